/* peft_int.h - shared by peft.c (reading an adapter), peft_extra.c (its tensors that are no factors),
 * peft_dir.c (from a folder), peft_fields.c (the table of config fields) and peft_match.c (which
 * modules a config means). */
#ifndef ENGINE_PEFT_INT_H
#define ENGINE_PEFT_INT_H

#include "engine/adapter.h"
#include "engine/util.h"

#include <jansson.h>

enum { PEFT_CONFIG_MAX = 4 << 20 }; /* bytes of an adapter_config.json */

/* ERR_INVALID with the slug that says: the file is at fault, and the message where. */
#define peft_refuse(err, ...) err_set_slug(err, ERR_INVALID, "adapter_refused", NULL, __VA_ARGS__)

/* --- the table of fields (peft_fields.c) --------------------------------------------------- */
enum peft_field_kind {
    FIELD_HONOURED, /* used exactly as PEFT uses it */
    FIELD_NOTED,    /* cannot change an answer: kept with the config, not used */
    FIELD_REFUSED,  /* only "off" is accepted: null, false, empty, or the value in `off` */
};
enum peft_field_for { FOR_BOTH, FOR_LORA, FOR_ADALORA };

struct peft_field {
    const char *name;
    enum peft_field_kind kind;
    enum peft_field_for method; /* set in a config of the other method: refused */
    const char *off;            /* FIELD_REFUSED: a string that is accepted too, or NULL */
    const char *fallback;       /* what holds when the field is absent, for the document */
    const char *why;            /* what is done with it, or why it is refused */
};
extern const struct peft_field peft_fields[]; /* ends with name NULL */

/* Every field of the config against the table.  fan_in_fan_out is left to the caller, who first
 * looks whether the targets exist: for a GPT-2 adapter that is the better answer. */
int peft_fields_check(json_t *root, bool adalora, struct err *err);
int peft_fan_in_check(json_t *root, struct err *err);
/* The rows of the table as Markdown, for docs/adapters.md. */
int peft_fields_markdown(struct buf *ret);

/* A string from a hostile file, for a message: printable ASCII, cut when long. */
const char *peft_show(const char *s, char ret[128]);
const char *peft_show_json(const json_t *v, char ret[128]);

/* --- the config, read (peft.c) --------------------------------------------------------------- */
struct peft_config {
    json_t *root;
    bool adalora, rslora, dora, lora_bias;
    enum peft_bias { BIAS_NONE, BIAS_LORA_ONLY, BIAS_ALL } bias;
    json_t *save;      /* modules_to_save: a list of strings, or NULL */
    bool tie;          /* ensure_weight_tying */
    int r;             /* LoRA's rank, AdaLoRA's init_r */
    double alpha;
    json_t *rank_pattern, *alpha_pattern; /* objects or NULL */
};

/* --- one file being read ----------------------------------------------------------------------- */
enum peft_part { PART_A, PART_B, PART_E, PARTS };

/* Factors found per module, and what the config says about it. */
struct peft_slot {
    const struct st_tensor *part[PARTS];
    bool targeted;
};

/* A tensor, other than factors, that the config says must be there.  `carried`: may be there,
 * means nothing. */
struct peft_want {
    struct adapter_src_extra x; /* name is owned until it goes to the adapter */
    bool carried;
    const struct st_tensor *tensor;
};

struct peft_reading {
    const struct arch *arch;
    const struct family *family;
    struct peft_config c;
    struct peft_matcher *matcher;
    struct peft_slot *slots; /* [L][MOD_SLOTS] */
    size_t ntargeted;
    struct peft_want *wants; /* ascending by name */
    size_t nwants, wants_cap;
    struct err *err;
};

static inline struct peft_slot *peft_slot_of(const struct peft_reading *r, int layer, int module)
{
    return &r->slots[(size_t)layer * MOD_SLOTS + (size_t)module];
}

/* Type, shape (cols -1: one dimension) and values; `from` says where the shape comes from. */
int peft_check_tensor(const struct peft_reading *r, const struct st_tensor *t, int64_t rows,
                      int64_t cols, const char *from);

/* --- what is no factor (peft_extra.c) ------------------------------------------------------------ */
/* Does modules_to_save name this path (so that it is not adapted)? */
bool peft_is_saved(const struct peft_reading *r, const char *path);
/* Once the targets are known: the list of tensors to come. */
int peft_wants_create(struct peft_reading *r);
void peft_wants_free(struct peft_reading *r);
/* True if the tensor (`name` without the prefix) was waited for. */
bool peft_wants_take(struct peft_reading *r, const struct st_tensor *t, const char *name);
/* All of them there, of the right shape: into a->extras. */
int peft_wants_finish(struct peft_reading *r, struct adapter_src *a);

/* --- which modules (peft_match.c) ------------------------------------------------------------ */
struct peft_matcher;
int peft_matcher_create(const struct peft_config *c, struct peft_matcher **ret, struct err *err);
void peft_matcher_free(struct peft_matcher *m); /* NULL is fine */
/* Does the config adapt the module at this path?  `linear`: "all-linear" includes it. */
int peft_matcher_targets(struct peft_matcher *m, const char *path, bool linear, bool *ret,
                         struct err *err);
/* rank and alpha for a path, after the patterns (LoRA). */
int peft_matcher_rank(struct peft_matcher *m, const char *path, int *ret_rank, double *ret_alpha,
                      struct err *err);

#endif
