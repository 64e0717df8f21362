/* tokenizer.c - the pipeline from text to ids.
 *
 *   1. bytes that are not UTF-8 become U+FFFD;
 *   2. added tokens that are matched as they are written cut the text into sections;
 *   3. each section is normalised, and cut again at the added tokens that are matched in
 *      normalised text;
 *   4. what lies between is cut into words by the pre-tokenizer;
 *   5. the model makes ids of each word;
 *   6. the post-processor puts ids around the whole.
 *
 * The order, and what each step sees of the text, is that of the reference (Hugging Face's
 * tokenizers library); so are its peculiarities. */
#include "engine/tokenizer_int.h"

#include <stdlib.h>
#include <string.h>

void tokenizer_free(struct tokenizer *t)
{
    if (t == NULL)
        return;
    for (size_t i = 0; i < t->nnorm; i++) {
        tok_pattern_free(&t->norm[i].pattern);
        free(t->norm[i].text);
        free(t->norm[i].trie);
    }
    for (size_t i = 0; i < t->npre; i++) {
        tok_pattern_free(&t->pre[i].pattern);
        free(t->pre[i].replacement);
    }
    for (size_t i = 0; i < t->ndec; i++) {
        tok_pattern_free(&t->dec[i].pattern);
        free(t->dec[i].text);
    }
    for (size_t i = 0; i < t->nadded; i++)
        free(t->added[i].normal);
    tok_pattern_free(&t->word);
    free(t->raw.by);
    free(t->normal.by);
    free(t->vocab.slot);
    free(t->merges.slot);
    free(t->cross.slot);
    free(t->score);
    free(t->trie.node);
    free(t->trie.label);
    free(t->norm);
    free(t->pre);
    free(t->dec);
    free(t->added);
    free(t->prefix);
    free(t->suffix);
    free(t->str);
    free(t->flags);
    free(t->arena);
    free(t);
}

int tokenizer_size(const struct tokenizer *t) { return t->size; }

int tokenizer_id(const struct tokenizer *t, const char *token)
{
    size_t len = strlen(token);
    for (size_t i = 0; i < t->nadded; i++)
        if (t->added[i].content.len == len && memcmp(t->added[i].content.s, token, len) == 0)
            return t->added[i].id;
    return tok_map_get(&t->vocab, token, len);
}

bool tokenizer_is_special(const struct tokenizer *t, int id)
{
    return id >= 0 && id < t->size && (t->flags[id] & TOK_SPECIAL) != 0;
}

/* --- sections ---------------------------------------------------------------------------- */
/* Where the white space that ends s[len] begins. */
static size_t space_before(const char *s, size_t len)
{
    while (len > 0) {
        size_t at = len - 1;
        while (at > 0 && (s[at] & 0xc0) == 0x80)
            at--;
        if (!tok_is_space(tok_codepoint(s + at, (int)(len - at))))
            break;
        len = at;
    }
    return len;
}

static size_t space_after(const char *s, size_t from, size_t len)
{
    while (from < len) {
        int n = tok_utf8(s + from, len - from);
        if (!tok_is_space(tok_codepoint(s + from, n)))
            break;
        from += (size_t)n;
    }
    return from;
}

/* Is the character s[n] part of a word?  -1 on failure. */
static int is_word(struct tok_call *c, const char *s, size_t n)
{
    size_t start, end;
    struct tok_scan scan = { .p = &c->t->word, .text = s, .len = n, .mem = &c->match };
    return tok_scan_next(&scan, &start, &end, c->err);
}

/* Do word characters touch [start, end)?  -1 on failure. */
static int inside_word(struct tok_call *c, const char *s, size_t len, size_t start, size_t end)
{
    if (start > 0) {
        size_t at = start - 1;
        while (at > 0 && (s[at] & 0xc0) == 0x80)
            at--;
        int is = is_word(c, s + at, start - at);
        if (is != 0)
            return is;
    }
    return end < len ? is_word(c, s + end, (size_t)tok_utf8(s + end, len - end)) : 0;
}

/* `origin`: see tok_normalize(). */
typedef int (*section_fn)(struct tok_call *c, const char *s, size_t len, size_t origin);

/* Cut s[len] at the added tokens of a finder: their ids are pushed, what is between goes to `fn`.
 * A match that does not count is skipped whole, as in the reference; so is one that lies wholly in
 * the white space that the token before took in. */
static int each_section(struct tok_call *c, const struct tok_finder *f, const char *s, size_t len,
                        size_t origin, section_fn fn)
{
    int rc = ERR_OK, which;
    size_t done = 0, from = 0, start, end;
    while (rc == ERR_OK && (which = tok_finder_next(f, s, len, from, &start, &end)) >= 0) {
        const struct tok_added *a = &c->t->added[which];
        from = end;
        if (end <= done || (a->special && !c->parse_special))
            continue;
        if (a->single_word) {
            int inside = inside_word(c, s, len, start, end);
            if (inside < 0)
                return c->err->code;
            if (inside)
                continue;
        }
        if (a->lstrip) {
            start = space_before(s, start);
            if (start < done)
                start = done;
        }
        if (a->rstrip)
            end = space_after(s, end, len);
        if (done < start)
            rc = fn(c, s + done, start - done, origin > done ? origin - done : 0);
        if (rc == ERR_OK)
            rc = tok_push_id(c, a->id);
        done = end;
    }
    if (rc == ERR_OK && done != len)
        rc = fn(c, s + done, len - done, origin > done ? origin - done : 0);
    return rc;
}

/* Steps 4 and 5. */
static int words(struct tok_call *c, const char *s, size_t len, size_t origin)
{
    c->text.len = 0;
    int rc = tok_add(&c->text, s, len, c->err);
    if (rc == ERR_OK)
        rc = tok_pretokenize(c, origin);
    static const tok_word_fn models[] = { [TOK_BPE] = tok_bpe,
                                          [TOK_UNIGRAM] = tok_unigram,
                                          [TOK_WORD_LEVEL] = tok_word_level };
    for (size_t i = 0; rc == ERR_OK && i < c->spans.n; i++)
        rc = models[c->t->model](c, c->text.data + c->spans.v[i].at, c->spans.v[i].len);
    return rc;
}

/* Step 3. */
static int normalised(struct tok_call *c, const char *s, size_t len, size_t origin)
{
    if (c->t->nnorm == 0)
        return each_section(c, &c->t->normal, s, len, origin, words);
    int rc = tok_normalize(c->t, s, len, &c->normal, &c->spare, &c->match, &origin, c->err);
    if (rc != ERR_OK || c->normal.len == 0)
        return rc;
    return each_section(c, &c->t->normal, c->normal.data, c->normal.len, origin, words);
}

/* --- the whole --------------------------------------------------------------------------- */
/* Step 1: *s and *len are left alone if all is well, else they point into `fixed`. */
static int fix_utf8(const char **s, size_t *len, struct buf *fixed, struct err *err)
{
    int rc = ERR_OK;
    size_t done = 0, i = 0;
    while (rc == ERR_OK && i < *len) {
        int n = tok_utf8(*s + i, *len - i);
        if (n > 0) {
            i += (size_t)n;
            continue;
        }
        rc = tok_add(fixed, *s + done, i - done, err);
        if (rc == ERR_OK)
            rc = tok_add(fixed, tok_replacement, 3, err);
        i = n == 0 ? *len : i + (size_t)-n;
        done = i;
    }
    if (rc == ERR_OK && done > 0) {
        rc = tok_add(fixed, *s + done, *len - done, err);
        *s = fixed->data;
        *len = fixed->len;
    }
    return rc;
}

static int push_all(struct tok_call *c, const int32_t *ids, size_t n)
{
    int rc = ERR_OK;
    for (size_t i = 0; rc == ERR_OK && i < n; i++)
        rc = tok_push_id(c, ids[i]);
    return rc;
}

static int call_init(struct tok_call *c, size_t len)
{
    size_t slots = 64;
    while (slots < 16384 && slots < len / 8)
        slots *= 2;
    c->cache_mask = slots - 1;
    buf_init(&c->normal, TOK_MAX_WORK);
    buf_init(&c->text, TOK_MAX_WORK);
    buf_init(&c->spare, TOK_MAX_WORK);
    c->cache = calloc(slots, sizeof *c->cache);
    return c->cache != NULL ? ERR_OK : err_nomem(c->err);
}

static void call_free(struct tok_call *c)
{
    buf_free(&c->normal);
    buf_free(&c->text);
    buf_free(&c->spare);
    free(c->spans.v);
    free(c->spans2.v);
    free(c->sym);
    free(c->heap);
    free(c->best);
    free(c->cache);
    tok_match_free(c->match);
}

int tokenizer_encode(const struct tokenizer *t, const char *text, size_t len, bool add_special,
                     bool parse_special, size_t max, struct tok_ids *ret, struct err *err)
{
    if (len > TOK_MAX_TEXT)
        return err_set(err, ERR_TOO_LARGE, "a text of %zu bytes, at most %d are tokenized at once",
                       len, TOK_MAX_TEXT);
    struct err own = { 0 };
    struct tok_call c = { .t = t,
                          .err = err != NULL ? err : &own,
                          .parse_special = parse_special,
                          .out = ret,
                          .limit = SIZE_MAX };
    const size_t before = ret->n;
    if (max > 0)
        c.limit = before + max;
    struct buf fixed;
    buf_init(&fixed, TOK_MAX_WORK);
    int rc = call_init(&c, len);
    if (rc == ERR_OK)
        rc = fix_utf8(&text, &len, &fixed, c.err);
    if (rc == ERR_OK && add_special)
        rc = push_all(&c, t->prefix, t->nprefix);
    if (rc == ERR_OK)
        rc = each_section(&c, &t->raw, text, len, len > 0 ? (size_t)tok_utf8(text, len) : 0, normalised);
    if (rc == ERR_OK && add_special)
        rc = push_all(&c, t->suffix, t->nsuffix);
    if (rc != ERR_OK)
        ret->n = before;
    buf_free(&fixed);
    call_free(&c);
    return rc;
}
