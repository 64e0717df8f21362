/* tok_make.c - see tok_make.h. */
#include "engine/tok_make_int.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* --- pieces ----------------------------------------------------------------------------- */

static int bad_piece(size_t id, const char *what, struct err *err)
{
    return err_set(err, ERR_INVALID, "tokenizer: piece %zu %s", id, what);
}

/* Tokens that are found in a text as they are, before anything else happens to it. */
bool tok_make_is_added(const struct piece *p)
{
    return p->type == PIECE_CONTROL || p->type == PIECE_USER || p->type == PIECE_UNKNOWN;
}

static int check_id(const struct vocab *v, const char *what, int id, struct err *err)
{
    if (id >= 0 && (size_t)id >= v->n)
        return err_set(err, ERR_INVALID, "tokenizer: the %s token %d is not one of the %zu tokens",
                       what, id, v->n);
    return ERR_OK;
}

/* Each piece is a text of its own.  *ret_map and *ret_str (its strings) are the caller's. */
int tok_make_check(const struct vocab *v, struct tok_map *ret_map, struct tok_str **ret_str,
                        struct err *err)
{
    if (v->n == 0 || v->n > (size_t)TOK_MAX_ID + 1)
        return err_set(err, ERR_INVALID, "tokenizer: %zu tokens, 1 to %d can be read", v->n,
                       TOK_MAX_ID + 1);
    struct tok_str *str = *ret_str = calloc(v->n, sizeof *str);
    int rc = str ? tok_map_init(ret_map, v->n, str, err) : err_nomem(err);
    for (size_t i = 0; i < v->n && rc == ERR_OK; i++) {
        const struct piece *p = &v->pieces[i];
        if (p->len == 0 || p->len > PIECE_MAX_BYTES || memchr(p->s, '\0', p->len) != NULL)
            return bad_piece(i, "is empty, too long or has a zero byte", err);
        if (p->type < PIECE_NORMAL || p->type > PIECE_BYTE || !isfinite(p->score))
            return bad_piece(i, "has no known type or no finite score", err);
        str[i] = (struct tok_str){ p->s, (uint32_t)p->len };
        if (!tok_map_add(ret_map, (uint32_t)i))
            return err_set(err, ERR_INVALID, "tokenizer: piece %zu, \"%.*s\", is there twice", i,
                           (int)(p->len < 60 ? p->len : 60), p->s);
    }
    if (rc == ERR_OK)
        rc = check_id(v, "bos", v->bos, err);
    if (rc == ERR_OK)
        rc = check_id(v, "eos", v->eos, err);
    return rc == ERR_OK ? check_id(v, "unknown", v->unk, err) : rc;
}

/* --- JSON -------------------------------------------------------------------------------- */

json_t *tok_make_text_of(const struct piece *p) { return json_stringn(p->s, p->len); }

static bool has_mark(const struct piece *p)
{
    return memmem(p->s, p->len, SPACE_MARK, 3) != NULL;
}

/* The user's own pieces are matched in the text as it was written, with spaces in it. */
json_t *tok_make_with_spaces(const struct piece *p)
{
    char out[PIECE_MAX_BYTES];
    size_t n = 0;
    for (size_t i = 0; i < p->len; n++) {
        bool mark = p->len - i >= 3 && memcmp(p->s + i, SPACE_MARK, 3) == 0;
        out[n] = mark ? ' ' : p->s[i];
        i += mark ? 3 : 1;
    }
    return json_stringn(out, n);
}

static json_t *added_token(size_t id, const struct piece *p)
{
    return json_pack("{s:I, s:o, s:b, s:b, s:b, s:b, s:b}", "id", (json_int_t)id, "content",
                     p->type == PIECE_USER ? tok_make_with_spaces(p) : tok_make_text_of(p), "single_word", 0,
                     "lstrip", 0, "rstrip", 0, "normalized", 0, "special", p->type != PIECE_USER);
}

/* Tokens that were added to the vocabulary later; marks ids of pieces among them. */
static int add_extra(const struct vocab *v, json_t *added, uint8_t *listed, struct err *err)
{
    for (size_t i = 0; i < json_array_size(v->extra); i++) {
        json_t *o = json_array_get(v->extra, i);
        const char *content = json_string_value(json_object_get(o, "content"));
        json_int_t id = json_integer_value(json_object_get(o, "id"));
        if (json_array_append(added, o) != 0)
            return err_nomem(err);
        if (id < 0 || (size_t)id >= v->n)
            continue;
        const struct piece *p = &v->pieces[id];
        if (p->len != strlen(content) || memcmp(p->s, content, p->len) != 0)
            return err_set(err, ERR_INVALID,
                           "tokenizer: token %lld is \"%.*s\", but it was added as \"%.60s\"",
                           (long long)id, (int)(p->len < 60 ? p->len : 60), p->s, content);
        listed[id] = 1;
    }
    return ERR_OK;
}

/* `added_in_vocab`: added tokens stand in the vocabulary too, but for those of the user with a
 * space, whose names differ. */
static int put_pieces(const struct vocab *v, bool added_in_vocab, const uint8_t *listed,
                      json_t *vocab, json_t *added, struct err *err)
{
    for (size_t i = 0; i < v->n; i++) {
        const struct piece *p = &v->pieces[i];
        json_t *text = tok_make_text_of(p);
        if (text == NULL)
            return bad_piece(i, "is not UTF-8", err);
        json_decref(text);
        bool spaced = added_in_vocab && p->type == PIECE_USER && has_mark(p) && !listed[i];
        if (spaced && v->prefix_space)
            return bad_piece(i, "is the user's own and has a space, which cannot be kept apart "
                                "from the one in front of a text", err);
        int rc = 0;
        if (tok_make_is_added(p) && !listed[i])
            rc |= json_array_append_new(added, added_token(i, p));
        if (!tok_make_is_added(p) || (added_in_vocab && !spaced))
            rc |= json_object_setn_new(vocab, p->s, p->len, json_integer((json_int_t)i));
        if (rc != 0)
            return err_nomem(err);
    }
    return ERR_OK;
}

int tok_make_vocab(const struct vocab *v, bool added_in_vocab, json_t **ret_vocab,
                      json_t **ret_added, struct err *err)
{
    uint8_t *listed = calloc(v->n, 1);
    *ret_vocab = json_object();
    *ret_added = json_array();
    int rc = listed ? add_extra(v, *ret_added, listed, err) : err_nomem(err);
    if (rc == ERR_OK)
        rc = put_pieces(v, added_in_vocab, listed, *ret_vocab, *ret_added, err);
    free(listed);
    return rc;
}

static void add_special(json_t *single, json_t *specials, const struct piece *p, int id)
{
    json_array_append_new(single, json_pack("{s:{s:o, s:i}}", "SpecialToken", "id", tok_make_text_of(p),
                                            "type_id", 0));
    json_t *s = json_pack("{s:o, s:[i], s:[o]}", "id", tok_make_text_of(p), "ids", id, "tokens", tok_make_text_of(p));
    json_object_setn_new(specials, p->s, p->len, s);
}

/* bos text eos, as far as they are wanted; NULL if neither is. */
static json_t *make_template(const struct vocab *v)
{
    bool bos = v->add_bos && v->bos >= 0, eos = v->add_eos && v->eos >= 0;
    if (!bos && !eos)
        return json_null();
    json_t *single = json_array(), *specials = json_object();
    if (bos)
        add_special(single, specials, &v->pieces[v->bos], v->bos);
    json_array_append_new(single, json_pack("{s:{s:s, s:i}}", "Sequence", "id", "A", "type_id", 0));
    if (eos)
        add_special(single, specials, &v->pieces[v->eos], v->eos);
    json_t *pair = json_deep_copy(single), *second = json_deep_copy(single);
    json_array_extend(pair, second); /* never used: a request is one text */
    json_decref(second);
    return json_pack("{s:s, s:o, s:o, s:o}", "type", "TemplateProcessing", "single", single, "pair",
                     pair, "special_tokens", specials);
}

/* Takes over all references, also after a failure. */
int tok_make_text(const struct vocab *v, json_t *added, json_t *normalizer, json_t *pre,
                     json_t *decoder, json_t *model, char **ret, struct err *err)
{
    json_t *o = json_pack("{s:s, s:n, s:n, s:o, s:o, s:o, s:o, s:o, s:o}", "version", "1.0",
                          "truncation", "padding", "added_tokens", added, "normalizer", normalizer,
                          "pre_tokenizer", pre, "post_processor", make_template(v), "decoder",
                          decoder, "model", model);
    char *text = o ? json_dumps(o, JSON_COMPACT) : NULL;
    json_decref(o);
    if (text == NULL)
        return err_nomem(err);
    *ret = text;
    return ERR_OK;
}

/* --- byte-level -------------------------------------------------------------------------------- */

/* How words are cut.  Llama 3 and Qwen 2 differ in how many digits stay together. */
#define CUT(digits)                                                                              \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" digits                         \
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

static const struct cutting {
    const char *name;
    const char *regex;   /* NULL: GPT-2's, which ByteLevel has built in */
    bool digits;         /* each digit on its own first */
    bool nfc;
    bool whole_words;    /* a word that is a token is not cut further */
    bool bos;
} cuttings[] = {
    { "gpt-2", NULL, false, false, false, false },
    { "smollm", NULL, true, false, false, false },
    { "llama-bpe", CUT("\\p{N}{1,3}"), false, false, true, true },
    { "llama3", CUT("\\p{N}{1,3}"), false, false, true, true },
    { "llama-v3", CUT("\\p{N}{1,3}"), false, false, true, true },
    { "qwen2", CUT("\\p{N}"), false, true, false, false },
};

static const struct cutting *find_cutting(const char *name)
{
    for (size_t i = 0; i < sizeof cuttings / sizeof cuttings[0]; i++)
        if (strcmp(cuttings[i].name, name) == 0)
            return &cuttings[i];
    return NULL;
}

bool tok_make_adds_bos(const char *pre)
{
    const struct cutting *c = find_cutting(pre);
    return c != NULL && c->bos;
}

static void append(json_t *array, json_t *v) { json_array_append_new(array, v); }

static json_t *byte_level(bool regex)
{
    return json_pack("{s:s, s:b, s:b, s:b}", "type", "ByteLevel", "add_prefix_space", 0,
                     "trim_offsets", 1, "use_regex", regex);
}

static json_t *bytelevel_pre(const struct cutting *c)
{
    json_t *steps = json_array();
    if (c->digits)
        append(steps, json_pack("{s:s, s:b}", "type", "Digits", "individual_digits", 1));
    if (c->regex != NULL)
        append(steps, json_pack("{s:s, s:{s:s}, s:s, s:b}", "type", "Split", "pattern", "Regex",
                                c->regex, "behavior", "Isolated", "invert", 0));
    append(steps, byte_level(c->regex == NULL));
    return json_pack("{s:s, s:o}", "type", "Sequence", "pretokenizers", steps);
}

static int copy_merges(const struct vocab *v, json_t *ret, struct err *err)
{
    for (size_t i = 0; i < v->nmerges; i++) {
        json_t *m = json_stringn(v->merges[i].s, v->merges[i].len);
        if (m == NULL || v->merges[i].len > 2 * PIECE_MAX_BYTES)
            return err_set(err, ERR_INVALID, "tokenizer: merge %zu is not UTF-8 or too long", i);
        if (json_array_append_new(ret, m) != 0)
            return err_nomem(err);
    }
    return ERR_OK;
}

int tok_make_bytelevel(const struct vocab *v, const char *pre, char **ret, struct err *err)
{
    const struct cutting *c = find_cutting(pre);
    if (c == NULL)
        return err_set(err, ERR_INVALID,
                       "the tokenizer cuts words by rule \"%.60s\", which is not known; gpt-2, "
                       "smollm, llama-bpe and qwen2 are", pre);
    struct tok_map map = { 0 };
    struct tok_str *str = NULL;
    json_t *vocab = NULL, *added = NULL, *merges = json_array();
    int rc = tok_make_check(v, &map, &str, err);
    if (rc == ERR_OK)
        rc = tok_make_vocab(v, false, &vocab, &added, err);
    if (rc == ERR_OK)
        rc = copy_merges(v, merges, err);
    free(map.slot);
    free(str);
    if (rc != ERR_OK) {
        json_decref(vocab);
        json_decref(added);
        json_decref(merges);
        return rc;
    }
    json_t *normalizer = c->nfc ? json_pack("{s:s}", "type", "NFC") : json_null();
    json_t *model = json_pack("{s:s, s:n, s:n, s:n, s:n, s:b, s:b, s:b, s:o, s:o}", "type", "BPE",
                              "dropout", "unk_token", "continuing_subword_prefix",
                              "end_of_word_suffix", "fuse_unk", 0, "byte_fallback", 0,
                              "ignore_merges", c->whole_words, "vocab", vocab, "merges", merges);
    return tok_make_text(v, added, normalizer, bytelevel_pre(c), byte_level(true), model, ret, err);
}

int tok_make_config(const struct vocab *v, char **ret, struct err *err)
{
    json_t *o = json_object();
    if (v->bos >= 0)
        json_object_set_new(o, "bos_token", tok_make_text_of(&v->pieces[v->bos]));
    if (v->eos >= 0)
        json_object_set_new(o, "eos_token", tok_make_text_of(&v->pieces[v->eos]));
    char *text = o ? json_dumps(o, JSON_COMPACT) : NULL;
    json_decref(o);
    if (text == NULL)
        return err_nomem(err);
    *ret = text;
    return ERR_OK;
}
