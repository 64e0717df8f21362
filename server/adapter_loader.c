/* adapter_loader.c - see adapter_loader.h. */
#include "server/adapter_loader.h"

int adapter_loader_load(void *loader, int64_t version_id, struct adapter **spare, struct adapter **ret,
                        struct err *err)
{
    struct adapter_loader *l = loader;
    const int rc = l->st != NULL ? ERR_OK : store_open(l->db_path, &l->st, err);
    return rc == ERR_OK ? store_version_build(l->st, version_id, l->base, spare, ret, err) : rc;
}

void adapter_loader_close(struct adapter_loader *l)
{
    store_close(l->st);
    l->st = NULL;
}
