/* import_int.h - import in three parts: the source as it is read (import_source.c; import_bnb.c for
 * weights that are 4-bit already, import_gguf.c for GGUF files), the conversion of one tensor
 * (import_tensor.c), the run over all of them (import.c). */
#ifndef ENGINE_IMPORT_INT_H
#define ENGINE_IMPORT_INT_H

#include "engine/base_int.h"
#include "engine/compute.h"
#include "engine/gguf.h"
#include "engine/nf4.h"
#include "engine/safetensors.h"
#include "engine/util.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A file that was read: small ones whole, weights mapped. */
struct source_file {
    char *name;
    char *text;          /* small file, NUL-terminated, or NULL */
    size_t len;
    struct st_file *st;  /* weights, or NULL */
    bool made;           /* text that import made of another file: not part of the source */
};

/* A matrix that bitsandbytes has quantised: what lies beside `X` as X.absmax and the like. */
struct q4_source {
    enum q4_type type;
    int64_t shape[2];
    size_t block, nested_block;           /* elements; nested_block 0: plain scales */
    const struct st_tensor *codes;
    const struct st_tensor *absmax;       /* F32, or U8 codes when nested */
    const struct st_tensor *nested_absmax;
    float offset;
    float map[16], nested_map[256];       /* as the file has them */
};

/* A tensor of the source: as it lies in the file, and what makes it numbers. */
struct source_tensor {
    const struct st_tensor *t;
    struct q4_source *q4; /* or NULL */
    const struct ggml_type *blocks; /* of GGUF, or NULL */
    int head_rows;        /* not 0: rows of each head of so many are in GGUF's order */
    bool used;
};

struct source {
    char *dir;
    struct arch arch;
    struct source_file *files;     /* ascending by name */
    size_t nfiles;
    struct source_tensor *tensors; /* of all weight files, sorted by name */
    size_t ntensors;
    struct q4_source *q4;          /* of those that are 4-bit */
    char *chat_template;           /* or NULL */
};

/* A folder or a GGUF file.  Reads and checks everything but the values of the tensors.  Close it
 * also after a failure. */
int source_open(const char *path, struct source *ret, struct err *err);
void source_close(struct source *s);

/* The text of a small file, or NULL if the folder has none. */
const struct source_file *source_text(const struct source *s, const char *name);
/* Also under the name without the family's optional prefix.  NULL if there is none. */
struct source_tensor *source_find(const struct source *s, const char *name);

/* The tensor `name`, marked as used.  NULL with ERR_INVALID naming it if it is missing or has
 * another type or shape than [N, K] (K = 0: [N]). */
const struct source_tensor *source_take(struct source *s, const char *name, int N, int K,
                                        struct err *err);
/* Elements [first, first + n) as fp32; the first that is no finite number is an error. */
int source_f32(const struct source_tensor *t, size_t first, size_t n, float *ret,
               struct err *err);
/* Its values are not needed any more: see st_forget(). */
void source_forget(const struct source *s, const struct source_tensor *t);
/* Is any tensor left that nobody took and that is no known stray buffer? */
int source_check_all_used(const struct source *s, struct err *err);

/* sha256 of what `sha256sum FILE...` prints for the files read, in ascending order of their names.
 * Takes as long as reading them all, unless `stop` becomes true (the result is then worthless). */
void source_hash(const struct source *s, const atomic_bool *stop, char ret_hex[65]);

/* For readers of other formats: a text that stands for a small file, a weight file with nothing
 * but its bytes, and the list of all tensors once each file has its own. */
int source_add_made(struct source *s, const char *name, const char *text, struct err *err);
int source_add_mapped(struct source *s, const char *path, const char *name, struct st_file **ret,
                      struct err *err);
int source_list_tensors(struct source *s, struct err *err);

/* --- GGUF (import_gguf.c) -------------------------------------------------------------- */

/* Called by source_open(). */
int source_open_gguf(const char *path, struct source *s, struct err *err);
/* Add the bytes of a tensor with head_rows to a digest, in Hugging Face's order. */
void gguf_digest(const struct source_tensor *t, struct sha256 *h);
int gguf_f32(const struct source_tensor *t, size_t first, size_t n, float *ret, struct err *err);
/* The vocabulary of a file as tokenizer.json; free() it. */
int gguf_tokenizer(const struct gguf *g, char **ret_json, struct err *err);

/* --- bitsandbytes (import_bnb.c) ------------------------------------------------------- */

/* Find the matrices that are 4-bit, check all that describes them and mark it as used. */
int bnb_attach(struct source *s, struct err *err);
/* Does it have NF4's codes and blocks, so that a base file can hold it as it is? */
bool bnb_is_nf4(const struct q4_source *q);
/* Add what makes numbers of the codes to a digest. */
void bnb_digest(const struct q4_source *q, struct sha256 *h);
int bnb_f32(const struct q4_source *q, size_t first, size_t n, float *ret, struct err *err);

/* --- one tensor ------------------------------------------------------------------------- */

enum form { FORM_F32, FORM_BF16, FORM_NF4, FORM_Q8 };

/* A weight of the output file. */
struct item {
    struct weight w;
    const struct source_tensor *src;
    enum form form;
    bool transposed;           /* the source's shape is [K, N] */
    bool has_digest;           /* false for a head made from the embedding */
    uint8_t digest[32];
};

/* Buffers of the conversion, grown as needed and shared by all tensors. */
struct scratch {
    struct pool *pool;
    float *wide;      /* one piece per thread, wide_n elements each */
    size_t wide_n;
    uint8_t *codes;   /* reference layout, or what is written */
    uint8_t *packed;
    float *absmax;
    uint8_t *nested;
    float *nested_absmax;
    uint16_t *scales;
    size_t cap[6];
};

/* `K_max` is the widest row of a head. */
int scratch_init(struct scratch *s, size_t K_max, struct err *err);
void scratch_free(struct scratch *s);

/* Declare what the item takes in the file. */
int item_declare(const struct item *it, struct st_writer *out, struct err *err);
/* Convert and write it, and fill in the digest. */
int item_write(struct item *it, struct scratch *s, struct st_writer *out, struct err *err);

#endif
