/* peft_int.h - shared by peft.c (reading an adapter), peft_config.c (its config), peft_extra.c (its
 * tensors that are no factors), peft_tokens.c (rows of the embedding and the head), peft_merged.c
 * (MergedLinear), peft_dir.c (from a folder), peft_fields.c (the table of config fields) and
 * peft_match.c (which modules a config means). */
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

/* Absent, null, false, "", [] or {}. */
bool peft_says_nothing(const json_t *v);
/* A string from a hostile file, for a message: printable ASCII, cut when long. */
const char *peft_show(const char *s, char ret[128]);
const char *peft_show_json(const json_t *v, char ret[128]);

/* --- the config, read (peft_config.c) -------------------------------------------------------- */
struct peft_config {
    json_t *root;
    bool adalora, rslora, dora, lora_bias;
    enum peft_bias { BIAS_NONE, BIAS_LORA_ONLY, BIAS_ALL } bias;
    json_t *save;      /* modules_to_save: a list of strings, or NULL */
    bool tie;          /* ensure_weight_tying */
    json_t *tokens;    /* trainable_token_indices: a list, or an object of lists, or NULL */
    json_t *merged;    /* enable_lora: a list of booleans, or NULL */
    int parts, parts_on; /* of that list: its length, and how many are true */
    int r;             /* LoRA's rank, AdaLoRA's init_r */
    double alpha;
    json_t *rank_pattern, *alpha_pattern; /* objects or NULL */
};

/* Every field of `root` but those of peft_match.c.  What it points to belongs to root. */
int peft_config_read(json_t *root, struct peft_config *ret, struct err *err);
/* AdaLoRA's schedule, into the adapter. */
int peft_schedule_read(const json_t *root, struct adapter_src *a, struct err *err);
/* "adapter_config.json: FIELD must be WANT, not V" */
int peft_wrong(const char *field, const char *want, const json_t *v, struct err *err);
/* An absent or null field leaves *ret alone. */
int peft_get_bool(const json_t *root, const char *field, bool *ret, struct err *err);

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
    const json_t *ids; /* of EXTRA_EMBED_ROWS and EXTRA_HEAD_ROWS: which */
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

/* A tensor's type and that its values are finite, without its shape. */
int peft_check_values(const struct peft_reading *r, const struct st_tensor *t);
/* As 16 for 16.0, which is how PEFT writes whole numbers. */
json_t *peft_number(double v);

/* Copies what the adapter borrows, so that nothing has to stay open. */
int peft_own(struct adapter_src *a, struct err *err);

/* --- what is no factor (peft_extra.c) ------------------------------------------------------------ */
/* Does modules_to_save name this path (so that it is not adapted)? */
bool peft_is_saved(const struct peft_reading *r, const char *path);
/* Once the targets are known: the list of tensors to come. */
int peft_wants_create(struct peft_reading *r);
void peft_wants_free(struct peft_reading *r);
/* True if the tensor (`name` without the prefix) was waited for. */
bool peft_wants_take(struct peft_reading *r, const struct st_tensor *t, const char *name);
/* One more on the list.  `ids` as in struct peft_want. */
int peft_want(struct peft_reading *r, enum adapter_extra kind, const json_t *ids, int rows, int cols,
              const char *path, const char *suffix);
/* All of them there, of the right shape: into a->extras; the data of ids is not there yet. */
int peft_wants_finish(struct peft_reading *r, struct adapter_src *a);

/* --- trainable_token_indices (peft_tokens.c) ------------------------------------------------------ */
/* Those that the config names, onto the list of tensors to come. */
int peft_tokens_want(struct peft_reading *r);

/* --- enable_lora (peft_merged.c) ------------------------------------------------------------------
 * The first versions of PEFT adapted layers whose outputs are several parts side by side (q, k, v)
 * with one A of `r` rows for each part that is on, and a B in two groups, each of which sees half of
 * A's rows.  As plain LoRA that is a B with two blocks and zeros elsewhere, of rank r times the parts
 * that are on; its alpha grows likewise. */
/* Fills c->merged, parts and parts_on, and refuses settings that those versions did not have. */
int peft_merged_read(struct peft_config *c, struct err *err);
/* Shape and values of the grouped B of a module whose rank is set; it stays as it is in the file. */
int peft_merged_check(const struct peft_reading *r, const struct adapter_src_module *m,
                      const struct st_tensor *B);
size_t peft_merged_bytes(const struct adapter_src_module *m); /* of B as plain LoRA has it */
void peft_merged_expand(const struct peft_config *c, const struct adapter_src_module *m, void *ret);
/* The config as plain LoRA: malloc()ed text. */
char *peft_merged_config(const struct peft_config *c, double alpha, struct err *err);

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
