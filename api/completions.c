/* completions.c - /v1/completions: a prompt is a string, an array of strings, an array of token
 * ids, or an array of those. */
#include "api/gen.h"

#include <stdlib.h>
#include <string.h>

static int from_text(struct api_ctx *c, const json_t *v, bool keep, struct gen_prompt *ret,
                     struct err *err)
{
    const char *s = json_string_value(v);
    const size_t len = json_string_length(v);
    int rc = tokenizer_encode(c->api->o.tokenizer, s, len, true, true, 0, &ret->ids, err);
    if (rc != ERR_OK)
        return rc;
    if (keep) {
        ret->text = malloc(len + 1);
        if (ret->text == NULL)
            return err_nomem(err);
        memcpy(ret->text, s, len);
        ret->text[len] = '\0';
        ret->text_len = len;
    }
    return ERR_OK;
}

static int from_ids(struct api_ctx *c, const json_t *list, bool keep, struct gen_prompt *ret,
                    struct err *err)
{
    const size_t n = json_array_size(list);
    const int V = c->api->o.base->arch.V;
    ret->ids.ids = malloc((n + 1) * sizeof *ret->ids.ids);
    if (ret->ids.ids == NULL)
        return err_nomem(err);
    for (size_t i = 0; i < n; i++) {
        const json_t *v = json_array_get(list, i);
        const json_int_t id = json_is_integer(v) ? json_integer_value(v) : -1;
        if (id < 0 || id >= V)
            return err_set_slug(err, ERR_INVALID, NULL, "prompt",
                                "token %zu of `prompt` must be an id from 0 to %d", i, V - 1);
        ret->ids.ids[ret->ids.n++] = (int32_t)id;
    }
    if (!keep)
        return ERR_OK;
    struct buf text;
    buf_init(&text, (size_t)64 << 20);
    int rc = tokenizer_decode(c->api->o.tokenizer, ret->ids.ids, n, false, &text, err);
    ret->text_len = text.len;
    ret->text = buf_take(&text);
    return rc;
}

static int one_prompt(struct api_ctx *c, const json_t *v, size_t i, bool keep,
                      struct gen_prompt *ret, struct err *err)
{
    int rc;
    if (json_is_string(v))
        rc = from_text(c, v, keep, ret, err);
    else if (json_is_array(v))
        rc = from_ids(c, v, keep, ret, err);
    else
        return err_set_slug(err, ERR_INVALID, NULL, "prompt", "prompt %zu must be a string or an "
                            "array of token ids, not %s", i, json_kind(v));
    if (rc == ERR_OK && ret->ids.n == 0)
        return err_set_slug(err, ERR_INVALID, NULL, "prompt", "prompt %zu is empty", i);
    return rc;
}

static int read_prompts(struct api_ctx *c, const json_t *v, const struct gen_params *p,
                        struct gen_prompt **ret, size_t *ret_n, struct err *err)
{
    if (v == NULL || json_is_null(v))
        return err_set_slug(err, ERR_INVALID, NULL, "prompt", "`prompt` is required");
    /* An array of numbers is one prompt; any other array is a list of them. */
    const bool list = json_is_array(v) && !json_is_integer(json_array_get(v, 0));
    const size_t n = list ? json_array_size(v) : 1;
    if (n == 0 || n > GEN_MAX_CHOICES / (size_t)p->n)
        return err_set_slug(err, ERR_INVALID, NULL, "prompt",
                            "%zu prompts with n = %d: one request may ask for 1 to %d choices", n,
                            p->n, GEN_MAX_CHOICES);
    struct gen_prompt *prompts = calloc(n, sizeof *prompts);
    if (prompts == NULL)
        return err_nomem(err);
    int rc = ERR_OK;
    for (size_t i = 0; i < n && rc == ERR_OK; i++)
        rc = one_prompt(c, list ? json_array_get(v, i) : v, i, p->echo, &prompts[i], err);
    if (rc != ERR_OK) {
        gen_prompts_free(prompts, n);
        return rc;
    }
    *ret = prompts;
    *ret_n = n;
    return ERR_OK;
}

int completions(struct api_ctx *c, struct err *err)
{
    struct gen_params p = { 0 };
    struct gen_target target = { 0 };
    struct gen_prompt *prompts = NULL;
    size_t n = 0;
    json_t *body;
    int rc = body_json(c->req, false, &body, err);
    if (rc != ERR_OK)
        return rc;
    rc = gen_params_parse(body, false, c->api->o.base->arch.V, &p, err);
    if (rc == ERR_OK)
        rc = gen_target_find(c, &p, &target, err);
    if (rc == ERR_OK)
        rc = read_prompts(c, json_object_get(body, "prompt"), &p, &prompts, &n, err);
    if (rc == ERR_OK)
        rc = gen_start(c, &p, &target, prompts, n, err);
    gen_target_free(&target);
    gen_params_free(&p);
    json_decref(body);
    return rc;
}
