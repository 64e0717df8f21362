/* test_families.c - the families beside Llama: configs of published models mean what their cards say,
 * what is not computed is refused by name, and models that can be written in two ways give the same
 * logits in both. */
#include "engine/arch_int.h"
#include "engine/base_int.h"
#include "engine/safetensors.h"
#include "engine/util.h"
#include "server/session.h"
#include "tests/support_model.h"

#include <dirent.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define COUNT(t) (sizeof(t) / sizeof(t)[0])

/* --- published models -------------------------------------------------------------------- */

static const char gpt2[] =
    "{'activation_function':'gelu_new','architectures':['GPT2LMHeadModel'],'bos_token_id':50256,"
    "'eos_token_id':50256,'layer_norm_epsilon':1e-05,'model_type':'gpt2','n_ctx':1024,'n_embd':768,"
    "'n_head':12,'n_layer':12,'n_positions':1024,'vocab_size':50257}";
static const char open_calm_1b[] =
    "{'architectures':['GPTNeoXForCausalLM'],'bos_token_id':0,'eos_token_id':0,'hidden_act':'gelu',"
    "'hidden_size':2048,'intermediate_size':8192,'layer_norm_eps':1e-05,'model_type':'gpt_neox',"
    "'max_position_embeddings':2048,'num_attention_heads':16,'num_hidden_layers':24,"
    "'rotary_emb_base':10000,'rotary_pct':1.0,'tie_word_embeddings':false,"
    "'use_parallel_residual':false,'vocab_size':52096}";
static const char pythia_70m[] =
    "{'architectures':['GPTNeoXForCausalLM'],'bos_token_id':0,'eos_token_id':0,'hidden_act':'gelu',"
    "'hidden_size':512,'intermediate_size':2048,'layer_norm_eps':1e-05,'model_type':'gpt_neox',"
    "'max_position_embeddings':2048,'num_attention_heads':8,'num_hidden_layers':6,"
    "'rotary_emb_base':10000,'rotary_pct':0.25,'tie_word_embeddings':false,"
    "'use_parallel_residual':true,'vocab_size':50304}";
static const char bloom_560m[] =
    "{'apply_residual_connection_post_layernorm':false,'architectures':['BloomForCausalLM'],"
    "'bos_token_id':1,'eos_token_id':2,'layer_norm_epsilon':1e-05,'model_type':'bloom',"
    "'n_embed':1024,'n_inner':null,'n_layer':24,'num_attention_heads':16,'offset_alibi':100,"
    "'seq_length':2048,'vocab_size':250880}";
static const char chatglm3_6b[] =
    "{'model_type':'chatglm','architectures':['ChatGLMModel'],'add_bias_linear':false,"
    "'add_qkv_bias':true,'apply_query_key_layer_scaling':true,"
    "'apply_residual_connection_post_layernorm':false,'ffn_hidden_size':13696,'hidden_size':4096,"
    "'kv_channels':128,'layernorm_epsilon':1e-05,'multi_query_attention':true,"
    "'multi_query_group_num':2,'num_attention_heads':32,'num_layers':28,'original_rope':true,"
    "'padded_vocab_size':65024,'post_layer_norm':true,'rmsnorm':true,'seq_length':8192,"
    "'quantization_bit':0,'pre_seq_len':null,'tie_word_embeddings':false,'eos_token_id':2}";
static const char glm_4_9b_chat[] =
    "{'model_type':'chatglm','architectures':['ChatGLMModel'],'add_bias_linear':false,"
    "'add_qkv_bias':true,'apply_residual_connection_post_layernorm':false,'ffn_hidden_size':13696,"
    "'hidden_size':4096,'kv_channels':128,'layernorm_epsilon':1.5625e-07,"
    "'multi_query_attention':true,'multi_query_group_num':2,'num_attention_heads':32,"
    "'num_layers':40,'original_rope':true,'padded_vocab_size':151552,'post_layer_norm':true,"
    "'rmsnorm':true,'rope_ratio':500,'seq_length':131072,'tie_word_embeddings':false,"
    "'eos_token_id':[151329,151336,151338]}";
static const char phi_3_mini_4k[] =
    "{'architectures':['Phi3ForCausalLM'],'bos_token_id':1,'eos_token_id':32000,"
    "'hidden_act':'silu','hidden_size':3072,'intermediate_size':8192,"
    "'max_position_embeddings':4096,'model_type':'phi3','num_attention_heads':32,"
    "'num_hidden_layers':32,'num_key_value_heads':32,'original_max_position_embeddings':4096,"
    "'rms_norm_eps':1e-05,'rope_scaling':null,'rope_theta':10000.0,'sliding_window':2047,"
    "'tie_word_embeddings':false,'vocab_size':32064}";
static const char smollm3_3b[] =
    "{'architectures':['SmolLM3ForCausalLM'],'attention_bias':false,'bos_token_id':null,"
    "'eos_token_id':128012,'hidden_act':'silu','hidden_size':2048,'intermediate_size':11008,"
    "'max_position_embeddings':65536,'mlp_bias':false,'model_type':'smollm3',"
    "'no_rope_layer_interval':4,'num_attention_heads':16,'num_hidden_layers':36,"
    "'num_key_value_heads':4,'rms_norm_eps':1e-06,'rope_scaling':null,'rope_theta':5000000.0,"
    "'sliding_window':null,'use_sliding_window':false,'vocab_size':128256}";
static const char gemma_2_2b[] =
    "{'architectures':['Gemma2ForCausalLM'],'attention_bias':false,'attn_logit_softcapping':50.0,"
    "'bos_token_id':2,'eos_token_id':1,'final_logit_softcapping':30.0,'head_dim':256,"
    "'hidden_act':'gelu_pytorch_tanh','hidden_activation':'gelu_pytorch_tanh','hidden_size':2304,"
    "'intermediate_size':9216,'max_position_embeddings':8192,'model_type':'gemma2',"
    "'num_attention_heads':8,'num_hidden_layers':26,'num_key_value_heads':4,"
    "'query_pre_attn_scalar':256,'rms_norm_eps':1e-06,'rope_theta':10000.0,'sliding_window':4096,"
    "'torch_dtype':'float32','vocab_size':256000}";
static const char gemma_3_270m[] =
    "{'_sliding_window_pattern':6,'architectures':['Gemma3ForCausalLM'],'attention_bias':false,"
    "'attn_logit_softcapping':null,'bos_token_id':2,'eos_token_id':1,"
    "'final_logit_softcapping':null,'head_dim':256,'hidden_activation':'gelu_pytorch_tanh',"
    "'hidden_size':640,'intermediate_size':2048,'max_position_embeddings':32768,"
    "'model_type':'gemma3_text','num_attention_heads':4,'num_hidden_layers':18,"
    "'num_key_value_heads':1,'query_pre_attn_scalar':256,'rms_norm_eps':1e-06,"
    "'rope_local_base_freq':10000.0,'rope_scaling':null,'rope_theta':1000000.0,"
    "'sliding_window':512,'torch_dtype':'bfloat16','use_bidirectional_attention':false,"
    "'vocab_size':262144}";

/* The config with some fields replaced: `patch` is a JSON object, in which "DEL" removes; apostrophes
 * stand for quotation marks in both.  free() it. */
static char *changed(const char *config, const char *patch)
{
    json_t *o[2];
    const char *const text[2] = { config, patch };
    for (int i = 0; i < 2; i++) {
        char *s = strdup(text[i]);
        for (char *p = s; *p != '\0'; p++)
            *p = *p == '\'' ? '"' : *p;
        o[i] = json_loads(s, 0, NULL);
        assert_non_null(o[i]);
        free(s);
    }
    const char *key;
    json_t *v;
    json_object_foreach (o[1], key, v)
        if (json_is_string(v) && strcmp(json_string_value(v), "DEL") == 0)
            json_object_del(o[0], key);
        else
            json_object_set(o[0], key, v);
    char *ret = json_dumps(o[0], 0);
    json_decref(o[0]);
    json_decref(o[1]);
    return ret;
}

static struct arch must_read(const char *config, const char *patch)
{
    struct arch a;
    struct err err = { 0 };
    char *text = changed(config, patch);
    if (arch_from_config(text, NULL, &a, &err) != ERR_OK)
        fail_msg("%s: %s", text, err.msg);
    free(text);
    return a;
}

static void shapes(const struct arch *a, int L, int D, int H, int G, int hd, int F, int V)
{
    const int want[] = { L, D, H, G, hd, F, V }, got[] = { a->L, a->D, a->H, a->G, a->hd, a->F, a->V };
    for (size_t i = 0; i < COUNT(want); i++)
        if (want[i] != got[i])
            fail_msg("%s: number %zu is %d, not %d", a->family, i, got[i], want[i]);
}

static void configs_of_published_models_mean_what_their_cards_say(void **state)
{
    (void)state;
    struct arch a = must_read(gpt2, "{}");
    shapes(&a, 12, 768, 12, 12, 64, 3072, 50257);
    assert_true(a.tied && a.qkv_bias && a.o_bias && a.mlp_bias && a.rot == 0);
    assert_true(a.act == ACT_GELU_TANH && a.max_positions == 1024 && a.attn_scale == 0);
    a = must_read(open_calm_1b, "{}");
    shapes(&a, 24, 2048, 16, 16, 128, 8192, 52096);
    assert_true(a.rot == 128 && !a.parallel && !a.tied && a.act == ACT_GELU_ERF && a.qkv_bias);
    a = must_read(pythia_70m, "{}");
    shapes(&a, 6, 512, 8, 8, 64, 2048, 50304);
    assert_true(a.rot == 16 && a.parallel && a.rope_theta == 10000);
    a = must_read(bloom_560m, "{}");
    shapes(&a, 24, 1024, 16, 16, 64, 4096, 250880);
    assert_true(a.tied && a.max_positions == 2048 && a.rot == 0 && a.act == ACT_GELU_TANH);
    a = must_read(chatglm3_6b, "{}");
    shapes(&a, 28, 4096, 32, 2, 128, 13696, 65024);
    assert_true(a.rot == 64 && a.rope_theta == 10000 && a.qkv_bias && !a.o_bias && !a.mlp_bias);
    assert_true(a.max_positions == 8192 && !a.tied && arch_out(&a, MOD_QKV) == 4096 + 512);
    a = must_read(glm_4_9b_chat, "{}");
    shapes(&a, 40, 4096, 32, 2, 128, 13696, 151552);
    assert_true(a.rope_theta == 5e6 && a.neos == 3 && a.norm_eps == 1.5625e-7f);
    a = must_read(phi_3_mini_4k, "{}");
    shapes(&a, 32, 3072, 32, 32, 96, 8192, 32064);
    assert_true(a.rot == 96 && a.window == 2047 && arch_layer_windowed(&a, 31) && !a.qkv_bias);
    assert_int_equal(arch_out(&a, MOD_GATE_UP), 2 * 8192);
    a = must_read(smollm3_3b, "{}");
    shapes(&a, 36, 2048, 16, 4, 128, 11008, 128256);
    assert_true(a.tied && a.rope_theta == 5e6 && a.window == 0);
    for (int l = 0; l < a.L; l++)
        assert_true(arch_layer_rope(&a, l) == (l % 4 != 3));
    a = must_read(gemma_2_2b, "{}");
    shapes(&a, 26, 2304, 8, 4, 256, 9216, 256000);
    assert_true(a.tied && a.embed_scale == 48 && a.attn_scale == 1.0 / 16 && a.attn_softcap == 50 &&
                a.final_softcap == 30 && a.window == 4096 && a.act == ACT_GELU_TANH);
    assert_true(arch_layer_windowed(&a, 0) && !arch_layer_windowed(&a, 25));
    a = must_read(gemma_3_270m, "{}");
    shapes(&a, 18, 640, 4, 1, 256, 2048, 262144);
    assert_true(a.embed_scale == 25.25 /* of 25.298 in bf16 */ && a.qk_norm && a.window == 512);
    assert_true(a.attn_softcap == 0 && a.final_softcap == 0 && a.rope_theta == 1e6 &&
                a.rope_theta_local == 10000);
    for (int l = 0; l < a.L; l++)
        assert_true(arch_layer_windowed(&a, l) == (l % 6 != 5));
}

static void fields_change_what_they_are_for(void **state)
{
    (void)state;
    assert_true(must_read(gpt2, "{'n_inner':64}").F == 64);
    assert_true(must_read(gpt2, "{'scale_attn_weights':false}").attn_scale == 1);
    assert_true(must_read(gpt2, "{'activation_function':'gelu'}").act == ACT_GELU_ERF);
    struct arch a = must_read(open_calm_1b, "{'attention_bias':false,'rotary_pct':'DEL'}");
    assert_true(!a.qkv_bias && !a.o_bias && a.mlp_bias && a.rot == 32);
    a = must_read(chatglm3_6b, "{'multi_query_attention':false,'add_bias_linear':true}");
    assert_true(a.G == 32 && a.qkv_bias && a.o_bias && a.mlp_bias);
    a = must_read(phi_3_mini_4k, "{'sliding_window':null,'partial_rotary_factor':0.75}");
    assert_true(a.window == 0 && a.rot == 72);
    a = must_read(smollm3_3b, "{'num_hidden_layers':3,'no_rope_layers':[0,1,0],"
                              "'use_sliding_window':true,'sliding_window':64}");
    assert_true(!arch_layer_rope(&a, 0) && arch_layer_rope(&a, 1) && !arch_layer_rope(&a, 2));
    assert_true(a.window == 64 && arch_layer_windowed(&a, 0) && !arch_layer_windowed(&a, 1));
    a = must_read(gemma_2_2b, "{'attn_logit_softcapping':null,'final_logit_softcapping':'DEL',"
                              "'query_pre_attn_scalar':144}");
    assert_true(a.attn_softcap == 0 && a.final_softcap == 30 && a.attn_scale == 1.0 / 12);
    /* transformers 5 writes both ropes in one object */
    char *old = arch_to_json(&(struct arch[]){ must_read(
        gemma_3_270m, "{'rope_scaling':{'rope_type':'linear','factor':8.0}}") }[0]);
    char *new = arch_to_json(&(struct arch[]){ must_read(
        gemma_3_270m, "{'rope_theta':'DEL','rope_local_base_freq':'DEL','rope_scaling':'DEL',"
                      "'rope_parameters':{'full_attention':{'rope_type':'linear','factor':8.0,"
                      "'rope_theta':1000000.0},'sliding_attention':{'rope_type':'default',"
                      "'rope_theta':10000.0}}}") }[0]);
    assert_string_equal(old, new);
    assert_non_null(strstr(old, "\"rope_scaling\":\"linear\""));
    free(old);
    free(new);
}

static void settings_that_a_family_does_not_compute_are_refused_by_name(void **state)
{
    (void)state;
    const struct {
        const char *config, *patch, *says;
    } cases[] = {
        { gpt2, "{'activation_function':'relu'}", "activation_function is \"relu\"" },
        { gpt2, "{'activation_function':'silu'}", "activation_function is \"silu\"" },
        { gpt2, "{'scale_attn_by_inverse_layer_idx':true}", "scale_attn_by_inverse_layer_idx is true" },
        { gpt2, "{'add_cross_attention':true}", "add_cross_attention is true" },
        { gpt2, "{'n_layer':'DEL'}", "n_layer is missing" },
        { gpt2, "{'n_head':7}", "hidden_size 768 is not a multiple of num_attention_heads 7" },
        { gpt2, "{'n_positions':1000000000}", "learned positions are too many" },
        { gpt2, "{'architectures':['GPT2ForSequenceClassification']}", "it is GPT2LMHeadModel" },
        { open_calm_1b, "{'rotary_pct':0}", "rotary_pct is 0" },
        { open_calm_1b, "{'rotary_pct':0.01}", "rope cannot turn 1 of 128" },
        { open_calm_1b, "{'use_parallel_residual':1}", "use_parallel_residual is 1" },
        { bloom_560m, "{'apply_residual_connection_post_layernorm':true}",
          "apply_residual_connection_post_layernorm is true" },
        { chatglm3_6b, "{'padded_vocab_size':'DEL'}", "padded_vocab_size is missing" },
        { chatglm3_6b, "{'rmsnorm':false}", "rmsnorm is false" },
        { chatglm3_6b, "{'post_layer_norm':false}", "post_layer_norm is false" },
        { chatglm3_6b, "{'original_rope':false}", "original_rope is false" },
        { chatglm3_6b, "{'quantization_bit':4}", "quantization_bit is 4" },
        { chatglm3_6b, "{'pre_seq_len':128}", "pre_seq_len is 128" },
        { chatglm3_6b, "{'rope_ratio':'x'}", "rope_ratio is \"x\"" },
        { chatglm3_6b, "{'multi_query_group_num':5}", "num_key_value_heads 5" },
        { phi_3_mini_4k, "{'rope_scaling':{'type':'longrope','long_factor':[1],'short_factor':[1]}}",
          "short_factor is not a list of 48" },
        { phi_3_mini_4k, "{'rope_scaling':{'type':'yarn'}}", "short_factor is not a list of 48" },
        { smollm3_3b, "{'no_rope_layers':[1]}", "no_rope_layers is not a list of" },
        { smollm3_3b, "{'num_hidden_layers':2,'no_rope_layers':[1,2]}", "no_rope_layers[1]" },
        { smollm3_3b, "{'num_hidden_layers':1,'layer_types':['sliding_attention']}", "give no window" },
        { gemma_2_2b, "{'use_bidirectional_attention':true}", "use_bidirectional_attention is true" },
        { gemma_2_2b, "{'query_pre_attn_scalar':0}", "query_pre_attn_scalar is 0" },
        { gemma_2_2b, "{'attn_logit_softcapping':-1}", "attn_logit_softcapping is -1" },
        { gemma_2_2b, "{'hidden_activation':'relu'}", "hidden_activation is \"relu\"" },
        { gemma_2_2b, "{'num_key_value_heads':'DEL'}", "num_key_value_heads is missing" },
        { gemma_3_270m, "{'_sliding_window_pattern':0}", "_sliding_window_pattern is 0" },
        { gemma_3_270m, "{'rope_local_base_freq':0}", "rope_local_base_freq is 0" },
        { gemma_3_270m, "{'rope_scaling':'DEL','rope_parameters':{'full_attention':{},"
                        "'sliding_attention':{'rope_type':'linear','factor':2}}}",
          "sliding_attention are scaled" },
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        char *text = changed(cases[i].config, cases[i].patch);
        struct arch a;
        struct err err = { 0 };
        int rc = arch_from_config(text, NULL, &a, &err);
        if (rc != ERR_INVALID || strstr(err.msg, cases[i].says) == NULL)
            fail_msg("%s: code %d, \"%s\"", cases[i].patch, rc, err.msg);
        free(text);
    }
}

static void every_family_s_kept_form_reads_back_as_the_same(void **state)
{
    (void)state;
    const char *const configs[] = { gpt2, open_calm_1b, pythia_70m, bloom_560m, chatglm3_6b,
                                    glm_4_9b_chat, phi_3_mini_4k, smollm3_3b, gemma_2_2b,
                                    gemma_3_270m };
    for (size_t i = 0; i < COUNT(configs); i++) {
        struct arch a = must_read(configs[i], "{}"), b;
        struct err err = { 0 };
        char *ja = arch_to_json(&a);
        if (arch_from_json(ja, &b, &err) != ERR_OK)
            fail_msg("%s: %s", ja, err.msg);
        char *jb = arch_to_json(&b);
        assert_string_equal(ja, jb);
        assert_true(a.act == b.act && a.rot == b.rot && a.parallel == b.parallel &&
                    a.embed_scale == b.embed_scale && a.attn_scale == b.attn_scale &&
                    a.attn_softcap == b.attn_softcap && a.final_softcap == b.final_softcap &&
                    a.rope_theta_local == b.rope_theta_local);
        assert_memory_equal(a.no_rope, b.no_rope, sizeof a.no_rope);
        free(ja);
        free(jb);
    }
}

/* What the first version wrote for a Llama; the fields since then have defaults. */
static void a_base_file_of_the_first_version_is_read_as_before(void **state)
{
    (void)state;
    static const char old[] =
        "{\"D\":64,\"F\":128,\"G\":2,\"H\":4,\"L\":4,\"V\":256,\"bos\":1,\"eos\":[2],"
        "\"family\":\"llama\",\"hd\":16,\"max_positions\":128,\"mlp_bias\":false,"
        "\"norm_eps\":9.9999997473787516e-06,\"o_bias\":false,\"qk_norm\":false,\"qkv_bias\":false,"
        "\"rope_factor\":0.0,\"rope_high_freq\":0.0,\"rope_low_freq\":0.0,\"rope_original_max\":0,"
        "\"rope_scaling\":\"default\",\"rope_theta\":10000.0,\"tied\":false,\"window\":0,"
        "\"windowed\":[]}";
    struct arch a;
    struct err err = { 0 };
    if (arch_from_json(old, &a, &err) != ERR_OK)
        fail_msg("%s", err.msg);
    assert_true(a.rot == 16 && a.embed_scale == 1 && a.attn_scale == 0 && a.act == ACT_SILU);
    assert_true(!a.parallel && a.attn_softcap == 0 && a.rope_theta_local == 0);
    for (int l = 0; l < a.L; l++)
        assert_true(arch_layer_rope(&a, l));
}

/* A kept form that would make the forward pass read what is not there. */
static void a_kept_form_that_its_family_cannot_have_is_refused(void **state)
{
    (void)state;
    const struct {
        const char *config, *key, *value;
    } cases[] = {
        { gpt2, "act", "\"silu\"" },       { gpt2, "rot", "64" },      { bloom_560m, "G", "8" },
        { pythia_70m, "rot", "66" },       { pythia_70m, "rot", "0" }, { pythia_70m, "rot", "15" },
        { gpt2, "qk_norm", "true" },       { gpt2, "family", "\"llama\"" },
        { smollm3_3b, "no_rope", "[36]" }, { smollm3_3b, "no_rope", "{}" },
        { gemma_2_2b, "act", "\"silu\"" }, { gemma_2_2b, "embed_scale", "0" },
        { gemma_2_2b, "embed_scale", "1e9" }, { gemma_3_270m, "rope_theta_local", "0.5" },
        { gemma_2_2b, "attn_softcap", "-1" }, { gpt2, "act", "3" },
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct arch a = must_read(cases[i].config, "{}"), b;
        struct err err = { 0 };
        char *good = arch_to_json(&a);
        json_t *o = json_loads(good, 0, NULL);
        json_object_set_new(o, cases[i].key, json_loads(cases[i].value, JSON_DECODE_ANY, NULL));
        char *text = json_dumps(o, 0);
        struct weight *weights = NULL;
        size_t n;
        int rc = arch_from_json(text, &b, &err);
        if (rc == ERR_OK) /* the list of weights has a say, too */
            rc = base_weights(&b, &weights, &n, &err);
        if (rc != ERR_INVALID || err.msg[0] == '\0')
            fail_msg("%s = %s was accepted", cases[i].key, cases[i].value);
        free(weights);
        free(text);
        free(good);
        json_decref(o);
    }
}

/* --- public adapters ---------------------------------------------------------------------- */

static int load_adapter(const struct arch *a, const char *name, struct adapter_src **ret,
                        struct err *err)
{
    char relative[128];
    snprintf(relative, sizeof relative, "adapters/%s", name);
    const char *dir = support_shared(relative);
    if (dir == NULL)
        skip();
    return peft_load_dir(a, dir, ret, err);
}

static void public_adapters_fit_the_models_they_were_trained_on(void **state)
{
    (void)state;
    const struct {
        const char *name, *config;
        size_t modules;
        int rank;
        double scaling;
    } cases[] = {
        { "gpt2-r8-cattn-cproj-main", gpt2, 36, 8, 2 }, /* c_attn and both c_proj */
        { "neox-opencalm1b-r1-f16", open_calm_1b, 24, 1, 32 },
        { "bloom-560m-r8-qkv", bloom_560m, 24, 8, 4 },
        { "gemma3-270m-r4-qkvo-hw", gemma_3_270m, 72, 4, 4 },
    };
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct arch a = must_read(cases[i].config, "{}");
        struct adapter_src *src = NULL;
        struct adapter *built = NULL;
        struct err err = { 0 };
        if (load_adapter(&a, cases[i].name, &src, &err) != ERR_OK)
            fail_msg("%s: %s", cases[i].name, err.msg);
        assert_int_equal(src->nmodules, cases[i].modules);
        assert_int_equal(src->rank_min, cases[i].rank);
        assert_int_equal(src->rank_max, cases[i].rank);
        assert_true(src->modules[0].scaling == cases[i].scaling);
        assert_int_equal(adapter_build(&a, src, 0, NULL, &built, &err), ERR_OK);
        adapter_free(built);
        adapter_src_free(src);
    }
    struct arch a = must_read(gpt2, "{}");
    struct adapter_src *src = NULL;
    struct err err = { 0 };
    assert_int_equal(load_adapter(&a, "gpt2-seqcls-r8-score", &src, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "task_type"));
}

/* Either value of fan_in_fan_out is right for GPT-2; elsewhere it would mean other layers. */
static void fan_in_fan_out_is_for_gpt2_alone(void **state)
{
    (void)state;
    const char *dir = support_shared("golden/adapters/tiny-gpt2/lora_hetero");
    if (dir == NULL)
        skip();
    char *config, *path = path_join(dir, "adapter_config.json"), *weights;
    size_t len;
    assert_int_equal(file_read(path, 1 << 20, &config, &len, NULL), ERR_OK);
    weights = path_join(dir, "adapter_model.safetensors");
    struct st_file *f = NULL;
    assert_int_equal(st_open(weights, &f, NULL), ERR_OK);
    struct arch a = must_read(gpt2, "{'n_embd':64,'n_layer':2,'n_head':4,'vocab_size':256,"
                                    "'bos_token_id':1,'eos_token_id':2}");
    static const char *const patches[] = { "{}", "{'fan_in_fan_out':false}",
                                           "{'fan_in_fan_out':'DEL'}" };
    uint8_t hash[3][32];
    for (size_t i = 0; i < 3; i++) {
        struct adapter_src *src = NULL;
        struct err err = { 0 };
        char *text = changed(config, patches[i]);
        if (peft_parse(&a, text, strlen(text), f, &src, &err) != ERR_OK)
            fail_msg("%s: %s", patches[i], err.msg);
        memcpy(hash[i], src->hash, 32);
        adapter_src_free(src);
        free(text);
    }
    assert_memory_equal(hash[0], hash[1], 32);
    assert_memory_equal(hash[0], hash[2], 32);
    struct adapter_src *src = NULL;
    struct err err = { 0 };
    char *text = changed(config, "{'fan_in_fan_out':'yes'}");
    assert_int_equal(peft_parse(&a, text, strlen(text), f, &src, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "fan_in_fan_out"));
    free(text);
    st_close(f);
    free(config);
    free(path);
    free(weights);

    struct arch bloom = must_read(bloom_560m, "{}");
    static const char plain[] = "{\"peft_type\":\"LORA\",\"r\":8,\"fan_in_fan_out\":true,"
                                "\"target_modules\":[\"query_key_value\"]}";
    const char *public = support_shared("adapters/bloom-560m-r8-qkv/adapter_model.safetensors");
    assert_int_equal(st_open(public, &f, NULL), ERR_OK);
    err_clear(&err);
    assert_int_equal(peft_parse(&bloom, plain, sizeof plain - 1, f, &src, &err), ERR_INVALID);
    assert_non_null(strstr(err.msg, "fan_in_fan_out"));
    st_close(f);
}

/* --- the same model in two ways ------------------------------------------------------------- */

/* A tensor of a copy: rows [row, row + rows) of tensor `from`. */
struct piece {
    char from[128], to[128];
    int64_t row, rows; /* 0 rows: all of it */
};

static void copy_weights(const char *from, const char *to, const struct piece *p, size_t n)
{
    struct st_file *f = NULL;
    struct st_writer *w = NULL;
    struct err err = { 0 };
    char *a = path_join(from, "model.safetensors"), *b = path_join(to, "model.safetensors");
    assert_int_equal(st_open(a, &f, &err), ERR_OK);
    assert_int_equal(st_writer_open(b, false, &w, &err), ERR_OK);
    for (int write = 0; write < 2; write++) {
        for (size_t i = 0; i < n; i++) {
            const struct st_tensor *t = st_find(f, p[i].from);
            if (t == NULL)
                fail_msg("no tensor %s", p[i].from);
            const int64_t rows = p[i].rows ? p[i].rows : t->shape[0];
            const size_t row = t->bytes / (size_t)t->shape[0];
            int rc = write ? st_writer_data(w, t->data + (size_t)p[i].row * row, (size_t)rows * row,
                                            &err)
                           : st_writer_tensor(w, p[i].to, t->dtype_name, t->ndim,
                                              (const int64_t[]){ rows, t->ndim > 1 ? t->shape[1] : 1 },
                                              (size_t)rows * row, &err);
            assert_int_equal(rc, ERR_OK);
        }
        assert_int_equal(write ? st_writer_commit(w, &err) : st_writer_begin(w, &err), ERR_OK);
    }
    st_close(f);
    free(a);
    free(b);
}

enum { NTOKENS = 23 };

static int keep(void *ud, int pos, int n, const float *logits, struct err *err)
{
    float **at = ud;
    (void)pos;
    (void)err;
    memcpy(*at, logits, (size_t)n * 320 * sizeof *logits);
    *at += n * 320;
    return ERR_OK;
}

/* Logits of 23 tokens, [23][320]; takes the base. */
static float *logits_of(struct base *base, const int32_t *tokens)
{
    struct session s = { .base = base, .compute.precision = PREC_F32 };
    struct session_runner *r;
    struct err err = { 0 };
    assert_int_equal(isa_select("auto", &s.compute.isa, &err), ERR_OK);
    assert_int_equal(pool_create(2, &s.compute.pool, &err), ERR_OK);
    float *logits = malloc(NTOKENS * 320 * sizeof *logits), *at = logits;
    assert_int_equal(session_runner_open(&s, NTOKENS, &r, &err), ERR_OK);
    assert_int_equal(session_run(r, tokens, NTOKENS, keep, &at, &err), ERR_OK);
    session_runner_close(r);
    session_close(&s);
    return logits;
}

static void some_tokens(int32_t tokens[NTOKENS])
{
    for (int i = 0; i < NTOKENS; i++)
        tokens[i] = (i * 97 + 31) % 320;
}

/* Published GPT-2 files lack "transformer." and carry masks. */
static void names_without_their_prefix_and_with_buffers_make_the_same_base(void **state)
{
    (void)state;
    static const char *const configs[] = {
        "{\"model_type\":\"gpt2\",\"n_embd\":64,\"n_layer\":1,\"n_head\":4,\"n_positions\":64,"
        "\"vocab_size\":320}",
        "{\"model_type\":\"bloom\",\"hidden_size\":64,\"n_layer\":1,\"n_head\":4,"
        "\"vocab_size\":320}",
    };
    for (size_t c = 0; c < COUNT(configs); c++) {
        char whole[64], cut[64], *path;
        support_tmpdir(whole);
        support_tmpdir(cut);
        support_config_write(configs[c], 7, whole);
        support_write_file(cut, "config.json", configs[c], strlen(configs[c]));
        struct st_file *f = NULL;
        path = path_join(whole, "model.safetensors");
        assert_int_equal(st_open(path, &f, NULL), ERR_OK);
        struct piece p[40];
        size_t n = 0;
        for (size_t i = 0; i < f->ntensors; i++, n++) {
            p[n] = (struct piece){ .row = 0 };
            snprintf(p[n].from, sizeof p[n].from, "%.127s", f->tensors[i].name);
            snprintf(p[n].to, sizeof p[n].to, "%.115s", f->tensors[i].name + strlen("transformer."));
        }
        if (c == 0) {
            p[n] = p[0];
            snprintf(p[n++].to, sizeof p[n].to, "h.0.attn.bias");
            p[n] = p[0];
            snprintf(p[n++].to, sizeof p[n].to, "h.0.attn.masked_bias");
        }
        copy_weights(whole, cut, p, n);
        st_close(f);
        free(path);
        struct base *a = support_base_dir(whole, "nf4", "f32", PREC_F32);
        struct base *b = support_base_dir(cut, "nf4", "f32", PREC_F32);
        assert_string_equal(a->hash_hex, b->hash_hex);
        int32_t tokens[NTOKENS];
        some_tokens(tokens);
        float *x = logits_of(a, tokens), *y = logits_of(b, tokens);
        assert_memory_equal(x, y, NTOKENS * 320 * sizeof *x);
        free(x);
        free(y);
        support_remove(whole);
        support_remove(cut);
    }
}

#define SMALL                                                                                      \
    "\"hidden_size\":64,\"intermediate_size\":96,\"num_hidden_layers\":2,"                         \
    "\"num_attention_heads\":4,\"num_key_value_heads\":2,\"vocab_size\":320,"                      \
    "\"max_position_embeddings\":64,\"rms_norm_eps\":1e-5,\"rope_theta\":10000.0,"                 \
    "\"tie_word_embeddings\":false}"

static void add(struct piece *p, size_t *n, const char *from, const char *to, int layer,
                int64_t row, int64_t rows)
{
    struct piece *q = &p[(*n)++];
    *q = (struct piece){ .row = row, .rows = rows };
    if (layer < 0) {
        snprintf(q->from, sizeof q->from, "%s.weight", from);
        snprintf(q->to, sizeof q->to, "%s.weight", to);
    } else {
        snprintf(q->from, sizeof q->from, "model.layers.%d.%s.weight", layer, from);
        snprintf(q->to, sizeof q->to, "model.layers.%d.%s.weight", layer, to);
    }
}

static void phi3_is_llama_with_its_matrices_put_together(void **state)
{
    (void)state;
    static const char phi[] = "{\"model_type\":\"phi3\"," SMALL;
    static const char llama[] = "{\"model_type\":\"llama\"," SMALL;
    static const char *const same[] = { "input_layernorm", "post_attention_layernorm",
                                        "self_attn.o_proj", "mlp.down_proj" };
    char one[64], other[64];
    support_tmpdir(one);
    support_tmpdir(other);
    support_config_write(phi, 3, one);
    support_write_file(other, "config.json", llama, sizeof llama - 1);
    struct piece p[40];
    size_t n = 0;
    for (int l = 0; l < 2; l++) {
        for (size_t i = 0; i < COUNT(same); i++)
            add(p, &n, same[i], same[i], l, 0, 0);
        add(p, &n, "self_attn.qkv_proj", "self_attn.q_proj", l, 0, 64);
        add(p, &n, "self_attn.qkv_proj", "self_attn.k_proj", l, 64, 32);
        add(p, &n, "self_attn.qkv_proj", "self_attn.v_proj", l, 96, 32);
        add(p, &n, "mlp.gate_up_proj", "mlp.gate_proj", l, 0, 96);
        add(p, &n, "mlp.gate_up_proj", "mlp.up_proj", l, 96, 96);
    }
    add(p, &n, "model.embed_tokens", "model.embed_tokens", -1, 0, 0);
    add(p, &n, "model.norm", "model.norm", -1, 0, 0);
    add(p, &n, "lm_head", "lm_head", -1, 0, 0);
    copy_weights(one, other, p, n);
    int32_t tokens[NTOKENS];
    some_tokens(tokens);
    float *x = logits_of(support_base_dir(one, "f32", "f32", PREC_F32), tokens);
    float *y = logits_of(support_base_dir(other, "f32", "f32", PREC_F32), tokens);
    assert_memory_equal(x, y, NTOKENS * 320 * sizeof *x);
    free(x);
    free(y);
    support_remove(one);
    support_remove(other);
}

static float *run_config(const char *model, const char *fields, const int32_t *tokens)
{
    char text[1024];
    snprintf(text, sizeof text, "{\"model_type\":\"%s\",%s" SMALL, model, fields);
    return logits_of(support_base_config(text, "f32", PREC_F32), tokens);
}

static double distance(const float *a, const float *b, size_t n)
{
    double diff = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        diff += pow((double)a[i] - b[i], 2);
        norm += pow(b[i], 2);
    }
    return sqrt(diff / norm);
}

/* With rope everywhere it is a Llama; a layer without rope does not know the order of what came
 * before, and with one layer nothing else does. */
static void smollm3_rotates_where_its_config_says(void **state)
{
    (void)state;
    int32_t tokens[NTOKENS], swapped[NTOKENS];
    some_tokens(tokens);
    memcpy(swapped, tokens, sizeof tokens);
    swapped[3] = tokens[11];
    swapped[11] = tokens[3];
    float *llama = run_config("llama", "", tokens);
    float *all = run_config("smollm3", "\"no_rope_layers\":[1,1],", tokens);
    float *some = run_config("smollm3", "\"no_rope_layers\":[1,0],", tokens);
    const size_t bytes = NTOKENS * 320 * sizeof *all;
    assert_memory_equal(llama, all, bytes);
    assert_true(distance(some, all, NTOKENS * 320) > 1e-2);
    free(llama);
    free(all);
    free(some);
    for (int rotates = 0; rotates < 2; rotates++) {
        char text[512];
        snprintf(text, sizeof text,
                 "{\"model_type\":\"smollm3\",\"no_rope_layers\":[%d],\"hidden_size\":64,"
                 "\"intermediate_size\":96,\"num_hidden_layers\":1,\"num_attention_heads\":4,"
                 "\"num_key_value_heads\":2,\"vocab_size\":320,\"max_position_embeddings\":64,"
                 "\"tie_word_embeddings\":false}",
                 rotates);
        float *x = logits_of(support_base_config(text, "f32", PREC_F32), tokens);
        float *y = logits_of(support_base_config(text, "f32", PREC_F32), swapped);
        double d = distance(x + (NTOKENS - 1) * 320, y + (NTOKENS - 1) * 320, 320);
        assert_true(rotates ? d > 1e-3 : d < 1e-5);
        free(x);
        free(y);
    }
}

/* --- the document ----------------------------------------------------------------------------- */

static void every_reference_model_is_in_the_table_of_the_document(void **state)
{
    (void)state;
    char *text;
    size_t len;
    const char *dir = support_shared("golden/models");
    if (dir == NULL)
        skip();
    assert_int_equal(file_read("docs/models.md", 1 << 20, &text, &len, NULL), ERR_OK);
    DIR *d = opendir(dir);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        char row[300];
        snprintf(row, sizeof row, "\n| `%s` |", e->d_name);
        if (e->d_name[0] != '.' && strstr(text, row) == NULL)
            fail_msg("docs/models.md has no row for %s", e->d_name);
    }
    closedir(d);
    for (size_t i = 0; i < arch_nfamilies; i++) {
        char name[80];
        snprintf(name, sizeof name, "`%s`", arch_families[i].model_type);
        if (strstr(text, name) == NULL)
            fail_msg("docs/models.md does not name %s", name);
    }
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(configs_of_published_models_mean_what_their_cards_say),
        cmocka_unit_test(fields_change_what_they_are_for),
        cmocka_unit_test(settings_that_a_family_does_not_compute_are_refused_by_name),
        cmocka_unit_test(every_family_s_kept_form_reads_back_as_the_same),
        cmocka_unit_test(a_base_file_of_the_first_version_is_read_as_before),
        cmocka_unit_test(a_kept_form_that_its_family_cannot_have_is_refused),
        cmocka_unit_test(public_adapters_fit_the_models_they_were_trained_on),
        cmocka_unit_test(fan_in_fan_out_is_for_gpt2_alone),
        cmocka_unit_test(names_without_their_prefix_and_with_buffers_make_the_same_base),
        cmocka_unit_test(phi3_is_llama_with_its_matrices_put_together),
        cmocka_unit_test(smollm3_rotates_where_its_config_says),
        cmocka_unit_test(every_reference_model_is_in_the_table_of_the_document),
    };
    return cmocka_run_group_tests_name("families", tests, NULL, NULL);
}
