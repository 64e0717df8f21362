/* peft_dir.c - an adapter from a folder as PEFT saves it.
 *
 * The weights file is mapped, read and closed: the adapter takes its own copy of the tensors. */
#include "engine/peft_int.h"
#include "engine/torch_file.h"

#include <stdlib.h>
#include <string.h>

static size_t pad64(size_t n) { return (n + 63) & ~(size_t)63; }

/* Copy one tensor to *p and move *p on. */
static void keep(const void **tensor, size_t bytes, char **p)
{
    if (*tensor == NULL)
        return;
    memcpy(*p, *tensor, bytes);
    *tensor = *p;
    *p += pad64(bytes);
}

int peft_own(struct adapter_src *a, struct err *err)
{
    size_t total = 64;
    for (size_t i = 0; i < a->nmodules; i++) {
        const struct adapter_src_module *m = &a->modules[i];
        size_t one = dtype_size(m->dtype), k = (size_t)m->rank;
        total += pad64(k * (size_t)m->in * one) + pad64(k * (size_t)m->out * one) + pad64(k * one);
    }
    for (size_t i = 0; i < a->nextras; i++)
        total += pad64(adapter_extra_count(&a->extras[i]) * dtype_size(a->extras[i].dtype));
    void *made = a->own; /* what was not in the file as the adapter has it */
    char *p = aligned_alloc(64, total);
    if (p == NULL)
        return err_nomem(err);
    a->own = p;
    for (size_t i = 0; i < a->nmodules; i++) {
        struct adapter_src_module *m = &a->modules[i];
        size_t one = dtype_size(m->dtype), k = (size_t)m->rank;
        keep(&m->A, k * (size_t)m->in * one, &p);
        keep(&m->B, k * (size_t)m->out * one, &p);
        keep(&m->E, k * one, &p);
    }
    for (size_t i = 0; i < a->nextras; i++) {
        struct adapter_src_extra *x = &a->extras[i];
        keep(&x->data, adapter_extra_count(x) * dtype_size(x->dtype), &p);
    }
    free(made);
    return ERR_OK;
}

/* As in PEFT, safetensors go first where there are both. */
static int load_paths(const struct arch *arch, const char *config_path, const char *weights_path,
                      const char *pickle_path, struct adapter_src **ret, struct err *err)
{
    char *config = NULL;
    size_t len = 0;
    struct st_file *weights = NULL;
    struct adapter_src *a = NULL;
    const bool pickle = !file_exists(weights_path) && file_exists(pickle_path);
    int rc = file_read(config_path, PEFT_CONFIG_MAX, &config, &len, err);
    if (rc == ERR_OK)
        rc = weights_open(pickle ? pickle_path : weights_path, &weights, err);
    if (rc == ERR_OK)
        rc = peft_parse(arch, config, len, weights, &a, err);
    if (rc == ERR_OK)
        rc = peft_own(a, err);
    st_close(weights);
    free(config);
    if (rc != ERR_OK) {
        adapter_src_free(a);
        return rc;
    }
    *ret = a;
    return ERR_OK;
}

int peft_load_dir(const struct arch *arch, const char *dir, struct adapter_src **ret,
                  struct err *err)
{
    char *config = path_join(dir, "adapter_config.json");
    char *weights = path_join(dir, "adapter_model.safetensors");
    char *pickle = path_join(dir, "adapter_model.bin");
    int rc = config != NULL && weights != NULL && pickle != NULL
                 ? load_paths(arch, config, weights, pickle, ret, err)
                 : err_nomem(err);
    free(config);
    free(weights);
    free(pickle);
    return rc;
}
