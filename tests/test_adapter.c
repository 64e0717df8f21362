/* test_adapter.c - adapters as built for computing, their hash, their sets, and writing them back;
 * and what becomes of every adapter among the reference files. */
#include "engine/adapter.h"
#include "engine/lora.h"
#include "engine/mem.h"
#include "engine/util.h"
#include "tests/support_adapter.h"
#include "tests/support_lora.h"
#include "tests/support_model.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { TENSORS = 64 };

static const char q_config[] = "{\"peft_type\":\"LORA\",\"r\":3,\"lora_alpha\":6,"
                               "\"target_modules\":\"all-linear\"}";
static const char ada_config[] =
    "{\"peft_type\":\"ADALORA\",\"init_r\":3,\"lora_alpha\":6,\"target_modules\":\"all-linear\"}";

/* All linear layers of the small model with rank 3. */
static struct adapter_src *small_src(struct arch *arch, bool ada, const char *dtype)
{
    struct support_tensor t[TENSORS];
    support_small_arch(arch);
    size_t n = support_lora_tensors(arch, NULL, 3, ada, dtype, t, TENSORS);
    struct adapter_src *a = NULL;
    struct err err = { 0 };
    if (support_parse(arch, ada ? ada_config : q_config, t, n, &a, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    return a;
}

static double value(const void *p, enum dtype t, size_t i)
{
    uint16_t h;
    float f;
    if (t == DT_F32) {
        memcpy(&f, (const char *)p + 4 * i, 4);
        return f;
    }
    memcpy(&h, (const char *)p + 2 * i, 2);
    return t == DT_F16 ? f16_to_f32(h) : bf16_to_f32(h);
}

/* --- building --------------------------------------------------------------------------------- */

static void check_built(const struct adapter_src_module *m, const struct lora_module *b)
{
    assert_int_equal(b->rank, m->rank);
    assert_int_equal(b->in, m->in);
    assert_int_equal(b->out, m->out);
    assert_int_equal(b->dtype, m->dtype);
    assert_int_equal((uintptr_t)b->A % 64, 0);
    assert_int_equal((uintptr_t)b->B % 64, 0);
    assert_int_equal((uintptr_t)b->gain % 64, 0);
    size_t k = (size_t)m->rank;
    assert_memory_equal(b->A, m->A, k * (size_t)m->in * dtype_size(m->dtype));
    for (size_t j = 0; j < k; j++) {
        double e = m->E ? value(m->E, m->dtype, j) : 1.0;
        assert_true(b->gain[j] == (float)(m->scaling * e));
        for (size_t o = 0; o < (size_t)m->out; o++)
            assert_true(value(b->B, b->dtype, lora_b_index(b, (int)o, (int)j)) ==
                        value(m->B, m->dtype, o * k + j));
    }
}

static void a_built_adapter_holds_a_the_transposed_b_and_the_gain(void **state)
{
    (void)state;
    const char *const types[] = { "F32", "F16", "BF16" };
    for (int i = 0; i < 6; i++) {
        struct arch arch;
        struct adapter_src *src = small_src(&arch, i >= 3, types[i % 3]);
        struct adapter *a = NULL;
        struct err err = { 0 };
        assert_int_equal(src->nmodules, 14);
        assert_int_equal(adapter_build(&arch, src, 42, NULL, &a, &err), ERR_OK);
        assert_int_equal(a->version_id, 42);
        assert_int_equal(a->L, 2);
        assert_int_equal(a->rank_max, 3);
        assert_memory_equal(a->hash, src->hash, 32);
        for (size_t k = 0; k < src->nmodules; k++)
            check_built(&src->modules[k],
                        adapter_module(a, src->modules[k].layer, src->modules[k].module));
        assert_int_equal(a->bytes, adapter_build_bytes(&arch, src));
        adapter_src_free(src); /* nothing of it is used any more */
        assert_true(isfinite(adapter_module(a, 1, MOD_DOWN)->gain[2]));
        adapter_free(a);
    }
}

/* Memory of one that has gone, full of what it held: the same bytes come of it as of new memory.  After the
 * tables there are no pointers, and small adapters begin where their memory does. */
static void the_memory_of_one_that_has_gone_is_taken_if_it_is_as_large(void **state)
{
    (void)state;
    const char *const types[] = { "F32", "F16", "BF16" };
    for (int i = 0; i < 6; i++) {
        struct arch arch;
        struct adapter_src *src = small_src(&arch, i >= 3, types[i % 3]);
        struct adapter *fresh = NULL, *again = NULL;
        assert_int_equal(adapter_build(&arch, src, 1, NULL, &fresh, NULL), ERR_OK);
        const size_t bytes = fresh->bytes;
        struct adapter *spare = support_spare(bytes + 64);
        assert_int_equal(adapter_build(&arch, src, 1, &spare, &again, NULL), ERR_OK);
        assert_null(spare); /* another size: freed */
        adapter_free(again);

        spare = support_spare(bytes);
        void *memory = spare->own;
        assert_int_equal(adapter_build(&arch, src, 1, &spare, &again, NULL), ERR_OK);
        assert_null(spare);
        assert_ptr_equal(again->own, memory);
        assert_int_equal(again->bytes, bytes);
        assert_null(again->norms);
        assert_null(again->alone);
        const size_t tables = (size_t)((const char *)fresh->modules - (const char *)fresh) +
                              (size_t)arch.L * MOD_SLOTS * sizeof *fresh->modules;
        assert_memory_equal((char *)again + tables, (char *)fresh + tables, bytes - tables);
        for (int l = 0; l < arch.L; l++)
            for (int m = 0; m < MOD_SLOTS; m++) {
                const struct lora_module *x = &fresh->modules[l * MOD_SLOTS + m];
                const struct lora_module *y = &again->modules[l * MOD_SLOTS + m];
                assert_int_equal(x->rank, y->rank);
                assert_int_equal(x->B != NULL ? (const char *)x->B - (const char *)fresh : 0,
                                 y->B != NULL ? (const char *)y->B - (const char *)again : 0);
            }
        adapter_free(fresh);
        adapter_free(again);
        adapter_src_free(src);
    }
}

static void modules_that_are_not_adapted_or_have_rank_0_add_nothing(void **state)
{
    (void)state;
    struct arch arch;
    struct adapter_src *src = small_src(&arch, false, "F32");
    src->nmodules = 1;
    src->modules[0].rank = 0;
    struct adapter *a = NULL;
    assert_int_equal(adapter_build(&arch, src, 0, NULL, &a, NULL), ERR_OK);
    for (int l = 0; l < 2; l++)
        for (int m = 0; m < MOD_COUNT; m++)
            assert_int_equal(adapter_module(a, l, (enum module)m)->rank, 0);
    assert_int_equal(a->rank_max, 0);
    adapter_free(a);
    src->nmodules = 14;
    src->modules[0].rank = 3;
    adapter_src_free(src);
}

static void an_adapter_of_another_base_is_not_built(void **state)
{
    (void)state;
    struct arch arch, other;
    struct adapter_src *src = small_src(&arch, false, "F32");
    struct adapter *a = NULL;
    for (int i = 0; i < 4; i++) {
        struct err err = { 0 };
        other = arch;
        if (i == 0)
            other.L = 1;
        else if (i == 1)
            other.D = 16;
        else if (i == 2)
            other.F = 13;
        else
            other.G = 2;
        assert_int_equal(adapter_build(&other, src, 0, NULL, &a, &err), ERR_INVALID);
        assert_non_null(strstr(err.msg, "model.layers."));
    }
    adapter_src_free(src);
}

/* Sizes from 2 MiB on are mapped, smaller ones come from the heap: bytes must say what was taken
 * on both sides. */
static void bytes_are_what_is_taken(void **state)
{
    (void)state;
    struct arch arch;
    support_small_arch(&arch);
    for (int in = 520; in < 530; in++) {
        static float zeros[1000 * 1000];
        arch.D = in;
        struct adapter_src_module m = { .path = "x",
                                        .module = MOD_GATE,
                                        .rank = 960,
                                        .in = in,
                                        .out = arch.F,
                                        .dtype = DT_F32,
                                        .A = zeros,
                                        .B = zeros,
                                        .scaling = 1 };
        struct adapter_src src = { .nmodules = 1, .modules = &m };
        struct adapter *a = NULL;
        size_t least = (size_t)960 * 4 * (size_t)(in + arch.F + 1);
        assert_int_equal(adapter_build(&arch, &src, 0, NULL, &a, NULL), ERR_OK);
        assert_true(a->bytes >= least && a->bytes < least + 16384);
        assert_int_equal(a->bytes, adapter_build_bytes(&arch, &src));
        assert_int_equal(mem_footprint(a->bytes), a->bytes);
        adapter_free(a);
    }
}

/* --- hash ---------------------------------------------------------------------------------------
 */

static void the_hash_depends_on_the_content_and_not_on_the_file(void **state)
{
    (void)state;
    struct arch arch;
    struct support_tensor t[TENSORS], turned[TENSORS];
    support_small_arch(&arch);
    size_t n = support_lora_tensors(&arch, NULL, 3, false, "F32", t, TENSORS);
    for (size_t i = 0; i < n; i++)
        turned[i] = t[n - 1 - i];
    struct adapter_src *a = NULL, *b = NULL;
    const char other[] = "{\"peft_version\":\"0.9\",  \"target_modules\":[\"q_proj\",\"k_proj\","
                         "\"v_proj\",\"o_proj\",\"gate_proj\",\"up_proj\",\"down_proj\"],"
                         "\"lora_alpha\":6.0,\"r\":3,\"peft_type\":\"LORA\"}";
    assert_int_equal(support_parse(&arch, q_config, t, n, &a, NULL), ERR_OK);
    assert_int_equal(support_parse(&arch, other, turned, n, &b, NULL), ERR_OK);
    assert_memory_equal(a->hash, b->hash, 32);

    uint8_t h[32];
    ((char *)(uintptr_t)b->modules[7].B)[5] ^= 1;
    adapter_src_hash(b, h);
    assert_memory_not_equal(h, a->hash, 32);
    ((char *)(uintptr_t)b->modules[7].B)[5] ^= 1;
    b->modules[3].scaling = nextafter(b->modules[3].scaling, 9);
    adapter_src_hash(b, h);
    assert_memory_not_equal(h, a->hash, 32);
    b->modules[3].scaling = a->modules[3].scaling;
    b->method = METHOD_RSLORA;
    adapter_src_hash(b, h);
    assert_memory_not_equal(h, a->hash, 32);
    b->method = METHOD_LORA;
    b->modules[2].init_rank++;
    adapter_src_hash(b, h);
    assert_memory_not_equal(h, a->hash, 32);
    adapter_src_free(a);
    adapter_src_free(b);
}

/* --- sets ---------------------------------------------------------------------------------------
 */

static void a_set_has_one_order_and_equal_contents_are_added(void **state)
{
    (void)state;
    const struct adapter a = { .hash = { 1 } }, b = { .hash = { 2 } }, c = { .hash = { 3 } };
    const struct adapter b_again = { .hash = { 2 }, .version_id = 9 };
    struct lora_set s = { 5,
                          { { &c, 1 }, { &b, 0.5f }, { &a, -2 }, { &b_again, 0.25f }, { &c, 3 } } };
    struct lora_set t = { 3, { { &b_again, 0.75f }, { &c, 4 }, { &a, -2 } } };
    lora_set_sort(&s);
    lora_set_sort(&t);
    assert_int_equal(s.n, 3);
    assert_ptr_equal(s.item[0].adapter, &a);
    assert_memory_equal(s.item[1].adapter->hash, b.hash, 32);
    assert_ptr_equal(s.item[2].adapter, &c);
    assert_true(s.item[1].weight == 0.75f && s.item[2].weight == 4);
    assert_true(lora_set_equal(&s, &t));

    uint8_t base[32] = { 7 }, seed[3][32];
    lora_set_seed(&s, 1, base, seed[0]);
    lora_set_seed(&t, 1, base, seed[1]);
    assert_memory_equal(seed[0], seed[1], 32);
    lora_set_seed(&t, 2, base, seed[1]);
    assert_memory_not_equal(seed[0], seed[1], 32); /* another tenant */
    base[0] = 8;
    lora_set_seed(&t, 1, base, seed[1]);
    assert_memory_not_equal(seed[0], seed[1], 32); /* another base */
    base[0] = 7;
    t.item[0].weight = 1;
    assert_false(lora_set_equal(&s, &t));
    lora_set_seed(&t, 1, base, seed[1]);
    assert_memory_not_equal(seed[0], seed[1], 32); /* other weights */

    struct lora_set none = { 0 };
    lora_set_sort(&none);
    assert_false(lora_set_equal(&s, &none));
    assert_true(lora_set_equal(&none, &none));
}

static void methods_have_names(void **state)
{
    (void)state;
    enum adapter_method m;
    for (int i = 0; i <= METHOD_ADALORA; i++) {
        assert_true(adapter_method_parse(adapter_method_name((enum adapter_method)i), &m));
        assert_int_equal(m, i);
    }
    assert_false(adapter_method_parse("pissa", &m));
}

/* --- writing back
 * --------------------------------------------------------------------------------- */

static void what_is_written_reads_back_the_same(void **state)
{
    (void)state;
    char dir[64], path[128];
    support_tmpdir(dir);
    snprintf(path, sizeof path, "%s/adapter_model.safetensors", dir);
    for (int i = 0; i < 2; i++) {
        struct arch arch;
        struct adapter_src *a = small_src(&arch, i == 1, "BF16"), *b = NULL;
        struct err err = { 0 };
        if (peft_write_weights(a, path, &err) != ERR_OK)
            fail_msg("%s", err.msg);
        support_write_file(dir, "adapter_config.json", a->config, a->config_len);
        if (peft_load_dir(&arch, dir, &b, &err) != ERR_OK)
            fail_msg("%s", err.msg);
        assert_memory_equal(a->hash, b->hash, 32);
        assert_string_equal(a->config, b->config);
        assert_int_equal(a->params, b->params);
        adapter_src_free(a);
        adapter_src_free(b);
    }
    support_remove(dir);
}

/* --- the classic form, against PyTorch ---------------------------------------------------------
 */

static void read_f32(const struct st_file *f, const char *name, float *ret, size_t n)
{
    const struct st_tensor *t = st_find(f, name);
    struct err err = { 0 };
    if (t == NULL || st_count(t) != n || st_f32(t, 0, n, ret, &err) != ERR_OK)
        fail_msg("%s: %s", name, err.msg);
}

/* Linear(8, 4) with r 2 and alpha 8: k_proj of the small model has that shape. */
static void w_plus_alpha_over_r_times_b_a_gives_pytorchs_numbers(void **state)
{
    (void)state;
    const char *path = support_shared("golden/seed_demo.safetensors");
    if (path == NULL)
        skip();
    float W[4 * 8], bias[4], A[2 * 8], x[3 * 8], B[4 * 2], want[3 * 4];
    struct st_file *f = NULL;
    struct err err = { 0 };
    assert_int_equal(st_open(path, &f, &err), ERR_OK);
    read_f32(f, "weight", W, 32);
    read_f32(f, "bias", bias, 4);
    read_f32(f, "A", A, 16);
    read_f32(f, "x", x, 24);
    struct arch arch;
    support_small_arch(&arch);
    for (int zero = 0; zero < 2; zero++) {
        read_f32(f, zero ? "B" : "B_nonzero", B, 8);
        read_f32(f, zero ? "y" : "y_nonzero", want, 12);
        struct adapter_src_module m = { .path = "k",
                                        .module = MOD_K,
                                        .rank = 2,
                                        .init_rank = 2,
                                        .alpha = 8,
                                        .scaling = 8.0 / 2,
                                        .in = 8,
                                        .out = 4,
                                        .dtype = DT_F32,
                                        .A = A,
                                        .B = B };
        struct adapter_src src = { .nmodules = 1, .modules = &m };
        struct adapter *a = NULL;
        assert_int_equal(adapter_build(&arch, &src, 0, NULL, &a, &err), ERR_OK);

        float y[3 * 4], *ys[1] = { y };
        _Alignas(64) float scratch[4096];
        for (int r = 0; r < 3; r++)
            for (int o = 0; o < 4; o++) {
                double s = bias[o];
                for (int k = 0; k < 8; k++)
                    s += (double)x[r * 8 + k] * W[o * 8 + k];
                y[r * 4 + o] = (float)s;
            }
        struct compute c = { .isa = ISA_SCALAR, .precision = PREC_F32 };
        assert_int_equal(pool_create(1, &c.pool, &err), ERR_OK);
        const struct lora_set set = { 1, { { a, 1 } } };
        const struct lora_group group = { 0, 3, &set };
        const enum module mods[1] = { MOD_K };
        const int ldy[1] = { 4 };
        assert_true(lora_scratch(3) <= sizeof scratch / sizeof scratch[0]);
        lora_apply(&c, &group, 1, &(struct lora_where){ 0, mods, 1 }, x, 8, ys, ldy, scratch);
        for (int i = 0; i < 12; i++)
            assert_float_equal(y[i], want[i], 1e-5f);
        pool_destroy(c.pool);
        adapter_free(a);
    }
    st_close(f);
}

/* --- every adapter among the reference files -----------------------------------------------------
 */

static int load_arch(const char *relative, struct arch *ret)
{
    char *text = NULL;
    size_t len;
    struct err err = { 0 };
    const char *path = support_shared(relative);
    if (path == NULL)
        return -1;
    if (file_read(path, 1 << 20, &text, &len, &err) != ERR_OK ||
        arch_from_config(text, NULL, ret, &err) != ERR_OK)
        fail_msg("%s: %s", relative, err.msg);
    free(text);
    return 0;
}

/* refused: a word of the reason, or NULL. */
struct reference {
    const char *model, *adapter, *refused;
    enum adapter_method method;
    size_t nmodules;
    int rank_min, rank_max;
};

static void check_reference(const struct arch *arch, const char *dir, const struct reference *r)
{
    struct adapter_src *a = NULL;
    struct adapter *built = NULL;
    struct err err = { 0 };
    int rc = peft_load_dir(arch, dir, &a, &err);
    if (r->refused != NULL) {
        if (rc != ERR_INVALID || strstr(err.msg, r->refused) == NULL)
            fail_msg("%s: %d \"%s\", not for \"%s\"", dir, rc, err.msg, r->refused);
        return;
    }
    if (rc != ERR_OK)
        fail_msg("%s: %s", dir, err.msg);
    if (a->method != r->method || a->nmodules != r->nmodules || a->rank_min != r->rank_min ||
        a->rank_max != r->rank_max)
        fail_msg("%s: %s, %zu modules, ranks %d to %d", dir, adapter_method_name(a->method),
                 a->nmodules, a->rank_min, a->rank_max);
    if (a->method != METHOD_DORA) { /* whose norms need the base (test_golden.c) */
        assert_int_equal(adapter_build(arch, a, 0, NULL, &built, &err), ERR_OK);
        assert_int_equal(built->bytes, adapter_build_bytes(arch, a));
        adapter_free(built);
    }
    adapter_src_free(a);
}

static void the_golden_adapters_are_read_or_refused_for_the_right_reason(void **state)
{
    (void)state;
    static const struct reference all[] = {
        { "tiny-llama", "adalora", NULL, METHOD_ADALORA, 14, 0, 6 },
        { "tiny-llama", "dora", NULL, METHOD_DORA, 14, 4, 4 },
        { "tiny-llama", "lora_all_linear", NULL, METHOD_LORA, 12, 2, 2 },
        { "tiny-llama", "lora_bf16", NULL, METHOD_LORA, 14, 4, 4 },
        { "tiny-llama", "lora_bin", NULL, METHOD_LORA, 4, 4, 4 },
        { "tiny-llama", "lora_embed_head", NULL, METHOD_LORA, 4, 4, 4 },
        { "tiny-llama", "lora_hetero", NULL, METHOD_LORA, 14, 2, 8 },
        { "tiny-llama", "lora_layers", NULL, METHOD_LORA, 2, 3, 3 },
        { "tiny-llama", "lora_lorabias", NULL, METHOD_LORA, 4, 4, 4 },
        { "tiny-llama", "lora_mts", NULL, METHOD_LORA, 4, 4, 4 },
        { "tiny-llama", "lora_regex", NULL, METHOD_LORA, 3, 3, 3 },
        { "tiny-llama", "lora_rslora", NULL, METHOD_RSLORA, 14, 2, 8 },
        { "tiny-llama3", "lora_hetero", NULL, METHOD_LORA, 14, 2, 8 },
        { "tiny-mistral", "lora_hetero", NULL, METHOD_LORA, 14, 2, 8 },
        { "tiny-qwen2", "adalora", NULL, METHOD_ADALORA, 14, 0, 5 },
        { "tiny-qwen2", "dora", NULL, METHOD_DORA, 14, 4, 4 },
        { "tiny-qwen2", "lora_bias_loraonly", NULL, METHOD_LORA, 4, 4, 4 },
        { "tiny-qwen2", "lora_hetero", NULL, METHOD_LORA, 14, 2, 8 },
        { "tiny-qwen2", "lora_rslora", NULL, METHOD_RSLORA, 14, 2, 8 },
        { "tiny-qwen3", "adalora", NULL, METHOD_ADALORA, 14, 0, 4 },
        { "tiny-qwen3", "dora", NULL, METHOD_DORA, 14, 4, 4 },
        { "tiny-qwen3", "lora_hetero", NULL, METHOD_LORA, 14, 2, 8 },
        { "tiny-qwen3", "lora_rslora", NULL, METHOD_RSLORA, 14, 2, 8 },
    };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        char rel[160];
        struct arch arch;
        snprintf(rel, sizeof rel, "golden/models/%s/config.json", all[i].model);
        if (load_arch(rel, &arch) != 0)
            skip();
        snprintf(rel, sizeof rel, "golden/adapters/%s/%s", all[i].model, all[i].adapter);
        check_reference(&arch, support_shared(rel), &all[i]);
    }
}

static void adapters_that_training_left_are_read(void **state)
{
    (void)state;
    static const struct reference all[] = {
        { "tiny-llama", "lora_nf4", NULL, METHOD_LORA, 14, 4, 4 },
        { "tiny-llama", "rslora_nf4_wd", NULL, METHOD_RSLORA, 14, 2, 4 },
        { "tiny-llama", "adalora_nf4", NULL, METHOD_ADALORA, 14, 0, 6 },
        { "tiny-llama", "adalora_deltaT3_from1", NULL, METHOD_ADALORA, 14, 0, 6 },
    };
    struct arch arch;
    if (load_arch("golden/models/tiny-llama/config.json", &arch) != 0)
        skip();
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        char rel[160];
        snprintf(rel, sizeof rel, "golden/train/%s/adapter", all[i].adapter);
        check_reference(&arch, support_shared(rel), &all[i]);
    }
}

/* Shapes of the models that the adapters were made for. */
static void real_arch(struct arch *a, const char *family, int L, int D, int H, int G, int F, int V)
{
    *a = (struct arch){ .L = L, .D = D, .H = H, .G = G, .hd = 64, .F = F, .V = V, .bos = -1 };
    snprintf(a->family, sizeof a->family, "%s", family);
}

static void adapters_from_the_hub_are_read_or_refused_for_the_right_reason(void **state)
{
    (void)state;
    static const struct reference all[] = {
        { "smollm2", "smollm2-135m-r8-qv", NULL, METHOD_LORA, 60, 8, 8 },
        { "qwen", "qwen2.5-0.5b-r8-qv", NULL, METHOD_LORA, 48, 8, 8 },
        /* the same names, other shapes */
        { "qwen", "smollm2-135m-r8-qv", "no such linear layer", 0, 0, 0, 0 },
        { "smollm2", "qwen2.5-0.5b-r8-qv", "shape [8, 896], not [8, 576]", 0, 0, 0, 0 },
        { "smollm2", "gemma3-270m-r4-qkvo-hw", "shape [4, 640], not [4, 576]", 0, 0, 0, 0 },
        /* other names */
        { "smollm2", "gpt2-r8-cattn-cproj-main", "c_attn\"] finds no linear layer", 0, 0, 0, 0 },
        { "smollm2", "bloom-560m-r8-qkv", "query_key_value\"] finds no linear layer", 0, 0, 0, 0 },
        { "smollm2", "neox-opencalm1b-r1-f16", "query_key_value\"] finds no linear", 0, 0, 0, 0 },
        { "smollm2", "gpt2-seqcls-r8-score", "SEQ_CLS", 0, 0, 0, 0 },
        { "smollm2", "bloom-560m-legacy-mergedlinear-bin", "query_key_value\"] finds no", 0, 0, 0, 0 },
    };
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        char rel[160];
        struct arch arch;
        if (strcmp(all[i].model, "smollm2") == 0)
            real_arch(&arch, "llama", 30, 576, 9, 3, 1536, 49152);
        else
            real_arch(&arch, "qwen2", 24, 896, 14, 2, 4864, 151936);
        snprintf(rel, sizeof rel, "adapters/%s", all[i].adapter);
        const char *dir = support_shared(rel);
        if (dir == NULL)
            skip();
        check_reference(&arch, dir, &all[i]);
    }
}

static void adapters_trained_on_stories_are_read(void **state)
{
    (void)state;
    static const struct reference all[] = {
        { NULL, "lora_r8", NULL, METHOD_LORA, 35, 8, 8 },
        { NULL, "adalora_r8", NULL, METHOD_ADALORA, 35, 0, 12 },
        { NULL, "dora_r8", NULL, METHOD_DORA, 35, 8, 8 },
    };
    struct arch arch;
    if (load_arch("models/stories260K/config.json", &arch) != 0)
        skip();
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
        char rel[160];
        snprintf(rel, sizeof rel, "adapters/stories260K/%s", all[i].adapter);
        check_reference(&arch, support_shared(rel), &all[i]);
    }
}

/* lora_hetero: rank_pattern {down_proj 2, layers.1.self_attn.v_proj 5, q_proj 8}, r 4;
 * alpha_pattern {^model.layers.0.self_attn.o_proj 3, v_proj 24}, alpha 8.  lora_rslora: the same
 * ranks, alpha 4 everywhere. */
static void patterns_of_a_golden_adapter_give_ranks_and_scalings(void **state)
{
    (void)state;
    static const int rank[2][MOD_COUNT] = { { 8, 4, 4, 4, 4, 4, 2 }, { 8, 4, 5, 4, 4, 4, 2 } };
    static const double alpha[2][MOD_COUNT] = { { 8, 8, 24, 3, 8, 8, 8 },
                                                { 8, 8, 24, 8, 8, 8, 8 } };
    struct arch arch;
    if (load_arch("golden/models/tiny-llama/config.json", &arch) != 0)
        skip();
    for (int rs = 0; rs < 2; rs++) {
        struct adapter_src *a = NULL;
        struct err err = { 0 };
        const char *dir = support_shared(rs ? "golden/adapters/tiny-llama/lora_rslora"
                                            : "golden/adapters/tiny-llama/lora_hetero");
        assert_int_equal(peft_load_dir(&arch, dir, &a, &err), ERR_OK);
        for (size_t i = 0; i < a->nmodules; i++) {
            const struct adapter_src_module *m = &a->modules[i];
            int r = rank[m->layer][m->module];
            double al = rs ? 4 : alpha[m->layer][m->module];
            assert_int_equal(m->rank, r);
            assert_true(fabs(m->scaling - (rs ? al / sqrt(r) : al / r)) < 1e-15);
        }
        assert_string_equal(a->base_name, "golden/tiny-llama");
        adapter_src_free(a);
    }
}

static void a_folder_without_its_files_is_refused(void **state)
{
    (void)state;
    char dir[64];
    struct arch arch;
    struct adapter_src *a = NULL;
    support_small_arch(&arch);
    support_tmpdir(dir);
    struct err err = { 0 };
    assert_int_equal(peft_load_dir(&arch, dir, &a, &err), ERR_NOT_FOUND);
    support_write_file(dir, "adapter_config.json", q_config, strlen(q_config));
    err_clear(&err);
    assert_int_not_equal(peft_load_dir(&arch, dir, &a, &err), ERR_OK);
    assert_non_null(strstr(err.msg, "adapter_model.safetensors"));
    support_write_file(dir, "adapter_model.bin", "x", 1);
    err_clear(&err);
    assert_int_equal(peft_load_dir(&arch, dir, &a, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "adapter_model.bin"));
    support_remove(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_built_adapter_holds_a_the_transposed_b_and_the_gain),
        cmocka_unit_test(the_memory_of_one_that_has_gone_is_taken_if_it_is_as_large),
        cmocka_unit_test(modules_that_are_not_adapted_or_have_rank_0_add_nothing),
        cmocka_unit_test(an_adapter_of_another_base_is_not_built),
        cmocka_unit_test(bytes_are_what_is_taken),
        cmocka_unit_test(the_hash_depends_on_the_content_and_not_on_the_file),
        cmocka_unit_test(a_set_has_one_order_and_equal_contents_are_added),
        cmocka_unit_test(methods_have_names),
        cmocka_unit_test(what_is_written_reads_back_the_same),
        cmocka_unit_test(w_plus_alpha_over_r_times_b_a_gives_pytorchs_numbers),
        cmocka_unit_test(the_golden_adapters_are_read_or_refused_for_the_right_reason),
        cmocka_unit_test(adapters_that_training_left_are_read),
        cmocka_unit_test(adapters_from_the_hub_are_read_or_refused_for_the_right_reason),
        cmocka_unit_test(adapters_trained_on_stories_are_read),
        cmocka_unit_test(patterns_of_a_golden_adapter_give_ranks_and_scalings),
        cmocka_unit_test(a_folder_without_its_files_is_refused),
    };
    return cmocka_run_group_tests_name("adapter", tests, NULL, NULL);
}
