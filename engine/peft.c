/* peft.c - reading an adapter in PEFT's format: a config and a safetensors file.
 *
 * Nothing is ignored.  Every field of the config is looked up in the table of peft_fields.c; every
 * tensor of the file must belong to a module that the config adapts; every module that the config
 * adapts must have its tensors, in the shape that its rank says.  PEFT itself accepts two of the
 * disagreements with a warning - tensors that no module takes, modules that got no tensor - and
 * then answers as if they were not there; here both are refused by name.  What PEFT accepts and
 * this does too: target_modules that names layers which the base has not got, as long as one of
 * its names is found. */
#include "engine/peft_int.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char prefix[] = "base_model.model.";

/* What the name of a factor may end in.  The two methods spell theirs differently, and the embedding
 * has its own.  Other ends are here for the reason that they are refused with. */
static const struct suffix {
    const char *text;
    enum peft_part part; /* PARTS: refused */
    bool adalora, embed;
    const char *why;
} suffixes[] = {
    { ".lora_A.weight", PART_A, false, false, NULL },
    { ".lora_B.weight", PART_B, false, false, NULL },
    { ".lora_embedding_A", PART_A, false, true, NULL },
    { ".lora_embedding_B", PART_B, false, true, NULL },
    { ".lora_A", PART_A, true, false, NULL },
    { ".lora_B", PART_B, true, false, NULL },
    { ".lora_E", PART_E, true, false, NULL },
    { ".lora_magnitude_vector", PARTS, false, false,
      "it belongs to DoRA, which the config does not ask for here" },
    { ".lora_magnitude_vector.weight", PARTS, false, false,
      "it belongs to DoRA, which the config does not ask for here" },
    { ".trainable_tokens_delta", PARTS, false, false,
      "it replaces rows of a table, which the config (trainable_token_indices) does not ask for here" },
    { ".lora_B.bias", PARTS, false, false,
      "the config does not say that there are biases inside lora_B here (lora_bias)" },
    { ".base_layer.weight", PARTS, false, false,
      "it would replace a weight of the base, which the config does not ask for" },
    { ".base_layer.bias", PARTS, false, false,
      "it would replace a bias of the base, which the config does not ask for or the base lacks" },
    { ".weight", PARTS, false, false,
      "it would replace a weight of the base, which the config does not ask for" },
    { ".bias", PARTS, false, false,
      "it would replace a bias of the base, which the config does not ask for or the base lacks" },
};

/* --- which modules --------------------------------------------------------------------------- */

/* The head and the embedding. */
static int find_outer(struct peft_reading *r)
{
    for (int m = MOD_HEAD; m <= MOD_EMBED; m++) {
        char path[256];
        struct peft_slot *s = peft_slot_of(r, 0, m);
        adapter_module_path(r->arch, 0, m, path, sizeof path);
        int rc = peft_matcher_targets(r->matcher, path, false, &s->targeted, r->err);
        if (rc != ERR_OK)
            return rc;
        s->targeted = s->targeted && !peft_is_saved(r, path);
        if (s->targeted && r->c.merged != NULL)
            return peft_refuse(r->err, "adapter_config.json: target_modules names %s: enable_lora is "
                               "read for linear layers of the blocks only", path);
        r->ntargeted += s->targeted;
        if (s->targeted && m == MOD_EMBED && (r->c.adalora || r->c.dora || r->c.lora_bias))
            return peft_refuse(r->err,
                               "adapter_config.json: target_modules names %s: an embedding can be "
                               "adapted by LoRA without use_dora and lora_bias only", path);
    }
    return ERR_OK;
}

static int find_targets(struct peft_reading *r)
{
    char path[256], shown[128];
    for (int l = 0; l < r->arch->L; l++) {
        for (int m = 0; m < MOD_COUNT; m++) {
            struct peft_slot *s = peft_slot_of(r, l, m);
            if (!arch_has_module(r->arch, (enum module)m))
                continue;
            arch_module_path(r->arch, l, (enum module)m, path, sizeof path);
            int rc = peft_matcher_targets(r->matcher, path, true, &s->targeted, r->err);
            if (rc != ERR_OK)
                return rc;
            r->ntargeted += s->targeted;
        }
    }
    int rc = find_outer(r);
    if (rc != ERR_OK)
        return rc;
    if (r->ntargeted == 0) {
        const json_t *exclude = json_object_get(r->c.root, "exclude_modules");
        return peft_refuse(r->err,
                           "adapter_config.json: target_modules %s%s finds no linear layer in this "
                           "base (%s with %d layers)",
                           peft_show_json(json_object_get(r->c.root, "target_modules"), shown),
                           exclude != NULL && !json_is_null(exclude) ? " less exclude_modules" : "",
                           r->arch->family, r->arch->L);
    }
    bool fan_in; /* PEFT takes it as true for layers that are stored so and as false for others, and
                    warns; only the first versions did the latter */
    return r->family->transposed || r->c.merged != NULL 
               ? peft_get_bool(r->c.root, "fan_in_fan_out", &fan_in, r->err)
               : peft_fan_in_check(r->c.root, r->err);
}

/* --- which tensors --------------------------------------------------------------------------- */

static int refuse_tensor(const struct peft_reading *r, const char *name, const char *why)
{
    char shown[128];
    return peft_refuse(r->err, "tensor %s: %s", peft_show(name, shown), why);
}

/* Where it belongs: false if the path names no layer that can be adapted. */
static bool parse_path(const struct peft_reading *r, const char *path, int *ret_layer,
                       int *ret_module)
{
    enum module module;
    *ret_layer = 0;
    *ret_module = strcmp(path, r->family->head) == 0 ? MOD_HEAD : MOD_EMBED;
    if (*ret_module == MOD_HEAD || strcmp(path, r->family->embed) == 0)
        return true;
    if (!arch_module_parse(r->arch, path, ret_layer, &module))
        return false;
    *ret_module = (int)module;
    return true;
}

static const struct suffix *suffix_of(const char *name, bool adalora, size_t *ret_at)
{
    size_t n = strlen(name);
    for (size_t i = 0; i < sizeof suffixes / sizeof suffixes[0]; i++) {
        const struct suffix *s = &suffixes[i];
        size_t k = strlen(s->text);
        if (k <= n && strcmp(name + n - k, s->text) == 0 &&
            (s->part == PARTS || s->adalora == adalora)) {
            *ret_at = n - k;
            return s;
        }
    }
    return NULL;
}

/* Put one tensor of the file where it belongs, or say why it belongs nowhere. */
static int take_tensor(struct peft_reading *r, const struct st_tensor *t)
{
    char path[256];
    size_t at = 0, skip = sizeof prefix - 1;
    if (strncmp(t->name, prefix, skip) != 0)
        return refuse_tensor(r, t->name, "its name does not begin with \"base_model.model.\"");
    if (peft_wants_take(r, t, t->name + skip))
        return ERR_OK;
    const struct suffix *s = suffix_of(t->name + skip, r->c.adalora, &at);
    if (s == NULL)
        return refuse_tensor(r, t->name,
                             r->c.adalora ? "its name does not end in .lora_A, .lora_B or "
                                            ".lora_E, as those of AdaLoRA do"
                                          : "its name does not end in .lora_A.weight or "
                                            ".lora_B.weight, as those of LoRA do");
    if (s->part == PARTS)
        return refuse_tensor(r, t->name, s->why);
    int layer = 0, module = 0;
    snprintf(path, sizeof path, "%.*s", (int)(at < sizeof path ? at : 0), t->name + skip);
    if (at >= sizeof path || !parse_path(r, path, &layer, &module) ||
        (module == MOD_EMBED) != s->embed) {
        char shown[128];
        return peft_refuse(r->err,
                           "tensor %s: this base (%s with %d layers) has no such linear layer",
                           peft_show(t->name, shown), r->arch->family, r->arch->L);
    }
    struct peft_slot *slot = peft_slot_of(r, layer, module);
    if (!slot->targeted)
        return refuse_tensor(r, t->name, "the config's target_modules does not mean its layer");
    slot->part[s->part] = t;
    return ERR_OK;
}

/* The first element that is NaN or infinite, or -1. */
static int64_t find_bad(const struct st_tensor *t)
{
    size_t n = st_count(t);
    if (t->dtype == DT_F32) {
        for (size_t i = 0; i < n; i++) {
            uint32_t u;
            memcpy(&u, t->data + 4 * i, 4);
            if ((u & 0x7f800000u) == 0x7f800000u)
                return (int64_t)i;
        }
        return -1;
    }
    const uint16_t mask = t->dtype == DT_F16 ? 0x7c00 : 0x7f80;
    for (size_t i = 0; i < n; i++) {
        uint16_t u;
        memcpy(&u, t->data + 2 * i, 2);
        if ((u & mask) == mask)
            return (int64_t)i;
    }
    return -1;
}

static int check_type(const struct peft_reading *r, const struct st_tensor *t)
{
    char shown[128];
    if (t->dtype == DT_F32 || t->dtype == DT_F16 || t->dtype == DT_BF16)
        return ERR_OK;
    return peft_refuse(r->err, "tensor %s has type %s, which is not F32, F16 or BF16",
                       peft_show(t->name, shown), t->dtype_name);
}

int peft_check_values(const struct peft_reading *r, const struct st_tensor *t)
{
    char shown[128];
    int rc = check_type(r, t);
    if (rc != ERR_OK)
        return rc;
    int64_t bad = find_bad(t);
    if (bad >= 0)
        return peft_refuse(r->err, "tensor %s holds a value that is not finite, at element %lld",
                           peft_show(t->name, shown), (long long)bad);
    return ERR_OK;
}

int peft_check_tensor(const struct peft_reading *r, const struct st_tensor *t, int64_t rows,
                      int64_t cols, const char *from)
{
    char shown[128];
    peft_show(t->name, shown);
    int rc = check_type(r, t);
    if (rc != ERR_OK)
        return rc;
    if (t->ndim != (cols < 0 ? 1 : 2) || t->shape[0] != rows || (cols >= 0 && t->shape[1] != cols)) {
        char have[128] = "", want[32] = "";
        size_t n = 0;
        for (int d = 0; d < t->ndim && n < sizeof have; d++)
            n += (size_t)snprintf(have + n, sizeof have - n, "%s%lld", d ? ", " : "",
                                  (long long)t->shape[d]);
        if (cols >= 0)
            snprintf(want, sizeof want, ", %lld", (long long)cols);
        return peft_refuse(r->err, "tensor %s has shape [%s], not [%lld%s] (%s)", shown, have,
                           (long long)rows, want, from);
    }
    return peft_check_values(r, t);
}

/* --- AdaLoRA's masks ------------------------------------------------------------------------- */

/* Every key of rank_pattern must be the lora_E of a module that is adapted. */
static int check_mask_keys(const struct peft_reading *r)
{
    const char *key;
    json_t *v;
    json_object_foreach(r->c.rank_pattern, key, v)
    {
        char path[256], shown[128];
        int layer, module;
        size_t n = strlen(key), k = strlen(".lora_E");
        bool ok = n > k && n - k < sizeof path && strcmp(key + n - k, ".lora_E") == 0;
        if (ok) {
            snprintf(path, sizeof path, "%.*s", (int)(n - k), key);
            ok = parse_path(r, path, &layer, &module);
        }
        if (!ok || !peft_slot_of(r, layer, module)->targeted)
            return peft_refuse(r->err,
                               "adapter_config.json: rank_pattern has the key \"%s\", which is "
                               "not the lora_E of an adapted layer of this base",
                               peft_show(key, shown));
    }
    return ERR_OK;
}

static int read_mask(const struct peft_reading *r, struct adapter_src_module *m)
{
    char key[300], want[80];
    snprintf(key, sizeof key, "%s.lora_E", m->path);
    const json_t *v = json_object_get(r->c.rank_pattern, key);
    m->rank = m->init_rank = r->c.r;
    if (v == NULL) /* not pruned */
        return ERR_OK;
    snprintf(want, sizeof want, "a list of %d booleans (init_r)", r->c.r);
    if (!json_is_array(v) || json_array_size(v) != (size_t)r->c.r)
        return peft_wrong("rank_pattern", want, v, r->err);
    m->mask = calloc((size_t)r->c.r, 1);
    if (m->mask == NULL)
        return err_nomem(r->err);
    m->rank = 0;
    for (int i = 0; i < r->c.r; i++) {
        const json_t *b = json_array_get(v, (size_t)i);
        if (!json_is_boolean(b))
            return peft_wrong("rank_pattern", want, v, r->err);
        m->mask[i] = json_is_true(b);
        m->rank += m->mask[i];
    }
    return ERR_OK;
}

/* --- one module ------------------------------------------------------------------------------ */

static int read_ranks(const struct peft_reading *r, struct adapter_src_module *m)
{
    if (r->c.adalora) {
        m->alpha = r->c.alpha;
        m->scaling = (m->alpha > 0 ? m->alpha : r->c.r) / (r->c.r + 1e-5);
        return read_mask(r, m);
    }
    int rc = peft_matcher_rank(r->matcher, m->path, &m->rank, &m->alpha, r->err);
    m->scaling = m->alpha / (r->c.rslora ? sqrt(m->rank) : (double)m->rank);
    if (rc == ERR_OK && r->c.merged != NULL) {
        m->rank *= r->c.parts_on;
        if (m->rank > ADAPTER_MAX_RANK || !adapter_alpha_of(m->scaling, m->rank, &m->alpha))
            rc = peft_refuse(r->err, "adapter_config.json: enable_lora with r %d and lora_alpha %g "
                             "cannot be written as plain LoRA", r->c.r, r->c.alpha);
    }
    m->init_rank = m->rank;
    return rc;
}

static int missing(const struct peft_reading *r, const char *path, const char *suffix)
{
    return peft_refuse(r->err, "tensor %s%s%s is missing: target_modules means this layer", prefix,
                       path, suffix);
}

static int check_parts(const struct peft_reading *r, const struct peft_slot *s, struct adapter_src_module *m)
{
    const struct st_tensor *A = s->part[PART_A], *B = s->part[PART_B], *E = s->part[PART_E];
    const bool embed = (int)m->module == MOD_EMBED;
    const char *weight = r->c.adalora || embed ? "" : ".weight";
    char suffix[32], from[96];
    for (int p = 0; p < (r->c.adalora ? PARTS : PART_E); p++) {
        snprintf(suffix, sizeof suffix, ".lora_%s%c%s", embed ? "embedding_" : "",
                 "ABE"[p], weight);
        if (s->part[p] == NULL)
            return missing(r, m->path, suffix);
    }
    snprintf(from, sizeof from, "rank %d by the config, %d inputs and %d outputs of this base",
             m->rank, m->in, m->out);
    int rc = peft_check_tensor(r, A, m->rank, m->in, from);
    if (rc == ERR_OK)
        rc = r->c.merged != NULL ? peft_merged_check(r, m, B)
                                 : peft_check_tensor(r, B, m->out, m->rank, from);
    if (rc == ERR_OK && E != NULL)
        rc = peft_check_tensor(r, E, m->rank, 1, from);
    if (rc != ERR_OK)
        return rc;
    if (A->dtype != B->dtype || (E != NULL && E->dtype != A->dtype)) {
        char shown[128];
        return peft_refuse(r->err,
                           "tensor %s has type %s but lora_B has %s%s%s: the factors of one "
                           "layer must share a type",
                           peft_show(A->name, shown), A->dtype_name, B->dtype_name,
                           E != NULL ? " and lora_E has " : "", E != NULL ? E->dtype_name : "");
    }
    if (!(fabs(m->scaling) <= 1e30))
        return peft_refuse(r->err, "%s: alpha %g with rank %d gives a scaling that is out of range",
                           m->path, m->alpha, m->rank);
    m->dtype = A->dtype;
    m->A = A->data;
    m->B = B->data;
    m->E = E != NULL ? E->data : NULL;
    return ERR_OK;
}

static int read_module(const struct peft_reading *r, int layer, int module,
                       struct adapter_src_module *m)
{
    char path[256];
    adapter_module_path(r->arch, layer, module, path, sizeof path);
    m->layer = layer;
    m->module = (enum module)module;
    m->in = adapter_module_in(r->arch, module);
    m->out = adapter_module_out(r->arch, module);
    m->path = strdup(path);
    if (m->path == NULL)
        return err_nomem(r->err);
    int rc = read_ranks(r, m);
    return rc != ERR_OK ? rc : check_parts(r, peft_slot_of(r, layer, module), m);
}

/* --- all of it ------------------------------------------------------------------------------- */

static void add_up(struct adapter_src *a)
{
    a->rank_min = ADAPTER_MAX_RANK;
    for (size_t i = 0; i < a->nmodules; i++) {
        const struct adapter_src_module *m = &a->modules[i];
        uint64_t n = (uint64_t)m->rank * ((uint64_t)m->in + (uint64_t)m->out + (m->E ? 1 : 0));
        a->params += n;
        a->bytes += n * dtype_size(m->dtype);
        a->rank_max = m->rank > a->rank_max ? m->rank : a->rank_max;
        a->rank_min = m->rank < a->rank_min ? m->rank : a->rank_min;
    }
    for (size_t i = 0; i < a->nextras; i++) {
        a->params += adapter_extra_is_ids(a->extras[i].kind) ? 0 : adapter_extra_count(&a->extras[i]);
        a->bytes += adapter_extra_count(&a->extras[i]) * dtype_size(a->extras[i].dtype);
    }
}

static size_t pad64(size_t n) { return (n + 63) & ~(size_t)63; }

/* What is not in the file as the adapter has it: B of MergedLinear, and the ids of rows. */
static int make_tensors(const struct peft_reading *r, struct adapter_src *a)
{
    size_t total = 0, nwant = 0;
    for (size_t i = 0; r->c.merged != NULL && i < a->nmodules; i++)
        total += pad64(peft_merged_bytes(&a->modules[i]));
    for (size_t i = 0; i < a->nextras; i++)
        total += adapter_extra_is_ids(a->extras[i].kind) ? pad64((size_t)a->extras[i].rows * 4) : 0;
    if (total == 0)
        return ERR_OK;
    char *p = a->own = aligned_alloc(64, total);
    if (p == NULL)
        return err_nomem(r->err);
    for (size_t i = 0; r->c.merged != NULL && i < a->nmodules; i++) {
        peft_merged_expand(&r->c, &a->modules[i], p);
        a->modules[i].B = p;
        p += pad64(peft_merged_bytes(&a->modules[i]));
    }
    for (size_t i = 0; i < a->nextras; i++) {
        if (!adapter_extra_is_ids(a->extras[i].kind))
            continue;
        while (r->wants[nwant].ids == NULL) /* in the same order */
            nwant++;
        for (int k = 0; k < a->extras[i].rows; k++) {
            const json_t *id = json_array_get(r->wants[nwant].ids, (size_t)k);
            ((int32_t *)(void *)p)[k] = (int32_t)json_integer_value(id);
        }
        nwant++;
        a->extras[i].data = p;
        p += pad64((size_t)a->extras[i].rows * 4);
    }
    return ERR_OK;
}

/* As it came, unless the adapter is now another one. */
static int keep_config(const struct peft_reading *r, const char *config, size_t len,
                       struct adapter_src *a)
{
    if (r->c.merged != NULL) {
        a->alpha = a->modules[0].alpha; /* there is one, and all have the same */
        a->config = peft_merged_config(&r->c, a->alpha, r->err);
        a->config_len = a->config != NULL ? strlen(a->config) : 0;
        return a->config != NULL ? ERR_OK : ERR_NOMEM;
    }
    a->config = malloc(len + 1);
    if (a->config == NULL)
        return err_nomem(r->err);
    memcpy(a->config, config, len);
    a->config[len] = '\0';
    a->config_len = len;
    return ERR_OK;
}

static int fill(struct peft_reading *r, const char *config, size_t len, struct adapter_src *a)
{
    const char *base = json_string_value(json_object_get(r->c.root, "base_model_name_or_path"));
    a->method = r->c.adalora  ? METHOD_ADALORA
                : r->c.dora   ? METHOD_DORA
                : r->c.rslora ? METHOD_RSLORA
                              : METHOD_LORA;
    a->alpha = r->c.alpha;
    a->init_r = r->c.adalora ? r->c.r : 0;
    a->base_name = base != NULL && base[0] != '\0' ? strdup(base) : NULL;
    a->modules = calloc(r->ntargeted + 1, sizeof *a->modules);
    if (a->modules == NULL || (base != NULL && base[0] != '\0' && a->base_name == NULL))
        return err_nomem(r->err);
    int rc = r->c.adalora ? peft_schedule_read(r->c.root, a, r->err) : ERR_OK;
    for (int l = 0; l < r->arch->L && rc == ERR_OK; l++)
        for (int m = 0; m < MOD_SLOTS && rc == ERR_OK; m++)
            if (peft_slot_of(r, l, m)->targeted)
                rc = read_module(r, l, m, &a->modules[a->nmodules++]);
    if (rc == ERR_OK)
        rc = peft_wants_finish(r, a);
    if (rc == ERR_OK)
        rc = make_tensors(r, a);
    if (rc == ERR_OK)
        rc = keep_config(r, config, len, a);
    if (rc != ERR_OK)
        return rc;
    add_up(a);
    adapter_src_hash(a, a->hash);
    return ERR_OK;
}

static int read_all(struct peft_reading *r, const char *config, size_t len,
                    const struct st_file *weights, struct adapter_src *a)
{
    int rc = peft_config_read(r->c.root, &r->c, r->err);
    if (rc == ERR_OK)
        rc = peft_matcher_create(&r->c, &r->matcher, r->err);
    if (rc == ERR_OK)
        rc = find_targets(r);
    if (rc == ERR_OK)
        rc = peft_wants_create(r);
    for (size_t i = 0; rc == ERR_OK && i < weights->ntensors; i++)
        rc = take_tensor(r, &weights->tensors[i]);
    if (rc == ERR_OK && r->c.adalora)
        rc = check_mask_keys(r);
    return rc != ERR_OK ? rc : fill(r, config, len, a);
}

int peft_parse(const struct arch *arch, const char *config, size_t config_len,
               const struct st_file *weights, struct adapter_src **ret, struct err *err)
{
    if (config_len > PEFT_CONFIG_MAX)
        return peft_refuse(err, "adapter_config.json has %zu bytes, at most %d are read",
                           config_len, PEFT_CONFIG_MAX);
    json_error_t why;
    json_t *root = json_loadb(config, config_len, JSON_REJECT_DUPLICATES, &why);
    if (!json_is_object(root)) {
        char shown[128];
        json_decref(root);
        return peft_refuse(err, "adapter_config.json is not a JSON object: %s, line %d",
                           peft_show(root == NULL ? why.text : "it is another value", shown),
                           why.line);
    }
    struct peft_reading r = { .arch = arch, .family = family_find(arch->family), .err = err };
    r.c.root = root;
    r.slots = calloc((size_t)arch->L * MOD_SLOTS, sizeof *r.slots);
    struct adapter_src *a = calloc(1, sizeof *a);
    int rc;
    if (r.slots == NULL || a == NULL)
        rc = err_nomem(err);
    else if (r.family == NULL)
        rc = err_set(err, ERR_INTERNAL, "unknown model family %s", arch->family);
    else
        rc = read_all(&r, config, config_len, weights, a);
    peft_matcher_free(r.matcher);
    peft_wants_free(&r);
    free(r.slots);
    json_decref(root);
    if (rc != ERR_OK) {
        adapter_src_free(a);
        return rc;
    }
    *ret = a;
    return ERR_OK;
}
