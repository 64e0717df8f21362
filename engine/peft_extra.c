/* peft_extra.c - the tensors of an adapter that are no factors: DoRA's magnitudes, biases, what
 * modules_to_save replaces, and the rows of trainable_token_indices (peft_tokens.c).
 *
 * The config says which of them the file must have: that list is made first, each with its name and
 * shape.  A tensor of the file that is neither a factor nor on the list is refused, and so is a
 * file that lacks one of the list.
 *
 * PEFT also writes a copy of the embedding and of the head when LoRA adapts them
 * (`.base_layer.weight`).  They are frozen while it trains, so the copy is the base's own: its name,
 * type, shape and that it is finite are checked, and then it is dropped.  (The base file has the
 * 4-bit or 8-bit form of the head; there is nothing to compare bytes with.) */
#include "engine/peft_int.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool ends_with(const char *s, size_t n, const char *end)
{
    size_t k = strlen(end);
    return k <= n && memcmp(s + n - k, end, k) == 0;
}

/* --- the list ---------------------------------------------------------------------------------- */

static int want(struct peft_reading *r, enum adapter_extra kind, bool carried, int layer, int module,
                int rows, int cols, const char *path, const char *suffix)
{
    if (r->nwants == r->wants_cap) {
        size_t cap = r->wants_cap > 0 ? 2 * r->wants_cap : 64;
        void *p = realloc(r->wants, cap * sizeof *r->wants);
        if (p == NULL)
            return err_nomem(r->err);
        r->wants = p;
        r->wants_cap = cap;
    }
    char name[320];
    snprintf(name, sizeof name, "%s%s", path, suffix);
    struct peft_want *w = &r->wants[r->nwants];
    *w = (struct peft_want){
        .x = { .kind = kind, .layer = layer, .module = module, .rows = rows, .cols = cols },
        .carried = carried,
    };
    w->x.name = strdup(name);
    if (w->x.name == NULL)
        return err_nomem(r->err);
    r->nwants++;
    return ERR_OK;
}

int peft_want(struct peft_reading *r, enum adapter_extra kind, const json_t *ids, int rows, int cols,
              const char *path, const char *suffix)
{
    int rc = want(r, kind, false, 0, 0, rows, cols, path, suffix);
    if (rc == ERR_OK)
        r->wants[r->nwants - 1].ids = ids;
    return rc;
}

/* --- modules_to_save --------------------------------------------------------------------------- */

/* As PEFT excludes saved modules from the targets: whole components of the path. */
bool peft_is_saved(const struct peft_reading *r, const char *path)
{
    for (size_t i = 0; i < json_array_size(r->c.save); i++) {
        const char *name = json_string_value(json_array_get(r->c.save, i));
        const size_t k = strlen(name);
        for (const char *p = strstr(path, name); p != NULL; p = strstr(p + 1, name))
            if ((p == path || p[-1] == '.') && (p[k] == '.' || p[k] == '\0'))
                return true;
    }
    return false;
}

/* As PEFT finds them: by the end of the path. */
static bool saved_by(const char *path, const char *name)
{
    return ends_with(path, strlen(path), name);
}

/* A name that means a linear layer or something around it. */
static int refuse_blocks(struct peft_reading *r, const char *name)
{
    char path[256];
    for (int l = 0; l < r->arch->L; l++)
        for (int m = 0; m < MOD_COUNT; m++) {
            arch_module_path(r->arch, l, (enum module)m, path, sizeof path);
            for (size_t n = 1; n <= strlen(path); n++)
                if ((path[n] == '.' || path[n] == '\0') && ends_with(path, n, name))
                    return peft_refuse(r->err,
                                       "adapter_config.json: modules_to_save names %s, which means "
                                       "%.*s: only the embedding, the head and norms can be replaced",
                                       name, (int)n, path);
        }
    return ERR_OK;
}

/* A norm's weight (with `weight`) and bias, if it has one. */
static int want_norm(struct peft_reading *r, int layer, enum norm n, bool weight)
{
    char path[256];
    const int size = n == NORM_Q || n == NORM_K ? r->arch->hd : r->arch->D;
    snprintf(path, sizeof path, r->family->norm_path[n], layer);
    int rc = weight ? want(r, EXTRA_NORM, false, layer, n, size, 0, path, ".weight") : ERR_OK;
    if (rc == ERR_OK && r->family->norm_kind == NORM_LAYER)
        rc = want(r, EXTRA_NORM_BIAS, false, layer, n, size, 0, path, ".bias");
    return rc;
}

/* Norms whose path ends so (NULL: all), in every layer. */
static int want_norms(struct peft_reading *r, const char *name, bool weight, bool *found)
{
    for (int i = 0; i < NORM_COUNT; i++) {
        const bool of_heads = i == NORM_Q || i == NORM_K;
        const char *format = r->family->norm_path[i];
        if (format == NULL || (of_heads && !r->arch->qk_norm))
            continue;
        for (int l = 0; l < (i < LAYER_NORMS ? r->arch->L : 1); l++) {
            char path[256];
            snprintf(path, sizeof path, format, l);
            if (name != NULL && !saved_by(path, name))
                continue;
            *found = true;
            int rc = want_norm(r, l, (enum norm)i, weight);
            if (rc != ERR_OK)
                return rc;
        }
    }
    return ERR_OK;
}

static int save(struct peft_reading *r, const char *name)
{
    const struct arch *a = r->arch;
    bool found = false;
    int rc = refuse_blocks(r, name);
    if (rc == ERR_OK && saved_by(r->family->head, name)) {
        found = true;
        rc = want(r, EXTRA_HEAD, false, 0, 0, a->V, a->D, r->family->head, ".weight");
    }
    if (rc == ERR_OK && saved_by(r->family->embed, name)) {
        found = true;
        rc = want(r, EXTRA_EMBED, false, 0, 0, a->V, a->D, r->family->embed, ".weight");
    }
    if (rc == ERR_OK)
        rc = want_norms(r, name, true, &found);
    if (rc == ERR_OK && !found)
        return peft_refuse(r->err,
                           "adapter_config.json: modules_to_save names %s, which this base (%s) has "
                           "not got: the embedding (%s), the head (%s) and norms can be replaced",
                           name, a->family, r->family->embed, r->family->head);
    return rc;
}

/* --- vectors of modules ------------------------------------------------------------------------ */

static int module_wants(struct peft_reading *r, int layer, int module)
{
    char path[256];
    const bool targeted = peft_slot_of(r, layer, module)->targeted;
    if (module < MOD_COUNT && !arch_has_module(r->arch, (enum module)module))
        return ERR_OK;
    const int out = adapter_module_out(r->arch, module);
    adapter_module_path(r->arch, layer, module, path, sizeof path);
    int rc = ERR_OK;
    if (targeted && r->c.dora)
        rc = want(r, EXTRA_MAGNITUDE, false, layer, module, out, 0, path, ".lora_magnitude_vector");
    if (rc == ERR_OK && targeted && r->c.lora_bias)
        rc = want(r, EXTRA_LORA_BIAS, false, layer, module, out, 0, path, ".lora_B.bias");
    if (rc == ERR_OK && module >= MOD_COUNT && targeted)
        rc = want(r, EXTRA_KINDS, true, 0, 0, r->arch->V, r->arch->D, path, ".base_layer.weight");
    if (rc != ERR_OK || module >= MOD_COUNT || !arch_has_bias(r->arch, (enum module)module))
        return rc;
    if (r->c.bias == BIAS_ALL || (r->c.bias == BIAS_LORA_ONLY && targeted))
        rc = want(r, EXTRA_BIAS, false, layer, module, out, 0, path,
                  targeted ? ".base_layer.bias" : ".bias");
    return rc;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct peft_want *)a)->x.name, ((const struct peft_want *)b)->x.name);
}

/* Two names of modules_to_save may mean one module. */
static void drop_doubles(struct peft_reading *r)
{
    size_t n = 0;
    for (size_t i = 0; i < r->nwants; i++) {
        if (n > 0 && strcmp(r->wants[n - 1].x.name, r->wants[i].x.name) == 0)
            free(r->wants[i].x.name);
        else
            r->wants[n++] = r->wants[i];
    }
    r->nwants = n;
}

/* With tied weights a trained embedding would be the head as well. */
static int check_tying(const struct peft_reading *r)
{
    bool outer = peft_slot_of(r, 0, MOD_HEAD)->targeted || peft_slot_of(r, 0, MOD_EMBED)->targeted ||
                 peft_is_saved(r, r->family->head) || peft_is_saved(r, r->family->embed);
    if (!r->c.tie || !r->arch->tied || !outer)
        return ERR_OK;
    return peft_refuse(r->err,
                       "adapter_config.json: ensure_weight_tying is true: this base's head is its "
                       "embedding, and an adapter that changes both as one is not computed");
}

int peft_wants_create(struct peft_reading *r)
{
    int rc = check_tying(r);
    for (size_t i = 0; rc == ERR_OK && i < json_array_size(r->c.save); i++)
        rc = save(r, json_string_value(json_array_get(r->c.save, i)));
    bool found;
    if (rc == ERR_OK && r->c.bias == BIAS_ALL)
        rc = want_norms(r, NULL, false, &found);
    if (rc == ERR_OK)
        rc = peft_tokens_want(r);
    for (int l = 0; l < r->arch->L; l++)
        for (int m = 0; rc == ERR_OK && m < (l == 0 ? MOD_SLOTS : MOD_COUNT); m++)
            rc = module_wants(r, l, m);
    if (rc != ERR_OK)
        return rc;
    if (r->nwants > 0)
        qsort(r->wants, r->nwants, sizeof *r->wants, by_name);
    drop_doubles(r);
    return ERR_OK;
}

void peft_wants_free(struct peft_reading *r)
{
    for (size_t i = 0; i < r->nwants; i++)
        free(r->wants[i].x.name);
    free(r->wants);
}

/* --- the file ---------------------------------------------------------------------------------- */

static int compare_name(const void *key, const void *item)
{
    return strcmp(key, ((const struct peft_want *)item)->x.name);
}

bool peft_wants_take(struct peft_reading *r, const struct st_tensor *t, const char *name)
{
    char shorter[320];
    const size_t n = strlen(name), k = strlen(".weight");
    if (r->nwants == 0 || n >= sizeof shorter)
        return false;
    memcpy(shorter, name, n + 1);
    if (ends_with(name, n, ".lora_magnitude_vector.weight")) /* PEFT reads both */
        shorter[n - k] = '\0';
    struct peft_want *w = bsearch(shorter, r->wants, r->nwants, sizeof *r->wants, compare_name);
    if (w == NULL || w->tensor != NULL)
        return false;
    w->tensor = t;
    return true;
}

static const char *who_wants(const struct peft_want *w)
{
    switch (w->x.kind) {
    case EXTRA_MAGNITUDE:
        return "use_dora is set";
    case EXTRA_LORA_BIAS:
        return "lora_bias is set";
    case EXTRA_BIAS:
    case EXTRA_NORM_BIAS:
        return "the config's bias says that the base's biases are replaced";
    case EXTRA_EMBED_ROWS:
    case EXTRA_HEAD_ROWS:
        return "trainable_token_indices names its rows";
    default:
        return "modules_to_save names it";
    }
}

static int finish_one(const struct peft_reading *r, struct peft_want *w)
{
    if (w->tensor == NULL)
        return w->carried ? ERR_OK
                          : peft_refuse(r->err, "tensor base_model.model.%s is missing: %s",
                                        w->x.name, who_wants(w));
    int rc = peft_check_tensor(r, w->tensor, w->x.rows, w->x.cols > 0 ? w->x.cols : -1,
                               w->ids != NULL ? "as trainable_token_indices and this base say"
                                              : "as in this base");
    w->x.dtype = w->tensor->dtype;
    w->x.data = w->tensor->data;
    return rc;
}

/* Which rows: a tensor of our own behind theirs. */
static int add_ids(struct peft_reading *r, const struct peft_want *w, const char *name,
                   struct adapter_src *a)
{
    struct adapter_src_extra *x = &a->extras[a->nextras];
    *x = (struct adapter_src_extra){
        .kind = w->x.kind == EXTRA_HEAD_ROWS ? EXTRA_HEAD_IDS : EXTRA_EMBED_IDS, .rows = w->x.rows,
        .dtype = DT_I32,
    };
    if (asprintf(&x->name, "%s.ids", name) < 0) {
        x->name = NULL;
        return err_nomem(r->err);
    }
    a->nextras++;
    return ERR_OK;
}

int peft_wants_finish(struct peft_reading *r, struct adapter_src *a)
{
    a->extras = calloc(2 * r->nwants + 1, sizeof *a->extras);
    if (a->extras == NULL)
        return err_nomem(r->err);
    for (size_t i = 0; i < r->nwants; i++) {
        struct peft_want *w = &r->wants[i];
        int rc = finish_one(r, w);
        if (rc != ERR_OK)
            return rc;
        if (w->carried)
            continue;
        struct adapter_src_extra *x = &a->extras[a->nextras++];
        *x = w->x;
        w->x.name = NULL; /* the adapter's now */
        if (w->ids != NULL)
            rc = add_ids(r, w, x->name, a);
        if (rc != ERR_OK)
            return rc;
    }
    return ERR_OK;
}
