/* adapter_cache.c - adapters by content hash, within a byte budget.
 *
 * An entry is
 *   QUEUED   in the loader's queue, first come first served
 *   LOADING  being read; its bytes are counted already
 *   READY    in memory; pinned by sequences, or waited for by tickets, or idle
 *   FAILED   out of the table, kept in a list until the last ticket for it has been told, so that
 *            whoever comes anew starts a new load at once
 * Idle entries (READY, no pins, no tickets) are the only ones that may be evicted, least recently
 * used first, and only when that makes enough room: `bytes - idle_bytes` is what cannot go.
 *
 * The queue is strict: a large adapter at its head is not overtaken by small ones, or it would
 * wait for ever.  One that is only expected (no tickets) enters an empty queue when there is room, and
 * leaves it again when there is none after all, so it never stands in anybody's way.  Everything is
 * under one mutex, which is never held during a load, a free or the ready callback. */
#include "engine/adapter_cache.h"

#include "engine/util.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { BUCKETS = 4096 };
enum { SPARE_APART = 256 << 10 }; /* bytes that an announced size may be off by, and an eighth: tables, boundaries */
enum entry_state { QUEUED, LOADING, READY, FAILED };

struct entry {
    uint8_t hash[32];
    int64_t version_id;
    size_t bytes; /* announced; after the load what it really takes */
    enum entry_state state;
    int pins, tickets;
    bool expected; /* counted as a miss before anybody came for it */
    uint64_t number; /* of this load: what a ticket holds */
    struct adapter *adapter;
    struct err err;
    struct entry *chain;        /* same bucket */
    struct entry *prev, *next;  /* in the queue or in the idle list */
};

struct list {
    struct entry *first, *last;
};

struct adapter_cache {
    pthread_mutex_t lock;
    pthread_cond_t work; /* something for the loader to look at */
    pthread_t loader;
    bool stopping;
    adapter_load_fn load;
    void *load_ud;
    struct entry *buckets[BUCKETS];
    struct list queue, idle, failed; /* idle: oldest first */
    size_t idle_bytes;
    uint64_t last_number;
    struct adapter_cache_stats st;

    pthread_mutex_t ready_lock; /* held while the callback runs */
    adapter_ready_fn ready;
    void *ready_ud;
};

/* --- lists and table ----------------------------------------------------------------------- */
static void list_add(struct list *l, struct entry *e)
{
    e->prev = l->last;
    e->next = NULL;
    *(l->last ? &l->last->next : &l->first) = e;
    l->last = e;
}

static void list_remove(struct list *l, struct entry *e)
{
    *(e->prev ? &e->prev->next : &l->first) = e->next;
    *(e->next ? &e->next->prev : &l->last) = e->prev;
}

static struct entry **slot_of(struct adapter_cache *c, const uint8_t hash[32])
{
    struct entry **at = &c->buckets[(hash[0] | (unsigned)hash[1] << 8) % BUCKETS];
    while (*at != NULL && memcmp((*at)->hash, hash, 32) != 0)
        at = &(*at)->chain;
    return at;
}

static void table_remove(struct adapter_cache *c, struct entry *e)
{
    *slot_of(c, e->hash) = e->chain;
}

/* --- the loader's side --------------------------------------------------------------------- */
static bool fits(const struct adapter_cache *c, size_t bytes)
{
    return c->st.bytes - c->idle_bytes <= c->st.budget - bytes; /* bytes <= budget */
}

/* READY and nobody's any more?  Then it may be evicted. */
static void maybe_idle(struct adapter_cache *c, struct entry *e)
{
    if (e->state != READY || e->pins > 0 || e->tickets > 0)
        return;
    list_add(&c->idle, e);
    c->idle_bytes += e->bytes;
    pthread_cond_signal(&c->work);
}

/* Unlink idle entries until `bytes` more fit; returns them chained by `next`, for freeing. */
static struct entry *make_room(struct adapter_cache *c, size_t bytes)
{
    struct entry *gone = NULL;
    while (c->st.bytes > c->st.budget - bytes) {
        struct entry *e = c->idle.first;
        list_remove(&c->idle, e);
        table_remove(c, e);
        c->idle_bytes -= e->bytes;
        c->st.bytes -= e->bytes;
        c->st.resident--;
        c->st.evictions++;
        e->next = gone;
        gone = e;
    }
    return gone;
}

static void free_entries(struct entry *e)
{
    while (e != NULL) {
        struct entry *next = e->next;
        adapter_free(e->adapter);
        free(e);
        e = next;
    }
}

static size_t apart(size_t a, size_t b) { return a > b ? a - b : b - a; }

/* Of those that have gone, one that may be as large as what comes, of which only about the size is known:
 * memory that the kernel gives anew it has to clear.  NULL if there is none. */
static struct adapter *take_spare(struct entry *gone, size_t bytes)
{
    while (gone != NULL && apart(gone->bytes, bytes) > bytes / 8 + SPARE_APART)
        gone = gone->next;
    if (gone == NULL)
        return NULL;
    struct adapter *a = gone->adapter;
    gone->adapter = NULL;
    return a;
}

/* The load itself, without the lock: the adapter, or NULL and why.  Takes `spare` over. */
static struct adapter *load_one(struct adapter_cache *c, const struct entry *e, struct adapter *spare,
                                struct err *err)
{
    struct adapter *a = NULL;
    const int rc = c->load(c->load_ud, e->version_id, &spare, &a, err);
    adapter_free(spare);
    if (rc != ERR_OK)
        return NULL;
    if (memcmp(a->hash, e->hash, 32) == 0)
        return a;
    char want[65], got[65];
    hex32(e->hash, want);
    hex32(a->hash, got);
    err_set(err, ERR_INTERNAL, "adapter version %lld should have content %.12s but has %.12s",
            (long long)e->version_id, want, got);
    adapter_free(a);
    return NULL;
}

/* The load took more than was announced, and what is in use leaves no room for the difference: it
 * goes back to the head of the queue with its true size, and is read again when that fits. */
static struct entry *load_again(struct adapter_cache *c, struct entry *e, size_t bytes)
{
    if (e->tickets == 0) { /* everybody who wanted it has gone */
        table_remove(c, e);
        e->next = NULL;
        return e;
    }
    e->bytes = bytes;
    e->state = QUEUED;
    e->prev = NULL;
    e->next = c->queue.first;
    *(e->next ? &e->next->prev : &c->queue.last) = e;
    c->queue.first = e;
    c->st.loading++;
    return NULL;
}

/* Called with the lock after a load.  Takes *a over unless there is no room for it or it failed.
 * Returns entries to be freed once the lock is open. */
static struct entry *finish_load(struct adapter_cache *c, struct entry *e, struct adapter **a,
                                 struct err *err)
{
    struct entry *gone = NULL;
    c->st.loading--;
    c->st.bytes -= e->bytes; /* what was announced */
    size_t bytes = *a != NULL ? (*a)->bytes : 0;
    if (*a != NULL && bytes <= c->st.budget && fits(c, bytes)) {
        gone = make_room(c, bytes);
        e->adapter = *a;
        *a = NULL;
        e->bytes = bytes;
        e->state = READY;
        c->st.bytes += bytes;
        c->st.resident++;
        c->st.loads++;
        maybe_idle(c, e); /* if everybody who wanted it has gone */
        return gone;
    }
    if (*a != NULL && bytes <= c->st.budget)
        return load_again(c, e, bytes);
    if (*a != NULL) {
        char need[32], have[32];
        err_set_slug(err, ERR_INVALID, "adapter_too_large", "model",
                     "the adapter takes %s in memory, but the adapter cache is limited to %s",
                     human_bytes(bytes, need), human_bytes(c->st.budget, have));
    }
    err_set(err, ERR_INTERNAL, "the adapter could not be loaded"); /* if nobody said why */
    c->st.failures++;
    table_remove(c, e);
    e->state = FAILED;
    e->err = *err;
    if (e->tickets > 0) {
        list_add(&c->failed, e);
        return NULL;
    }
    e->next = NULL;
    return e;
}

/* Nobody waits for it. */
static void drop_queued(struct adapter_cache *c, struct entry *e)
{
    list_remove(&c->queue, e);
    c->st.loading--;
    table_remove(c, e);
    free(e);
    pthread_cond_signal(&c->work); /* the next one in the queue may fit */
}

static void *loader_main(void *ud)
{
    struct adapter_cache *c = ud;
    pthread_mutex_lock(&c->lock);
    while (!c->stopping) {
        struct entry *e = c->queue.first;
        const bool now = e != NULL && fits(c, e->bytes);
        if (e != NULL && !now && e->tickets == 0) {
            drop_queued(c, e);
            continue;
        }
        if (!now) {
            pthread_cond_wait(&c->work, &c->lock);
            continue;
        }
        list_remove(&c->queue, e);
        e->state = LOADING;
        struct entry *gone = make_room(c, e->bytes);
        c->st.bytes += e->bytes;
        pthread_mutex_unlock(&c->lock);

        struct adapter *spare = take_spare(gone, e->bytes);
        free_entries(gone);
        struct err err = { .code = ERR_OK };
        struct adapter *a = load_one(c, e, spare, &err);

        pthread_mutex_lock(&c->lock);
        gone = finish_load(c, e, &a, &err);
        pthread_mutex_unlock(&c->lock);

        free_entries(gone);
        adapter_free(a);
        pthread_mutex_lock(&c->ready_lock);
        if (c->ready != NULL)
            c->ready(c->ready_ud);
        pthread_mutex_unlock(&c->ready_lock);
        pthread_mutex_lock(&c->lock);
    }
    pthread_mutex_unlock(&c->lock);
    return NULL;
}

/* --- making and ending --------------------------------------------------------------------- */
int adapter_cache_create(size_t budget, adapter_load_fn load, void *load_ud,
                         struct adapter_cache **ret, struct err *err)
{
    struct adapter_cache *c = calloc(1, sizeof *c);
    if (c == NULL)
        return err_nomem(err);
    c->st.budget = budget;
    c->load = load;
    c->load_ud = load_ud;
    pthread_mutex_init(&c->lock, NULL);
    pthread_mutex_init(&c->ready_lock, NULL);
    pthread_cond_init(&c->work, NULL);
    if (pthread_create(&c->loader, NULL, loader_main, c) != 0) {
        free(c);
        return err_set(err, ERR_NOMEM, "the adapter loader's thread could not be started");
    }
    pthread_setname_np(c->loader, "lorad-loader");
    *ret = c;
    return ERR_OK;
}

void adapter_cache_on_ready(struct adapter_cache *c, adapter_ready_fn fn, void *ud)
{
    pthread_mutex_lock(&c->ready_lock);
    c->ready = fn;
    c->ready_ud = ud;
    pthread_mutex_unlock(&c->ready_lock);
}

void adapter_cache_destroy(struct adapter_cache *c)
{
    if (c == NULL)
        return;
    pthread_mutex_lock(&c->lock);
    c->stopping = true;
    pthread_cond_signal(&c->work);
    pthread_mutex_unlock(&c->lock);
    pthread_join(c->loader, NULL);
    free_entries(c->failed.first);
    for (int i = 0; i < BUCKETS; i++)
        for (struct entry *e = c->buckets[i], *next; e != NULL; e = next) {
            next = e->chain;
            adapter_free(e->adapter);
            free(e);
        }
    pthread_cond_destroy(&c->work);
    pthread_mutex_destroy(&c->ready_lock);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

size_t adapter_cache_budget(const struct adapter_cache *c) { return c->st.budget; }

/* --- the caller's side --------------------------------------------------------------------- */
static void drop_ticket(struct adapter_cache *c, struct entry *e, uint64_t *ticket)
{
    *ticket = 0;
    if (--e->tickets > 0)
        return;
    if (e->state == FAILED) {
        list_remove(&c->failed, e);
        free(e);
    } else if (e->state == QUEUED) {
        drop_queued(c, e);
    }
}

static enum adapter_state pin(struct adapter_cache *c, struct entry *e, uint64_t *ticket,
                              const struct adapter **ret)
{
    if (*ticket != 0) {
        drop_ticket(c, e, ticket);
    } else {
        c->st.hits += !e->expected;
        e->expected = false;
        if (e->pins == 0 && e->tickets == 0) {
            list_remove(&c->idle, e);
            c->idle_bytes -= e->bytes;
        }
    }
    if (e->pins++ == 0)
        c->st.pinned++;
    *ret = e->adapter;
    return ADAPTER_READY;
}

/* A new load at the end of the queue; NULL when memory is out. */
static struct entry *enqueue(struct adapter_cache *c, const uint8_t hash[32], int64_t version_id,
                             size_t bytes)
{
    struct entry *e = calloc(1, sizeof *e);
    if (e == NULL)
        return NULL;
    memcpy(e->hash, hash, 32);
    e->version_id = version_id;
    e->bytes = bytes;
    e->number = ++c->last_number;
    *slot_of(c, hash) = e;
    list_add(&c->queue, e);
    c->st.loading++;
    pthread_cond_signal(&c->work);
    return e;
}

/* What a ticket stands for: a failure, or what is in the table under its hash. */
static struct entry *find(struct adapter_cache *c, const uint8_t hash[32], uint64_t ticket)
{
    for (struct entry *e = ticket != 0 ? c->failed.first : NULL; e != NULL; e = e->next)
        if (e->number == ticket)
            return e;
    return *slot_of(c, hash);
}

enum adapter_state adapter_cache_acquire(struct adapter_cache *c, const uint8_t hash[32],
                                         int64_t version_id, size_t bytes, uint64_t *ticket,
                                         const struct adapter **ret, struct err *err)
{
    if (bytes > c->st.budget) {
        char need[32], have[32];
        err_set_slug(err, ERR_INVALID, "adapter_too_large", "model",
                     "the adapter takes %s in memory, but the adapter cache is limited to %s",
                     human_bytes(bytes, need), human_bytes(c->st.budget, have));
        return ADAPTER_FAILED;
    }
    pthread_mutex_lock(&c->lock);
    enum adapter_state state;
    struct entry *e = find(c, hash, *ticket);
    if (e == NULL)
        e = enqueue(c, hash, version_id, bytes);
    if (e == NULL) {
        err_nomem(err);
        state = ADAPTER_FAILED;
    } else if (e->state == READY) {
        state = pin(c, e, ticket, ret);
    } else if (e->state == FAILED) {
        if (err != NULL && err->code == ERR_OK)
            *err = e->err;
        drop_ticket(c, e, ticket);
        state = ADAPTER_FAILED;
    } else {
        if (*ticket == 0) {
            c->st.misses += !e->expected;
            e->expected = false;
            *ticket = e->number;
            e->tickets++;
        }
        bool stuck = c->queue.first != NULL && !fits(c, c->queue.first->bytes);
        state = e->state == QUEUED && stuck ? ADAPTER_NO_ROOM : ADAPTER_LOADING;
    }
    pthread_mutex_unlock(&c->lock);
    return state;
}

void adapter_cache_expect(struct adapter_cache *c, const uint8_t hash[32], int64_t version_id, size_t bytes)
{
    pthread_mutex_lock(&c->lock);
    if (bytes <= c->st.budget && c->queue.first == NULL && fits(c, bytes) && *slot_of(c, hash) == NULL) {
        struct entry *e = enqueue(c, hash, version_id, bytes);
        if (e != NULL) {
            e->expected = true;
            c->st.misses++;
        }
    }
    pthread_mutex_unlock(&c->lock);
}

void adapter_cache_abandon(struct adapter_cache *c, const uint8_t hash[32], uint64_t *ticket)
{
    if (*ticket == 0)
        return;
    pthread_mutex_lock(&c->lock);
    struct entry *e = find(c, hash, *ticket); /* there: it has a ticket */
    if (e != NULL && e->state == READY) {
        drop_ticket(c, e, ticket);
        maybe_idle(c, e);
    } else if (e != NULL) {
        drop_ticket(c, e, ticket);
    }
    pthread_mutex_unlock(&c->lock);
}

void adapter_cache_release(struct adapter_cache *c, const struct adapter *a)
{
    pthread_mutex_lock(&c->lock);
    struct entry *e = *slot_of(c, a->hash); /* there: it is pinned */
    if (e != NULL && --e->pins == 0) {
        c->st.pinned--;
        maybe_idle(c, e);
    }
    pthread_mutex_unlock(&c->lock);
}

void adapter_cache_stats(struct adapter_cache *c, struct adapter_cache_stats *ret)
{
    pthread_mutex_lock(&c->lock);
    *ret = c->st;
    pthread_mutex_unlock(&c->lock);
}
