/* kv.c - pages of keys and values: reference counts, the table of shared pages, recycling.
 *
 * A page is in one of three states:
 *   used    refs > 0: one or more sequences hold it
 *   cached  refs = 0 and in the table: findable, linked in the recency list
 *   free    refs = 0 and not in the table: on the free stack
 * Only full pages enter the table, and a hash enters it once: when two sequences compute the same
 * page side by side, the second keeps its own copy, which is nobody else's and goes straight to
 * the free stack when it is given back.
 *
 * kv_close() gives pages back last one first, so that of one sequence the tail is recycled before
 * the prefix that leads to it (a page whose prefix is gone cannot be found any more).
 *
 * Pages that were never used are taken in order, so memory is first written to extent by extent.  The first
 * position in an extent touches all of its huge pages at once (22 MiB of fp16 with 30 layers and 3 heads of
 * 64), which is why one extent more than has been reached is made ready ahead (engine/mem_ahead.h). */
#include "engine/kv.h"

#include "engine/mem.h"
#include "engine/mem_ahead.h"
#include "engine/util.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { NONE = -1, MAX_PAGES = 1 << 28 };

/* Pages of an extent.  In its memory what belongs to one head lies together, page after page: attention
 * reads one head of one layer over many positions, and a sequence alone mostly gets pages in order. */
enum { EXTENT = 64 };

struct page {
    uint8_t hash[32];
    int32_t refs;
    int32_t chain;        /* next page of the same bucket; of the free stack when free */
    int32_t older, newer; /* recency list, cached pages only */
    bool in_table;
};

struct kv_cache {
    uint8_t *data;
    struct mem_ahead *ahead;
    int extents; /* that have been reached */
    size_t data_bytes, page_bytes, head_bytes; /* head: K and V of one in one layer */
    int npages, G;
    enum kv_type type;
    struct page *pages;
    int32_t *buckets; /* [mask + 1], first page or NONE */
    uint32_t mask;
    int32_t free_top, oldest, newest;
    /* Written by the engine thread alone, read by anyone. */
    _Atomic int nused, ncached;
    _Atomic uint64_t lookups, lookup_tokens, hit_tokens, evicted;
};

/* One writer, so no read-modify-write is needed. */
static void add_int(_Atomic int *p, int d)
{
    atomic_store_explicit(p, atomic_load_explicit(p, memory_order_relaxed) + d,
                          memory_order_relaxed);
}

static void add_u64(_Atomic uint64_t *p, uint64_t d)
{
    atomic_store_explicit(p, atomic_load_explicit(p, memory_order_relaxed) + d,
                          memory_order_relaxed);
}

static const char *const type_names[] = { [KV_F16] = "f16", [KV_F32] = "f32", [KV_Q8] = "q8" };

const char *kv_type_name(enum kv_type t) { return type_names[t]; }

int kv_type_parse(const char *name, enum kv_type *ret, struct err *err)
{
    for (int t = KV_F16; t <= KV_Q8; t++)
        if (strcmp(name, type_names[t]) == 0) {
            *ret = (enum kv_type)t;
            return ERR_OK;
        }
    return err_set(err, ERR_INVALID, "keys and values are f16, f32 or q8, not %s", name);
}

size_t kv_part_bytes(enum kv_type t, int hd)
{
    const size_t n = (size_t)hd * KV_PAGE, blocks = ((size_t)hd + KV_Q8_BLOCK - 1) / KV_Q8_BLOCK;
    return t == KV_F32 ? n * 4 : t == KV_F16 ? n * 2 : n + blocks * KV_PAGE * sizeof(uint16_t);
}

size_t kv_page_bytes(const struct arch *a, enum kv_type t)
{
    return (size_t)a->L * (size_t)a->G * 2 * kv_part_bytes(t, a->hd);
}

int kv_create(const struct arch *a, enum kv_type t, size_t bytes, struct kv_cache **ret,
              struct err *err)
{
    struct kv_cache *c = calloc(1, sizeof *c);
    if (c == NULL)
        return err_nomem(err);
    c->type = t;
    c->page_bytes = kv_page_bytes(a, t);
    c->head_bytes = 2 * kv_part_bytes(t, a->hd);
    c->G = a->G;
    size_t n = bytes / c->page_bytes;
    c->npages = n < 1 ? 1 : n > MAX_PAGES ? MAX_PAGES : (int)n;
    c->data_bytes = (size_t)c->npages * c->page_bytes;

    uint32_t nbuckets = 16;
    while (nbuckets < (uint32_t)c->npages)
        nbuckets *= 2;
    c->mask = nbuckets - 1;
    c->data = mem_alloc(c->data_bytes);
    c->pages = calloc((size_t)c->npages, sizeof *c->pages);
    c->buckets = malloc(nbuckets * sizeof *c->buckets);
    if (c->data == NULL || c->pages == NULL || c->buckets == NULL) {
        kv_destroy(c);
        char size[32];
        return err_set(err, ERR_NOMEM, "out of memory for a key/value cache of %s",
                       human_bytes(bytes, size));
    }
    memset(c->buckets, 0xff, nbuckets * sizeof *c->buckets);
    c->oldest = c->newest = c->free_top = NONE;
    for (int i = c->npages - 1; i >= 0; i--) { /* low numbers are used first */
        c->pages[i].chain = c->free_top;
        c->free_top = i;
    }
    c->ahead = mem_ahead_start(c->data, c->data_bytes);
    mem_ahead_reach(c->ahead, EXTENT * c->page_bytes);
    *ret = c;
    return ERR_OK;
}

void kv_destroy(struct kv_cache *c)
{
    if (c == NULL)
        return;
    mem_ahead_end(c->ahead);
    if (c->data != NULL)
        mem_free(c->data, c->data_bytes);
    free(c->pages);
    free(c->buckets);
    free(c);
}

void kv_stats(const struct kv_cache *c, struct kv_stats *ret)
{
    *ret = (struct kv_stats){
        .pages = c->npages,
        .used = atomic_load_explicit(&c->nused, memory_order_relaxed),
        .cached = atomic_load_explicit(&c->ncached, memory_order_relaxed),
        .page_bytes = c->page_bytes,
        .lookups = atomic_load_explicit(&c->lookups, memory_order_relaxed),
        .lookup_tokens = atomic_load_explicit(&c->lookup_tokens, memory_order_relaxed),
        .hit_tokens = atomic_load_explicit(&c->hit_tokens, memory_order_relaxed),
        .evicted = atomic_load_explicit(&c->evicted, memory_order_relaxed),
    };
}

enum kv_type kv_type_of(const struct kv_cache *c) { return c->type; }
int kv_pages(const struct kv_cache *c) { return c->npages; }

int kv_available(const struct kv_cache *c)
{
    return c->npages - atomic_load_explicit(&c->nused, memory_order_relaxed);
}

void *kv_k(const struct kv_cache *c, int page, int layer, int g)
{
    const int first = page / EXTENT * EXTENT;
    const int in = c->npages - first < EXTENT ? c->npages - first : EXTENT;
    const size_t head = (size_t)layer * (size_t)c->G + (size_t)g;
    return c->data + (size_t)first * c->page_bytes +
           (head * (size_t)in + (size_t)(page - first)) * c->head_bytes;
}

void *kv_v(const struct kv_cache *c, int page, int layer, int g)
{
    return (uint8_t *)kv_k(c, page, layer, g) + c->head_bytes / 2;
}

/* --- the table ------------------------------------------------------------------------- */
static int32_t *bucket(struct kv_cache *c, const uint8_t hash[32])
{
    uint32_t h;
    memcpy(&h, hash, sizeof h);
    return &c->buckets[h & c->mask];
}

static int table_find(struct kv_cache *c, const uint8_t hash[32])
{
    int i = *bucket(c, hash);
    while (i != NONE && memcmp(c->pages[i].hash, hash, 32) != 0)
        i = c->pages[i].chain;
    return i;
}

static void table_add(struct kv_cache *c, int i, const uint8_t hash[32])
{
    struct page *p = &c->pages[i];
    int32_t *b = bucket(c, hash);
    memcpy(p->hash, hash, 32);
    p->chain = *b;
    p->in_table = true;
    *b = i;
}

static void table_remove(struct kv_cache *c, int i)
{
    int32_t *at = bucket(c, c->pages[i].hash);
    while (*at != i)
        at = &c->pages[*at].chain;
    *at = c->pages[i].chain;
    c->pages[i].in_table = false;
}

/* --- recency list of cached pages ---------------------------------------------------------- */
static void recency_add(struct kv_cache *c, int i)
{
    struct page *p = &c->pages[i];
    p->older = c->newest;
    p->newer = NONE;
    if (c->newest != NONE)
        c->pages[c->newest].newer = i;
    else
        c->oldest = i;
    c->newest = i;
    add_int(&c->ncached, 1);
}

static void recency_remove(struct kv_cache *c, int i)
{
    struct page *p = &c->pages[i];
    if (p->older != NONE)
        c->pages[p->older].newer = p->newer;
    else
        c->oldest = p->newer;
    if (p->newer != NONE)
        c->pages[p->newer].older = p->older;
    else
        c->newest = p->older;
    add_int(&c->ncached, -1);
}

/* --- pages in and out of use --------------------------------------------------------------- */
static void push_free(struct kv_cache *c, int i)
{
    c->pages[i].chain = c->free_top;
    c->free_top = i;
}

/* Page i is used for the first time, or again. */
static void reach(struct kv_cache *c, int i)
{
    if (i / EXTENT < c->extents)
        return;
    c->extents = i / EXTENT + 1;
    mem_ahead_reach(c->ahead, (size_t)(c->extents + 1) * EXTENT * c->page_bytes);
}

/* A page without content; the caller knows that one is available. */
static int take_page(struct kv_cache *c)
{
    int i = c->free_top;
    if (i != NONE) {
        c->free_top = c->pages[i].chain;
        reach(c, i);
    } else {
        i = c->oldest;
        recency_remove(c, i);
        table_remove(c, i);
        add_u64(&c->evicted, 1);
    }
    c->pages[i].refs = 1;
    add_int(&c->nused, 1);
    return i;
}

static void hold_page(struct kv_cache *c, int i)
{
    if (c->pages[i].refs++ == 0) {
        recency_remove(c, i);
        add_int(&c->nused, 1);
    }
}

static void drop_page(struct kv_cache *c, int i)
{
    struct page *p = &c->pages[i];
    if (--p->refs > 0)
        return;
    add_int(&c->nused, -1);
    if (p->in_table)
        recency_add(c, i);
    else
        push_free(c, i);
}

/* --- sequences ----------------------------------------------------------------------------- */
static void chain_hash(const uint8_t from[32], const int32_t tokens[KV_PAGE], uint8_t ret[32])
{
    uint8_t in[32 + 4 * KV_PAGE];
    memcpy(in, from, 32);
    for (int i = 0; i < KV_PAGE; i++)
        for (int b = 0; b < 4; b++)
            in[32 + 4 * i + b] = (uint8_t)((uint32_t)tokens[i] >> 8 * b);
    sha256_of(in, sizeof in, ret);
}

static bool seq_room(struct kv_seq *s, int npages)
{
    if (npages <= s->cap)
        return true;
    int cap = s->cap * 2 > npages ? s->cap * 2 : npages;
    int32_t *p = realloc(s->pages, (size_t)cap * sizeof *p);
    if (p == NULL)
        return false;
    s->pages = p;
    s->cap = cap;
    return true;
}

int kv_open(struct kv_cache *c, const uint8_t seed[32], const int32_t *tokens, int n,
            struct kv_seq *s, struct err *err)
{
    struct kv_seq q = { .cap = kv_pages_for(n) + 1 };
    q.pages = malloc((size_t)q.cap * sizeof *q.pages);
    if (q.pages == NULL)
        return err_nomem(err);
    memcpy(q.chain, seed, 32);
    while (q.len + KV_PAGE < n) { /* strictly: at least one token is left to compute */
        uint8_t next[32];
        chain_hash(q.chain, tokens + q.len, next);
        int i = table_find(c, next);
        if (i == NONE)
            break;
        hold_page(c, i);
        q.pages[q.npages++] = i;
        q.len += KV_PAGE;
        memcpy(q.chain, next, 32);
    }
    q.hashed = q.npages;
    add_u64(&c->lookups, 1);
    add_u64(&c->lookup_tokens, (uint64_t)n);
    add_u64(&c->hit_tokens, (uint64_t)q.len);
    *s = q;
    return ERR_OK;
}

bool kv_grow(struct kv_seq *s, int len) { return seq_room(s, kv_pages_for(len)); }

bool kv_reserve(struct kv_cache *c, struct kv_seq *s, int len)
{
    int want = kv_pages_for(len), more = want - s->npages;
    if (more <= 0)
        return true;
    if (more > kv_available(c) || !seq_room(s, want))
        return false;
    while (s->npages < want)
        s->pages[s->npages++] = take_page(c);
    return true;
}

void kv_commit(struct kv_cache *c, struct kv_seq *s, const int32_t *tokens, int len)
{
    s->len = len;
    for (; (s->hashed + 1) * KV_PAGE <= len; s->hashed++) {
        int i = s->pages[s->hashed];
        chain_hash(s->chain, tokens + s->hashed * KV_PAGE, s->chain);
        if (table_find(c, s->chain) == NONE)
            table_add(c, i, s->chain);
    }
}

void kv_close(struct kv_cache *c, struct kv_seq *s)
{
    while (s->npages > 0)
        drop_page(c, s->pages[--s->npages]);
    free(s->pages);
    *s = (struct kv_seq){ .pages = NULL };
}

void kv_forget(struct kv_cache *c)
{
    for (int i = 0; i < c->npages; i++) {
        if (!c->pages[i].in_table)
            continue;
        table_remove(c, i);
        if (c->pages[i].refs == 0) {
            recency_remove(c, i);
            push_free(c, i);
        }
    }
}
