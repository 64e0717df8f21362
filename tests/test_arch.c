/* test_arch.c - config.json is read as transformers reads it, or refused by name. */
#include "engine/arch_int.h"
#include "engine/util.h"
#include "tests/support_model.h"

#include <jansson.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define COUNT(t) (sizeof(t) / sizeof(t)[0])

static const char llama[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"hidden_size\":64,"
    "\"intermediate_size\":128,\"num_hidden_layers\":4,\"num_attention_heads\":4,"
    "\"num_key_value_heads\":2,\"vocab_size\":256,\"max_position_embeddings\":128,"
    "\"rms_norm_eps\":1e-5,\"hidden_act\":\"silu\",\"bos_token_id\":1,\"eos_token_id\":[2,3]}";

/* The config above with fields replaced (JSON object of new values; "DEL" removes). */
static char *changed(const char *patch)
{
    json_t *o = json_loads(llama, 0, NULL), *p = json_loads(patch, 0, NULL), *v;
    const char *key;
    assert_non_null(p);
    json_object_foreach (p, key, v)
        if (json_is_string(v) && strcmp(json_string_value(v), "DEL") == 0)
            json_object_del(o, key);
        else
            json_object_set(o, key, v);
    char *text = json_dumps(o, 0);
    json_decref(o);
    json_decref(p);
    return text;
}

static struct arch must_read(const char *patch)
{
    struct arch a;
    struct err err = { 0 };
    char *text = changed(patch);
    if (arch_from_config(text, NULL, &a, &err) != ERR_OK)
        fail_msg("%s: %s", patch, err.msg);
    free(text);
    return a;
}

static char *read_shared(const char *model, const char *file)
{
    char rel[128], *text;
    struct err err = { 0 };
    size_t len;
    snprintf(rel, sizeof rel, "golden/models/%s/%s", model, file);
    const char *path = support_shared(rel);
    if (path == NULL)
        return NULL;
    assert_int_equal(file_read(path, 1 << 20, &text, &len, &err), ERR_OK);
    return text;
}

static void both_spellings_of_a_config_give_the_same_arch(void **state)
{
    (void)state;
    static const char *const models[] = { "tiny-llama", "tiny-llama3", "tiny-mistral", "tiny-qwen2",
                                          "tiny-qwen3", "tiny-gptneox", "tiny-glm", "tiny-glm4",
                                          "tiny-gemma2" };
    for (size_t i = 0; i < COUNT(models); i++) {
        char *v5 = read_shared(models[i], "config.json"), *v4 = read_shared(models[i], "config.v4.json");
        if (v5 == NULL || v4 == NULL)
            skip();
        struct arch a, b;
        struct err err = { 0 };
        assert_int_equal(arch_from_config(v5, NULL, &a, &err), ERR_OK);
        assert_int_equal(arch_from_config(v4, NULL, &b, &err), ERR_OK);
        char *ja = arch_to_json(&a), *jb = arch_to_json(&b);
        assert_string_equal(ja, jb);
        free(ja);
        free(jb);
        free(v4);
        free(v5);
    }
}

/* Expected values read off the files by hand. */
static void golden_configs_mean_what_they_say(void **state)
{
    (void)state;
    char *text = read_shared("tiny-llama3", "config.v4.json");
    if (text == NULL)
        skip();
    struct arch a;
    struct err err = { 0 };
    assert_int_equal(arch_from_config(text, NULL, &a, &err), ERR_OK);
    free(text);
    assert_int_equal(a.hd, 32);
    assert_int_equal(a.G, 1);
    assert_int_equal(a.rope_scaling, ROPE_LLAMA3);
    assert_true(a.rope_theta == 500000 && a.rope_factor == 8 && a.rope_low_freq == 1 &&
                a.rope_high_freq == 4);
    assert_int_equal(a.rope_original_max, 64);
    assert_true(a.tied);
    text = read_shared("tiny-mistral", "config.json");
    assert_int_equal(arch_from_config(text, NULL, &a, &err), ERR_OK);
    free(text);
    assert_int_equal(a.window, 8);
    assert_true(arch_layer_windowed(&a, 0) && arch_layer_windowed(&a, 1));
    text = read_shared("tiny-qwen2", "config.json");
    assert_int_equal(arch_from_config(text, NULL, &a, &err), ERR_OK);
    free(text);
    assert_true(a.qkv_bias && !a.o_bias && !a.mlp_bias && a.window == 0 && a.norm_eps == 1e-6f);
    text = read_shared("tiny-qwen3", "config.json");
    assert_int_equal(arch_from_config(text, NULL, &a, &err), ERR_OK);
    free(text);
    assert_true(a.qk_norm && !a.qkv_bias && a.rope_theta == 1e6);
    assert_int_equal(arch_out(&a, MOD_Q), 128); /* head_dim 32 x 4, hidden size 64 */
    assert_int_equal(arch_in(&a, MOD_O), 128);
    assert_int_equal(arch_out(&a, MOD_O), 64);
}

static void every_family_of_the_table_is_in_the_list_of_messages(void **state)
{
    (void)state;
    char list[512] = "";
    for (size_t i = 0; i < arch_nfamilies; i++)
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", i ? ", " : "",
                 arch_families[i].model_type);
    assert_string_equal(list, family_list());
    struct arch a;
    struct err err = { 0 };
    char *text = changed("{\"model_type\":\"mamba\"}");
    assert_int_equal(arch_from_config(text, NULL, &a, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, list));
    free(text);
}

static void settings_that_cannot_be_honoured_are_refused_by_name(void **state)
{
    (void)state;
    const struct {
        const char *patch, *says;
    } cases[] = {
        { "{\"model_type\":\"DEL\"}", "model_type is missing" },
        { "{\"model_type\":\"mamba\"}", "model_type \"mamba\"" },
        { "{\"architectures\":[\"LlamaForSequenceClassification\"]}", "LlamaForSequenceClassification" },
        { "{\"hidden_act\":\"gelu\"}", "hidden_act is \"gelu\"" },
        { "{\"hidden_act\":1}", "hidden_act is 1" },
        { "{\"quantization_config\":{\"quant_method\":\"gptq\"}}", "quantization_config (gptq)" },
        { "{\"hidden_size\":\"DEL\"}", "hidden_size is missing" },
        { "{\"hidden_size\":64.0}", "hidden_size is 64.0" },
        { "{\"hidden_size\":-64}", "hidden_size is -64" },
        { "{\"hidden_size\":1000000000000}", "hidden_size is 1000000000000" },
        { "{\"vocab_size\":2000000000}", "vocab_size is 2000000000" },
        { "{\"num_hidden_layers\":513}", "num_hidden_layers is 513" },
        { "{\"num_hidden_layers\":0}", "num_hidden_layers is 0" },
        { "{\"num_key_value_heads\":3}", "num_attention_heads 4 is not a multiple of num_key_value_heads 3" },
        { "{\"num_attention_heads\":3,\"num_key_value_heads\":3}", "head_dim is missing" },
        { "{\"head_dim\":15}", "head_dim 15 is odd" },
        { "{\"head_dim\":4096,\"num_attention_heads\":4096,\"num_key_value_heads\":1}", "4096 heads of 4096" },
        { "{\"rms_norm_eps\":0}", "rms_norm_eps is 0" },
        { "{\"rms_norm_eps\":\"1e-5\"}", "rms_norm_eps is \"1e-5\"" },
        { "{\"rope_scaling\":{\"rope_type\":\"ntk\",\"factor\":4}}", "rope scaling \"ntk\"" },
        { "{\"rope_scaling\":{\"type\":\"dynamic\",\"alpha\":4}}", "\"dynamic\" with alpha" },
        { "{\"rope_scaling\":{\"type\":\"yarn\",\"mrope_section\":[1]}}", "\"yarn\" with mrope_section" },
        { "{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":0.5}}", "factor is 0.5" },
        { "{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2,\"beta_fast\":1,\"beta_slow\":2}}",
          "YaRN from 1 to 2 turns" },
        { "{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2,\"truncate\":1}}", "truncate is 1" },
        { "{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2},\"rope_theta\":1}", "with rope_theta 1" },
        { "{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2,\"original_max_position_embeddings\":64},"
          "\"original_max_position_embeddings\":32}", "is 32, but 64 in the rope settings" },
        { "{\"rope_parameters\":{\"rope_type\":\"longrope\"}}", "short_factor is not a list of 8" },
        { "{\"rope_parameters\":{\"rope_type\":\"longrope\",\"short_factor\":[1,1,1,1,1,1,1,0]}}",
          "short_factor[7]" },
        { "{\"rope_parameters\":{\"rope_type\":\"longrope\",\"factor\":4,\"short_factor\":[1,1,1,1,1,1,1,1],"
          "\"original_max_position_embeddings\":64,\"long_factor\":[1,1,1,1,1,1,1,1]}}",
          "has factor 4, but" },
        { "{\"rope_parameters\":{\"rope_type\":\"longrope\",\"short_factor\":[1],\"long_factor\":[1],"
          "\"long_mscale\":1}}", "\"longrope\" with long_mscale" },
        { "{\"rope_scaling\":{\"type\":\"linear\"}}", "factor is missing" },
        { "{\"rope_scaling\":{\"type\":\"linear\",\"factor\":0}}", "factor is 0" },
        { "{\"rope_scaling\":3}", "rope_scaling is 3" },
        { "{\"rope_scaling\":{\"type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4}}",
          "original_max_position_embeddings is missing" },
        { "{\"rope_scaling\":{\"type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,\"high_freq_factor\":4,"
          "\"original_max_position_embeddings\":64}}", "high_freq_factor 4 is not above" },
        { "{\"rope_scaling\":{\"type\":\"linear\",\"factor\":2},\"rope_parameters\":{\"rope_theta\":10000}}",
          "both rope_parameters and rope_scaling" },
        { "{\"rope_theta\":-1}", "rope_theta is -1" },
        { "{\"partial_rotary_factor\":0.5}", "partial_rotary_factor is 0.5" },
        { "{\"rope_parameters\":{\"partial_rotary_factor\":0.5}}", "partial_rotary_factor is 0.5" },
        { "{\"tie_word_embeddings\":1}", "tie_word_embeddings is 1" },
        { "{\"bos_token_id\":256}", "bos_token_id is 256" },
        { "{\"eos_token_id\":256}", "eos_token_id is 256" },
        { "{\"eos_token_id\":[1,\"2\"]}", "eos_token_id is \"2\"" },
        { "{\"eos_token_id\":[1,2,3,4,5,6,7,8,9]}", "more than 8" },
        { "{\"model_type\":\"qwen2\",\"architectures\":null,\"layer_types\":[\"full_attention\"]}",
          "layer_types is not a list of num_hidden_layers = 4" },
        { "{\"model_type\":\"qwen3\",\"architectures\":null,\"layer_types\":"
          "[\"full_attention\",\"linear_attention\",\"full_attention\",\"full_attention\"]}",
          "layer_types[1] is \"linear_attention\"" },
        { "{\"model_type\":\"qwen2\",\"architectures\":null,\"layer_types\":"
          "[\"full_attention\",\"sliding_attention\",\"full_attention\",\"full_attention\"]}",
          "give no window" },
        { "{\"model_type\":\"mistral\",\"architectures\":null,\"num_key_value_heads\":\"DEL\"}",
          "num_key_value_heads is missing" },
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        char *text = changed(cases[i].patch);
        struct arch a;
        struct err err = { 0 };
        int rc = arch_from_config(text, NULL, &a, &err);
        if (rc != ERR_INVALID || strstr(err.msg, cases[i].says) == NULL)
            fail_msg("%s: code %d, \"%s\"", cases[i].patch, rc, err.msg);
        free(text);
    }
    static const char *const broken[] = { "", "[]", "null", "{", "{\"model_type\":\"llama\",}",
                                          "{\"model_type\":\"llama\",\"model_type\":\"llama\"}" };
    for (size_t i = 0; i < COUNT(broken); i++) {
        struct arch a;
        struct err err = { 0 };
        assert_int_equal(arch_from_config(broken[i], NULL, &a, &err), ERR_INVALID);
        assert_non_null(strstr(err.msg, "config.json"));
    }
}

static void absent_fields_take_the_defaults_of_their_class(void **state)
{
    (void)state;
    struct arch a = must_read("{\"num_key_value_heads\":\"DEL\",\"rms_norm_eps\":\"DEL\","
                              "\"bos_token_id\":\"DEL\",\"eos_token_id\":\"DEL\"}");
    assert_int_equal(a.G, 4);
    assert_int_equal(a.hd, 16);
    assert_true(a.norm_eps == 1e-6f && a.rope_theta == 10000 && !a.tied);
    assert_int_equal(a.bos, -1);
    assert_int_equal(a.neos, 0);
    a = must_read("{\"model_type\":\"qwen3\",\"architectures\":null}");
    assert_int_equal(a.hd, 128);
    a = must_read("{\"model_type\":\"mistral\",\"architectures\":null}");
    assert_int_equal(a.window, 4096);
    a = must_read("{\"model_type\":\"mistral\",\"architectures\":null,\"sliding_window\":null}");
    assert_int_equal(a.window, 0);
    a = must_read("{\"attention_bias\":true,\"mlp_bias\":true}");
    assert_true(a.qkv_bias && a.o_bias && a.mlp_bias && arch_has_bias(&a, MOD_DOWN));
}

static void windows_of_qwen_begin_at_the_layer_the_config_names(void **state)
{
    (void)state;
    const struct {
        const char *patch;
        int window, layers; /* bit l: windowed */
    } cases[] = {
        { "{\"model_type\":\"qwen2\",\"architectures\":null,\"use_sliding_window\":true,"
          "\"sliding_window\":16,\"max_window_layers\":3}", 16, 8 },
        { "{\"model_type\":\"qwen2\",\"architectures\":null,\"use_sliding_window\":false,"
          "\"sliding_window\":16,\"max_window_layers\":0}", 0, 0 },
        { "{\"model_type\":\"qwen3\",\"architectures\":null,\"use_sliding_window\":true,"
          "\"sliding_window\":16}", 0, 0 }, /* max_window_layers is 28 when absent */
        { "{\"model_type\":\"qwen3\",\"architectures\":null,\"use_sliding_window\":true,"
          "\"sliding_window\":16,\"max_window_layers\":0,\"layer_types\":[\"sliding_attention\","
          "\"full_attention\",\"sliding_attention\",\"full_attention\"]}", 16, 5 },
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct arch a = must_read(cases[i].patch);
        int layers = 0;
        for (int l = 0; l < a.L; l++)
            layers |= arch_layer_windowed(&a, l) << l;
        assert_int_equal(a.window, cases[i].window);
        assert_int_equal(layers, cases[i].layers);
    }
}

static void generation_config_decides_where_generation_ends(void **state)
{
    (void)state;
    struct arch a;
    struct err err = { 0 };
    assert_int_equal(arch_from_config(llama, "{\"eos_token_id\":[7,9,7]}", &a, &err), ERR_OK);
    assert_int_equal(a.neos, 2);
    assert_int_equal(a.eos[1], 9);
    assert_int_equal(arch_from_config(llama, "{\"temperature\":0.6}", &a, &err), ERR_OK);
    assert_int_equal(a.neos, 2);
    assert_int_equal(a.eos[0], 2);
    assert_int_equal(arch_from_config(llama, "[]", &a, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "generation_config.json"));
}

static void the_kept_form_reads_back_as_the_same(void **state)
{
    (void)state;
    static const char *const patches[] = {
        "{}",
        "{\"rope_scaling\":{\"type\":\"linear\",\"factor\":2.5},\"rope_theta\":1234567.891}",
        "{\"model_type\":\"mistral\",\"architectures\":null,\"sliding_window\":7}",
        "{\"model_type\":\"qwen3\",\"architectures\":null,\"use_sliding_window\":true,"
        "\"sliding_window\":16,\"max_window_layers\":2,\"attention_bias\":true,"
        "\"tie_word_embeddings\":true}",
        ("{\"rope_parameters\":{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,"
         "\"high_freq_factor\":4,\"original_max_position_embeddings\":64,\"rope_theta\":5e5}}"),
        "{\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2,\"truncate\":false,\"beta_fast\":31.5}}",
        ("{\"rope_scaling\":{\"type\":\"longrope\",\"short_factor\":[1,1.1,1,1,1,1,1,1],"
         "\"long_factor\":[1,1.2,1,1,1,1,1,7],\"original_max_position_embeddings\":64}}"),
    };
    for (size_t i = 0; i < COUNT(patches); i++) {
        struct arch a = must_read(patches[i]), b;
        struct err err = { 0 };
        char *ja = arch_to_json(&a);
        if (arch_from_json(ja, &b, &err) != ERR_OK)
            fail_msg("%s", err.msg);
        char *jb = arch_to_json(&b);
        assert_string_equal(ja, jb);
        assert_true(a.rope_theta == b.rope_theta && a.norm_eps == b.norm_eps &&
                    a.rope_factor == b.rope_factor && a.rope_scaling == b.rope_scaling);
        assert_memory_equal(a.windowed, b.windowed, sizeof a.windowed);
        free(ja);
        free(jb);
    }
}

static void a_damaged_kept_form_is_refused(void **state)
{
    (void)state;
    struct arch a = must_read("{}"), b;
    char *good = arch_to_json(&a);
    const struct {
        const char *key, *value;
    } cases[] = {
        { "family", "\"gpt2\"" }, { "L", "0" },       { "L", "\"4\"" },        { "D", "1e9" },
        { "hd", "3" },            { "G", "3" },       { "windowed", "[0]" },   { "windowed", "[4]" },
        { "windowed", "{}" },     { "eos", "[256]" }, { "rope_theta", "0" },   { "norm_eps", "0" },
        { "bos", "256" },         { "bos", "-2" },    { "rope_scaling", "\"yarn\"" },
        { "rope_scaling", "\"llama3\"" },             { "rope_scaling", "\"linear\"" },
        { "rope_scaling", "\"longrope\"" },           { "rope_scaling", "\"dynamic\"" },
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        json_t *o = json_loads(good, 0, NULL);
        json_object_set_new(o, cases[i].key, json_loads(cases[i].value, JSON_DECODE_ANY, NULL));
        char *text = json_dumps(o, 0);
        struct err err = { 0 };
        if (arch_from_json(text, &b, &err) != ERR_INVALID || err.msg[0] == '\0')
            fail_msg("%s = %s was accepted", cases[i].key, cases[i].value);
        free(text);
        json_decref(o);
    }
    free(good);
}

static void paths_of_modules_and_back(void **state)
{
    (void)state;
    struct arch a = must_read("{\"num_hidden_layers\":12}");
    for (int l = 0; l < a.L; l++)
        for (int m = 0; m < MOD_COUNT; m++) {
            char path[100];
            int layer = -1;
            enum module module = MOD_COUNT;
            if (!arch_has_module(&a, (enum module)m))
                continue;
            arch_module_path(&a, l, (enum module)m, path, sizeof path);
            assert_true(arch_module_parse(&a, path, &layer, &module));
            assert_int_equal(layer, l);
            assert_int_equal(module, m);
        }
    char path[100];
    arch_module_path(&a, 11, MOD_DOWN, path, sizeof path);
    assert_string_equal(path, "model.layers.11.mlp.down_proj");
    static const char *const none[] = {
        "", "model.layers.12.mlp.down_proj", "model.layers.01.mlp.down_proj", "lm_head",
        "model.layers.-1.mlp.down_proj", "model.layers..mlp.down_proj",
        "model.layers.1.mlp.down_proj.weight", "model.layers.4294967297.mlp.down_proj",
        "model.layers.1.mlp.down_pro", "model.layers.1",
    };
    for (size_t i = 0; i < COUNT(none); i++) {
        int layer;
        enum module module;
        if (arch_module_parse(&a, none[i], &layer, &module))
            fail_msg("\"%s\" was taken for a module", none[i]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(both_spellings_of_a_config_give_the_same_arch),
        cmocka_unit_test(golden_configs_mean_what_they_say),
        cmocka_unit_test(every_family_of_the_table_is_in_the_list_of_messages),
        cmocka_unit_test(settings_that_cannot_be_honoured_are_refused_by_name),
        cmocka_unit_test(absent_fields_take_the_defaults_of_their_class),
        cmocka_unit_test(windows_of_qwen_begin_at_the_layer_the_config_names),
        cmocka_unit_test(generation_config_decides_where_generation_ends),
        cmocka_unit_test(the_kept_form_reads_back_as_the_same),
        cmocka_unit_test(a_damaged_kept_form_is_refused),
        cmocka_unit_test(paths_of_modules_and_back),
    };
    return cmocka_run_group_tests_name("arch", tests, NULL, NULL);
}
