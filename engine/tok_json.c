/* tok_json.c - tokenizer.json -> tables: the file as a whole, added tokens, post-processor.
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

/* --- added tokens, second part ----------------------------------------------------------- */
static int normalise_added(struct tokenizer *t, struct tok_added *a, struct err *err)
{
    struct buf text, spare;
    struct tok_match *mem = NULL;
    size_t origin = 0;
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

/* "cls" or "sep": ["token", id]. */
static int pair_id(struct around *p, const json_t *o, const char *type, const char *key,
                   int32_t *ret, struct err *err)
{
    const json_t *pair = json_object_get(o, key), *v = json_array_get(pair, 1);
    json_int_t id = json_is_integer(v) ? json_integer_value(v) : -1;
    if (json_array_size(pair) != 2 || !json_is_string(json_array_get(pair, 0)))
        return tok_bad(err, "%s needs \"%s\", a token and its id", type, key);
    if (id < 0 || id >= p->t->size || p->t->str[id].s == NULL)
        return tok_bad(err, "\"%s\" of %s has an id that is no token", key, type);
    *ret = (int32_t)id;
    return ERR_OK;
}

/* RoBERTa's and BERT's: cls, the text, sep.  The other two options are about offsets. */
static int read_pair(struct around *p, const json_t *o, const char *type, struct err *err)
{
    int rc = tok_only(o, type, type[0] == 'R' ? "type sep cls trim_offsets add_prefix_space"
                                              : "type sep cls", err);
    if (p->t->nprefix + p->t->nsuffix > 0)
        return tok_bad(err, "more than one template adds tokens");
    if (rc == ERR_OK)
        rc = pair_id(p, o, type, "cls", &p->prefix[0], err);
    if (rc == ERR_OK)
        rc = pair_id(p, o, type, "sep", &p->suffix[0], err);
    p->t->nprefix = p->t->nsuffix = 1;
    return rc;
}

static int read_post(struct around *p, const json_t *o, int depth, struct err *err)
{
    const char *type = json_string_value(json_object_get(o, "type"));
    if (type == NULL)
        return tok_bad(err, "the post_processor has no type");
    if (strcmp(type, "TemplateProcessing") == 0)
        return read_template(p, o, err);
    if (strcmp(type, "RobertaProcessing") == 0 || strcmp(type, "BertProcessing") == 0)
        return read_pair(p, o, type, err);
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
        rc = tok_read_model(t, json_object_get(root, "model"),
                            json_object_get(root, "added_tokens"), err);
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
    t->raw_bytes = t->model == TOK_BPE && t->npre > 0 &&
                   t->pre[t->npre - 1].kind == PRE_BYTES && !t->byte_fallback;
    rc = t->model == TOK_BPE       ? tok_bpe_prepare(t, err)
         : t->model == TOK_UNIGRAM ? tok_unigram_prepare(t, err)
                                   : ERR_OK;
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
