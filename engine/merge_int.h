/* merge_int.h - merging in two parts: the weights (merge.c) and the folder around them
 * (merge_folder.c). */
#ifndef ENGINE_MERGE_INT_H
#define ENGINE_MERGE_INT_H

#include "engine/import_int.h"
#include "engine/merge.h"

struct merging {
    const struct adapter_src *a;
    const struct merge_opts *o;
    struct source src;
    enum dtype dtype;      /* of the result; DT_OTHER: each tensor's own */
    bool transposed;       /* weights are stored [in, out] */
    const struct st_tensor **targets; /* of each module */
    char *tmp;             /* the folder under its temporary name */
    struct st_writer *out;
    size_t done, all;      /* bytes read */
    size_t total;          /* bytes of the result's tensors */
};

enum dtype merge_dtype(const struct merging *g, const struct st_tensor *t);
const char *merge_dtype_name(enum dtype t);

/* An empty folder beside `out`, which must not exist. */
int merge_folder_make(struct merging *g, const char *out, struct err *err);
/* Config, index and tokenizer files; the type and the size in them as they are now. */
int merge_copy_files(struct merging *g, struct err *err);
/* With all that is in it. */
void merge_folder_remove(struct merging *g);

#endif
