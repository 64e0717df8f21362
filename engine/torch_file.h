/* torch_file.h - adapter_model.bin: what torch.save() makes of a dict of tensors.
 *
 * Such a file is a zip archive, uncompressed, with the tensors' bytes in members of their own and a
 * pickle that puts names and shapes to them.  A pickle is a program; this reader runs none.  It knows
 * the few opcodes and names that a flat dict of tensors needs, and refuses the file at anything else,
 * naming it.  Every offset and count is hostile until it is checked.  Checksums are not looked at: the
 * shapes, the types and that values are finite are, as with safetensors. */
#ifndef ENGINE_TORCH_FILE_H
#define ENGINE_TORCH_FILE_H

#include "engine/safetensors.h"

/* Either format, told apart by the first bytes; as st_open() and st_open_mem(). */
int weights_open(const char *path, struct st_file **ret, struct err *err);
int weights_open_mem(const void *data, size_t len, const char *what, struct st_file **ret,
                     struct err *err);

/* --- between torch_file.c (the archive) and torch_pickle.c ----------------------------------- */
/* One tensor of the dict: `key` is the member with its bytes, numbers count elements. */
struct torch_tensor {
    const char *name; /* inside the pickle, not NUL-terminated */
    size_t name_len;
    const char *key;
    size_t key_len;
    enum dtype dtype;
    char dtype_name[8];
    unsigned size;    /* of an element */
    int64_t storage;  /* elements in the member */
    int64_t offset;
    int ndim;
    int64_t shape[ST_MAX_DIMS], stride[ST_MAX_DIMS];
};

/* The dict that the pickle describes; free() *ret. */
int torch_pickle_read(const uint8_t *p, size_t len, const char *what, struct torch_tensor **ret,
                      size_t *ret_n, struct err *err);

#endif
