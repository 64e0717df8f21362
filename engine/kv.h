/* kv.h - the key/value cache: pages of 16 positions, shared by prefix, recycled LRU.
 *
 * A page holds 16 consecutive positions for all layers and key/value heads.  Inside a page, for
 * layer l and head g (hd = head size, element = fp16, fp32 or a code of 8 bits):
 *   K transposed [hd][16]   so that 16 positions are one vector and q.k needs no horizontal sum
 *   V            [16][hd]
 * kv_k() and kv_v() give their addresses; V follows K, the rest of a page lies elsewhere.  Keys are
 * stored after rope.  With KV_Q8 each of the two is followed by the scales, fp16 [blocks][16]: one for each
 * position and block of KV_Q8_BLOCK numbers of the head, so that what a position holds depends on itself
 * alone, and a head of 64 or 128 takes 53 % of fp16's bytes.
 *
 * Full pages are entered in a table under a hash chain: h_0 = seed, h_i = sha256(h_{i-1}, 16 token
 * ids).  The seed (lora_set_seed) holds tenant, base and adapters by content, so a page can only
 * be found by who would have computed the very same bytes.  Pages in use are reference-counted;
 * free ones that are in the table stay until memory is needed, least recently used first.  A
 * shared page is full and never written again, so there is nothing to copy on write; the last,
 * partial page of a sequence is always its own.
 *
 * Everything here belongs to the engine thread; only kv_stats() may be called by others. */
#ifndef ENGINE_KV_H
#define ENGINE_KV_H

#include "engine/arch.h"
#include "engine/err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { KV_PAGE = 16, KV_Q8_BLOCK = 32 };

/* Numbers of keys and values. */
enum kv_type { KV_F16, KV_F32, KV_Q8 };

struct kv_cache;

struct kv_seq {
    int32_t *pages;     /* page numbers, [npages] */
    int npages, cap;
    int len;            /* positions filled */
    int hashed;         /* full pages that are in the table */
    uint8_t chain[32];  /* hash of the last of those, or the seed */
};

struct kv_stats {
    int pages, used, cached; /* all; held by sequences; free but findable */
    size_t page_bytes;
    uint64_t lookups;       /* sequences opened (a preempted one opens again) */
    uint64_t lookup_tokens; /* tokens they brought */
    uint64_t hit_tokens;    /* of those, found in shared pages */
    uint64_t evicted;       /* pages forgotten to make room */
};

/* "f16", "f32" or "q8". */
int kv_type_parse(const char *name, enum kv_type *ret, struct err *err);
const char *kv_type_name(enum kv_type t);
/* What a base has unless told otherwise: fp16, and fp32 if it was made with --type f32. */
static inline enum kv_type kv_type_default(bool f32_base) { return f32_base ? KV_F32 : KV_F16; }

/* Bytes of K or of V of one head in one page. */
size_t kv_part_bytes(enum kv_type t, int hd);
/* Bytes of one page for this model. */
size_t kv_page_bytes(const struct arch *a, enum kv_type t);
/* As many pages as fit `bytes`, at least one.  Memory that no page has used yet is not resident, but for
 * some ahead of them. */
int kv_create(const struct arch *a, enum kv_type t, size_t bytes, struct kv_cache **ret,
              struct err *err);
void kv_destroy(struct kv_cache *c); /* NULL is fine */
void kv_stats(const struct kv_cache *c, struct kv_stats *ret); /* any thread */
/* Pages that kv_reserve() could still hand out. */
int kv_available(const struct kv_cache *c);
int kv_pages(const struct kv_cache *c); /* all there are */
/* Pages that hold `len` positions. */
static inline int kv_pages_for(int len) { return len / KV_PAGE + (len % KV_PAGE != 0); }
enum kv_type kv_type_of(const struct kv_cache *c);

/* Start a sequence: attach the longest run of shared full pages that tokens[0..n) begins with,
 * but never all n (the last token has to be computed for its logits).  s->len says how many
 * positions that saved. */
int kv_open(struct kv_cache *c, const uint8_t seed[32], const int32_t *tokens, int n,
            struct kv_seq *s, struct err *err);
/* Room in the list of pages for a sequence that grows to `len`, so that kv_reserve() need not
 * allocate.  false: out of memory. */
bool kv_grow(struct kv_seq *s, int len);
/* Pages for positions up to `len`.  false: none left (nothing changed); preempt somebody. */
bool kv_reserve(struct kv_cache *c, struct kv_seq *s, int len);
/* Positions s->len .. len-1 now hold tokens[s->len .. len) (`tokens` is the whole sequence):
 * enters newly full pages in the table. */
void kv_commit(struct kv_cache *c, struct kv_seq *s, const int32_t *tokens, int len);
/* Give the pages back (they stay findable until reused). */
void kv_close(struct kv_cache *c, struct kv_seq *s);
/* Forget every shared page (tests, and when an operator asks). */
void kv_forget(struct kv_cache *c);

/* Element (0,0) of K^T / V of page number `page`: uint16_t (fp16), float or int8_t. */
void *kv_k(const struct kv_cache *c, int page, int layer, int g);
void *kv_v(const struct kv_cache *c, int page, int layer, int g);

#endif
