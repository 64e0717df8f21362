/* tok_json_model.c - vocabulary, added tokens and model of tokenizer.json.
 *
 * BPE has an object of tokens with their ids and a list of merges; Unigram a list of tokens with
 * scores, whose places are the ids; WordLevel just the object.  Options that would change the
 * result and are not supported must be off. */
#include "engine/tokenizer_int.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_UNIGRAM = 1024 }; /* bytes of a Unigram token; the longest in use have some hundred */

/* Options of the model that would change the result and are not supported must be off. */
static int must_be_empty(const json_t *model, const char *key, struct err *err)
{
    const json_t *v = json_object_get(model, key);
    if (v == NULL || json_is_null(v) || (json_is_string(v) && json_string_length(v) == 0))
        return ERR_OK;
    return tok_bad(err, "the model's \"%s\" is not supported", key);
}

/* --- vocabulary -------------------------------------------------------------------------- */
static int check_id(const json_t *v, const char *token, int *ret, struct err *err)
{
    if (!json_is_integer(v))
        return tok_bad(err, "the id of token \"%.60s\" is not a number", token);
    json_int_t id = json_integer_value(v);
    if (id < 0 || id > TOK_MAX_ID)
        return tok_bad(err, "token \"%.60s\" has id %lld, ids are 0 to %d", token, (long long)id,
                       TOK_MAX_ID);
    *ret = (int)id;
    return ERR_OK;
}

static void grow(struct tokenizer *t, size_t *bytes, int id, size_t len)
{
    if (id >= t->size)
        t->size = id + 1;
    *bytes += len + 1;
}

/* A Unigram token: ["text", score]; null for a score only in what tok_make_spm.c writes. */
static const json_t *scored_token(const json_t *list, size_t i)
{
    const json_t *e = json_array_get(list, i), *s = json_array_get(e, 0);
    bool good = json_array_size(e) == 2 && json_is_string(s) && (json_is_number(json_array_get(e, 1)) ||
                                                              json_is_null(json_array_get(e, 1)));
    return good ? s : NULL;
}

static int measure_list(struct tokenizer *t, const json_t *vocab, size_t *bytes, struct err *err)
{
    size_t n = json_array_size(vocab);
    if (n > (size_t)TOK_MAX_ID + 1)
        return tok_bad(err, "the vocabulary has %zu tokens, at most %d are taken", n,
                       TOK_MAX_ID + 1);
    for (size_t i = 0; i < n; i++) {
        const json_t *s = scored_token(vocab, i);
        if (s == NULL)
            return tok_bad(err, "token %zu is not a text with a score", i);
        grow(t, bytes, (int)i, json_string_length(s));
    }
    return ERR_OK;
}

/* Sizes of the tables: ids, and bytes of all strings. */
static int measure(struct tokenizer *t, json_t *vocab, const json_t *added, size_t *ret_bytes,
                   struct err *err)
{
    const char *key;
    json_t *value;
    int id;
    size_t bytes = 0;
    int rc = json_is_array(vocab) ? measure_list(t, vocab, &bytes, err) : ERR_OK;
    if (rc != ERR_OK)
        return rc;
    json_object_foreach(vocab, key, value) {
        rc = check_id(value, key, &id, err);
        if (rc != ERR_OK)
            return rc;
        grow(t, &bytes, id, strlen(key));
    }
    for (size_t i = 0; i < json_array_size(added); i++) {
        const json_t *o = json_array_get(added, i), *content = json_object_get(o, "content");
        if (!json_is_string(content) || json_string_length(content) == 0)
            return tok_bad(err, "added token %zu has no content", i);
        rc = check_id(json_object_get(o, "id"), json_string_value(content), &id, err);
        if (rc != ERR_OK)
            return rc;
        grow(t, &bytes, id, json_string_length(content));
    }
    *ret_bytes = bytes;
    return ERR_OK;
}

/* Put a string into the arena and the table; an id has one string. */
static int place(struct tokenizer *t, int id, const char *s, size_t len, char **next,
                 struct err *err)
{
    struct tok_str *e = &t->str[id];
    if (e->s != NULL)
        return tok_bad(err, "id %d belongs to \"%.60s\" and to \"%.60s\"", id, e->s, s);
    memcpy(*next, s, len);
    *e = (struct tok_str){ *next, (uint32_t)len };
    *next += len + 1;
    return ERR_OK;
}

static int read_added(struct tokenizer *t, const json_t *o, struct tok_added *a, char **next,
                      struct err *err)
{
    const json_t *content = json_object_get(o, "content");
    const char *s = json_string_value(content);
    size_t len = json_string_length(content);
    int rc = tok_only(o, "an added token",
                      "id content single_word lstrip rstrip normalized special", err);
    const struct {
        const char *key;
        bool *ret;
        bool def;
    } flags[] = {
        { "single_word", &a->single_word, false }, { "lstrip", &a->lstrip, false },
        { "rstrip", &a->rstrip, false },           { "special", &a->special, false },
        { "normalized", &a->normalized, true },
    };
    for (size_t i = 0; rc == ERR_OK && i < sizeof flags / sizeof flags[0]; i++)
        rc = tok_get_bool(o, s, flags[i].key, flags[i].def, flags[i].ret, err);
    if (rc != ERR_OK)
        return rc;
    a->id = (int)json_integer_value(json_object_get(o, "id"));
    int known = tok_map_get(&t->vocab, s, len);
    if (known >= 0 && known != a->id)
        return tok_bad(err, "added token \"%.60s\" has id %d, the vocabulary says %d", s, a->id,
                       known);
    if (t->flags[a->id] & TOK_ADDED)
        return tok_bad(err, "two added tokens have id %d", a->id);
    if (known < 0)
        rc = place(t, a->id, s, len, next, err);
    a->content = t->str[a->id];
    t->flags[a->id] |= (uint8_t)(TOK_ADDED | (a->special ? TOK_SPECIAL : 0));
    return rc;
}

/* One token of the model; of two with the same text the later one is found. */
static int add_token(struct tokenizer *t, int id, const char *s, size_t len, char **next,
                     struct err *err)
{
    int rc = place(t, id, s, len, next, err);
    if (rc != ERR_OK)
        return rc;
    tok_map_set(&t->vocab, (uint32_t)id);
    if (len > t->max_token)
        t->max_token = len;
    return ERR_OK;
}

static int read_tokens(struct tokenizer *t, json_t *vocab, char **next, struct err *err)
{
    const char *key;
    json_t *value;
    int rc = ERR_OK;
    json_object_foreach(vocab, key, value) {
        rc = add_token(t, (int)json_integer_value(value), key, strlen(key), next, err);
        if (rc != ERR_OK)
            return rc;
    }
    for (size_t i = 0; rc == ERR_OK && i < json_array_size(vocab); i++) {
        const json_t *s = scored_token(vocab, i);
        rc = add_token(t, (int)i, json_string_value(s), json_string_length(s), next, err);
    }
    return rc;
}

static int read_vocab(struct tokenizer *t, json_t *vocab, const json_t *added, struct err *err)
{
    size_t n = json_is_array(vocab) ? json_array_size(vocab) : json_object_size(vocab);
    if (n == 0 || json_is_array(vocab) != (t->model == TOK_UNIGRAM))
        return tok_bad(err, "the model has no vocabulary");
    if (added != NULL && !json_is_array(added))
        return tok_bad(err, "added_tokens is not a list");
    size_t bytes = 0;
    int rc = measure(t, vocab, added, &bytes, err);
    if (rc != ERR_OK)
        return rc;
    t->str = calloc((size_t)t->size + 1, sizeof *t->str);
    t->flags = calloc((size_t)t->size + 1, 1);
    t->arena = calloc(bytes + 1, 1);
    t->added = calloc(json_array_size(added) + 1, sizeof *t->added);
    if (t->str == NULL || t->flags == NULL || t->arena == NULL || t->added == NULL)
        return err_nomem(err);
    rc = tok_map_init(&t->vocab, n, t->str, err);
    char *next = t->arena;
    if (rc == ERR_OK)
        rc = read_tokens(t, vocab, &next, err);
    for (size_t i = 0; rc == ERR_OK && i < json_array_size(added); i++)
        rc = read_added(t, json_array_get(added, i), &t->added[t->nadded++], &next, err);
    if (t->max_token == 0)
        t->max_token = 1;
    return rc;
}

/* --- merges ------------------------------------------------------------------------------ */
/* The two halves of a merge: "a b" or ["a", "b"]. */
static bool halves(const json_t *m, struct tok_str ret[2])
{
    if (json_is_array(m) && json_array_size(m) == 2) {
        for (size_t i = 0; i < 2; i++) {
            const json_t *s = json_array_get(m, i);
            if (!json_is_string(s))
                return false;
            ret[i] = (struct tok_str){ json_string_value(s), (uint32_t)json_string_length(s) };
        }
        return ret[0].len > 0 && ret[1].len > 0;
    }
    if (!json_is_string(m))
        return false;
    const char *s = json_string_value(m), *end = s + json_string_length(m);
    const char *space = memchr(s, ' ', (size_t)(end - s));
    if (space == NULL || memchr(space + 1, ' ', (size_t)(end - space - 1)) != NULL)
        return false;
    ret[0] = (struct tok_str){ s, (uint32_t)(space - s) };
    ret[1] = (struct tok_str){ space + 1, (uint32_t)(end - space - 1) };
    return ret[0].len > 0 && ret[1].len > 0;
}

static int read_merge(struct tokenizer *t, const json_t *m, uint32_t rank, struct err *err)
{
    struct tok_str half[2];
    if (!halves(m, half))
        return tok_bad(err, "merge %u is not a pair of tokens", (unsigned)rank);
    int id[2];
    for (int i = 0; i < 2; i++) {
        id[i] = tok_map_get(&t->vocab, half[i].s, half[i].len);
        if (id[i] < 0)
            return tok_bad(err, "merge %u names \"%.*s\", which the vocabulary lacks",
                           (unsigned)rank, half[i].len > 60 ? 60 : (int)half[i].len, half[i].s);
    }
    /* the result is looked up before anything is allocated for it: no token is longer */
    char joined[256];
    size_t len = (size_t)half[0].len + half[1].len;
    int whole = -1;
    if (len <= t->max_token) {
        char *p = len > sizeof joined ? malloc(len) : joined;
        if (p == NULL)
            return err_nomem(err);
        memcpy(p, half[0].s, half[0].len);
        memcpy(p + half[0].len, half[1].s, half[1].len);
        whole = tok_map_get(&t->vocab, p, len);
        if (p != joined)
            free(p);
    }
    if (whole < 0)
        return tok_bad(err, "merge %u makes \"%.*s%.*s\", which the vocabulary lacks",
                       (unsigned)rank, half[0].len > 60 ? 60 : (int)half[0].len, half[0].s,
                       half[1].len > 60 ? 60 : (int)half[1].len, half[1].s);
    tok_pairs_set(&t->merges, id[0], id[1], rank, whole);
    return ERR_OK;
}

static int read_merges(struct tokenizer *t, const json_t *merges, struct err *err)
{
    if (!json_is_array(merges) || json_array_size(merges) > 4 * ((size_t)TOK_MAX_ID + 1))
        return tok_bad(err, "the model has no list of merges");
    size_t n = json_array_size(merges);
    int rc = tok_pairs_init(&t->merges, n, err);
    uint32_t rank = 0;
    for (size_t i = 0; rc == ERR_OK && i < n; i++) {
        const json_t *m = json_array_get(merges, i);
        if (json_is_string(m) && strncmp(json_string_value(m), "#version", 8) == 0)
            continue; /* the first line of a merges.txt */
        rc = read_merge(t, m, rank++, err);
    }
    return rc;
}

/* --- model ------------------------------------------------------------------------------- */
static int read_unknown(struct tokenizer *t, const json_t *model, struct err *err)
{
    const json_t *unk = json_object_get(model, "unk_token");
    t->unk = -1;
    if (unk == NULL || json_is_null(unk))
        return ERR_OK;
    if (!json_is_string(unk))
        return tok_bad(err, "unk_token is not a text");
    t->has_unk = true;
    t->unk = tok_map_get(&t->vocab, json_string_value(unk), json_string_length(unk));
    return ERR_OK;
}

static int read_bpe(struct tokenizer *t, const json_t *model, const json_t *added,
                    struct err *err)
{
    int rc = tok_only(model, "the model",
                      "type dropout unk_token continuing_subword_prefix end_of_word_suffix "
                      "fuse_unk byte_fallback ignore_merges vocab merges",
                      err);
    const json_t *dropout = json_object_get(model, "dropout");
    if (rc == ERR_OK && dropout != NULL && !json_is_null(dropout) &&
        !(json_is_number(dropout) && json_number_value(dropout) == 0))
        rc = tok_bad(err, "the model's \"dropout\" is not supported");
    if (rc == ERR_OK)
        rc = must_be_empty(model, "continuing_subword_prefix", err);
    if (rc == ERR_OK)
        rc = must_be_empty(model, "end_of_word_suffix", err);
    if (rc == ERR_OK)
        rc = tok_get_bool(model, "the model", "fuse_unk", false, &t->fuse_unk, err);
    if (rc == ERR_OK)
        rc = tok_get_bool(model, "the model", "byte_fallback", false, &t->byte_fallback, err);
    if (rc == ERR_OK)
        rc = tok_get_bool(model, "the model", "ignore_merges", false, &t->ignore_merges, err);
    if (rc == ERR_OK)
        rc = read_vocab(t, json_object_get(model, "vocab"), added, err);
    if (rc == ERR_OK)
        rc = read_unknown(t, model, err);
    return rc == ERR_OK ? read_merges(t, json_object_get(model, "merges"), err) : rc;
}

/* A score as the reference has it.  Its JSON parser reads the digits as a whole number, rounds
 * that to a double and then divides, so 16 or 17 digits are rounded twice; paths with equal scores
 * would be told apart differently without this.  Files are written with the fewest digits that
 * give the number back, so that is what we start from again. */
static double score_of(const json_t *v)
{
    double x = json_number_value(v);
    char s[40], digits[20];
    int n = 0, precision = 14;
    do
        snprintf(s, sizeof s, "%.*e", precision, x);
    while (strtod(s, NULL) != x && ++precision < 17);
    if (precision == 14)
        return x; /* up to 15 digits are exact, and so is the division */
    const char *p = s;
    for (; *p != 'e'; p++)
        if (*p >= '0' && *p <= '9')
            digits[n++] = *p;
    digits[n] = '\0';
    int exponent = atoi(p + 1) - precision;
    if (exponent < -300 || exponent > 300)
        return x;
    double whole = (double)strtoull(digits, NULL, 10), ten = 10;
    for (int i = 1; i < abs(exponent); i++)
        ten *= 10;
    double y = exponent == 0 ? whole : exponent < 0 ? whole / ten : whole * ten;
    return x < 0 ? -y : y;
}

/* NAN is the score of what no text is spelled with. */
static int read_scores(struct tokenizer *t, const json_t *vocab, size_t n, struct err *err)
{
    double lowest = INFINITY;
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(json_array_get(vocab, i), 1);
        if (json_is_null(v) && !t->sentencepiece)
            return tok_bad(err, "token %zu is not a text with a score", i);
        t->score[i] = json_is_null(v)    ? NAN
                      : t->sentencepiece ? (double)(float)json_number_value(v)
                                         : score_of(v);
        if (t->score[i] < lowest)
            lowest = t->score[i];
    }
    if (lowest == INFINITY)
        return tok_bad(err, "no token has a score");
    t->unk_score = t->sentencepiece ? (double)(float)(lowest - 10) : lowest - 10;
    return ERR_OK;
}

static int read_unigram(struct tokenizer *t, const json_t *model, const json_t *added,
                        struct err *err)
{
    int rc = tok_only(model, "the model", "type unk_id vocab byte_fallback sentencepiece", err);
    if (rc == ERR_OK)
        rc = tok_get_bool(model, "the model", "byte_fallback", false, &t->byte_fallback, err);
    if (rc == ERR_OK)
        rc = tok_get_bool(model, "the model", "sentencepiece", false, &t->sentencepiece, err);
    json_t *vocab = json_object_get(model, "vocab");
    if (rc == ERR_OK)
        rc = read_vocab(t, vocab, added, err);
    if (rc != ERR_OK)
        return rc;
    if (t->max_token > MAX_UNIGRAM) /* the time for a text grows with it */
        return tok_bad(err, "a token has %zu bytes, at most %d are taken", t->max_token,
                       MAX_UNIGRAM);
    const json_t *unk = json_object_get(model, "unk_id");
    size_t n = json_array_size(vocab);
    t->unk = -1;
    if (unk != NULL && !json_is_null(unk)) {
        json_int_t id = json_is_integer(unk) ? json_integer_value(unk) : -1;
        if (id < 0 || (size_t)id >= n)
            return tok_bad(err, "unk_id is not one of the %zu ids", n);
        t->unk = (int)id;
        t->has_unk = true;
    }
    t->score = calloc(n, sizeof *t->score);
    if (t->score == NULL)
        return err_nomem(err);
    return read_scores(t, vocab, n, err);
}

static int read_word_level(struct tokenizer *t, const json_t *model, const json_t *added,
                           struct err *err)
{
    int rc = tok_only(model, "the model", "type vocab unk_token", err);
    if (rc == ERR_OK)
        rc = read_vocab(t, json_object_get(model, "vocab"), added, err);
    if (rc == ERR_OK)
        rc = read_unknown(t, model, err);
    if (rc == ERR_OK && !t->has_unk)
        rc = tok_bad(err, "WordLevel has no unk_token");
    return rc;
}

int tok_read_model(struct tokenizer *t, const json_t *model, const json_t *added, struct err *err)
{
    if (!json_is_object(model))
        return tok_bad(err, "there is no model");
    const json_t *type = json_object_get(model, "type");
    const char *name = json_string_value(type);
    if (type == NULL && json_object_get(model, "merges") != NULL)
        name = "BPE"; /* older files do not say */
    t->model = TOK_BPE;
    if (name != NULL && strcmp(name, "BPE") == 0)
        return read_bpe(t, model, added, err);
    t->model = TOK_UNIGRAM;
    if (name != NULL && strcmp(name, "Unigram") == 0)
        return read_unigram(t, model, added, err);
    t->model = TOK_WORD_LEVEL;
    if (name != NULL && strcmp(name, "WordLevel") == 0)
        return read_word_level(t, model, added, err);
    return tok_bad(err, "the model \"%.60s\" is not supported; BPE, Unigram and WordLevel are",
                   name != NULL ? name : "(no type)");
}
