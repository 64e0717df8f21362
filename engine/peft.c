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

/* --- the config ------------------------------------------------------------------------------ */

static int wrong(const char *field, const char *want, const json_t *v, struct err *err)
{
    char shown[128];
    return peft_refuse(err, "adapter_config.json: %s must be %s, not %s", field, want,
                       peft_show_json(v, shown));
}

/* An absent or null field leaves *ret alone. */
static int get_int(const json_t *root, const char *field, int low, int high, int *ret,
                   struct err *err)
{
    char want[64];
    const json_t *v = json_object_get(root, field);
    if (v == NULL || json_is_null(v))
        return ERR_OK;
    if (json_is_integer(v) && json_integer_value(v) >= low && json_integer_value(v) <= high) {
        *ret = (int)json_integer_value(v);
        return ERR_OK;
    }
    snprintf(want, sizeof want, "a whole number from %d to %d", low, high);
    return wrong(field, want, v, err);
}

static int get_number(const json_t *root, const char *field, double *ret, struct err *err)
{
    const json_t *v = json_object_get(root, field);
    if (v == NULL || json_is_null(v))
        return ERR_OK;
    if (!json_is_number(v))
        return wrong(field, "a number", v, err);
    *ret = json_number_value(v);
    return ERR_OK;
}

static int get_bool(const json_t *root, const char *field, bool *ret, struct err *err)
{
    const json_t *v = json_object_get(root, field);
    if (v == NULL || json_is_null(v))
        return ERR_OK;
    if (!json_is_boolean(v))
        return wrong(field, "true or false", v, err);
    *ret = json_is_true(v);
    return ERR_OK;
}

static int get_dict(const json_t *root, const char *field, json_t **ret, struct err *err)
{
    json_t *v = json_object_get(root, field);
    if (v == NULL || json_is_null(v))
        return ERR_OK;
    if (!json_is_object(v))
        return wrong(field, "an object", v, err);
    *ret = v;
    return ERR_OK;
}

static int check_kind(json_t *root, bool *ret_adalora, struct err *err)
{
    const json_t *type = json_object_get(root, "peft_type");
    const json_t *task = json_object_get(root, "task_type");
    const char *name = json_string_value(type);
    if (name == NULL)
        return peft_refuse(err,
                           "adapter_config.json: peft_type is missing: it must be LORA or ADALORA");
    *ret_adalora = strcmp(name, "ADALORA") == 0;
    if (!*ret_adalora && strcmp(name, "LORA") != 0)
        return wrong("peft_type", "LORA or ADALORA", type, err);
    if (task != NULL && !json_is_null(task) &&
        (!json_is_string(task) || strcmp(json_string_value(task), "CAUSAL_LM") != 0))
        return wrong("task_type", "CAUSAL_LM or null (this server continues text)", task, err);
    return ERR_OK;
}

/* How training began: some beginnings moved part of the base into the adapter, and then the
 * adapter is right only on that other base. */
static int check_init(const json_t *root, struct err *err)
{
    static const char *const harmless[] = { "gaussian", "orthogonal", "eva" };
    const json_t *v = json_object_get(root, "init_lora_weights");
    if (v == NULL || json_is_null(v) || json_is_boolean(v))
        return ERR_OK;
    for (size_t i = 0; json_is_string(v) && i < sizeof harmless / sizeof harmless[0]; i++)
        if (strcmp(json_string_value(v), harmless[i]) == 0)
            return ERR_OK;
    return wrong("init_lora_weights",
                 "true, false, gaussian, orthogonal or eva (others change the base weights)", v,
                 err);
}

/* What there is beside the factors. */
static int read_beside(json_t *root, struct peft_config *c, struct err *err)
{
    static const char *const biases[] = { "none", "lora_only", "all" };
    json_t *bias = json_object_get(root, "bias"), *save = json_object_get(root, "modules_to_save");
    int rc = get_bool(root, "use_dora", &c->dora, err);
    if (rc == ERR_OK)
        rc = get_bool(root, "lora_bias", &c->lora_bias, err);
    if (rc == ERR_OK)
        rc = get_bool(root, "ensure_weight_tying", &c->tie, err);
    if (rc != ERR_OK)
        return rc;
    if (c->dora && c->lora_bias)
        return wrong("lora_bias", "false with use_dora (as PEFT says)",
                     json_object_get(root, "lora_bias"), err);
    bool known = bias == NULL || json_is_null(bias);
    for (int i = 0; json_is_string(bias) && i < 3; i++)
        if (strcmp(json_string_value(bias), biases[i]) == 0) {
            c->bias = (enum peft_bias)i;
            known = true;
        }
    if (!known)
        return wrong("bias", "none, lora_only or all", bias, err);
    if (save == NULL || json_is_null(save))
        return ERR_OK;
    /* PEFT takes the names as regular expressions in one place and as they are in another. */
    bool ok = json_is_array(save);
    for (size_t i = 0; ok && i < json_array_size(save); i++) {
        const char *name = json_string_value(json_array_get(save, i));
        ok = name != NULL && name[0] != '\0' &&
             name[strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.")] ==
                 '\0';
    }
    c->save = json_array_size(save) > 0 ? save : NULL;
    return ok ? ERR_OK
              : wrong("modules_to_save", "a list of module names of letters, digits, _ and .", save,
                      err);
}

static int read_config(json_t *root, struct peft_config *c, struct err *err)
{
    *c = (struct peft_config){ .root = root, .r = 8, .alpha = 8 };
    int init_r = 12;
    int rc = check_kind(root, &c->adalora, err);
    if (rc == ERR_OK)
        rc = peft_fields_check(root, c->adalora, err);
    if (rc == ERR_OK)
        rc = check_init(root, err);
    if (rc == ERR_OK)
        rc = get_int(root, "r", 1, ADAPTER_MAX_RANK, &c->r, err);
    if (rc == ERR_OK)
        rc = get_int(root, "init_r", 1, ADAPTER_MAX_RANK, &init_r, err);
    if (rc == ERR_OK)
        rc = get_number(root, "lora_alpha", &c->alpha, err);
    if (rc == ERR_OK)
        rc = get_bool(root, "use_rslora", &c->rslora, err);
    if (rc == ERR_OK)
        rc = get_dict(root, "rank_pattern", &c->rank_pattern, err);
    if (rc == ERR_OK)
        rc = get_dict(root, "alpha_pattern", &c->alpha_pattern, err);
    if (rc == ERR_OK)
        rc = read_beside(root, c, err);
    if (c->adalora)
        c->r = init_r;
    /* With a pattern, PEFT trains with init_r in place of alpha but reloads with what is left. */
    if (rc == ERR_OK && c->adalora && c->alpha <= 0 && c->rank_pattern != NULL)
        rc = wrong("lora_alpha", "positive in AdaLoRA with a rank_pattern",
                   json_object_get(root, "lora_alpha"), err);
    return rc;
}

static int read_schedule(const json_t *root, struct adapter_src *a, struct err *err)
{
    const int big = 1 << 30;
    a->target_r = 8;
    a->deltaT = 1;
    a->beta1 = a->beta2 = 0.85;
    a->orth_reg_weight = 0.5;
    int rc = get_int(root, "target_r", 0, big, &a->target_r, err);
    if (rc == ERR_OK)
        rc = get_int(root, "tinit", 0, big, &a->tinit, err);
    if (rc == ERR_OK)
        rc = get_int(root, "tfinal", 0, big, &a->tfinal, err);
    if (rc == ERR_OK)
        rc = get_int(root, "deltaT", 0, big, &a->deltaT, err);
    if (rc == ERR_OK)
        rc = get_int(root, "total_step", 0, big, &a->total_step, err);
    if (rc == ERR_OK)
        rc = get_number(root, "beta1", &a->beta1, err);
    if (rc == ERR_OK)
        rc = get_number(root, "beta2", &a->beta2, err);
    if (rc == ERR_OK)
        rc = get_number(root, "orth_reg_weight", &a->orth_reg_weight, err);
    return rc;
}

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
    bool fan_in; /* PEFT takes it as true for layers that are stored so, and warns */
    return r->family->transposed ? get_bool(r->c.root, "fan_in_fan_out", &fan_in, r->err)
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

int peft_check_tensor(const struct peft_reading *r, const struct st_tensor *t, int64_t rows,
                      int64_t cols, const char *from)
{
    char shown[128];
    peft_show(t->name, shown);
    if (t->dtype != DT_F32 && t->dtype != DT_F16 && t->dtype != DT_BF16)
        return peft_refuse(r->err, "tensor %s has type %s, which is not F32, F16 or BF16", shown,
                           t->dtype_name);
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
    int64_t bad = find_bad(t);
    if (bad >= 0)
        return peft_refuse(r->err, "tensor %s holds a value that is not finite, at element %lld",
                           shown, (long long)bad);
    return ERR_OK;
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
        return wrong("rank_pattern", want, v, r->err);
    m->mask = calloc((size_t)r->c.r, 1);
    if (m->mask == NULL)
        return err_nomem(r->err);
    m->rank = 0;
    for (int i = 0; i < r->c.r; i++) {
        const json_t *b = json_array_get(v, (size_t)i);
        if (!json_is_boolean(b))
            return wrong("rank_pattern", want, v, r->err);
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
    m->init_rank = m->rank;
    m->scaling = m->alpha / (r->c.rslora ? sqrt(m->rank) : (double)m->rank);
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
        rc = peft_check_tensor(r, B, m->out, m->rank, from);
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
        a->params += adapter_extra_count(&a->extras[i]);
        a->bytes += adapter_extra_count(&a->extras[i]) * dtype_size(a->extras[i].dtype);
    }
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
    a->config_len = len;
    a->config = malloc(len + 1);
    a->base_name = base != NULL && base[0] != '\0' ? strdup(base) : NULL;
    a->modules = calloc(r->ntargeted + 1, sizeof *a->modules);
    if (a->config == NULL || a->modules == NULL ||
        (base != NULL && base[0] != '\0' && a->base_name == NULL))
        return err_nomem(r->err);
    memcpy(a->config, config, len);
    a->config[len] = '\0';
    int rc = r->c.adalora ? read_schedule(r->c.root, a, r->err) : ERR_OK;
    for (int l = 0; l < r->arch->L && rc == ERR_OK; l++)
        for (int m = 0; m < MOD_SLOTS && rc == ERR_OK; m++)
            if (peft_slot_of(r, l, m)->targeted)
                rc = read_module(r, l, m, &a->modules[a->nmodules++]);
    if (rc == ERR_OK)
        rc = peft_wants_finish(r, a);
    if (rc != ERR_OK)
        return rc;
    add_up(a);
    adapter_src_hash(a, a->hash);
    return ERR_OK;
}

static int read_all(struct peft_reading *r, const char *config, size_t len,
                    const struct st_file *weights, struct adapter_src *a)
{
    int rc = read_config(r->c.root, &r->c, r->err);
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
