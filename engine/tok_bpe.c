/* tok_bpe.c - the merge engine: one word to ids.
 *
 * A word starts as one symbol per character (per byte with raw_bytes).  The pair of neighbours
 * whose merge has the lowest rank is joined first, the leftmost of equals, until none is left.  A
 * heap holds the candidates and a linked list the symbols, so a word of n characters takes
 * O(n log n), however long.
 *
 * Before that, a word is cut wherever no merge could ever reach: between characters x and y such
 * that no merge (a, b) has a ending in x and b beginning with y.  Tokens are the concatenation of
 * their characters, so the pieces are independent and the result is exactly the same.  For models
 * without a pre-tokenizer, whose "word" is the whole text, this finds the words again; and words
 * that were met before in the same call are copied from the output. */
#include "engine/tokenizer_int.h"

#include <stdlib.h>
#include <string.h>

int tok_push_id(struct tok_call *c, int id)
{
    struct tok_ids *o = c->out;
    if (o->n >= c->limit)
        return err_set(c->err, ERR_TOO_LARGE, "the text has more tokens than are allowed here");
    if (o->n == o->cap) {
        size_t cap = o->cap ? 2 * o->cap : 64;
        int32_t *ids = realloc(o->ids, cap * sizeof *ids);
        if (ids == NULL)
            return err_nomem(c->err);
        o->ids = ids;
        o->cap = cap;
    }
    o->ids[o->n++] = id;
    return ERR_OK;
}

/* --- the heap: lowest rank first, then leftmost ------------------------------------------ */
static bool before(const struct tok_todo *a, const struct tok_todo *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->pos < b->pos;
}

static void sift_down(struct tok_todo *h, size_t n, size_t i)
{
    struct tok_todo x = h[i];
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= n)
            break;
        if (child + 1 < n && before(&h[child + 1], &h[child]))
            child++;
        if (!before(&h[child], &x))
            break;
        h[i] = h[child];
        i = child;
    }
    h[i] = x;
}

static int heap_room(struct tok_call *c)
{
    if (c->nheap < c->heap_cap)
        return ERR_OK;
    size_t cap = c->heap_cap ? 2 * c->heap_cap : 128;
    struct tok_todo *h = realloc(c->heap, cap * sizeof *h);
    if (h == NULL)
        return err_nomem(c->err);
    c->heap = h;
    c->heap_cap = cap;
    return ERR_OK;
}

static int heap_push(struct tok_call *c, struct tok_todo x)
{
    int rc = heap_room(c);
    if (rc != ERR_OK)
        return rc;
    size_t i = c->nheap++;
    while (i > 0 && before(&x, &c->heap[(i - 1) / 2])) {
        c->heap[i] = c->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    c->heap[i] = x;
    return ERR_OK;
}

static struct tok_todo heap_pop(struct tok_call *c)
{
    struct tok_todo top = c->heap[0];
    c->heap[0] = c->heap[--c->nheap];
    if (c->nheap > 1)
        sift_down(c->heap, c->nheap, 0);
    return top;
}

/* --- symbols ----------------------------------------------------------------------------- */
static int add_symbol(struct tok_call *c, int id)
{
    if (c->nsym == c->sym_cap) {
        size_t cap = c->sym_cap ? 2 * c->sym_cap : 128;
        struct tok_symbol *v = realloc(c->sym, cap * sizeof *v);
        if (v == NULL)
            return err_nomem(c->err);
        c->sym = v;
        c->sym_cap = cap;
    }
    int32_t n = (int32_t)c->nsym;
    if (n > 0)
        c->sym[n - 1].next = n;
    c->sym[c->nsym++] = (struct tok_symbol){ id, n - 1, -1 };
    return ERR_OK;
}

/* Id of the character s[n], which starts a symbol; -1 if the vocabulary lacks it. */
static int char_id(const struct tokenizer *t, const char *s, int n)
{
    if (t->raw_bytes)
        return t->bytes[(unsigned char)s[0]];
    if (n == 1)
        return t->ascii[(unsigned char)s[0]];
    return tok_map_get(&t->vocab, s, (size_t)n);
}

bool tok_bytes_known(const struct tokenizer *t, const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (t->bytes[(unsigned char)s[i]] < 0)
            return false;
    return true;
}

int tok_lacks_unknown(struct err *err)
{
    return err_set(err, ERR_INVALID,
                   "the text has a character that the tokenizer lacks, and its unknown token is "
                   "not in its vocabulary");
}

/* An unknown character: its bytes, or the unknown token, or (without one) nothing.  *pending: an
 * unknown token that waits for a character that is known, as the reference delays it. */
static int add_unknown(struct tok_call *c, const char *s, int n, bool *pending)
{
    const struct tokenizer *t = c->t;
    int rc = ERR_OK;
    if (t->byte_fallback && tok_bytes_known(t, s, (size_t)n)) {
        for (int i = 0; rc == ERR_OK && i < n; i++)
            rc = add_symbol(c, t->bytes[(unsigned char)s[i]]);
        return rc;
    }
    if (!t->has_unk)
        return ERR_OK;
    if (t->unk < 0)
        return tok_lacks_unknown(c->err);
    if (*pending && !t->fuse_unk)
        rc = add_symbol(c, t->unk);
    *pending = true;
    return rc;
}

/* With raw_bytes a symbol is a byte, and the alphabet has a character for each. */
static int char_len(const struct tokenizer *t, const char *s, size_t len)
{
    return t->raw_bytes ? 1 : tok_utf8(s, len);
}

static int add_symbols(struct tok_call *c, const char *s, size_t len)
{
    const struct tokenizer *t = c->t;
    bool pending = false;
    int rc = ERR_OK;
    c->nsym = 0;
    for (size_t i = 0; rc == ERR_OK && i < len;) {
        int n = char_len(t, s + i, len - i);
        int id = char_id(t, s + i, n);
        if (id < 0) {
            rc = add_unknown(c, s + i, n, &pending);
        } else {
            if (pending)
                rc = add_symbol(c, t->unk);
            pending = false;
            if (rc == ERR_OK)
                rc = add_symbol(c, id);
        }
        i += (size_t)n;
    }
    return rc == ERR_OK && pending ? add_symbol(c, t->unk) : rc;
}

/* --- merging ----------------------------------------------------------------------------- */
static int consider(struct tok_call *c, int32_t left, int32_t right)
{
    const struct tok_pair *m = tok_pairs_get(&c->t->merges, c->sym[left].id, c->sym[right].id);
    return m == NULL ? ERR_OK : heap_push(c, (struct tok_todo){ m->rank, left, m->id });
}

static int merge_all(struct tok_call *c)
{
    const struct tokenizer *t = c->t;
    struct tok_symbol *sym = c->sym;
    int rc = ERR_OK;
    c->nheap = 0;
    for (size_t i = 0; rc == ERR_OK && i + 1 < c->nsym; i++) {
        const struct tok_pair *m = tok_pairs_get(&t->merges, sym[i].id, sym[i + 1].id);
        if (m != NULL && (rc = heap_room(c)) == ERR_OK)
            c->heap[c->nheap++] = (struct tok_todo){ m->rank, (int32_t)i, m->id };
    }
    for (size_t i = c->nheap / 2; i-- > 0;)
        sift_down(c->heap, c->nheap, i);

    while (rc == ERR_OK && c->nheap > 0) {
        struct tok_todo top = heap_pop(c);
        struct tok_symbol *s = &sym[top.pos];
        if (s->id < 0 || s->next < 0)
            continue;
        /* outdated when the symbols have changed since; the reference compares only the result */
        const struct tok_pair *m = tok_pairs_get(&t->merges, s->id, sym[s->next].id);
        if (m == NULL || m->id != top.id)
            continue;
        struct tok_symbol *right = &sym[s->next];
        s->id = top.id;
        s->next = right->next;
        right->id = -1;
        if (s->next >= 0)
            sym[s->next].prev = top.pos;
        if (s->prev >= 0)
            rc = consider(c, s->prev, top.pos);
        if (rc == ERR_OK && s->next >= 0)
            rc = consider(c, top.pos, s->next);
    }
    return rc;
}

int tok_check_limit(struct tok_call *c, size_t len)
{
    if (!c->t->shrinks && len / c->t->max_token > c->limit - c->out->n)
        return err_set(c->err, ERR_TOO_LARGE, "the text has more tokens than are allowed here");
    return ERR_OK;
}

/* A piece that no merge leaves, without looking in the cache. */
static int merge_piece(struct tok_call *c, const char *s, size_t len)
{
    int rc = tok_check_limit(c, len);
    if (rc == ERR_OK)
        rc = add_symbols(c, s, len);
    if (rc == ERR_OK)
        rc = merge_all(c);
    for (size_t i = 0; rc == ERR_OK && i < c->nsym; i++)
        if (c->sym[i].id >= 0)
            rc = tok_push_id(c, c->sym[i].id);
    return rc;
}

int tok_cached(struct tok_call *c, const char *s, size_t len, tok_word_fn fn)
{
    if (len > TOK_CACHED)
        return fn(c, s, len);
    struct tok_cached *e = &c->cache[tok_hash(s, len) & c->cache_mask];
    int rc = ERR_OK;
    if (e->len == len && memcmp(e->word, s, len) == 0) {
        for (size_t i = 0; rc == ERR_OK && i < e->n; i++)
            rc = tok_push_id(c, c->out->ids[e->at + i]);
        return rc;
    }
    size_t at = c->out->n;
    rc = fn(c, s, len);
    *e = (struct tok_cached){ .at = at, .n = (uint32_t)(c->out->n - at), .len = (uint8_t)len };
    memcpy(e->word, s, len);
    return rc;
}

/* Can a merge join x and y, the characters s[n] and its right neighbour? */
static bool crossed(const struct tokenizer *t, const char *x, int nx, const char *y, int ny)
{
    if (nx == 1 && ny == 1)
        return t->cross_small[(unsigned char)*x][(unsigned char)*y >> 3] >> (*y & 7) & 1;
    int a = char_id(t, x, nx), b = char_id(t, y, ny);
    return a < 0 || b < 0 || tok_pairs_get(&t->cross, a, b) != NULL;
}

/* The id of the word as a whole, or -1: with ignore_merges, known words are not merged. */
static int whole_word(struct tok_call *c, const char *s, size_t len, int *ret)
{
    const struct tokenizer *t = c->t;
    *ret = -1;
    if (len > t->max_token)
        return ERR_OK;
    if (!t->raw_bytes) {
        *ret = tok_map_get(&t->vocab, s, len);
        return ERR_OK;
    }
    int rc = ERR_OK;
    c->spare.len = 0;
    for (size_t i = 0; rc == ERR_OK && i < len; i++) {
        char mapped[2];
        rc = tok_add(&c->spare, mapped, (size_t)tok_byte_char((uint8_t)s[i], mapped), c->err);
    }
    if (rc == ERR_OK)
        *ret = tok_map_get(&t->vocab, c->spare.data, c->spare.len);
    return rc;
}

int tok_bpe(struct tok_call *c, const char *s, size_t len)
{
    const struct tokenizer *t = c->t;
    if (t->ignore_merges) {
        int id, code = whole_word(c, s, len, &id);
        if (code != ERR_OK || id >= 0)
            return code != ERR_OK ? code : tok_push_id(c, id);
    }
    if (t->raw_bytes && len <= TOK_CACHED)
        return tok_cached(c, s, len, merge_piece);
    int rc = ERR_OK, n = char_len(t, s, len);
    size_t from = 0;
    for (size_t i = 0; rc == ERR_OK && i + (size_t)n < len;) {
        size_t next = i + (size_t)n;
        int m = char_len(t, s + next, len - next);
        if (!crossed(t, s + i, n, s + next, m)) {
            rc = tok_cached(c, s + from, next - from, merge_piece);
            from = next;
        }
        i = next;
        n = m;
    }
    return rc == ERR_OK ? tok_cached(c, s + from, len - from, merge_piece) : rc;
}

/* --- tables ------------------------------------------------------------------------------ */
void tok_chars_prepare(struct tokenizer *t)
{
    for (int b = 0; b < 256; b++) {
        char s[8];
        int n = t->raw_bytes ? tok_byte_char((uint8_t)b, s) : (int)(stpcpy(s, "<0x") - s);
        if (!t->raw_bytes) {
            static const char hex[] = "0123456789ABCDEF";
            s[n++] = hex[b >> 4];
            s[n++] = hex[b & 15];
            s[n++] = '>';
        }
        t->bytes[b] = tok_map_get(&t->vocab, s, (size_t)n);
        if (t->bytes[b] < 0 && (t->raw_bytes || t->byte_fallback))
            t->shrinks = true;
    }
    if (!t->raw_bytes && !t->byte_fallback)
        t->shrinks = true;
    for (int b = 0; b < 128; b++) {
        char s = (char)b;
        t->ascii[b] = tok_map_get(&t->vocab, &s, 1);
    }
}

/* Byte (raw_bytes), ASCII character, or -1 for others: what cross_small is indexed with. */
static int small_char(const struct tokenizer *t, const char *s, size_t len)
{
    size_t used;
    if (t->raw_bytes)
        return tok_char_byte(s, len, &used);
    return (unsigned char)s[0] < 128 ? (unsigned char)s[0] : -1;
}

/* A pair of characters with an unknown one may not be cut apart either: the unknown token may
 * span both. */
static void prepare_cross_unknown(struct tokenizer *t)
{
    int n = t->raw_bytes ? 256 : 128;
    const int *id = t->raw_bytes ? t->bytes : t->ascii;
    for (int x = 0; x < n; x++)
        for (int y = 0; y < n; y++)
            if (id[x] < 0 || id[y] < 0)
                t->cross_small[x][y >> 3] |= (uint8_t)(1 << (y & 7));
}

static void prepare_cross(struct tokenizer *t, const struct tok_pair *m)
{
    const struct tok_str *a = &t->str[m->key >> 24 & TOK_MAX_ID], *b = &t->str[m->key & TOK_MAX_ID];
    const char *last = a->s + a->len - 1;
    while ((*last & 0xc0) == 0x80 && last > a->s)
        last--;
    int nx = (int)(a->s + a->len - last), ny = tok_utf8(b->s, b->len);
    int x = small_char(t, last, (size_t)nx), y = small_char(t, b->s, (size_t)ny);
    if (x >= 0 && y >= 0)
        t->cross_small[x][y >> 3] |= (uint8_t)(1 << (y & 7));
    int ix = tok_map_get(&t->vocab, last, (size_t)nx),
        iy = tok_map_get(&t->vocab, b->s, (size_t)ny);
    if (ix >= 0 && iy >= 0)
        tok_pairs_set(&t->cross, ix, iy, 0, 0);
}

int tok_bpe_prepare(struct tokenizer *t, struct err *err)
{
    tok_chars_prepare(t);
    prepare_cross_unknown(t);
    size_t n = 0;
    for (uint64_t i = 0; i <= t->merges.mask; i++)
        n += t->merges.slot[i].key != 0;
    int rc = tok_pairs_init(&t->cross, n, err);
    for (uint64_t i = 0; rc == ERR_OK && i <= t->merges.mask; i++)
        if (t->merges.slot[i].key != 0)
            prepare_cross(t, &t->merges.slot[i]);
    return rc;
}
