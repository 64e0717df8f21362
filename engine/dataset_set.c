/* dataset_set.c - examples gathered into a struct train_set.
 *
 * Ids and learn bytes lie in slabs, so that a set takes what its tokens take and never moves. */
#include "engine/dataset_int.h"

#include "engine/safetensors.h"

#include <stdlib.h>
#include <string.h>

enum { SLAB_TOKENS = 1 << 18 };

struct slab {
    struct slab *next;
    size_t used, cap; /* tokens */
    int32_t *ids;
    uint8_t *learn;
};

static void slabs_free(struct slab *s)
{
    while (s != NULL) {
        struct slab *next = s->next;
        free(s->ids);
        free(s->learn);
        free(s);
        s = next;
    }
}

void train_set_free(struct train_set *s)
{
    if (s == NULL)
        return;
    slabs_free(s->own);
    free(s->examples);
    free(s);
}

int set_maker_init(struct set_maker *m, uint64_t max_tokens, struct err *err)
{
    *m = (struct set_maker){ .max_tokens = max_tokens };
    sha256_init(&m->hash);
    m->set = calloc(1, sizeof *m->set);
    return m->set ? ERR_OK : err_nomem(err);
}

/* A slab with room for n tokens, the first of the list; NULL if memory is out. */
static struct slab *slab_for(struct train_set *set, size_t n)
{
    struct slab *s = set->own;
    if (s != NULL && s->cap - s->used >= n)
        return s;
    s = calloc(1, sizeof *s);
    if (s == NULL)
        return NULL;
    s->cap = n > SLAB_TOKENS ? n : SLAB_TOKENS;
    s->ids = malloc(s->cap * sizeof *s->ids);
    s->learn = malloc(s->cap);
    if (s->ids == NULL || s->learn == NULL) {
        slabs_free(s);
        return NULL;
    }
    s->next = set->own;
    set->own = s;
    return s;
}

static void hash_int(struct sha256 *h, int32_t v)
{
    const uint32_t u = (uint32_t)v;
    const uint8_t b[4] = { (uint8_t)u, (uint8_t)(u >> 8), (uint8_t)(u >> 16), (uint8_t)(u >> 24) };
    sha256_add(h, b, 4);
}

int set_maker_add(struct set_maker *m, const int32_t *ids, const uint8_t *learn, size_t n,
                  struct err *err)
{
    struct train_set *set = m->set;
    if (n > m->max_tokens - set->tokens)
        return err_set(err, ERR_TOO_LARGE, "the data has more than %llu tokens",
                       (unsigned long long)m->max_tokens);
    if (set->n == m->cap) {
        const size_t cap = m->cap ? 2 * m->cap : 256;
        struct train_example *e = realloc(set->examples, cap * sizeof *e);
        if (e == NULL)
            return err_nomem(err);
        set->examples = e;
        m->cap = cap;
    }
    struct slab *s = slab_for(set, n);
    if (s == NULL)
        return err_nomem(err);
    int32_t *to = s->ids + s->used;
    uint8_t *flags = s->learn + s->used;
    s->used += n;
    memcpy(to, ids, n * sizeof *to);
    hash_int(&m->hash, (int32_t)n);
    for (size_t i = 0; i < n; i++) {
        flags[i] = i > 0 && learn[i] != 0;
        set->targets += flags[i];
        hash_int(&m->hash, ids[i]);
    }
    sha256_add(&m->hash, flags, n);
    set->tokens += n;
    set->examples[set->n++] = (struct train_example){ to, flags, (int)n };
    return ERR_OK;
}

struct set_mark set_maker_mark(const struct set_maker *m)
{
    const struct train_set *set = m->set;
    const struct slab *s = set->own;
    return (struct set_mark){ set->n, s ? s->used : 0, set->tokens, set->targets, set->own, m->hash };
}

void set_maker_back(struct set_maker *m, const struct set_mark *mark)
{
    struct train_set *set = m->set;
    while (set->own != mark->own) {
        struct slab *s = set->own;
        set->own = s->next;
        s->next = NULL;
        slabs_free(s);
    }
    struct slab *s = set->own;
    if (s != NULL)
        s->used = mark->used;
    set->n = mark->n;
    set->tokens = mark->tokens;
    set->targets = mark->targets;
    m->hash = mark->hash;
}

struct train_set *set_maker_take(struct set_maker *m)
{
    struct train_set *set = m->set;
    sha256_end(&m->hash, set->hash);
    m->set = NULL;
    return set;
}

void set_maker_free(struct set_maker *m)
{
    train_set_free(m->set);
    m->set = NULL;
}

/* --- from a tensor -------------------------------------------------------------------------------- */

static int64_t id_at(const struct st_tensor *t, size_t i)
{
    int64_t wide;
    int32_t small;
    if (t->dtype == DT_I64) {
        memcpy(&wide, t->data + i * 8, 8);
        return wide;
    }
    memcpy(&small, t->data + i * 4, 4);
    return small;
}

static int from_tensor(const struct st_tensor *t, const char *path, int V, size_t max_length,
                       struct set_maker *m, struct dataset_report *rep, struct err *err)
{
    if ((t->dtype != DT_I64 && t->dtype != DT_I32) || t->ndim < 1 || t->ndim > 2)
        return err_set(err, ERR_INVALID, "%s: tensor %s is not I32 or I64 [T] or [N, T]", path,
                       t->name);
    const size_t total = st_count(t), T = total ? (size_t)t->shape[t->ndim - 1] : 0;
    if (T < 2 || T > INT32_MAX)
        return err_set(err, ERR_INVALID, "%s: tensor %s has rows of %zu ids: two are the least to "
                       "learn from", path, t->name, T);
    const size_t n = T < max_length ? T : max_length;
    int32_t *ids = malloc(n * sizeof *ids);
    uint8_t *learn = malloc(n);
    int rc = ids && learn ? ERR_OK : err_nomem(err);
    if (learn != NULL)
        memset(learn, 1, n);
    for (size_t at = 0; at < total && rc == ERR_OK; at += T) {
        for (size_t i = 0; i < T && rc == ERR_OK; i++) {
            const int64_t id = id_at(t, at + i);
            if (id < 0 || id >= V)
                rc = err_set(err, ERR_INVALID, "%s: tensor %s has %lld at %zu, which is not an id "
                             "of 0 to %d", path, t->name, (long long)id, at + i, V - 1);
            else if (i < n)
                ids[i] = (int32_t)id;
        }
        if (rc == ERR_OK)
            rc = set_maker_add(m, ids, learn, n, err);
        rep->lines++;
        rep->cut += n < T;
    }
    rep->longest = (int)T;
    free(ids);
    free(learn);
    return rc;
}

int dataset_tokens(const char *path, const char *name, int V, int max_length,
                   struct dataset_report *rep, struct train_set **ret, struct err *err)
{
    struct dataset_report local = { 0 };
    struct set_maker m = { 0 };
    struct st_file *f = NULL;
    if (max_length < 2)
        return err_set(err, ERR_INVALID, "the length of examples must be 2 or more, not %d",
                       max_length);
    int rc = st_open(path, &f, err);
    if (rc == ERR_OK)
        rc = set_maker_init(&m, DATASET_MAX_TOKENS, err);
    if (rc == ERR_OK) {
        const struct st_tensor *t = st_find(f, name);
        rc = t == NULL ? err_set(err, ERR_NOT_FOUND, "%s has no tensor %s", path, name)
                       : from_tensor(t, path, V, (size_t)max_length, &m, &local, err);
    }
    if (rc == ERR_OK) {
        local.examples = m.set->n;
        local.tokens = m.set->tokens;
        local.targets = m.set->targets;
        *ret = set_maker_take(&m);
    }
    if (rep != NULL)
        *rep = local;
    set_maker_free(&m);
    st_close(f);
    return rc;
}
