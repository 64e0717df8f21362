/* tok_vocab.c - token <-> id, pairs of ids, added tokens found in a text.
 *
 * Both tables use open addressing with linear probing and are at most half full; they are filled
 * while loading and only read afterwards. */
#include "engine/tokenizer_int.h"

#include <stdlib.h>
#include <string.h>

static uint64_t mix(uint64_t h)
{
    h ^= h >> 32;
    h *= 0xd6e8feb86659fd93u;
    h ^= h >> 32;
    h *= 0xd6e8feb86659fd93u;
    return h ^ (h >> 32);
}

uint64_t tok_hash(const void *data, size_t len)
{
    const char *p = data;
    uint64_t h = 0x9e3779b97f4a7c15u + len;
    for (; len >= 8; p += 8, len -= 8) {
        uint64_t w;
        memcpy(&w, p, 8);
        h = (h ^ w) * 0xff51afd7ed558ccdu;
        h ^= h >> 29;
    }
    uint64_t w = 0;
    memcpy(&w, p, len);
    return mix(h ^ w);
}

/* --- strings ----------------------------------------------------------------------------- */
int tok_map_init(struct tok_map *m, size_t n, const struct tok_str *str, struct err *err)
{
    size_t cap = 16;
    while (cap < 2 * n)
        cap *= 2;
    m->slot = calloc(cap, sizeof *m->slot);
    if (m->slot == NULL)
        return err_nomem(err);
    m->mask = (uint32_t)(cap - 1);
    m->str = str;
    return ERR_OK;
}

static uint32_t *map_slot(const struct tok_map *m, const char *s, size_t len)
{
    for (uint32_t i = (uint32_t)tok_hash(s, len) & m->mask;; i = (i + 1) & m->mask) {
        if (m->slot[i] == 0)
            return &m->slot[i];
        const struct tok_str *have = &m->str[m->slot[i] - 1];
        if (have->len == len && memcmp(have->s, s, len) == 0)
            return &m->slot[i];
    }
}

bool tok_map_add(struct tok_map *m, uint32_t id)
{
    uint32_t *slot = map_slot(m, m->str[id].s, m->str[id].len);
    if (*slot != 0)
        return false;
    *slot = id + 1;
    return true;
}

void tok_map_set(struct tok_map *m, uint32_t id)
{
    *map_slot(m, m->str[id].s, m->str[id].len) = id + 1;
}

int tok_map_get(const struct tok_map *m, const char *s, size_t len)
{
    return (int)*map_slot(m, s, len) - 1;
}

/* --- pairs ------------------------------------------------------------------------------- */
int tok_pairs_init(struct tok_pairs *p, size_t n, struct err *err)
{
    size_t cap = 16;
    while (cap < 2 * n)
        cap *= 2;
    p->slot = calloc(cap, sizeof *p->slot);
    if (p->slot == NULL)
        return err_nomem(err);
    p->mask = cap - 1;
    return ERR_OK;
}

/* Ids have 21 bits; the top bit tells the pair (0, 0) from a free slot. */
static uint64_t pair_key(int a, int b)
{
    return (uint64_t)1 << 63 | (uint64_t)(uint32_t)a << 24 | (uint32_t)b;
}

static struct tok_pair *pair_slot(const struct tok_pairs *p, uint64_t key)
{
    for (uint64_t i = mix(key) & p->mask;; i = (i + 1) & p->mask)
        if (p->slot[i].key == key || p->slot[i].key == 0)
            return &p->slot[i];
}

void tok_pairs_set(struct tok_pairs *p, int a, int b, uint32_t rank, int id)
{
    uint64_t key = pair_key(a, b);
    *pair_slot(p, key) = (struct tok_pair){ .key = key, .rank = rank, .id = id };
}

const struct tok_pair *tok_pairs_get(const struct tok_pairs *p, int a, int b)
{
    const struct tok_pair *slot = pair_slot(p, pair_key(a, b));
    return slot->key != 0 ? slot : NULL;
}

/* --- added tokens ------------------------------------------------------------------------ */
static int by_bytes(const void *a, const void *b)
{
    const struct tok_needle *x = a, *y = b;
    int c = memcmp(x->s, y->s, x->len < y->len ? x->len : y->len);
    if (c != 0)
        return c;
    return (x->len > y->len) - (x->len < y->len);
}

void tok_needles_sort(struct tok_needle *v, size_t n) { qsort(v, n, sizeof *v, by_bytes); }

int tok_finder_init(struct tok_finder *f, const struct tok_added *added, size_t n, bool normalized,
                    struct err *err)
{
    f->by = calloc(n + 1, sizeof *f->by);
    if (f->by == NULL)
        return err_nomem(err);
    for (size_t i = 0; i < n; i++) {
        const struct tok_added *a = &added[i];
        if (a->normalized != normalized)
            continue;
        struct tok_needle *e = &f->by[f->n];
        *e = (struct tok_needle){ a->content.s, a->content.len, (int)i };
        if (a->normal != NULL)
            *e = (struct tok_needle){ a->normal, a->normal_len, (int)i };
        if (e->len == 0)
            return tok_bad(err, "nothing is left of added token \"%.*s\" after normalisation",
                           (int)a->content.len, a->content.s);
        f->first[(unsigned char)e->s[0]] = true;
        f->n++;
    }
    tok_needles_sort(f->by, f->n);
    for (size_t i = 1; i < f->n; i++)
        if (by_bytes(&f->by[i - 1], &f->by[i]) == 0)
            return tok_bad(err, "added token \"%.*s\" occurs twice", (int)f->by[i].len, f->by[i].s);
    return ERR_OK;
}

/* First entry of [lo, hi), which share `depth` bytes, whose next byte is at least `byte`. */
static size_t lower(const struct tok_finder *f, size_t lo, size_t hi, size_t depth, int byte)
{
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        const struct tok_needle *e = &f->by[mid];
        if (e->len <= depth || (unsigned char)e->s[depth] < byte)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* The longest token that s[len] begins with: narrow the sorted list byte by byte. */
static const struct tok_needle *longest_at(const struct tok_finder *f, const char *s, size_t len)
{
    const struct tok_needle *best = NULL;
    size_t lo = 0, hi = f->n;
    for (size_t depth = 0; depth < len; depth++) {
        int byte = (unsigned char)s[depth];
        lo = lower(f, lo, hi, depth, byte);
        hi = lower(f, lo, hi, depth, byte + 1);
        if (lo == hi)
            break;
        if (f->by[lo].len == depth + 1)
            best = &f->by[lo];
    }
    return best;
}

int tok_finder_next(const struct tok_finder *f, const char *s, size_t len, size_t from,
                    size_t *start, size_t *end)
{
    if (f->n == 0)
        return -1;
    for (size_t i = from; i < len; i++) {
        if (!f->first[(unsigned char)s[i]])
            continue;
        const struct tok_needle *e = longest_at(f, s + i, len - i);
        if (e != NULL) {
            *start = i;
            *end = i + e->len;
            return e->which;
        }
    }
    return -1;
}
