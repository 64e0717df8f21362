/* support_adapter.c - adapters in PEFT's format for tests, made in memory. */
#include "tests/support_adapter.h"

#include "engine/peft_int.h"

#include "engine/util.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void must(bool ok, const char *what)
{
    if (ok)
        return;
    fprintf(stderr, "support_adapter: %s\n", what);
    abort();
}

static unsigned size_of(const char *dtype)
{
    return strcmp(dtype, "F16") == 0 || strcmp(dtype, "BF16") == 0 ? 2 : 4;
}

static uint32_t seed_of(const char *name)
{
    uint32_t h = 2166136261u;
    for (; *name != '\0'; name++)
        h = (h ^ (unsigned char)*name) * 16777619u;
    return h;
}

static void put_value(struct buf *b, const char *dtype, float v)
{
    uint16_t h = strcmp(dtype, "F16") == 0 ? f32_to_f16(v) : f32_to_bf16(v);
    bool small = size_of(dtype) == 2;
    must(buf_add(b, small ? (void *)&h : (void *)&v, small ? 2 : 4) == ERR_OK, "memory");
}

static void put_tensor(struct buf *b, const struct support_tensor *t)
{
    uint32_t x = seed_of(t->name);
    int64_t n = t->rows * (t->cols < 0 ? 1 : t->cols);
    for (int64_t i = 0; i < n; i++) {
        x = x * 1664525u + 1013904223u;
        float v = (float)(int32_t)x / 2147483648.0f;
        if (t->bad != NULL && i == n - 1)
            v = strcmp(t->bad, "nan") == 0 ? NAN : INFINITY;
        put_value(b, t->dtype, v);
    }
}

char *support_tensors_file(const struct support_tensor *t, size_t n, size_t *ret_len)
{
    struct buf head, all;
    buf_init(&head, 16 << 20);
    buf_init(&all, 64 << 20);
    size_t at = 0;
    must(buf_puts(&head, "{\"__metadata__\":{\"format\":\"pt\"}") == ERR_OK, "memory");
    for (size_t i = 0; i < n; i++) {
        char cols[32] = "";
        size_t bytes = (size_t)(t[i].rows * (t[i].cols < 0 ? 1 : t[i].cols)) * size_of(t[i].dtype);
        if (t[i].cols >= 0)
            snprintf(cols, sizeof cols, ",%lld%s", (long long)t[i].cols, t[i].conv ? ",1" : "");
        must(buf_printf(
                 &head, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%lld%s],\"data_offsets\":[%zu,%zu]}",
                 t[i].name, t[i].dtype, (long long)t[i].rows, cols, at, at + bytes) == ERR_OK,
             "memory");
        at += bytes;
    }
    must(buf_puts(&head, "}") == ERR_OK, "memory");
    uint8_t len[8];
    for (int i = 0; i < 8; i++)
        len[i] = (uint8_t)((uint64_t)head.len >> 8 * i);
    must(buf_add(&all, len, 8) == ERR_OK && buf_add(&all, head.data, head.len) == ERR_OK, "memory");
    for (size_t i = 0; i < n; i++)
        put_tensor(&all, &t[i]);
    buf_free(&head);
    *ret_len = all.len;
    return buf_take(&all);
}

void support_small_arch(struct arch *ret)
{
    static const char config[] =
        "{\"model_type\":\"llama\",\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":8,"
        "\"num_hidden_layers\":2,\"num_attention_heads\":2,\"num_key_value_heads\":1,"
        "\"head_dim\":4,\"intermediate_size\":12,\"vocab_size\":16,\"hidden_act\":\"silu\","
        "\"max_position_embeddings\":64,\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0,"
        "\"tie_word_embeddings\":false}";
    struct err err = { 0 };
    int rc = arch_from_config(config, NULL, ret, &err);
    must(rc == ERR_OK, err.msg);
}

size_t support_lora_tensors(const struct arch *arch, const char *path_end, int rank, bool adalora,
                            const char *dtype, struct support_tensor *t, size_t cap)
{
    static const char *const lora[] = { ".lora_A.weight", ".lora_B.weight" };
    static const char *const ada[] = { ".lora_A", ".lora_B", ".lora_E" };
    size_t n = 0, k = path_end ? strlen(path_end) : 0;
    for (int l = 0; l < arch->L; l++)
        for (int m = 0; m < MOD_COUNT; m++) {
            char path[96];
            if (!arch_has_module(arch, (enum module)m))
                continue;
            arch_module_path(arch, l, (enum module)m, path, sizeof path);
            size_t len = strlen(path);
            if (k > len || (k > 0 && strcmp(path + len - k, path_end) != 0))
                continue;
            for (int p = 0; p < (adalora ? 3 : 2); p++) {
                must(n < cap, "too many tensors");
                struct support_tensor *x = &t[n++];
                *x = (struct support_tensor){ .dtype = dtype };
                snprintf(x->name, sizeof x->name, "base_model.model.%s%s", path,
                         adalora ? ada[p] : lora[p]);
                x->rows = p == 1 ? arch_out(arch, (enum module)m) : rank;
                x->cols = p == 0 ? arch_in(arch, (enum module)m) : p == 1 ? rank : 1;
            }
        }
    return n;
}

/* The adapter borrows its tensors from the file's memory, so it is handed that memory as its own.
 */
int support_parse(const struct arch *arch, const char *config, const struct support_tensor *t,
                  size_t n, struct adapter_src **ret, struct err *err)
{
    size_t len;
    char *file = support_tensors_file(t, n, &len);
    struct st_file *st = NULL;
    int rc = st_open_mem(file, len, "weights", &st, err);
    if (rc == ERR_OK)
        rc = peft_parse(arch, config, strlen(config), st, ret, err);
    st_close(st);
    if (rc == ERR_OK && (*ret)->own == NULL) {
        (*ret)->own = file; /* the tensors lie in it */
        return ERR_OK;
    }
    if (rc == ERR_OK)
        rc = peft_own(*ret, err);
    free(file);
    return rc;
}
