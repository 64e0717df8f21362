/* arch_families.c - the table of model families.
 *
 * One forward pass serves them all (forward.c); a family says which norms, linear layers, positions
 * and activation it has, and what its tensors are called.  config.json leaves many settings to the
 * defaults of the family's class in transformers; `absent` and the readers (arch_readers.c) spell
 * those out. */
#include "engine/arch.h"
#include "engine/arch_int.h"

/* --- names ------------------------------------------------------------------------------ */

#define HF_KEYS                                                                                   \
    .L = "num_hidden_layers", .D = "hidden_size", .H = "num_attention_heads", .V = "vocab_size",  \
    .positions = "max_position_embeddings", .F = "intermediate_size"

static const struct config_keys llama_keys = {
    HF_KEYS, .eps = "rms_norm_eps", .G = "num_key_value_heads", .hd = "head_dim",
    .act = "hidden_act", .theta = "rope_theta",
};
/* The same with a part of each head that may not rotate. */
static const struct config_keys glm_keys = {
    HF_KEYS, .eps = "rms_norm_eps", .G = "num_key_value_heads", .hd = "head_dim",
    .act = "hidden_act", .theta = "rope_theta", .rotary = "partial_rotary_factor",
};
static const struct config_keys gemma_keys = {
    HF_KEYS, .eps = "rms_norm_eps", .G = "num_key_value_heads", .hd = "head_dim",
    .act = "hidden_activation", .theta = "rope_theta",
};
static const struct config_keys chatglm_keys = {
    .L = "num_layers", .D = "hidden_size", .H = "num_attention_heads", .V = "padded_vocab_size",
    .positions = "seq_length", .eps = "layernorm_epsilon", .F = "ffn_hidden_size",
    .G = "multi_query_group_num", .hd = "kv_channels",
};
static const struct config_keys neox_keys = {
    HF_KEYS, .eps = "layer_norm_eps", .act = "hidden_act", .theta = "rotary_emb_base|rope_theta",
    .rotary = "rotary_pct|partial_rotary_factor",
};
static const struct config_keys gpt2_keys = {
    .L = "num_hidden_layers|n_layer", .D = "hidden_size|n_embd", .H = "num_attention_heads|n_head",
    .V = "vocab_size", .positions = "max_position_embeddings|n_positions",
    .eps = "layer_norm_epsilon", .F = "n_inner", .act = "activation_function",
};
static const struct config_keys bloom_keys = {
    .L = "num_hidden_layers|n_layer", .D = "n_embed|hidden_size", .H = "num_attention_heads|n_head",
    .V = "vocab_size", .positions = "seq_length", .eps = "layer_norm_epsilon",
};

#define LLAMA_ATTENTION                                                                          \
    [MOD_Q] = "model.layers.%d.self_attn.q_proj", [MOD_K] = "model.layers.%d.self_attn.k_proj",  \
    [MOD_V] = "model.layers.%d.self_attn.v_proj", [MOD_O] = "model.layers.%d.self_attn.o_proj"
#define LLAMA_MODULES                                                                            \
    .module_path = {                                                                             \
        LLAMA_ATTENTION,                                                                         \
        [MOD_GATE] = "model.layers.%d.mlp.gate_proj",                                            \
        [MOD_UP] = "model.layers.%d.mlp.up_proj",                                                \
        [MOD_DOWN] = "model.layers.%d.mlp.down_proj",                                            \
    }
#define LLAMA_NORMS                                                                              \
    [NORM_ATTN] = "model.layers.%d.input_layernorm", [NORM_FINAL] = "model.norm",                \
    [NORM_MLP] = "model.layers.%d.post_attention_layernorm"
#define HEAD_NORMS                                                                               \
    [NORM_Q] = "model.layers.%d.self_attn.q_norm", [NORM_K] = "model.layers.%d.self_attn.k_norm"
#define GLM_MODULES                                                                              \
    .module_path = {                                                                             \
        LLAMA_ATTENTION,                                                                         \
        [MOD_GATE_UP] = "model.layers.%d.mlp.gate_up_proj",                                      \
        [MOD_DOWN] = "model.layers.%d.mlp.down_proj",                                            \
    }
#define GEMMA_NORMS                                                                              \
    [NORM_ATTN] = "model.layers.%d.input_layernorm",                                             \
    [NORM_POST_ATTN] = "model.layers.%d.post_attention_layernorm",                               \
    [NORM_MLP] = "model.layers.%d.pre_feedforward_layernorm",                                    \
    [NORM_POST_MLP] = "model.layers.%d.post_feedforward_layernorm", [NORM_FINAL] = "model.norm"
#define LLAMA_ENDS .embed = "model.embed_tokens", .head = "lm_head"

/* --- the table -------------------------------------------------------------------------- */

const struct family arch_families[] = {
    {
        .model_type = "llama",
        .architecture = { "LlamaForCausalLM" },
        .keys = &llama_keys,
        .absent = { .G_is_H = true, .eps = 1e-6, .theta = 10000 },
        LLAMA_MODULES,
        .norm_path = { LLAMA_NORMS },
        LLAMA_ENDS,
        .read_config = arch_read_llama,
    },
    {
        .model_type = "mistral",
        .architecture = { "MistralForCausalLM" },
        .keys = &llama_keys,
        .absent = { .eps = 1e-6, .theta = 10000 },
        LLAMA_MODULES,
        .norm_path = { LLAMA_NORMS },
        LLAMA_ENDS,
        .read_config = arch_read_mistral,
    },
    {
        .model_type = "qwen2",
        .architecture = { "Qwen2ForCausalLM" },
        .keys = &llama_keys,
        .absent = { .eps = 1e-6, .theta = 10000 },
        LLAMA_MODULES,
        .norm_path = { LLAMA_NORMS },
        LLAMA_ENDS,
        .read_config = arch_read_qwen2,
    },
    {
        .model_type = "qwen3",
        .architecture = { "Qwen3ForCausalLM" },
        .keys = &llama_keys,
        .absent = { .hd = 128, .eps = 1e-6, .theta = 10000 },
        LLAMA_MODULES,
        .norm_path = { LLAMA_NORMS, HEAD_NORMS },
        LLAMA_ENDS,
        .read_config = arch_read_qwen3,
    },
    {
        .model_type = "gpt2",
        .architecture = { "GPT2LMHeadModel" },
        .norm_kind = NORM_LAYER,
        .position = POS_LEARNED,
        .act = ACT_GELU_TANH,
        .transposed = true,
        .optional_prefix = "transformer.",
        .keys = &gpt2_keys,
        .absent = { .F_is_4D = true, .eps = 1e-5, .tied = true },
        .module_path = {
            [MOD_QKV] = "transformer.h.%d.attn.c_attn",
            [MOD_O] = "transformer.h.%d.attn.c_proj",
            [MOD_UP] = "transformer.h.%d.mlp.c_fc",
            [MOD_DOWN] = "transformer.h.%d.mlp.c_proj",
        },
        .norm_path = {
            [NORM_ATTN] = "transformer.h.%d.ln_1",
            [NORM_MLP] = "transformer.h.%d.ln_2",
            [NORM_FINAL] = "transformer.ln_f",
        },
        .embed = "transformer.wte", .positions = "transformer.wpe", .head = "lm_head",
        .read_config = arch_read_gpt2,
    },
    {
        .model_type = "gpt_neox",
        .architecture = { "GPTNeoXForCausalLM" },
        .norm_kind = NORM_LAYER,
        .act = ACT_GELU_ERF,
        .qkv_by_head = true,
        .keys = &neox_keys,
        .absent = { .eps = 1e-5, .theta = 10000, .rotary = 0.25 },
        .module_path = {
            [MOD_QKV] = "gpt_neox.layers.%d.attention.query_key_value",
            [MOD_O] = "gpt_neox.layers.%d.attention.dense",
            [MOD_UP] = "gpt_neox.layers.%d.mlp.dense_h_to_4h",
            [MOD_DOWN] = "gpt_neox.layers.%d.mlp.dense_4h_to_h",
        },
        .norm_path = {
            [NORM_ATTN] = "gpt_neox.layers.%d.input_layernorm",
            [NORM_MLP] = "gpt_neox.layers.%d.post_attention_layernorm",
            [NORM_FINAL] = "gpt_neox.final_layer_norm",
        },
        .embed = "gpt_neox.embed_in", .head = "embed_out",
        .read_config = arch_read_neox,
    },
    {
        .model_type = "bloom",
        .architecture = { "BloomForCausalLM" },
        .norm_kind = NORM_LAYER,
        .position = POS_ALIBI,
        .act = ACT_GELU_TANH,
        .qkv_by_head = true,
        .optional_prefix = "transformer.",
        .keys = &bloom_keys,
        .absent = { .F_is_4D = true, .positions = 2048, .eps = 1e-5, .tied = true },
        .module_path = {
            [MOD_QKV] = "transformer.h.%d.self_attention.query_key_value",
            [MOD_O] = "transformer.h.%d.self_attention.dense",
            [MOD_UP] = "transformer.h.%d.mlp.dense_h_to_4h",
            [MOD_DOWN] = "transformer.h.%d.mlp.dense_4h_to_h",
        },
        .norm_path = {
            [NORM_EMBED] = "transformer.word_embeddings_layernorm",
            [NORM_ATTN] = "transformer.h.%d.input_layernorm",
            [NORM_MLP] = "transformer.h.%d.post_attention_layernorm",
            [NORM_FINAL] = "transformer.ln_f",
        },
        .embed = "transformer.word_embeddings", .head = "lm_head",
        .read_config = arch_read_bloom,
    },
    {
        .model_type = "chatglm",
        .architecture = { "ChatGLMModel", "ChatGLMForConditionalGeneration" },
        .position = POS_ROPE_INTERLEAVED,
        .keys = &chatglm_keys,
        .absent = { .G_is_H = true, .eps = 1e-5 },
        .module_path = {
            [MOD_QKV] = "transformer.encoder.layers.%d.self_attention.query_key_value",
            [MOD_O] = "transformer.encoder.layers.%d.self_attention.dense",
            [MOD_GATE_UP] = "transformer.encoder.layers.%d.mlp.dense_h_to_4h",
            [MOD_DOWN] = "transformer.encoder.layers.%d.mlp.dense_4h_to_h",
        },
        .norm_path = {
            [NORM_ATTN] = "transformer.encoder.layers.%d.input_layernorm",
            [NORM_MLP] = "transformer.encoder.layers.%d.post_attention_layernorm",
            [NORM_FINAL] = "transformer.encoder.final_layernorm",
        },
        .embed = "transformer.embedding.word_embeddings", .head = "transformer.output_layer",
        .read_config = arch_read_chatglm,
    },
    {
        .model_type = "glm",
        .architecture = { "GlmForCausalLM" },
        .position = POS_ROPE_INTERLEAVED,
        .keys = &glm_keys,
        .absent = { .hd = 128, .eps = 1.5625e-7, .theta = 10000, .rotary = 0.5 },
        GLM_MODULES,
        .norm_path = { LLAMA_NORMS },
        LLAMA_ENDS,
        .read_config = arch_read_glm,
    },
    {
        .model_type = "glm4",
        .architecture = { "Glm4ForCausalLM" },
        .position = POS_ROPE_INTERLEAVED,
        .keys = &glm_keys,
        .absent = { .hd = 128, .eps = 1.5625e-7, .theta = 10000, .rotary = 0.5 },
        GLM_MODULES,
        .norm_path = {
            LLAMA_NORMS,
            [NORM_POST_ATTN] = "model.layers.%d.post_self_attn_layernorm",
            [NORM_POST_MLP] = "model.layers.%d.post_mlp_layernorm",
        },
        LLAMA_ENDS,
        .read_config = arch_read_glm,
    },
    {
        .model_type = "phi3",
        .architecture = { "Phi3ForCausalLM" },
        .keys = &glm_keys,
        .absent = { .G_is_H = true, .eps = 1e-5, .theta = 10000, .rotary = 1 },
        .module_path = {
            [MOD_QKV] = "model.layers.%d.self_attn.qkv_proj",
            [MOD_O] = "model.layers.%d.self_attn.o_proj",
            [MOD_GATE_UP] = "model.layers.%d.mlp.gate_up_proj",
            [MOD_DOWN] = "model.layers.%d.mlp.down_proj",
        },
        .norm_path = { LLAMA_NORMS },
        LLAMA_ENDS,
        .read_config = arch_read_phi3,
    },
    {
        .model_type = "smollm3",
        .architecture = { "SmolLM3ForCausalLM" },
        .keys = &llama_keys,
        .absent = { .eps = 1e-6, .theta = 2e6, .tied = true },
        LLAMA_MODULES,
        .norm_path = { LLAMA_NORMS },
        LLAMA_ENDS,
        .read_config = arch_read_smollm3,
    },
    {
        .model_type = "gemma2",
        .architecture = { "Gemma2ForCausalLM" },
        .norm_kind = NORM_RMS_PLUS_ONE,
        .act = ACT_GELU_TANH,
        .keys = &gemma_keys,
        .absent = { .hd = 256, .eps = 1e-6, .theta = 10000, .tied = true },
        LLAMA_MODULES,
        .norm_path = { GEMMA_NORMS },
        LLAMA_ENDS,
        .read_config = arch_read_gemma2,
    },
    {
        .model_type = "gemma3_text",
        .architecture = { "Gemma3ForCausalLM" },
        .norm_kind = NORM_RMS_PLUS_ONE,
        .act = ACT_GELU_TANH,
        .local_rope = true,
        .keys = &gemma_keys,
        .absent = { .hd = 256, .eps = 1e-6, .theta = 1e6, .tied = true },
        LLAMA_MODULES,
        .norm_path = { GEMMA_NORMS, HEAD_NORMS },
        LLAMA_ENDS,
        .read_config = arch_read_gemma3,
    },
};
const size_t arch_nfamilies = sizeof arch_families / sizeof arch_families[0];

const char *family_list(void)
{
    return "llama, mistral, qwen2, qwen3, gpt2, gpt_neox, bloom, chatglm, glm, glm4, phi3, "
           "smollm3, gemma2, gemma3_text";
}
