/* adapter_loader.h - where the adapter cache's adapters come from: the database. */
#ifndef SERVER_ADAPTER_LOADER_H
#define SERVER_ADAPTER_LOADER_H

#include "engine/adapter_cache.h"
#include "store/store.h"

/* The first two are set by whoever owns it and must outlive it. */
struct adapter_loader {
    const char *db_path;
    const struct base *base;
    struct store *st;        /* of the cache's thread, opened when it is first needed */
};
/* For adapter_cache_create(); `loader` is the struct. */
int adapter_loader_load(void *loader, int64_t version_id, struct adapter **spare, struct adapter **ret,
                        struct err *err);
void adapter_loader_close(struct adapter_loader *l); /* after the cache is gone */

#endif
