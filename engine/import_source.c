/* import_source.c - a Hugging Face folder: its JSON files, and the tensors of one or many weight
 * files as one sorted list.  A GGUF file becomes the same things (import_gguf.c). */
#include "engine/import_int.h"

#include "engine/sentencepiece.h"
#include "engine/util.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

enum { MAX_SHARDS = 1000, MAX_JSON = 4 << 20, MAX_TOKENIZER = 64 << 20, HASH_STEP = 16 << 20 };

static const struct {
    const char *name;
    size_t max;
    bool required, json;
} small_files[] = {
    { "config.json", MAX_JSON, true, true },
    { "generation_config.json", MAX_JSON, false, true },
    { "tokenizer.json", MAX_TOKENIZER, false, true },
    { "tokenizer_config.json", MAX_JSON, false, true },
    { "chat_template.jinja", MAX_JSON, false, false },
};
enum { NSMALL = sizeof small_files / sizeof small_files[0] };

/* --- files ---------------------------------------------------------------------------- */

/* A slot for one more file; they are never moved, there is room for all. */
static struct source_file *new_file(struct source *s, const char *name)
{
    struct source_file *f = &s->files[s->nfiles];
    f->name = strdup(name);
    if (f->name == NULL)
        return NULL;
    s->nfiles++;
    return f;
}

int source_add_made(struct source *s, const char *name, const char *text, struct err *err)
{
    struct source_file *f = new_file(s, name);
    if (f == NULL || (f->text = strdup(text)) == NULL)
        return err_nomem(err);
    f->len = strlen(text);
    f->made = true;
    return ERR_OK;
}

int source_add_mapped(struct source *s, const char *path, const char *name, struct st_file **ret,
                      struct err *err)
{
    struct source_file *f = new_file(s, name);
    if (f == NULL || (f->st = calloc(1, sizeof *f->st)) == NULL)
        return err_nomem(err);
    int rc = file_map(path, &f->st->map, &f->st->map_len, err);
    f->st->mapped = rc == ERR_OK;
    *ret = f->st;
    return rc;
}

static int check_json(const struct source *s, const struct source_file *f, struct err *err)
{
    json_error_t je;
    json_t *v = json_loadb(f->text, f->len, 0, &je);
    bool object = json_is_object(v);
    json_decref(v);
    if (v == NULL)
        return err_set(err, ERR_INVALID, "%s/%s is not valid JSON (line %d: %s)", s->dir, f->name,
                       je.line, je.text);
    if (!object)
        return err_set(err, ERR_INVALID, "%s/%s is not a JSON object", s->dir, f->name);
    return ERR_OK;
}

static int read_small(struct source *s, const char *name, size_t max, bool json, struct err *err)
{
    struct source_file *f = new_file(s, name);
    char *path = path_join(s->dir, name);
    int rc = f == NULL || path == NULL ? err_nomem(err)
                                       : file_read(path, max, &f->text, &f->len, err);
    if (rc == ERR_OK && strlen(f->text) != f->len)
        rc = err_set(err, ERR_INVALID, "%s contains a zero byte", path);
    if (rc == ERR_OK && json)
        rc = check_json(s, f, err);
    free(path);
    return rc;
}

static bool has_file(const struct source *s, const char *name)
{
    char *path = path_join(s->dir, name);
    bool there = path != NULL && file_exists(path);
    free(path);
    return there;
}

static int read_small_files(struct source *s, struct err *err)
{
    for (size_t i = 0; i < NSMALL; i++) {
        if (!has_file(s, small_files[i].name)) {
            if (small_files[i].required)
                return err_set(err, ERR_INVALID,
                               "%s has no %s: it is not a Hugging Face model folder", s->dir,
                               small_files[i].name);
            continue;
        }
        int rc = read_small(s, small_files[i].name, small_files[i].max, small_files[i].json, err);
        if (rc != ERR_OK)
            return rc;
    }
    return ERR_OK;
}

const struct source_file *source_text(const struct source *s, const char *name)
{
    for (size_t i = 0; i < s->nfiles; i++)
        if (s->files[i].text != NULL && strcmp(s->files[i].name, name) == 0)
            return &s->files[i];
    return NULL;
}

/* --- weights -------------------------------------------------------------------------- */

static int open_weights(struct source *s, const char *name, struct err *err)
{
    struct source_file *f = new_file(s, name);
    char *path = path_join(s->dir, name);
    int rc = f == NULL || path == NULL ? err_nomem(err) : st_open(path, &f->st, err);
    free(path);
    return rc;
}

static bool is_open(const struct source *s, const char *name)
{
    for (size_t i = 0; i < s->nfiles; i++)
        if (strcmp(s->files[i].name, name) == 0)
            return true;
    return false;
}

/* Open every file that the index names. */
static int open_shards(struct source *s, const json_t *map, struct err *err)
{
    const char *tensor;
    json_t *v;
    json_object_foreach ((json_t *)map, tensor, v) {
        const char *name = json_string_value(v);
        if (name == NULL || name[0] == '.' || strchr(name, '/') != NULL)
            return err_set(err, ERR_INVALID,
                           "model.safetensors.index.json: the file of tensor %.200s is not a plain "
                           "file name",
                           tensor);
        if (is_open(s, name))
            continue;
        if (s->nfiles == MAX_SHARDS)
            return err_set(err, ERR_TOO_LARGE,
                           "model.safetensors.index.json names more than %d files", MAX_SHARDS);
        int rc = open_weights(s, name, err);
        if (rc != ERR_OK)
            return rc;
    }
    return ERR_OK;
}

/* The index and the files must agree on where each tensor is. */
static int check_index(const struct source *s, const json_t *map, struct err *err)
{
    const char *tensor;
    json_t *v;
    for (size_t i = 0; i < s->nfiles; i++)
        for (size_t k = 0; s->files[i].st != NULL && k < s->files[i].st->ntensors; k++) {
            const char *name = s->files[i].st->tensors[k].name;
            const char *where = json_string_value(json_object_get(map, name));
            if (where == NULL || strcmp(where, s->files[i].name) != 0)
                return err_set(err, ERR_INVALID,
                               "tensor %s is in %s, but model.safetensors.index.json %s %s", name,
                               s->files[i].name, where ? "says" : "does not list it",
                               where ? where : "there");
        }
    json_object_foreach ((json_t *)map, tensor, v)
        if (source_find(s, tensor) == NULL)
            return err_set(err, ERR_INVALID,
                           "tensor %.200s is not in %.100s, where model.safetensors.index.json "
                           "says it is",
                           tensor, json_string_value(v));
    return ERR_OK;
}

static int by_name(const void *pa, const void *pb)
{
    const struct source_tensor *a = pa, *b = pb;
    return strcmp(a->t->name, b->t->name);
}

int source_list_tensors(struct source *s, struct err *err)
{
    size_t n = 0;
    for (size_t i = 0; i < s->nfiles; i++)
        n += s->files[i].st ? s->files[i].st->ntensors : 0;
    s->tensors = calloc(n + 1, sizeof *s->tensors);
    if (s->tensors == NULL)
        return err_nomem(err);
    for (size_t i = 0; i < s->nfiles; i++)
        for (size_t k = 0; s->files[i].st != NULL && k < s->files[i].st->ntensors; k++)
            s->tensors[s->ntensors++].t = &s->files[i].st->tensors[k];
    qsort(s->tensors, n, sizeof *s->tensors, by_name);
    for (size_t i = 1; i < n; i++)
        if (strcmp(s->tensors[i - 1].t->name, s->tensors[i].t->name) == 0)
            return err_set(err, ERR_INVALID, "tensor %s is in two weight files of %s",
                           s->tensors[i].t->name, s->dir);
    return ERR_OK;
}

static int open_all_weights(struct source *s, struct err *err)
{
    if (has_file(s, "model.safetensors")) {
        int rc = open_weights(s, "model.safetensors", err);
        return rc == ERR_OK ? source_list_tensors(s, err) : rc;
    }
    if (!has_file(s, "model.safetensors.index.json"))
        return err_set(err, ERR_INVALID,
                       "%s has neither model.safetensors nor model.safetensors.index.json%s",
                       s->dir,
                       has_file(s, "pytorch_model.bin") ||
                               has_file(s, "pytorch_model.bin.index.json")
                           ? "; pickled weights (pytorch_model.bin) can run code and are not read"
                           : "");
    int rc = read_small(s, "model.safetensors.index.json", MAX_TOKENIZER, true, err);
    if (rc != ERR_OK)
        return rc;
    json_t *index = json_loads(s->files[s->nfiles - 1].text, JSON_REJECT_DUPLICATES, NULL);
    const json_t *map = json_object_get(index, "weight_map");
    if (!json_is_object(map) || json_object_size(map) == 0)
        rc = err_set(err, ERR_INVALID,
                     "model.safetensors.index.json has no weight_map, or lists a tensor twice");
    if (rc == ERR_OK)
        rc = open_shards(s, map, err);
    if (rc == ERR_OK)
        rc = source_list_tensors(s, err);
    if (rc == ERR_OK)
        rc = check_index(s, map, err);
    json_decref(index);
    return rc;
}

static struct source_tensor *find_exactly(const struct source *s, const char *name)
{
    const struct st_tensor t = { .name = name };
    const struct source_tensor key = { .t = &t };
    return s->ntensors ? bsearch(&key, s->tensors, s->ntensors, sizeof key, by_name) : NULL;
}

struct source_tensor *source_find(const struct source *s, const char *name)
{
    const struct family *f = family_find(s->arch.family); /* NULL before the config was read */
    const char *prefix = f ? f->optional_prefix : NULL;
    struct source_tensor *t = find_exactly(s, name);
    if (t == NULL && prefix != NULL && strncmp(name, prefix, strlen(prefix)) == 0)
        t = find_exactly(s, name + strlen(prefix));
    return t;
}

static void shape_mismatch(const char *name, const int64_t *dims, int ndim, int N, int K,
                           struct err *err)
{
    char shape[120] = "", want[40];
    size_t len = 0;
    for (int i = 0; i < ndim && i < 5; i++)
        len += (size_t)snprintf(shape + len, sizeof shape - len, "%s%lld", i ? ", " : "",
                                (long long)dims[i]);
    snprintf(want, sizeof want, K ? "%d, %d" : "%d", N, K);
    err_set(err, ERR_INVALID, "tensor %s has shape [%s], but config.json asks for [%s]", name,
            shape, want);
}

int source_f32(const struct source_tensor *t, size_t first, size_t n, float *ret, struct err *err)
{
    if (t->blocks != NULL || t->head_rows != 0)
        return gguf_f32(t, first, n, ret, err);
    return t->q4 ? bnb_f32(t->q4, first, n, ret, err) : st_f32(t->t, first, n, ret, err);
}

const struct source_tensor *source_take(struct source *s, const char *name, int N, int K,
                                        struct err *err)
{
    struct source_tensor *e = source_find(s, name);
    if (e == NULL) {
        err_set(err, ERR_INVALID, "tensor %s is missing from %s", name, s->dir);
        return NULL;
    }
    const struct st_tensor *t = e->t;
    if (!e->q4 && !e->blocks && t->dtype != DT_F32 && t->dtype != DT_F16 && t->dtype != DT_BF16) {
        err_set(err, ERR_INVALID, "tensor %s has type %s, where F32, F16 or BF16 is needed", name,
                t->dtype_name);
        return NULL;
    }
    const int64_t *dims = e->q4 ? e->q4->shape : t->shape;
    const int ndim = e->q4 ? 2 : t->ndim;
    if (ndim != (K ? 2 : 1) || dims[0] != N || (K && dims[1] != K)) {
        shape_mismatch(name, dims, ndim, N, K, err);
        return NULL;
    }
    e->used = true;
    return e;
}

void source_forget(const struct source *s, const struct source_tensor *src)
{
    const struct st_tensor *t = src->t;
    for (size_t i = 0; i < s->nfiles; i++) /* the one that maps it; the others do nothing */
        if (s->files[i].st != NULL)
            st_forget(s->files[i].st, t->data, t->bytes);
}

/* Buffers that old versions of transformers saved beside the weights; nothing reads them. */
static bool is_stray(const char *name)
{
    static const char *const suffixes[] = { ".rotary_emb.inv_freq", ".rotary_pos_emb.inv_freq",
                                            ".masked_bias", ".attn.bias", ".attention.bias" };
    size_t n = strlen(name);
    for (size_t i = 0; i < sizeof suffixes / sizeof suffixes[0]; i++) {
        size_t m = strlen(suffixes[i]);
        if (n > m && strcmp(name + n - m, suffixes[i]) == 0)
            return true;
    }
    return false;
}

int source_check_all_used(const struct source *s, struct err *err)
{
    for (size_t i = 0; i < s->ntensors; i++)
        if (!s->tensors[i].used && !is_stray(s->tensors[i].t->name))
            return err_set(err, ERR_INVALID,
                           "tensor %s does not belong to a %s model as config.json describes it",
                           s->tensors[i].t->name, s->arch.family);
    return ERR_OK;
}

/* --- chat template -------------------------------------------------------------------- */

/* chat_template of tokenizer_config.json is a string, or a list of named ones; the one called
 * "default" is meant when nobody says which. */
static const char *template_of(const json_t *v)
{
    if (json_is_string(v))
        return json_string_value(v);
    for (size_t i = 0; i < json_array_size(v); i++) {
        const json_t *e = json_array_get(v, i);
        const char *name = json_string_value(json_object_get(e, "name"));
        if (name != NULL && strcmp(name, "default") == 0)
            return json_string_value(json_object_get(e, "template"));
    }
    return NULL;
}

/* A chat_template.jinja comes before what tokenizer_config.json says. */
static int find_template(struct source *s, struct err *err)
{
    const struct source_file *f = source_text(s, "chat_template.jinja");
    json_t *config = NULL;
    const char *text = f ? f->text : NULL;
    if (f == NULL && (f = source_text(s, "tokenizer_config.json")) != NULL) {
        config = json_loadb(f->text, f->len, 0, NULL);
        text = template_of(json_object_get(config, "chat_template"));
    }
    if (text != NULL)
        s->chat_template = strdup(text);
    json_decref(config);
    return text != NULL && s->chat_template == NULL ? err_nomem(err) : ERR_OK;
}

/* --- open and close ------------------------------------------------------------------- */

static int by_file_name(const void *pa, const void *pb)
{
    const struct source_file *a = pa, *b = pb;
    return strcmp(a->name, b->name);
}

/* A tokenizer.model becomes the tokenizer.json that the folder lacks. */
static int read_spm(struct source *s, struct err *err)
{
    if (source_text(s, "tokenizer.json") != NULL || !has_file(s, "tokenizer.model"))
        return ERR_OK;
    struct source_file *f = new_file(s, "tokenizer.model");
    char *path = path_join(s->dir, "tokenizer.model"), *json = NULL;
    int rc = f == NULL || path == NULL ? err_nomem(err)
                                       : file_read(path, MAX_TOKENIZER, &f->text, &f->len, err);
    const struct source_file *config = source_text(s, "tokenizer_config.json");
    const struct source_file *added = source_text(s, "added_tokens.json");
    if (rc == ERR_OK)
        rc = spm_tokenizer(f->text, f->len, config ? config->text : NULL,
                           added ? added->text : NULL, &json, err);
    if (rc == ERR_OK)
        rc = source_add_made(s, "tokenizer.json", json, err);
    free(json);
    free(path);
    return rc;
}

/* tokenizer.model and what only it needs. */
static int read_vocabulary(struct source *s, struct err *err)
{
    int rc = ERR_OK;
    if (source_text(s, "tokenizer.json") == NULL && has_file(s, "added_tokens.json"))
        rc = read_small(s, "added_tokens.json", MAX_JSON, true, err);
    return rc == ERR_OK ? read_spm(s, err) : rc;
}

static int open_folder(struct source *ret, struct err *err)
{
    int rc = read_small_files(ret, err);
    if (rc == ERR_OK)
        rc = read_vocabulary(ret, err);
    if (rc == ERR_OK) {
        const struct source_file *gen = source_text(ret, "generation_config.json");
        rc = arch_from_config(source_text(ret, "config.json")->text, gen ? gen->text : NULL,
                              &ret->arch, err);
    }
    if (rc == ERR_OK)
        rc = find_template(ret, err);
    if (rc == ERR_OK)
        rc = open_all_weights(ret, err);
    if (rc == ERR_OK)
        rc = bnb_attach(ret, err);
    return rc;
}

int source_open(const char *path, struct source *ret, struct err *err)
{
    struct stat st;
    *ret = (struct source){ .dir = strdup(path) };
    ret->files = calloc(MAX_SHARDS + NSMALL + 5, sizeof *ret->files);
    if (ret->dir == NULL || ret->files == NULL)
        return err_nomem(err);
    int rc = stat(path, &st) == 0 && S_ISREG(st.st_mode) ? source_open_gguf(path, ret, err)
                                                          : open_folder(ret, err);
    qsort(ret->files, ret->nfiles, sizeof *ret->files, by_file_name);
    return rc;
}

void source_close(struct source *s)
{
    for (size_t i = 0; i < s->nfiles; i++) {
        free(s->files[i].name);
        free(s->files[i].text);
        st_close(s->files[i].st);
    }
    free(s->files);
    free(s->tensors);
    free(s->q4);
    free(s->chat_template);
    free(s->dir);
    *s = (struct source){ 0 };
}

/* In steps, so that a cancelled import need not wait for the end of a large file. */
static void hash_file(const struct source_file *f, const atomic_bool *stop, char ret_hex[65])
{
    const uint8_t *p = f->st ? f->st->map : (const uint8_t *)f->text;
    size_t left = f->st ? f->st->map_len : f->len;
    struct sha256 h;
    uint8_t digest[32];
    sha256_init(&h);
    while (left > 0 && !atomic_load(stop)) {
        size_t n = left < HASH_STEP ? left : HASH_STEP;
        sha256_add(&h, p, n);
        if (f->st != NULL)
            st_forget(f->st, p, n);
        p += n;
        left -= n;
    }
    sha256_end(&h, digest);
    hex32(digest, ret_hex);
}

void source_hash(const struct source *s, const atomic_bool *stop, char ret_hex[65])
{
    struct sha256 all;
    uint8_t digest[32];
    sha256_init(&all);
    for (size_t i = 0; i < s->nfiles; i++) {
        char hex[65];
        if (s->files[i].made)
            continue;
        hash_file(&s->files[i], stop, hex);
        sha256_add(&all, hex, 64);
        sha256_add(&all, "  ", 2);
        sha256_add(&all, s->files[i].name, strlen(s->files[i].name));
        sha256_add(&all, "\n", 1);
    }
    sha256_end(&all, digest);
    hex32(digest, ret_hex);
}
