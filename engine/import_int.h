/* import_int.h - import in three parts: the folder as it is read (import_source.c), the conversion
 * of one tensor (import_tensor.c), the run over all of them (import.c). */
#ifndef ENGINE_IMPORT_INT_H
#define ENGINE_IMPORT_INT_H

#include "engine/base_int.h"
#include "engine/compute.h"
#include "engine/safetensors.h"

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
};

struct source_tensor {
    const struct st_tensor *t;
    bool used;
};

struct source {
    char *dir;
    struct arch arch;
    struct source_file *files;     /* ascending by name */
    size_t nfiles;
    struct source_tensor *tensors; /* of all weight files, sorted by name */
    size_t ntensors;
    char *chat_template;           /* or NULL */
};

/* Reads and checks everything but the values of the tensors.  Close it also after a failure. */
int source_open(const char *dir, struct source *ret, struct err *err);
void source_close(struct source *s);

/* The text of a small file, or NULL if the folder has none. */
const struct source_file *source_text(const struct source *s, const char *name);
/* NULL if there is none. */
struct source_tensor *source_find(const struct source *s, const char *name);

/* The tensor `name`, marked as used.  NULL with ERR_INVALID naming it if it is missing or has
 * another type or shape than [N, K] (K = 0: [N]). */
const struct st_tensor *source_take(struct source *s, const char *name, int N, int K,
                                    struct err *err);
/* Its values are not needed any more: see st_forget(). */
void source_forget(const struct source *s, const struct st_tensor *t);
/* Is any tensor left that nobody took and that is no known stray buffer? */
int source_check_all_used(const struct source *s, struct err *err);

/* sha256 of what `sha256sum FILE...` prints for the files read, in ascending order of their names.
 * Takes as long as reading them all, unless `stop` becomes true (the result is then worthless). */
void source_hash(const struct source *s, const atomic_bool *stop, char ret_hex[65]);

/* --- one tensor ------------------------------------------------------------------------- */

enum form { FORM_F32, FORM_BF16, FORM_NF4, FORM_Q8 };

/* A weight of the output file. */
struct item {
    struct weight w;
    const struct st_tensor *t; /* the source's */
    enum form form;
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
