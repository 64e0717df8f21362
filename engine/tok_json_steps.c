/* tok_json_steps.c - normaliser, pre-tokenizer and decoder of tokenizer.json as lists of steps.
 *
 * Each is an object with a type, or a Sequence of such objects; nested sequences are flattened.
 * Every type and every key is in here or is refused by name. */
#include "engine/tokenizer_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The reference's pattern for GPT-2, in PCRE2's words. */
#define GPT2_PATTERN                                                                               \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+|"              \
    "\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+"

#define PUNCTUATION "[\\p{P}$+<=>^`|~]"

typedef int (*step_fn)(struct tokenizer *t, const json_t *o, const char *type, struct err *err);

/* What the three kinds of lists differ in. */
struct list {
    const char *what;  /* "normalizer": for messages */
    const char *items; /* key of a Sequence's list, */
    const char *keys;  /* and both its keys */
    step_fn step;      /* appends one step to the tokenizer */
};

static int read_list(struct tokenizer *t, const struct list *l, const json_t *o, int depth,
                     struct err *err)
{
    if (!json_is_object(o))
        return tok_bad(err, "%s is not an object", l->what);
    const char *type = json_string_value(json_object_get(o, "type"));
    if (type == NULL)
        return tok_bad(err, "%s has no type", l->what);
    if (strcmp(type, "Sequence") != 0)
        return l->step(t, o, type, err);
    if (depth == 8)
        return tok_bad(err, "%s nests too many sequences", l->what);
    int rc = tok_only(o, l->what, l->keys, err);
    const json_t *items = json_object_get(o, l->items);
    if (rc == ERR_OK && !json_is_array(items))
        rc = tok_bad(err, "a Sequence in %s has no list \"%s\"", l->what, l->items);
    for (size_t i = 0; rc == ERR_OK && i < json_array_size(items); i++)
        rc = read_list(t, l, json_array_get(items, i), depth + 1, err);
    return rc;
}

static int too_many(const char *what, struct err *err)
{
    return tok_bad(err, "%s has more than %d steps", what, TOK_MAX_STEPS);
}

static int unknown(const char *what, const char *type, struct err *err)
{
    return tok_bad(err, "the %s \"%.60s\" is not supported", what, type);
}

/* "pattern": {"String": "..."} or {"Regex": "..."}. */
static int read_pattern(const json_t *o, const char *where, struct tok_pattern *ret,
                        struct err *err)
{
    const json_t *p = json_object_get(o, "pattern");
    const json_t *s = json_object_get(p, "String"), *re = json_object_get(p, "Regex");
    if (json_object_size(p) == 1 && json_is_string(s))
        return tok_pattern_literal(ret, json_string_value(s), json_string_length(s), err);
    if (json_object_size(p) == 1 && json_is_string(re))
        return tok_pattern_onig(ret, json_string_value(re), json_string_length(re), err);
    return tok_bad(err, "%s needs a pattern with a String or a Regex", where);
}

static bool is_one_char(const char *s, size_t len)
{
    return len > 0 && tok_utf8(s, len) == (int)len;
}

static int one_char(const char *s, size_t len, const char *where, struct err *err)
{
    return is_one_char(s, len) ? ERR_OK
                               : tok_bad(err, "%s needs one character, not \"%.40s\"", where, s);
}

/* --- normaliser -------------------------------------------------------------------------- */
static int read_charsmap(struct tok_norm *st, const json_t *o, struct err *err)
{
    const json_t *map = json_object_get(o, "precompiled_charsmap");
    st->kind = NORM_CHARSMAP;
    int rc = tok_only(o, "Precompiled", "type precompiled_charsmap longest", err);
    if (rc == ERR_OK)
        rc = tok_get_bool(o, "Precompiled", "longest", false, &st->longest, err);
    if (rc == ERR_OK && !json_is_string(map))
        rc = tok_bad(err, "Precompiled needs a text \"precompiled_charsmap\"");
    return rc == ERR_OK
               ? tok_charsmap_read(st, json_string_value(map), json_string_length(map), err)
               : rc;
}

/* Up to five steps. */
static int read_bert(struct tokenizer *t, const json_t *o, struct err *err)
{
    bool clean, chinese, lower, accents;
    int rc = tok_only(o, "BertNormalizer",
                      "type clean_text handle_chinese_chars strip_accents lowercase", err);
    if (rc == ERR_OK)
        rc = tok_get_bool(o, "BertNormalizer", "clean_text", true, &clean, err);
    if (rc == ERR_OK)
        rc = tok_get_bool(o, "BertNormalizer", "handle_chinese_chars", true, &chinese, err);
    if (rc == ERR_OK)
        rc = tok_get_bool(o, "BertNormalizer", "lowercase", true, &lower, err);
    if (rc == ERR_OK)
        rc = tok_get_bool(o, "BertNormalizer", "strip_accents", lower, &accents, err);
    if (rc != ERR_OK)
        return rc;
    const struct {
        bool on;
        struct tok_norm step;
    } steps[] = { { clean, { .kind = NORM_CLEAN } },
                  { chinese, { .kind = NORM_CHINESE } },
                  { accents, { .kind = NORM_UNICODE } },
                  { accents, { .kind = NORM_STRIP_ACCENTS, .only_mn = true } },
                  { lower, { .kind = NORM_LOWERCASE } } };
    for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        if (!steps[i].on)
            continue;
        if (t->nnorm == TOK_MAX_STEPS)
            return too_many("the normalizer", err);
        t->norm[t->nnorm++] = steps[i].step;
    }
    return ERR_OK;
}

static int read_norm(struct tokenizer *t, const json_t *o, const char *type, struct err *err)
{
    static const struct {
        const char *name;
        bool compose, compat;
    } forms[] = {
        { "NFC", true, false },
        { "NFD", false, false },
        { "NFKC", true, true },
        { "NFKD", false, true },
    };
    if (t->nnorm == TOK_MAX_STEPS)
        return too_many("the normalizer", err);
    struct tok_norm *st = &t->norm[t->nnorm++];
    for (size_t i = 0; i < sizeof forms / sizeof forms[0]; i++)
        if (strcmp(type, forms[i].name) == 0) {
            st->kind = NORM_UNICODE;
            st->compose = forms[i].compose;
            st->compat = forms[i].compat;
            return tok_only(o, type, "type", err);
        }
    int rc;
    if (strcmp(type, "Prepend") == 0) {
        st->kind = NORM_PREPEND;
        rc = tok_only(o, type, "type prepend", err);
        return rc != ERR_OK ? rc : tok_get_text(o, type, "prepend", &st->text, &st->text_len, err);
    }
    if (strcmp(type, "Replace") == 0) {
        st->kind = NORM_REPLACE;
        rc = tok_only(o, type, "type pattern content", err);
        if (rc == ERR_OK)
            rc = read_pattern(o, type, &st->pattern, err);
        return rc != ERR_OK ? rc : tok_get_text(o, type, "content", &st->text, &st->text_len, err);
    }
    if (strcmp(type, "Strip") == 0) {
        st->kind = NORM_STRIP;
        rc = tok_only(o, type, "type strip_left strip_right", err);
        if (rc == ERR_OK)
            rc = tok_get_bool(o, type, "strip_left", true, &st->left, err);
        return rc != ERR_OK ? rc : tok_get_bool(o, type, "strip_right", true, &st->right, err);
    }
    static const struct {
        const char *name;
        int kind;
    } plain[] = { { "Lowercase", NORM_LOWERCASE },
                  { "ByteLevel", NORM_BYTES },
                  { "Nmt", NORM_NMT },
                  { "StripAccents", NORM_STRIP_ACCENTS } };
    for (size_t i = 0; i < sizeof plain / sizeof plain[0]; i++)
        if (strcmp(type, plain[i].name) == 0) {
            *st = (struct tok_norm){ .kind = plain[i].kind };
            return tok_only(o, type, "type", err);
        }
    if (strcmp(type, "Precompiled") == 0)
        return read_charsmap(st, o, err);
    if (strcmp(type, "BertNormalizer") == 0) {
        t->nnorm--;
        return read_bert(t, o, err);
    }
    return unknown("normalizer", type, err);
}

/* --- pre-tokenizer ----------------------------------------------------------------------- */
static int read_behavior(const json_t *o, const char *where, enum tok_behavior *ret,
                         struct err *err)
{
    static const char *const names[] = { [REMOVED] = "Removed",
                                         [ISOLATED] = "Isolated",
                                         [MERGED_WITH_PREVIOUS] = "MergedWithPrevious",
                                         [MERGED_WITH_NEXT] = "MergedWithNext",
                                         [CONTIGUOUS] = "Contiguous" };
    const char *s = json_string_value(json_object_get(o, "behavior"));
    for (int i = 0; s != NULL && i < (int)(sizeof names / sizeof names[0]); i++)
        if (strcmp(s, names[i]) == 0) {
            *ret = (enum tok_behavior)i;
            return ERR_OK;
        }
    return tok_bad(err, "%s has the unknown behavior \"%.40s\"", where, s != NULL ? s : "(none)");
}

static int read_byte_level(struct tok_pre *st, const json_t *o, struct err *err)
{
    bool use_regex = true, ignored;
    st->kind = PRE_BYTES;
    st->behavior = ISOLATED;
    int rc = tok_only(o, "ByteLevel", "type add_prefix_space trim_offsets use_regex", err);
    if (rc == ERR_OK)
        rc = tok_get_bool(o, "ByteLevel", "add_prefix_space", true, &st->prefix_space, err);
    if (rc == ERR_OK)
        rc = tok_get_bool(o, "ByteLevel", "trim_offsets", true, &ignored, err);
    if (rc == ERR_OK)
        rc = tok_get_bool(o, "ByteLevel", "use_regex", true, &use_regex, err);
    if (rc != ERR_OK || !use_regex)
        return rc;
    st->has_pattern = true;
    return tok_pattern_pcre(&st->pattern, GPT2_PATTERN, err);
}

/* Metaspace as pre-tokenizer and as decoder: replacement, and whether to prepend it. */
static int read_metaspace(const json_t *o, char **ret, size_t *ret_len, enum tok_prepend *prepend,
                          bool *split, struct err *err)
{
    static const char *const names[] = { "always", "first", "never" };
    bool prefix = true;
    int rc = tok_only(o, "Metaspace",
                      "type replacement prepend_scheme split add_prefix_space str_rep", err);
    if (rc == ERR_OK)
        rc = tok_get_text(o, "Metaspace", "replacement", ret, ret_len, err);
    if (rc == ERR_OK)
        rc = one_char(*ret, *ret_len, "Metaspace", err);
    if (rc == ERR_OK)
        rc = tok_get_bool(o, "Metaspace", "split", true, split, err);
    if (rc == ERR_OK)
        rc = tok_get_bool(o, "Metaspace", "add_prefix_space", true, &prefix, err);
    if (rc != ERR_OK)
        return rc;
    const json_t *scheme = json_object_get(o, "prepend_scheme");
    *prepend = PREPEND_ALWAYS;
    for (int i = 0; scheme != NULL; i++) {
        if (i == 3 || !json_is_string(scheme))
            return tok_bad(err, "Metaspace has an unknown prepend_scheme");
        if (strcmp(json_string_value(scheme), names[i]) == 0) {
            *prepend = (enum tok_prepend)i;
            break;
        }
    }
    if (!prefix && scheme != NULL && *prepend != PREPEND_NEVER)
        return tok_bad(err, "Metaspace's add_prefix_space contradicts its prepend_scheme");
    if (!prefix)
        *prepend = PREPEND_NEVER;
    return ERR_OK;
}

static int read_split(struct tok_pre *st, const json_t *o, struct err *err)
{
    st->has_pattern = true;
    int rc = tok_only(o, "Split", "type pattern behavior invert", err);
    if (rc == ERR_OK)
        rc = read_pattern(o, "Split", &st->pattern, err);
    if (rc == ERR_OK)
        rc = read_behavior(o, "Split", &st->behavior, err);
    return rc == ERR_OK ? tok_get_bool(o, "Split", "invert", false, &st->invert, err) : rc;
}

static int read_delimiter(struct tok_pre *st, const json_t *o, struct err *err)
{
    const json_t *c = json_object_get(o, "delimiter");
    st->behavior = REMOVED;
    int rc = tok_only(o, "CharDelimiterSplit", "type delimiter", err);
    if (rc == ERR_OK && !json_is_string(c))
        rc = tok_bad(err, "CharDelimiterSplit needs a text \"delimiter\"");
    if (rc == ERR_OK)
        rc = one_char(json_string_value(c), json_string_length(c), "CharDelimiterSplit", err);
    return rc == ERR_OK ? tok_pattern_literal(&st->pattern, json_string_value(c),
                                              json_string_length(c), err)
                        : rc;
}

static int read_fixed_length(struct tok_pre *st, const json_t *o, struct err *err)
{
    const json_t *v = json_object_get(o, "length");
    json_int_t n = v == NULL ? 5 : json_is_integer(v) ? json_integer_value(v) : 0;
    st->behavior = ISOLATED;
    int rc = tok_only(o, "FixedLength", "type length", err);
    if (rc == ERR_OK && (n < 1 || n > 65535))
        rc = tok_bad(err, "FixedLength's \"length\" must be 1 to 65535");
    char pattern[32];
    snprintf(pattern, sizeof pattern, "(?s).{1,%d}", (int)n);
    return rc == ERR_OK ? tok_pattern_pcre(&st->pattern, pattern, err) : rc;
}

/* Splits whose pattern the type implies. */
static int read_fixed_split(struct tok_pre *st, const json_t *o, const char *type, struct err *err)
{
    bool individual = false;
    int rc;
    st->has_pattern = true;
    if (strcmp(type, "Whitespace") == 0) {
        st->behavior = REMOVED;
        st->invert = true;
        rc = tok_only(o, type, "type", err);
        return rc != ERR_OK
                   ? rc
                   : tok_pattern_pcre(&st->pattern,
                                      "[" TOK_WORD "]+|[^" TOK_WORD "\\p{White_Space}]+", err);
    }
    if (strcmp(type, "WhitespaceSplit") == 0) {
        st->behavior = REMOVED;
        rc = tok_only(o, type, "type", err);
        return rc != ERR_OK ? rc : tok_pattern_pcre(&st->pattern, "\\p{White_Space}", err);
    }
    if (strcmp(type, "Digits") == 0) {
        rc = tok_only(o, type, "type individual_digits", err);
        if (rc == ERR_OK)
            rc = tok_get_bool(o, type, "individual_digits", false, &individual, err);
        st->behavior = individual ? ISOLATED : CONTIGUOUS;
        return rc != ERR_OK ? rc : tok_pattern_pcre(&st->pattern, "\\p{N}", err);
    }
    if (strcmp(type, "Punctuation") == 0) {
        st->behavior = ISOLATED;
        rc = tok_only(o, type, "type behavior", err);
        if (rc == ERR_OK && json_object_get(o, "behavior") != NULL)
            rc = read_behavior(o, type, &st->behavior, err);
        return rc != ERR_OK ? rc : tok_pattern_pcre(&st->pattern, PUNCTUATION, err);
    }
    if (strcmp(type, "CharDelimiterSplit") == 0)
        return read_delimiter(st, o, err);
    if (strcmp(type, "FixedLength") == 0)
        return read_fixed_length(st, o, err);
    return unknown("pre-tokenizer", type, err);
}

/* At white space, then at punctuation. */
static int read_bert_pre(struct tokenizer *t, struct tok_pre *st, const json_t *o, struct err *err)
{
    if (t->npre == TOK_MAX_STEPS)
        return too_many("the pre-tokenizer", err);
    st[0].behavior = REMOVED;
    st[1].behavior = ISOLATED;
    st[0].has_pattern = st[1].has_pattern = true;
    t->npre++;
    int rc = tok_only(o, "BertPreTokenizer", "type", err);
    if (rc == ERR_OK)
        rc = tok_pattern_pcre(&st[0].pattern, "\\p{White_Space}", err);
    return rc == ERR_OK ? tok_pattern_pcre(&st[1].pattern, PUNCTUATION, err) : rc;
}

static int read_pre(struct tokenizer *t, const json_t *o, const char *type, struct err *err)
{
    if (t->npre == TOK_MAX_STEPS)
        return too_many("the pre-tokenizer", err);
    struct tok_pre *st = &t->pre[t->npre++];
    if (strcmp(type, "ByteLevel") == 0)
        return read_byte_level(st, o, err);
    if (strcmp(type, "Split") == 0)
        return read_split(st, o, err);
    if (strcmp(type, "BertPreTokenizer") == 0)
        return read_bert_pre(t, st, o, err);
    if (strcmp(type, "Metaspace") != 0)
        return read_fixed_split(st, o, type, err);
    st->kind = PRE_METASPACE;
    st->behavior = MERGED_WITH_NEXT;
    int rc = read_metaspace(o, &st->replacement, &st->replacement_len, &st->prepend,
                            &st->has_pattern, err);
    if (rc != ERR_OK || !st->has_pattern)
        return rc;
    return tok_pattern_literal(&st->pattern, st->replacement, st->replacement_len, err);
}

/* --- decoder ----------------------------------------------------------------------------- */
static int read_count(const json_t *o, const char *key, size_t *ret, struct err *err)
{
    const json_t *v = json_object_get(o, key);
    if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > 1000)
        return tok_bad(err, "Strip's \"%s\" must be 0 to 1000", key);
    *ret = (size_t)json_integer_value(v);
    return ERR_OK;
}

static int read_dec(struct tokenizer *t, const json_t *o, const char *type, struct err *err)
{
    if (t->ndec == TOK_MAX_STEPS)
        return too_many("the decoder", err);
    struct tok_decoder *st = &t->dec[t->ndec++];
    int rc;
    if (strcmp(type, "ByteLevel") == 0) {
        st->kind = DEC_BYTES;
        return tok_only(o, type, "type add_prefix_space trim_offsets use_regex", err);
    }
    if (strcmp(type, "ByteFallback") == 0 || strcmp(type, "Fuse") == 0) {
        st->kind = type[0] == 'B' ? DEC_BYTE_FALLBACK : DEC_FUSE;
        return tok_only(o, type, "type", err);
    }
    if (strcmp(type, "Replace") == 0) {
        st->kind = DEC_REPLACE;
        rc = tok_only(o, type, "type pattern content", err);
        if (rc == ERR_OK)
            rc = read_pattern(o, type, &st->pattern, err);
        return rc != ERR_OK ? rc : tok_get_text(o, type, "content", &st->text, &st->text_len, err);
    }
    if (strcmp(type, "Strip") == 0) {
        st->kind = DEC_STRIP;
        rc = tok_only(o, type, "type content start stop", err);
        if (rc == ERR_OK)
            rc = tok_get_text(o, type, "content", &st->text, &st->text_len, err);
        if (rc == ERR_OK)
            rc = one_char(st->text, st->text_len, type, err);
        if (rc == ERR_OK)
            rc = read_count(o, "start", &st->start, err);
        return rc == ERR_OK ? read_count(o, "stop", &st->stop, err) : rc;
    }
    if (strcmp(type, "BPEDecoder") == 0) {
        st->kind = DEC_SUFFIX;
        rc = tok_only(o, type, "type suffix", err);
        if (rc == ERR_OK)
            rc = tok_get_text(o, type, "suffix", &st->text, &st->text_len, err);
        return rc != ERR_OK ? rc : tok_pattern_literal(&st->pattern, st->text, st->text_len, err);
    }
    if (strcmp(type, "Metaspace") == 0) {
        enum tok_prepend prepend;
        bool split;
        st->kind = DEC_METASPACE;
        rc = read_metaspace(o, &st->text, &st->text_len, &prepend, &split, err);
        st->drop_first = rc == ERR_OK && prepend != PREPEND_NEVER;
        return rc != ERR_OK ? rc : tok_pattern_literal(&st->pattern, st->text, st->text_len, err);
    }
    return unknown("decoder", type, err);
}

/* --- the three --------------------------------------------------------------------------- */
int tok_read_normalizer(struct tokenizer *t, const json_t *o, struct err *err)
{
    static const struct list l = { "the normalizer", "normalizers", "type normalizers", read_norm };
    t->norm = calloc(TOK_MAX_STEPS, sizeof *t->norm);
    if (t->norm == NULL)
        return err_nomem(err);
    return o == NULL || json_is_null(o) ? ERR_OK : read_list(t, &l, o, 0, err);
}

int tok_read_pre_tokenizer(struct tokenizer *t, const json_t *o, struct err *err)
{
    static const struct list l = { "the pre_tokenizer", "pretokenizers", "type pretokenizers",
                                   read_pre };
    t->pre = calloc(TOK_MAX_STEPS, sizeof *t->pre);
    if (t->pre == NULL)
        return err_nomem(err);
    return o == NULL || json_is_null(o) ? ERR_OK : read_list(t, &l, o, 0, err);
}

int tok_read_decoder(struct tokenizer *t, const json_t *o, struct err *err)
{
    static const struct list l = { "the decoder", "decoders", "type decoders", read_dec };
    t->dec = calloc(TOK_MAX_STEPS, sizeof *t->dec);
    if (t->dec == NULL)
        return err_nomem(err);
    if (o == NULL || json_is_null(o))
        return ERR_OK;
    t->has_decoder = true;
    return read_list(t, &l, o, 0, err);
}
