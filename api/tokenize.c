/* tokenize.c - /tokenize and /detokenize, in llama.cpp's shapes (`prompt` and `text` are also
 * understood for `content`). */
#include "api/api_int.h"

#include <stdlib.h>
#include <string.h>

/* The bytes of one token: a string, or an array of byte values when they are not UTF-8. */
static json_t *piece_json(const struct tokenizer *t, int32_t id)
{
    struct buf b;
    buf_init(&b, 1 << 16);
    tokenizer_piece(t, id, &b);
    json_t *j = json_stringn(b.data ? b.data : "", b.len);
    if (j == NULL) {
        j = json_array();
        for (size_t i = 0; b.data != NULL && i < b.len; i++)
            json_array_append_new(j, json_integer((unsigned char)b.data[i]));
    }
    buf_free(&b);
    return j;
}

static json_t *tokens_json(const struct tokenizer *t, const struct tok_ids *ids, bool pieces)
{
    json_t *list = json_array();
    for (size_t i = 0; i < ids->n; i++) {
        json_t *v = json_integer(ids->ids[i]);
        if (pieces)
            v = json_pack("{s:o, s:o}", "id", v, "piece", piece_json(t, ids->ids[i]));
        if (json_array_append_new(list, v) != 0) {
            json_decref(list);
            return NULL;
        }
    }
    return list;
}

static int encode(struct api_ctx *c, json_t *in, struct err *err)
{
    static const char *const known[] = { "content", "prompt", "text", "model", "add_special",
                                         "parse_special", "with_pieces", NULL };
    bool add_special = false, parse_special = true, pieces = false;
    int rc = json_only(in, known, err);
    if (rc == ERR_OK)
        rc = json_get_bool(in, "add_special", &add_special, err);
    if (rc == ERR_OK)
        rc = json_get_bool(in, "parse_special", &parse_special, err);
    if (rc == ERR_OK)
        rc = json_get_bool(in, "with_pieces", &pieces, err);
    if (rc != ERR_OK)
        return rc;
    const json_t *text = NULL;
    for (size_t i = 0; i < 3 && text == NULL; i++)
        text = json_object_get(in, known[i]);
    if (!json_is_string(text))
        return err_set_slug(err, ERR_INVALID, NULL, "content", "`content` must be a string");

    struct tok_ids ids = { 0 };
    const struct tokenizer *t = c->api->o.tokenizer;
    rc = tokenizer_encode(t, json_string_value(text), json_string_length(text), add_special,
                          parse_special, 0, &ids, err);
    if (rc == ERR_OK)
        rc = resp_json(c, 200, json_pack("{s:o}", "tokens", tokens_json(t, &ids, pieces)), err);
    free(ids.ids);
    return rc;
}

static int decode(struct api_ctx *c, json_t *in, struct err *err)
{
    static const char *const known[] = { "tokens", "model", NULL };
    int rc = json_only(in, known, err);
    if (rc != ERR_OK)
        return rc;
    const json_t *list = json_object_get(in, "tokens");
    if (!json_is_array(list))
        return err_set_slug(err, ERR_INVALID, NULL, "tokens",
                            "`tokens` must be an array of token ids");
    const size_t n = json_array_size(list);
    int32_t *ids = malloc((n + 1) * sizeof *ids);
    if (ids == NULL)
        return err_nomem(err);
    const struct tokenizer *t = c->api->o.tokenizer;
    for (size_t i = 0; i < n && rc == ERR_OK; i++) {
        const json_t *v = json_array_get(list, i);
        const json_int_t id = json_is_integer(v) ? json_integer_value(v) : -1;
        if (id < 0 || id >= tokenizer_size(t))
            rc = err_set_slug(err, ERR_INVALID, NULL, "tokens",
                              "`tokens`[%zu] must be a token id from 0 to %d", i,
                              tokenizer_size(t) - 1);
        else
            ids[i] = (int32_t)id;
    }
    struct buf text;
    buf_init(&text, (size_t)64 << 20);
    if (rc == ERR_OK)
        rc = tokenizer_decode(t, ids, n, false, &text, err);
    if (rc == ERR_OK)
        rc = resp_json(c, 200,
                       json_pack("{s:o}", "content", json_text(text.data ? text.data : "", text.len)),
                       err);
    free(ids);
    buf_free(&text);
    return rc;
}

static int with_body(struct api_ctx *c, int (*run)(struct api_ctx *, json_t *, struct err *),
                     struct err *err)
{
    json_t *in;
    int rc = body_json(c->req, false, &in, err);
    if (rc != ERR_OK)
        return rc;
    rc = run(c, in, err);
    json_decref(in);
    return rc;
}

int tokenize(struct api_ctx *c, struct err *err) { return with_body(c, encode, err); }

int detokenize(struct api_ctx *c, struct err *err) { return with_body(c, decode, err); }
