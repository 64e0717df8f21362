/* adapter_cache.h - adapters in memory: a byte budget, least recently used leaves, pinned while in
 * use, read by a loader thread so that nobody waits who did not ask.
 *
 * Keyed by content hash: the same bytes under two names, or of two tenants, are held once.  The
 * engine thread acquires and releases, who submits to it may expect; loads happen on the cache's own
 * thread through the callback, which knows where adapters come from (the engine does not).  All calls are thread-safe. */
#ifndef ENGINE_ADAPTER_CACHE_H
#define ENGINE_ADAPTER_CACHE_H

#include "engine/adapter.h"

struct adapter_cache;

/* Called on the loader thread.  Makes the adapter of `version_id`; *spare, for adapter_build(), is one of
 * about the announced size that has gone for it, or NULL, and the cache's again if it is left there. */
typedef int (*adapter_load_fn)(void *ud, int64_t version_id, struct adapter **spare, struct adapter **ret,
                               struct err *err);
/* Called on the loader thread after each finished load, failed or not; must not block. */
typedef void (*adapter_ready_fn)(void *ud);

struct adapter_cache_stats {
    size_t budget, bytes;
    int resident, pinned, loading;
    uint64_t hits, misses, loads, evictions, failures;
};

int adapter_cache_create(size_t budget, adapter_load_fn load, void *load_ud,
                         struct adapter_cache **ret, struct err *err);
/* NULL takes it off again; when this returns no call of the former one is under way. */
void adapter_cache_on_ready(struct adapter_cache *c, adapter_ready_fn fn, void *ud);
/* Joins the loader.  Everything must have been released. */
void adapter_cache_destroy(struct adapter_cache *c); /* NULL is fine */
size_t adapter_cache_budget(const struct adapter_cache *c);

enum adapter_state { ADAPTER_READY, ADAPTER_LOADING, ADAPTER_NO_ROOM, ADAPTER_FAILED };
/* `ticket` belongs to whoever asks: 0 at first, then kept between calls.
 * READY: *ret is pinned until adapter_cache_release(); *ticket is 0 again.
 * LOADING: a load is queued or under way; ask again after on_ready.  `bytes` is about what it will
 * take: room is made before it starts, and if that was too little and there is no more, it is read
 * again when there is.  NO_ROOM: the same, but everything else is pinned and it waits for a
 * release.  What was loaded for a ticket stays until its holder comes back.
 * FAILED: err says why, *ticket is 0 again; every holder of a ticket for that load is told, and
 * asking anew tries anew. */
enum adapter_state adapter_cache_acquire(struct adapter_cache *c, const uint8_t hash[32],
                                         int64_t version_id, size_t bytes, uint64_t *ticket,
                                         const struct adapter **ret, struct err *err);
/* Somebody will soon ask for it: the load may begin, if it is not there, no other load waits, and there
 * is room (unused adapters may have to go for it).  What comes of it is nobody's until it is asked for. */
void adapter_cache_expect(struct adapter_cache *c, const uint8_t hash[32], int64_t version_id, size_t bytes);
/* Hand back a ticket without waiting for what it stands for; 0 is fine. */
void adapter_cache_abandon(struct adapter_cache *c, const uint8_t hash[32], uint64_t *ticket);
void adapter_cache_release(struct adapter_cache *c, const struct adapter *a);
void adapter_cache_stats(struct adapter_cache *c, struct adapter_cache_stats *ret);

#endif
