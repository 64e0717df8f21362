/* session.c - opening a base with adapters, and running sequences through it. */
#include "server/session.h"

#include "store/store.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* --- adapters --------------------------------------------------------------------------------- */
/* "NAME:0.5" -> "NAME", 0.5.  What follows the last colon is a weight if it is a number.  NULL: err
 * says why. */
static char *split_weight(const char *spec, float *ret_weight, struct err *err)
{
    char *name = strdup(spec);
    if (name == NULL) {
        err_nomem(err);
        return NULL;
    }
    char *colon = strrchr(name, ':'), *end = NULL;
    *ret_weight = 1.0f;
    if (colon == NULL || colon[1] == '\0')
        return name;
    const float weight = strtof(colon + 1, &end);
    if (*end != '\0')
        return name;
    if (!isfinite(weight)) {
        err_set(err, ERR_INVALID, "the weight of adapter %s is not finite", spec);
        free(name);
        return NULL;
    }
    *ret_weight = weight;
    *colon = '\0';
    return name;
}

static int load_from_db(struct store *st, const char *tenant, const char *name,
                        const struct base *base, struct adapter **ret, struct err *err)
{
    int64_t tenant_id;
    struct store_version v;
    int rc = store_tenant_find(st, tenant, &tenant_id, err);
    if (rc == ERR_OK)
        rc = store_version_find(st, tenant_id, name, &v, err);
    if (rc != ERR_OK)
        return rc;
    if (strcmp(v.base_hash_hex, base->hash_hex) != 0)
        rc = err_set(err, ERR_CONFLICT, "adapter %s@%d was made for another base: %.12s..., not %.12s...",
                     v.name, v.version, v.base_hash_hex, base->hash_hex);
    if (rc == ERR_OK)
        rc = store_version_build(st, v.id, base, NULL, ret, err);
    store_version_free(&v);
    return rc;
}

static int load_from_folder(const char *path, const struct base *base, struct adapter **ret, struct err *err)
{
    struct adapter_src *src = NULL;
    int rc = adapter_load(&base->arch, path, &src, err);
    if (rc == ERR_OK)
        rc = adapter_norms(base, src, err);
    if (rc == ERR_OK)
        rc = adapter_build(&base->arch, src, 0, NULL, ret, err);
    adapter_src_free(src);
    return rc;
}

static int add_adapter(struct session *s, struct store *st, const char *tenant, const char *spec,
                       struct err *err)
{
    float weight;
    char *name = split_weight(spec, &weight, err);
    if (name == NULL)
        return err->code;
    struct adapter *a = NULL;
    const int rc = st != NULL && name[0] != '.' && name[0] != '/'
                       ? load_from_db(st, tenant, name, s->base, &a, err)
                       : load_from_folder(name, s->base, &a, err);
    if (rc != ERR_OK) { /* say which of them it was */
        const struct err cause = *err;
        err_clear(err);
        err_set(err, cause.code, "adapter %.200s: %.300s", name, cause.msg);
        free(name);
        return rc;
    }
    free(name);
    s->adapters[s->lora.n] = a;
    s->lora.item[s->lora.n].adapter = a;
    s->lora.item[s->lora.n].weight = weight;
    s->lora.n++;
    return ERR_OK;
}

static int add_adapters(struct session *s, const struct opts *o, struct err *err)
{
    const char *db = opt_str(o, "db");
    const size_t n = opt_count(o, "adapter");
    struct store *st = NULL;
    if (n > LORA_SET_MAX)
        return err_set(err, ERR_INVALID, "%zu adapters are more than the %d that can be combined",
                       n, LORA_SET_MAX);
    int rc = ERR_OK;
    if (db != NULL && n > 0) {
        if (!file_exists(db))
            return err_set(err, ERR_NOT_FOUND, "there is no database %s", db);
        rc = store_open(db, &st, err);
    }
    for (size_t i = 0; rc == ERR_OK && i < n; i++)
        rc = add_adapter(s, st, opt_str(o, "tenant"), opt_nth(o, "adapter", i), err);
    store_close(st);
    lora_set_sort(&s->lora);
    return rc == ERR_OK ? lora_set_check(&s->lora, err) : rc;
}

int session_kv_type(const struct opts *o, enum kv_type *ret, bool *ret_given)
{
    struct err err = { 0 };
    const char *name = opt_str(o, "kv-type");
    *ret_given = name != NULL;
    if (name != NULL && kv_type_parse(name, ret, &err) != ERR_OK)
        return fail(2, "--kv-type: %s", err.msg);
    return 0;
}

/* --- opening ------------------------------------------------------------------------------------ */
static int open_session(const struct opts *o, bool adapters, struct session *ret)
{
    struct session s = { 0 };
    struct err err = { 0 };
    const char *base = opt_str(o, "base");
    int64_t threads;
    if (!opt_int(o, "threads", 0, 1024, &threads))
        return 2;
    if (base == NULL)
        return fail(2, "--base FILE is needed");
    if (precision_parse(opt_str(o, "precision"), &s.compute.precision, &err) != ERR_OK ||
        isa_select(opt_str(o, "kernel"), &s.compute.isa, &err) != ERR_OK)
        return fail(2, "%s", err.msg);
    bool given = false;
    if (adapters && session_kv_type(o, &s.kv_type, &given) != 0)
        return 2;
    int rc = pool_create((int)threads, &s.compute.pool, &err);
    if (rc == ERR_OK)
        rc = base_load(base, s.compute.precision, opt_flag(o, "mmap"), &s.base, &err);
    if (rc == ERR_OK && !given)
        s.kv_type = kv_type_default(s.base->is_f32);
    if (rc == ERR_OK && adapters)
        rc = add_adapters(&s, o, &err);
    if (rc != ERR_OK) {
        session_close(&s);
        return fail(1, "%s", err.msg);
    }
    *ret = s;
    return 0;
}

int session_open(const struct opts *o, struct session *ret) { return open_session(o, true, ret); }

int session_open_base(const struct opts *o, struct session *ret)
{
    return open_session(o, false, ret);
}

void session_close(struct session *s)
{
    for (int i = 0; i < LORA_SET_MAX; i++)
        adapter_free(s->adapters[i]);
    tokenizer_free(s->tokenizer);
    base_free(s->base);
    pool_destroy(s->compute.pool);
    memset(s, 0, sizeof *s);
}

int session_tokenizer(struct session *s, struct err *err)
{
    if (s->tokenizer != NULL)
        return ERR_OK;
    if (s->base->tokenizer_json == NULL)
        return err_set(err, ERR_INVALID, "base %s has no tokenizer: give token ids",
                       s->base->name);
    return tokenizer_load(s->base->tokenizer_json, s->base->tokenizer_json_len, &s->tokenizer,
                          err);
}

int session_template(const struct base *base, const char *file, struct chat_template **ret,
                     struct err *err)
{
    char name[300], *text = NULL;
    size_t len;
    int rc = ERR_OK;
    if (file != NULL)
        rc = file_read(file, (size_t)4 << 20, &text, &len, err);
    else if (base->chat_template == NULL)
        return ERR_OK;
    snprintf(name, sizeof name, "the chat template %s %.250s", file ? "file" : "of",
             file ? file : base->name);
    if (rc == ERR_OK)
        rc = chat_template_open(name, text ? text : base->chat_template, base->tokenizer_config,
                                ret, err);
    free(text);
    return rc;
}

/* --- running sequences ---------------------------------------------------------------------------- */
enum { CHUNK = 128 };

struct session_runner {
    struct session *s;
    struct kv_cache *kv;
    struct forward *forward;
};

int session_runner_open(struct session *s, int longest, struct session_runner **ret,
                        struct err *err)
{
    const struct arch *a = &s->base->arch;
    if (longest > a->max_positions)
        return err_set(err, ERR_INVALID, "%d tokens are more than the model's %d positions",
                       longest, a->max_positions);
    struct session_runner *r = calloc(1, sizeof *r);
    if (r == NULL)
        return err_nomem(err);
    const size_t pages = ((size_t)longest + KV_PAGE - 1) / KV_PAGE;
    const int chunk = longest < CHUNK ? longest : CHUNK;
    r->s = s;
    int rc = kv_create(a, s->kv_type, pages * kv_page_bytes(a, s->kv_type), &r->kv, err);
    if (rc == ERR_OK)
        rc = forward_create(s->base, &s->compute, r->kv, longest, chunk, chunk, &r->forward, err);
    if (rc != ERR_OK) {
        session_runner_close(r);
        return rc;
    }
    *ret = r;
    return ERR_OK;
}

int session_run(struct session_runner *r, const int32_t *tokens, int n, session_logits_fn fn,
                void *ud, struct err *err)
{
    static const uint8_t seed[32];
    struct kv_seq seq = { 0 };
    kv_forget(r->kv); /* no position may be skipped: all logits are wanted */
    int rc = kv_open(r->kv, seed, tokens, n, &seq, err);
    if (rc != ERR_OK)
        return rc;
    if (!kv_reserve(r->kv, &seq, n))
        rc = err_set(err, ERR_INTERNAL, "the cache is too small for %d tokens", n);
    for (int pos = 0; rc == ERR_OK && pos < n; pos += CHUNK) {
        const int m = n - pos < CHUNK ? n - pos : CHUNK;
        const struct span span = { .kv = &seq, .pos = pos, .n = m, .tokens = tokens + pos,
                                   .lora = &r->s->lora, .nlogits = m };
        const float *logits = forward_run(r->forward, &span, 1);
        kv_commit(r->kv, &seq, tokens, pos + m);
        rc = fn(ud, pos, m, logits, err);
    }
    kv_close(r->kv, &seq);
    return rc;
}

double session_nll(const float *logits, int V, int id)
{
    double top = logits[0];
    for (int i = 1; i < V; i++)
        top = logits[i] > top ? logits[i] : top;
    double sum = exp(logits[0] - top);
    for (int i = 1; i < V; i++)
        sum += exp(logits[i] - top);
    return log(sum) + top - logits[id];
}

void session_runner_close(struct session_runner *r)
{
    if (r == NULL)
        return;
    forward_destroy(r->forward);
    kv_destroy(r->kv);
    free(r);
}
