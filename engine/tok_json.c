/* tok_json.c - tokenizer.json -> tables.
 *
 * What is in the file is used as the reference uses it, or the file is refused with a sentence
 * that names it.  The two exceptions are `truncation` and `padding`, which are about making
 * batches: serving never cuts a text.  Order matters: added tokens need the normaliser, the merge
 * tables need to know how words arrive. */
#include "engine/tokenizer_int.h"

#include <stdlib.h>
#include <string.h>

/* --- members ----------------------------------------------------------------------------- */
/* Is the word `key` in a list of words between spaces? */
static bool in_list(const char *list, const char *key)
{
    size_t len = strlen(key);
    for (const char *p = strstr(list, key); p != NULL && len > 0; p = strstr(p + 1, key))
        if ((p == list || p[-1] == ' ') && (p[len] == ' ' || p[len] == '\0'))
            return true;
    return false;
}

int tok_only(const json_t *o, const char *where, const char *keys, struct err *err)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)o, key, value) {
        if (!in_list(keys, key) || strchr(key, ' ') != NULL)
            return tok_bad(err, "%s has the unknown key \"%.60s\"", where, key);
    }
    return ERR_OK;
}

int tok_get_bool(const json_t *o, const char *where, const char *key, bool def, bool *ret,
                 struct err *err)
{
    const json_t *v = json_object_get(o, key);
    if (v != NULL && !json_is_null(v) && !json_is_boolean(v))
        return tok_bad(err, "\"%s\" of %s is neither true nor false", key, where);
    *ret = json_is_boolean(v) ? json_is_true(v) : def;
    return ERR_OK;
}

int tok_get_text(const json_t *o, const char *where, const char *key, char **ret, size_t *ret_len,
                 struct err *err)
{
    const json_t *v = json_object_get(o, key);
    if (!json_is_string(v))
        return tok_bad(err, "%s needs a text \"%s\"", where, key);
    *ret_len = json_string_length(v);
    *ret = malloc(*ret_len + 1);
    if (*ret == NULL)
        return err_nomem(err);
    memcpy(*ret, json_string_value(v), *ret_len + 1);
    return ERR_OK;
}

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

/* Sizes of the tables: ids, and bytes of all strings. */
static int measure(struct tokenizer *t, json_t *vocab, const json_t *added, size_t *ret_bytes,
                   struct err *err)
{
    const char *key;
    json_t *value;
    int id, rc = ERR_OK;
    size_t bytes = 0;
    json_object_foreach(vocab, key, value) {
        rc = check_id(value, key, &id, err);
        if (rc != ERR_OK)
            return rc;
        if (id >= t->size)
            t->size = id + 1;
        bytes += strlen(key) + 1;
    }
    for (size_t i = 0; i < json_array_size(added); i++) {
        const json_t *o = json_array_get(added, i), *content = json_object_get(o, "content");
        if (!json_is_string(content) || json_string_length(content) == 0)
            return tok_bad(err, "added token %zu has no content", i);
        rc = check_id(json_object_get(o, "id"), json_string_value(content), &id, err);
        if (rc != ERR_OK)
            return rc;
        if (id >= t->size)
            t->size = id + 1;
        bytes += json_string_length(content) + 1;
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

static int read_vocab(struct tokenizer *t, json_t *vocab, const json_t *added, struct err *err)
{
    if (!json_is_object(vocab) || json_object_size(vocab) == 0)
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
    rc = tok_map_init(&t->vocab, json_object_size(vocab), t->str, err);
    char *next = t->arena;
    const char *key;
    json_t *value;
    json_object_foreach(vocab, key, value) {
        int id = (int)json_integer_value(value);
        size_t len = strlen(key);
        if (rc == ERR_OK)
            rc = place(t, id, key, len, &next, err);
        if (rc != ERR_OK)
            return rc;
        tok_map_add(&t->vocab, (uint32_t)id);
        if (len > t->max_token)
            t->max_token = len;
    }
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

static int read_model(struct tokenizer *t, const json_t *model, const json_t *added,
                      struct err *err)
{
    if (!json_is_object(model))
        return tok_bad(err, "there is no model");
    const json_t *type = json_object_get(model, "type");
    if (type != NULL ? !json_is_string(type) || strcmp(json_string_value(type), "BPE") != 0
                     : json_object_get(model, "merges") == NULL)
        return tok_bad(err, "the model \"%.60s\" is not supported, BPE is",
                       json_is_string(type) ? json_string_value(type) : "(no type)");
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

/* --- added tokens, second part ----------------------------------------------------------- */
static int normalise_added(struct tokenizer *t, struct tok_added *a, struct err *err)
{
    struct buf text, spare;
    struct tok_match *mem = NULL;
    bool origin = true;
    buf_init(&text, 1 << 20);
    buf_init(&spare, 1 << 20);
    int rc = tok_normalize(t, a->content.s, a->content.len, &text, &spare, &mem, &origin, err);
    if (rc == ERR_OK &&
        (text.len != a->content.len || memcmp(text.data, a->content.s, text.len) != 0)) {
        a->normal_len = text.len;
        a->normal = buf_take(&text);
    }
    buf_free(&text);
    buf_free(&spare);
    tok_match_free(mem);
    return rc;
}

static int prepare_added(struct tokenizer *t, struct err *err)
{
    int rc = ERR_OK;
    bool words = false;
    for (size_t i = 0; rc == ERR_OK && i < t->nadded; i++) {
        words = words || t->added[i].single_word;
        if (t->added[i].normalized && t->nnorm > 0)
            rc = normalise_added(t, &t->added[i], err);
    }
    if (rc == ERR_OK && words)
        rc = tok_pattern_pcre(&t->word, "[" TOK_WORD "]", err);
    if (rc == ERR_OK)
        rc = tok_finder_init(&t->raw, t->added, t->nadded, false, err);
    return rc == ERR_OK ? tok_finder_init(&t->normal, t->added, t->nadded, true, err) : rc;
}

/* --- post-processor ---------------------------------------------------------------------- */
struct around {
    struct tokenizer *t;
    int32_t prefix[TOK_MAX_TEMPLATE], suffix[TOK_MAX_TEMPLATE];
};

/* The ids of a special token of a template. */
static int template_ids(struct around *p, const json_t *o, const char *name, bool before,
                        struct err *err)
{
    const json_t *ids =
        json_object_get(json_object_get(json_object_get(o, "special_tokens"), name), "ids");
    if (!json_is_array(ids))
        return tok_bad(err, "the template names \"%.60s\" and does not say its ids", name);
    for (size_t i = 0; i < json_array_size(ids); i++) {
        const json_t *v = json_array_get(ids, i);
        json_int_t id = json_is_integer(v) ? json_integer_value(v) : -1;
        if (id < 0 || id >= p->t->size || p->t->str[id].s == NULL)
            return tok_bad(err, "the template's \"%.60s\" has an id that is no token", name);
        size_t *n = before ? &p->t->nprefix : &p->t->nsuffix;
        if (*n == TOK_MAX_TEMPLATE)
            return tok_bad(err, "the template adds more than %d tokens", TOK_MAX_TEMPLATE);
        (before ? p->prefix : p->suffix)[(*n)++] = (int32_t)id;
    }
    return ERR_OK;
}

/* A list of special tokens around one $A. */
static int read_template(struct around *p, const json_t *o, struct err *err)
{
    int rc = tok_only(o, "TemplateProcessing", "type single pair special_tokens", err);
    const json_t *single = json_object_get(o, "single");
    bool before = true;
    if (p->t->nprefix + p->t->nsuffix > 0)
        return tok_bad(err, "more than one template adds tokens");
    if (rc == ERR_OK && !json_is_array(single))
        rc = tok_bad(err, "the template has no list \"single\"");
    for (size_t i = 0; rc == ERR_OK && i < json_array_size(single); i++) {
        const json_t *piece = json_array_get(single, i);
        const char *special =
            json_string_value(json_object_get(json_object_get(piece, "SpecialToken"), "id"));
        const char *sequence =
            json_string_value(json_object_get(json_object_get(piece, "Sequence"), "id"));
        if (special != NULL && sequence == NULL)
            rc = template_ids(p, o, special, before, err);
        else if (special == NULL && sequence != NULL && strcmp(sequence, "A") == 0 && before)
            before = false;
        else
            rc = tok_bad(err,
                         "piece %zu of the template is neither a special token nor "
                         "the first $A",
                         i);
    }
    if (rc == ERR_OK && before)
        rc = tok_bad(err, "the template leaves out the text itself");
    return rc;
}

static int read_post(struct around *p, const json_t *o, int depth, struct err *err)
{
    const char *type = json_string_value(json_object_get(o, "type"));
    if (type == NULL)
        return tok_bad(err, "the post_processor has no type");
    if (strcmp(type, "TemplateProcessing") == 0)
        return read_template(p, o, err);
    if (strcmp(type, "ByteLevel") == 0) /* about offsets, which we do not have */
        return tok_only(o, type, "type add_prefix_space trim_offsets use_regex", err);
    if (strcmp(type, "Sequence") != 0 || depth == 8)
        return tok_bad(err, "the post-processor \"%.60s\" is not supported", type);
    const json_t *items = json_object_get(o, "processors");
    int rc = tok_only(o, "the post_processor", "type processors", err);
    if (rc == ERR_OK && !json_is_array(items))
        rc = tok_bad(err, "a Sequence of the post_processor has no list");
    for (size_t i = 0; rc == ERR_OK && i < json_array_size(items); i++)
        rc = read_post(p, json_array_get(items, i), depth + 1, err);
    return rc;
}

static int read_post_processor(struct tokenizer *t, const json_t *o, struct err *err)
{
    if (o == NULL || json_is_null(o))
        return ERR_OK;
    struct around p = { .t = t };
    int rc = read_post(&p, o, 0, err);
    if (rc != ERR_OK)
        return rc;
    t->prefix = calloc(t->nprefix + 1, sizeof *t->prefix);
    t->suffix = calloc(t->nsuffix + 1, sizeof *t->suffix);
    if (t->prefix == NULL || t->suffix == NULL)
        return err_nomem(err);
    memcpy(t->prefix, p.prefix, t->nprefix * sizeof *t->prefix);
    memcpy(t->suffix, p.suffix, t->nsuffix * sizeof *t->suffix);
    return ERR_OK;
}

/* --- the file ---------------------------------------------------------------------------- */
static int read_all(struct tokenizer *t, const json_t *root, struct err *err)
{
    int rc = tok_only(root, "the file",
                      "version truncation padding added_tokens normalizer pre_tokenizer "
                      "post_processor decoder model",
                      err);
    const json_t *version = json_object_get(root, "version");
    if (rc == ERR_OK && version != NULL &&
        !(json_is_string(version) && strcmp(json_string_value(version), "1.0") == 0))
        rc = tok_bad(err, "the version is not \"1.0\"");
    if (rc == ERR_OK)
        rc = read_model(t, json_object_get(root, "model"), json_object_get(root, "added_tokens"),
                        err);
    if (rc == ERR_OK)
        rc = tok_read_normalizer(t, json_object_get(root, "normalizer"), err);
    if (rc == ERR_OK)
        rc = tok_read_pre_tokenizer(t, json_object_get(root, "pre_tokenizer"), err);
    if (rc == ERR_OK)
        rc = tok_read_decoder(t, json_object_get(root, "decoder"), err);
    if (rc == ERR_OK)
        rc = read_post_processor(t, json_object_get(root, "post_processor"), err);
    if (rc != ERR_OK)
        return rc;
    t->raw_bytes = t->npre > 0 && t->pre[t->npre - 1].kind == PRE_BYTES && !t->byte_fallback;
    rc = tok_bpe_prepare(t, err);
    return rc == ERR_OK ? prepare_added(t, err) : rc;
}

int tokenizer_load(const char *json, size_t len, struct tokenizer **ret, struct err *err)
{
    json_error_t why;
    json_t *root = json_loadb(json, len, JSON_ALLOW_NUL, &why);
    if (root == NULL)
        return tok_bad(err, "line %d: %s", why.line, why.text);
    struct tokenizer *t = calloc(1, sizeof *t);
    int rc = t == NULL               ? err_nomem(err)
             : !json_is_object(root) ? tok_bad(err, "not an object")
                                     : read_all(t, root, err);
    json_decref(root);
    if (rc != ERR_OK) {
        tokenizer_free(t);
        return rc;
    }
    *ret = t;
    return ERR_OK;
}
