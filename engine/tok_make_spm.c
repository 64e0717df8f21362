/* tok_make_spm.c - SentencePiece's BPE and Unigram models as tokenizer.json.
 *
 * BPE becomes what transformers' converters write.  For Unigram and for character maps those write
 * something that reads texts otherwise than SentencePiece itself does: its sums are fp32, the
 * longest entry of a map counts, pieces for control and bytes are no spelling of a text.  So the text
 * has two members of our own: "longest" of a Precompiled step, and "sentencepiece" of a Unigram model,
 * in whose vocabulary a piece with null for a score is never found in a text. */
#include "engine/tok_make_int.h"

#include <sodium.h>
#include <stdlib.h>
#include <string.h>

/* --- SentencePiece: merges from scores ----------------------------------------------------- */

struct pair {
    float score;
    uint32_t id, left, right; /* of the piece and its halves */
};

struct pairs {
    struct pair *list;
    size_t n, cap;
};

/* Best score first; of one score, as the vocabulary has them. */
static int by_rank(const void *pa, const void *pb)
{
    const struct pair *a = pa, *b = pb;
    if (a->score != b->score)
        return a->score > b->score ? -1 : 1;
    if (a->id != b->id)
        return a->id < b->id ? -1 : 1;
    if (a->left != b->left)
        return a->left < b->left ? -1 : 1;
    return (a->right > b->right) - (a->right < b->right);
}

static bool can_merge(const struct piece *p)
{
    return p->type == PIECE_NORMAL || p->type == PIECE_UNUSED;
}

static int add_pair(struct pairs *ps, struct pair p, struct err *err)
{
    if (ps->n == ps->cap) {
        size_t cap = ps->cap ? 2 * ps->cap : 4096;
        struct pair *list = realloc(ps->list, cap * sizeof *list);
        if (list == NULL)
            return err_nomem(err);
        ps->list = list;
        ps->cap = cap;
    }
    ps->list[ps->n++] = p;
    return ERR_OK;
}

/* All ways to make piece `id` of two others. */
static int find_halves(const struct vocab *v, const struct tok_map *map, size_t id,
                       struct pairs *ps, struct err *err)
{
    const struct piece *p = &v->pieces[id];
    int rc = ERR_OK;
    for (size_t at = 1; at < p->len && rc == ERR_OK; at++) {
        if (((unsigned char)p->s[at] & 0xc0) == 0x80)
            continue;
        int left = tok_map_get(map, p->s, at);
        int right = left < 0 ? -1 : tok_map_get(map, p->s + at, p->len - at);
        if (right < 0 || !can_merge(&v->pieces[left]) || !can_merge(&v->pieces[right]))
            continue;
        rc = add_pair(ps, (struct pair){ .score = p->score, .id = (uint32_t)id,
                                         .left = (uint32_t)left, .right = (uint32_t)right }, err);
    }
    return rc;
}

static int make_merges(const struct vocab *v, const struct tok_map *map, json_t *ret,
                       struct err *err)
{
    struct pairs ps = { 0 };
    int rc = ERR_OK;
    for (size_t i = 0; i < v->n && rc == ERR_OK; i++)
        if (can_merge(&v->pieces[i]))
            rc = find_halves(v, map, i, &ps, err);
    if (ps.n > 1)
        qsort(ps.list, ps.n, sizeof *ps.list, by_rank);
    for (size_t i = 0; i < ps.n && rc == ERR_OK; i++) {
        const struct piece *l = &v->pieces[ps.list[i].left], *r = &v->pieces[ps.list[i].right];
        if (json_array_append_new(ret, json_pack("[o, o]", tok_make_text_of(l), tok_make_text_of(r))) != 0)
            rc = err_nomem(err);
    }
    free(ps.list);
    return rc;
}

/* --- SentencePiece: the rest ---------------------------------------------------------------- */

static void append(json_t *array, json_t *v) { json_array_append_new(array, v); }

static json_t *replacing(const char *kind, const char *pattern, const char *content)
{
    return json_pack("{s:s, s:{s:s}, s:s}", "type", "Replace", "pattern", kind, pattern, "content",
                     content);
}

static json_t *charsmap_step(const struct vocab *v)
{
    const size_t size = sodium_base64_encoded_len(v->charsmap_len, sodium_base64_VARIANT_ORIGINAL);
    char *text = malloc(size);
    if (text == NULL)
        return NULL;
    sodium_bin2base64(text, size, v->charsmap, v->charsmap_len, sodium_base64_VARIANT_ORIGINAL);
    json_t *o = json_pack("{s:s, s:s, s:b}", "type", "Precompiled", "precompiled_charsmap", text,
                          "longest", 1);
    free(text);
    return o;
}

static json_t *spm_normalizer(const struct vocab *v)
{
    json_t *steps = json_array();
    if (v->charsmap != NULL)
        append(steps, charsmap_step(v));
    if (v->squeeze_spaces) {
        append(steps, replacing("Regex", "\\A +|[ " SPACE_MARK "]+\\z", ""));
        append(steps, replacing("Regex", " {2,}", " "));
    }
    if (v->prefix_space && !v->prefix_once)
        append(steps, json_pack("{s:s, s:s}", "type", "Prepend", "prepend", SPACE_MARK));
    if (!v->prefix_once)
        append(steps, replacing("String", " ", SPACE_MARK));
    if (json_array_size(steps) > 0)
        return json_pack("{s:s, s:o}", "type", "Sequence", "normalizers", steps);
    json_decref(steps);
    return json_null();
}

static json_t *spm_pre(const struct vocab *v)
{
    if (!v->prefix_once)
        return json_null();
    return json_pack("{s:s, s:s, s:s, s:b}", "type", "Metaspace", "replacement", SPACE_MARK,
                     "prepend_scheme", v->prefix_space ? "first" : "never", "split", 0);
}

static json_t *spm_decoder(const struct vocab *v)
{
    json_t *steps = json_array();
    append(steps, replacing("String", SPACE_MARK, " "));
    append(steps, json_pack("{s:s}", "type", "ByteFallback"));
    append(steps, json_pack("{s:s}", "type", "Fuse"));
    if (v->prefix_space)
        append(steps, json_pack("{s:s, s:s, s:i, s:i}", "type", "Strip", "content", " ", "start", 1,
                                "stop", 0));
    return json_pack("{s:s, s:o}", "type", "Sequence", "decoders", steps);
}

static bool has_bytes(const struct vocab *v)
{
    for (size_t i = 0; i < v->n; i++)
        if (v->pieces[i].type == PIECE_BYTE)
            return true;
    return false;
}

/* --- Unigram -------------------------------------------------------------------------------- */

/* Texts with their scores by id; null for what no text is spelled with. */
static json_t *unigram_vocab(const struct vocab *v, struct err *err)
{
    json_t *list = json_array();
    for (size_t i = 0; i < v->n; i++) {
        const struct piece *p = &v->pieces[i];
        json_t *text = p->type == PIECE_USER ? tok_make_with_spaces(p) : tok_make_text_of(p);
        json_t *score = p->type == PIECE_NORMAL ? json_real((double)p->score) : json_null();
        if (json_array_append_new(list, json_pack("[o, o]", text, score)) != 0) {
            json_decref(list);
            err_nomem(err);
            return NULL;
        }
    }
    return list;
}

static int make_unigram(const struct vocab *v, char **ret, struct err *err)
{
    json_t *names = NULL, *added = NULL, *list = NULL;
    int rc = v->unk >= 0 ? ERR_OK
                         : err_set(err, ERR_INVALID, "tokenizer: a Unigram model without a piece for "
                                                     "what is unknown");
    if (rc == ERR_OK)
        rc = tok_make_vocab(v, true, &names, &added, err);
    json_decref(names);
    if (rc == ERR_OK && (list = unigram_vocab(v, err)) == NULL)
        rc = ERR_NOMEM;
    if (rc != ERR_OK) {
        json_decref(added);
        return rc;
    }
    json_t *model = json_pack("{s:s, s:i, s:o, s:b, s:b}", "type", "Unigram", "unk_id", v->unk,
                              "vocab", list, "byte_fallback", has_bytes(v), "sentencepiece", 1);
    return tok_make_text(v, added, spm_normalizer(v), spm_pre(v), spm_decoder(v), model, ret, err);
}

/* --- BPE ------------------------------------------------------------------------------------- */

static int make_bpe(const struct vocab *v, const struct tok_map *map, char **ret, struct err *err)
{
    json_t *vocab = NULL, *added = NULL, *merges = json_array();
    int rc = tok_make_vocab(v, true, &vocab, &added, err);
    if (rc == ERR_OK)
        rc = make_merges(v, map, merges, err);
    if (rc != ERR_OK) {
        json_decref(vocab);
        json_decref(added);
        json_decref(merges);
        return rc;
    }
    json_t *unk = v->unk >= 0 ? tok_make_text_of(&v->pieces[v->unk]) : json_null();
    json_t *model = json_pack("{s:s, s:n, s:o, s:n, s:n, s:b, s:b, s:b, s:o, s:o}", "type", "BPE",
                              "dropout", "unk_token", unk, "continuing_subword_prefix",
                              "end_of_word_suffix", "fuse_unk", 1, "byte_fallback", has_bytes(v),
                              "ignore_merges", 0, "vocab", vocab, "merges", merges);
    return tok_make_text(v, added, spm_normalizer(v), spm_pre(v), spm_decoder(v), model, ret, err);
}

int tok_make_spm(const struct vocab *v, char **ret, struct err *err)
{
    struct tok_map map = { 0 };
    struct tok_str *str = NULL;
    int rc = tok_make_check(v, &map, &str, err);
    if (rc == ERR_OK)
        rc = v->unigram ? make_unigram(v, ret, err) : make_bpe(v, &map, ret, err);
    free(map.slot);
    free(str);
    return rc;
}
