/* tok_unigram.c - the Unigram model: of all ways to spell a word with tokens, the one with the
 * highest sum of scores.  And WordLevel, for which a word is a token.
 *
 * One pass from left to right keeps, for each place, the best spelling that ends there; tokens
 * that begin at a place are found by walking down a trie.  Sums are made in the same order as the
 * reference makes them and the first of equals stays, so ties fall as they do there.  That is also
 * why a long word is not cut anywhere: a sum that starts elsewhere rounds differently.
 *
 * A character that no token of its own covers counts as unknown, ten below the worst score.
 * Neighbouring unknowns are one. */
#include "engine/tokenizer_int.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* --- the trie ---------------------------------------------------------------------------- */
/* What a node stands for: the tokens [lo, hi) of the sorted list, which share `depth` bytes. */
struct range {
    uint32_t lo, hi, depth;
};

static void add_children(struct tok_trie *trie, struct range *range, const struct tok_needle *by,
                         uint32_t i, uint32_t *n)
{
    struct range r = range[i];
    trie->node[i] = (struct tok_node){ *n, -1 };
    while (r.lo < r.hi && by[r.lo].len == r.depth)
        trie->node[i].id = by[r.lo++].which;
    while (r.lo < r.hi) {
        uint8_t byte = (uint8_t)by[r.lo].s[r.depth];
        uint32_t lo = r.lo;
        while (r.lo < r.hi && (uint8_t)by[r.lo].s[r.depth] == byte)
            r.lo++;
        if (i == 0)
            trie->root[byte] = *n;
        trie->label[*n] = byte;
        range[(*n)++] = (struct range){ lo, r.lo, r.depth + 1 };
    }
}

static int build_trie(struct tok_trie *trie, const struct tok_needle *by, size_t count,
                      size_t bytes, struct err *err)
{
    struct range *range = calloc(bytes + 1, sizeof *range);
    trie->node = calloc(bytes + 2, sizeof *trie->node);
    trie->label = calloc(bytes + 1, 1);
    if (range == NULL || trie->node == NULL || trie->label == NULL) {
        free(range);
        return err_nomem(err);
    }
    uint32_t n = 1;
    range[0] = (struct range){ 0, (uint32_t)count, 0 };
    for (uint32_t i = 0; i < n; i++)
        add_children(trie, range, by, i, &n);
    free(range);
    trie->node[n] = (struct tok_node){ n, -1 };
    trie->node[0].id = -1; /* an empty token is never found */
    struct tok_node *node = realloc(trie->node, (n + 1) * sizeof *node);
    if (node != NULL)
        trie->node = node;
    uint8_t *label = realloc(trie->label, n);
    if (label != NULL)
        trie->label = label;
    return ERR_OK;
}

/* Node below i by a byte, 0: none. */
static uint32_t child(const struct tok_trie *trie, uint32_t i, uint8_t byte)
{
    uint32_t lo = trie->node[i].first, end = trie->node[i + 1].first, hi = end;
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;
        if (trie->label[mid] < byte)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo < end && trie->label[lo] == byte ? lo : 0;
}

int tok_unigram_prepare(struct tokenizer *t, struct err *err)
{
    tok_chars_prepare(t);
    size_t n = 0, bytes = 0;
    struct tok_needle *by = calloc((size_t)t->size + 1, sizeof *by);
    if (by == NULL)
        return err_nomem(err);
    for (int id = 0; id < t->size; id++) {
        const struct tok_str *e = &t->str[id];
        if (e->s == NULL || tok_map_get(&t->vocab, e->s, e->len) != id)
            continue; /* an added token, or a later one has the same text */
        if (isnan(t->score[id]))
            continue;
        by[n++] = (struct tok_needle){ e->s, e->len, id };
        bytes += e->len;
    }
    tok_needles_sort(by, n);
    int rc = bytes < UINT32_MAX ? build_trie(&t->trie, by, n, bytes, err)
                                : tok_bad(err, "the vocabulary is too large");
    free(by);
    return rc;
}

/* --- the best path ----------------------------------------------------------------------- */
static int room(struct tok_call *c, size_t n)
{
    if (n <= c->best_cap)
        return ERR_OK;
    size_t cap = c->best_cap ? c->best_cap : 256;
    while (cap < n)
        cap *= 2;
    struct tok_best *best = realloc(c->best, cap * sizeof *best);
    if (best == NULL)
        return err_nomem(c->err);
    c->best = best;
    c->best_cap = cap;
    return ERR_OK;
}

/* SentencePiece compares sums of two numbers in double and keeps them in fp32. */
static void offer(const struct tokenizer *t, struct tok_best *b, double score, int id, size_t from)
{
    if (b->id < 0 || score > b->score)
        *b = (struct tok_best){ t->sentencepiece ? (double)(float)score : score, id,
                                (uint32_t)from };
}

/* All tokens that begin at s[at]; is one of them just the character there, of n bytes? */
static bool offer_tokens(struct tok_call *c, const char *s, size_t len, size_t at, size_t n)
{
    const struct tokenizer *t = c->t;
    const struct tok_trie *trie = &t->trie;
    const double before = c->best[at].score;
    bool single = false;
    uint32_t node = trie->root[(uint8_t)s[at]];
    for (size_t end = at + 1; node != 0; end++) {
        int id = trie->node[node].id;
        if (id >= 0) {
            offer(t, &c->best[end], t->score[id] + before, id, at);
            single = single || end - at == n;
        }
        if (end == len)
            break;
        node = child(trie, node, (uint8_t)s[end]);
    }
    return single;
}

static int best_path(struct tok_call *c, const char *s, size_t len)
{
    const struct tokenizer *t = c->t;
    int rc = room(c, len + 1);
    if (rc != ERR_OK)
        return rc;
    for (size_t i = 0; i <= len; i++)
        c->best[i] = (struct tok_best){ 0, -1, 0 };
    for (size_t at = 0; at < len;) {
        size_t n = (size_t)tok_utf8(s + at, len - at);
        if (!offer_tokens(c, s, len, at, n)) {
            struct tok_best *b = &c->best[at + n];
            double score = t->unk_score + c->best[at].score;
            if (t->sentencepiece)
                score = (double)(float)score; /* this one is added in fp32 */
            if (!t->has_unk && (b->id < 0 || score > b->score))
                return err_set(c->err, ERR_INVALID,
                               "the text has a character that the tokenizer lacks, and it has no "
                               "unknown token");
            if (t->has_unk)
                offer(t, b, score, t->unk, at);
        }
        at += n;
    }
    return ERR_OK;
}

/* Turn the links round: best[i].from is where the token that begins at i ends. */
static void reverse(struct tok_best *best, size_t len)
{
    uint32_t at = (uint32_t)len, from = best[at].from;
    while (at > 0) {
        uint32_t before = best[from].from;
        best[from].from = at;
        at = from;
        from = before;
    }
}

/* Unknown characters together: perhaps a token after all, else their bytes, else unknown. */
static int push_unknown(struct tok_call *c, const char *s, size_t len)
{
    const struct tokenizer *t = c->t;
    const bool look = !t->sentencepiece && len <= t->max_token;
    int rc = ERR_OK, id = look ? tok_map_get(&t->vocab, s, len) : -1;
    if (id >= 0 || !t->byte_fallback || !tok_bytes_known(t, s, len))
        return tok_push_id(c, id >= 0 ? id : t->unk);
    for (size_t i = 0; rc == ERR_OK && i < len; i++)
        rc = tok_push_id(c, t->bytes[(uint8_t)s[i]]);
    return rc;
}

static int spell(struct tok_call *c, const char *s, size_t len)
{
    int rc = tok_check_limit(c, len);
    if (rc == ERR_OK)
        rc = best_path(c, s, len);
    if (rc != ERR_OK)
        return rc;
    reverse(c->best, len);
    for (size_t at = 0; rc == ERR_OK && at < len;) {
        size_t end = c->best[at].from;
        int id = c->best[end].id;
        if (!c->t->has_unk || id != c->t->unk) {
            rc = tok_push_id(c, id);
        } else {
            while (end < len && c->best[c->best[end].from].id == id)
                end = c->best[end].from;
            rc = push_unknown(c, s + at, end - at);
        }
        at = end;
    }
    return rc;
}

int tok_unigram(struct tok_call *c, const char *s, size_t len)
{
    return tok_cached(c, s, len, spell);
}

/* --- WordLevel --------------------------------------------------------------------------- */
int tok_word_level(struct tok_call *c, const char *s, size_t len)
{
    int id = tok_map_get(&c->t->vocab, s, len);
    if (id < 0 && c->t->unk < 0)
        return tok_lacks_unknown(c->err);
    return tok_push_id(c, id >= 0 ? id : c->t->unk);
}
