/* sentencepiece.c - see sentencepiece.h.
 *
 * Fields of the protocol buffer that matter, by number: ModelProto 1 piece (repeated; 1 text, 2
 * score, 3 type), 2 trainer (3 model type, 24 space as suffix, 40 to 42 ids of unknown, bos, eos),
 * 3 normaliser (2 compiled character map, 3 space in front, 4 squeeze spaces, 5 spaces become
 * U+2581), 5 denormaliser (2 compiled character map).  All others are about training. */
#include "engine/sentencepiece.h"

#include <jansson.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* --- protocol buffers ------------------------------------------------------------------- */

struct message {
    const uint8_t *at, *end;
};

struct field {
    uint64_t number, value;  /* value: of a varint, or the bits of 4 or 8 bytes */
    unsigned wire;
    struct message bytes;    /* of a field with a length */
};

enum { VARINT = 0, EIGHT = 1, BYTES = 2, FOUR = 5 };

static bool read_varint(struct message *m, uint64_t *ret)
{
    *ret = 0;
    for (unsigned shift = 0; shift < 64 && m->at < m->end; shift += 7) {
        uint8_t b = *m->at++;
        *ret |= (uint64_t)(b & 0x7f) << shift;
        if (b < 0x80)
            return true;
    }
    return false;
}

static bool read_fixed(struct message *m, unsigned n, uint64_t *ret)
{
    if ((size_t)(m->end - m->at) < n)
        return false;
    *ret = 0;
    for (unsigned i = 0; i < n; i++)
        *ret |= (uint64_t)*m->at++ << (8 * i);
    return true;
}

/* 1: a field, 0: the end, -1: no protocol buffer. */
static int next(struct message *m, struct field *f)
{
    uint64_t tag;
    if (m->at == m->end)
        return 0;
    *f = (struct field){ 0 };
    if (!read_varint(m, &tag) || tag >> 3 == 0)
        return -1;
    f->number = tag >> 3;
    f->wire = tag & 7;
    if (f->wire == VARINT)
        return read_varint(m, &f->value) ? 1 : -1;
    if (f->wire == EIGHT || f->wire == FOUR)
        return read_fixed(m, f->wire == EIGHT ? 8 : 4, &f->value) ? 1 : -1;
    if (f->wire != BYTES || !read_varint(m, &f->value) || f->value > (size_t)(m->end - m->at))
        return -1;
    f->bytes = (struct message){ m->at, m->at + f->value };
    m->at += f->value;
    return 1;
}

static int broken(struct err *err)
{
    return err_set(err, ERR_INVALID, "tokenizer.model is not a SentencePiece model, or cut off");
}

static int refused(const char *what, struct err *err)
{
    return err_set(err, ERR_INVALID, "tokenizer.model %s, which is not supported", what);
}

/* --- the model -------------------------------------------------------------------------- */

static int read_piece(struct message m, struct piece *p, struct err *err)
{
    struct field f;
    int more;
    *p = (struct piece){ .type = PIECE_NORMAL };
    while ((more = next(&m, &f)) == 1) {
        if (f.number == 1 && f.wire == BYTES) {
            p->s = (const char *)f.bytes.at;
            p->len = (size_t)f.value;
        } else if (f.number == 2 && f.wire == FOUR) {
            uint32_t bits = (uint32_t)f.value;
            memcpy(&p->score, &bits, 4);
        } else if (f.number == 3 && f.wire == VARINT) {
            p->type = f.value > PIECE_BYTE ? (enum piece_type)0 : (enum piece_type)f.value;
        }
    }
    return more == 0 ? ERR_OK : broken(err);
}

/* Negative ids, which mean "none", come as 64 bits. */
static int id_of(uint64_t v) { return v > INT32_MAX ? -1 : (int)v; }

static int read_trainer(struct message m, struct vocab *v, struct err *err)
{
    static const char *const kinds[] = { "is of no known kind", "", "", "is a word model",
                                         "is a character model" };
    struct field f;
    int more;
    uint64_t kind = 1;
    while ((more = next(&m, &f)) == 1) {
        if (f.wire != VARINT)
            continue;
        if (f.number == 3)
            kind = f.value;
        else if (f.number == 24 && f.value != 0)
            return refused("marks spaces at the end of words", err);
        else if (f.number == 40)
            v->unk = id_of(f.value);
        else if (f.number == 41)
            v->bos = id_of(f.value);
        else if (f.number == 42)
            v->eos = id_of(f.value);
    }
    if (more != 0)
        return broken(err);
    v->unigram = kind == 1;
    return kind == 1 || kind == 2 ? ERR_OK : refused(kinds[kind < 5 ? kind : 0], err);
}

static int read_normalizer(struct message m, struct vocab *v, struct err *err)
{
    struct field f;
    int more;
    while ((more = next(&m, &f)) == 1) {
        if (f.number == 2 && f.wire == BYTES && f.value != 0) {
            v->charsmap = f.bytes.at;
            v->charsmap_len = (size_t)f.value;
        }
        if (f.wire != VARINT)
            continue;
        if (f.number == 3)
            v->prefix_space = f.value != 0;
        else if (f.number == 4)
            v->squeeze_spaces = f.value != 0;
        else if (f.number == 5 && f.value == 0)
            return refused("keeps spaces as they are", err);
    }
    return more == 0 ? ERR_OK : broken(err);
}

static int read_denormalizer(struct message m, struct err *err)
{
    struct field f;
    int more;
    while ((more = next(&m, &f)) == 1)
        if (f.number == 2 && f.wire == BYTES && f.value != 0)
            return refused("rewrites characters of its output (denormalizer_spec)", err);
    return more == 0 ? ERR_OK : broken(err);
}

static int count_pieces(struct message m, size_t *ret, struct err *err)
{
    struct field f;
    int more;
    *ret = 0;
    while ((more = next(&m, &f)) == 1)
        *ret += f.number == 1 && f.wire == BYTES;
    return more == 0 && *ret > 0 ? ERR_OK : broken(err);
}

int spm_read(const void *data, size_t len, struct vocab *ret, struct err *err)
{
    struct message m = { data, (const uint8_t *)data + len };
    struct vocab v = { .bos = 1, .eos = 2, .unk = 0, .prefix_space = true, .squeeze_spaces = true };
    struct field f;
    bool trained = false;
    int rc = count_pieces(m, &v.n, err);
    if (rc != ERR_OK)
        return rc;
    struct piece *pieces = calloc(v.n + 1, sizeof *pieces), *p = pieces;
    if (pieces == NULL)
        return err_nomem(err);
    while (rc == ERR_OK && next(&m, &f) == 1) {
        if (f.wire != BYTES)
            continue;
        if (f.number == 1)
            rc = read_piece(f.bytes, p++, err);
        else if (f.number == 2)
            rc = read_trainer(f.bytes, &v, err);
        else if (f.number == 3)
            rc = read_normalizer(f.bytes, &v, err);
        else if (f.number == 5)
            rc = read_denormalizer(f.bytes, err);
        trained |= f.number == 2;
    }
    if (rc == ERR_OK && !trained)
        rc = refused("does not say what kind of model it is", err);
    if (rc != ERR_OK) {
        free(pieces);
        return rc;
    }
    v.pieces = pieces;
    *ret = v;
    return ERR_OK;
}

/* --- what lies beside it ------------------------------------------------------------------ */

static int bad_config(const char *what, struct err *err)
{
    return err_set(err, ERR_INVALID, "tokenizer_config.json: %s", what);
}

static int read_flag(const json_t *o, const char *key, bool *ret, struct err *err)
{
    const json_t *v = json_object_get(o, key);
    if (v == NULL || json_is_null(v))
        return ERR_OK;
    if (!json_is_boolean(v))
        return err_set(err, ERR_INVALID, "tokenizer_config.json: %s is neither true nor false", key);
    *ret = json_is_true(v);
    return ERR_OK;
}

static int find_piece(const struct vocab *v, const char *s)
{
    for (size_t i = 0; i < v->n; i++)
        if (v->pieces[i].len == strlen(s) && memcmp(v->pieces[i].s, s, strlen(s)) == 0)
            return (int)i;
    return -1;
}

/* "bos_token": a name, or an object with it as content. */
static int read_special(const json_t *o, const char *key, const struct vocab *v, int *ret,
                        struct err *err)
{
    const json_t *t = json_object_get(o, key);
    const char *s = json_string_value(json_is_object(t) ? json_object_get(t, "content") : t);
    if (s == NULL)
        return ERR_OK;
    *ret = find_piece(v, s);
    return *ret >= 0 ? ERR_OK
                     : err_set(err, ERR_INVALID, "tokenizer_config.json: %s \"%.60s\" is no piece of "
                                                 "tokenizer.model", key, s);
}

/* The id that an object's key is, or -1. */
static int id_of_key(const char *key)
{
    char *end;
    long id = strtol(key, &end, 10);
    return *key >= '0' && *key <= '9' && *end == '\0' && id < 1 << 21 ? (int)id : -1;
}

/* added_tokens_decoder: {"32000": {"content": ..., flags}} to tokenizer.json's list. */
static int read_decoder(const json_t *decoder, json_t *ret, struct err *err)
{
    const char *key;
    json_t *v;
    json_object_foreach((json_t *)decoder, key, v) {
        json_t *o = json_deep_copy(v);
        int id = id_of_key(key);
        if (id < 0 || !json_is_object(o) || !json_is_string(json_object_get(o, "content"))) {
            json_decref(o);
            return bad_config("added_tokens_decoder is not ids with their tokens", err);
        }
        if (json_object_set_new(o, "id", json_integer(id)) != 0 || json_array_append_new(ret, o) != 0)
            return err_nomem(err);
    }
    return ERR_OK;
}

/* Only these classes make of a model what tok_make_spm() makes of it. */
static int check_class(const json_t *o, struct err *err)
{
    static const char *const known[] = { "LlamaTokenizer", "LlamaTokenizerFast" };
    const char *name = json_string_value(json_object_get(o, "tokenizer_class"));
    for (size_t i = 0; name != NULL && i < sizeof known / sizeof known[0]; i++)
        if (strcmp(name, known[i]) == 0)
            return ERR_OK;
    return name == NULL ? ERR_OK
                        : err_set(err, ERR_INVALID,
                                  "tokenizer_config.json: a tokenizer.model of class %.60s needs a "
                                  "tokenizer.json beside it", name);
}

static int read_config(const json_t *o, struct vocab *v, json_t *extra, struct err *err)
{
    bool legacy = true;
    int rc = check_class(o, err);
    if (rc == ERR_OK)
        rc = read_flag(o, "add_bos_token", &v->add_bos, err);
    if (rc == ERR_OK)
        rc = read_flag(o, "add_eos_token", &v->add_eos, err);
    if (rc == ERR_OK)
        rc = read_flag(o, "legacy", &legacy, err);
    if (rc == ERR_OK)
        rc = read_flag(o, "add_prefix_space", &v->prefix_space, err);
    if (rc == ERR_OK && v->add_bos)
        rc = read_special(o, "bos_token", v, &v->bos, err);
    if (rc == ERR_OK && v->add_eos)
        rc = read_special(o, "eos_token", v, &v->eos, err);
    if (rc == ERR_OK)
        rc = read_special(o, "unk_token", v, &v->unk, err);
    v->prefix_once = !legacy;
    return rc == ERR_OK ? read_decoder(json_object_get(o, "added_tokens_decoder"), extra, err) : rc;
}

static bool lists(const json_t *extra, const char *content)
{
    for (size_t i = 0; i < json_array_size(extra); i++)
        if (strcmp(json_string_value(json_object_get(json_array_get(extra, i), "content")),
                   content) == 0)
            return true;
    return false;
}

/* added_tokens.json is older and says less; it may repeat what is known. */
static int check_added(const char *text, const struct vocab *v, const json_t *extra,
                       struct err *err)
{
    json_t *o = json_loads(text, 0, NULL);
    const char *key;
    json_t *id;
    int rc = json_is_object(o) ? ERR_OK
                               : err_set(err, ERR_INVALID, "added_tokens.json is no JSON object");
    json_object_foreach(o, key, id)
        if (rc == ERR_OK && find_piece(v, key) < 0 && !lists(extra, key))
            rc = err_set(err, ERR_INVALID,
                         "added_tokens.json has \"%.60s\", but neither tokenizer.model nor "
                         "tokenizer_config.json says what kind of token that is", key);
    json_decref(o);
    return rc;
}

int spm_tokenizer(const void *data, size_t len, const char *config, const char *added,
                  char **ret_json, struct err *err)
{
    struct vocab v;
    int rc = spm_read(data, len, &v, err);
    if (rc != ERR_OK)
        return rc;
    json_t *o = config ? json_loads(config, 0, NULL) : NULL, *extra = json_array();
    v.add_bos = true;
    v.extra = extra;
    if (config != NULL)
        rc = json_is_object(o) ? read_config(o, &v, extra, err)
                               : bad_config("it is no JSON object", err);
    if (rc == ERR_OK && added != NULL)
        rc = check_added(added, &v, extra, err);
    if (rc == ERR_OK)
        rc = tok_make_spm(&v, ret_json, err);
    json_decref(o);
    json_decref(extra);
    free((struct piece *)v.pieces);
    return rc;
}
