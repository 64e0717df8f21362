/* adapter_loader.c - see adapter_loader.h. */
#include "server/adapter_loader.h"

int adapter_loader_load(void *loader, int64_t version_id, struct adapter **ret, struct err *err)
{
    struct adapter_loader *l = loader;
    struct adapter_src *src = NULL;
    int rc = l->st != NULL ? ERR_OK : store_open(l->db_path, &l->st, err);
    if (rc == ERR_OK)
        rc = store_version_load_for(l->st, version_id, l->base, &src, err);
    if (rc == ERR_OK)
        rc = adapter_build(&l->base->arch, src, version_id, ret, err);
    adapter_src_free(src);
    return rc;
}

void adapter_loader_close(struct adapter_loader *l)
{
    store_close(l->st);
    l->st = NULL;
}
