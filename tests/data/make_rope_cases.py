"""Writes rope_cases.json: inverse frequencies and the factor on cos and sin, for every kind of rope
scaling, computed with numpy in float32 in the order of operations of transformers'
modeling_rope_utils.py (5.x).  Not part of any build:  python3 tests/data/make_rope_cases.py"""
import json
import math
import os

import numpy as np

F = np.float32


def powers(base, dim):
    return F(base) ** (np.arange(0, dim, 2).astype(F) / F(dim))


def plain(base, dim):
    return F(1) / powers(base, dim)


def yarn(base, dim, max_positions, factor=None, original=None, attention=None, beta_fast=None,
         beta_slow=None, mscale=None, mscale_all_dim=None, truncate=True):
    original = original or max_positions
    factor = factor or max_positions / original

    def get_mscale(scale, m=1):
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    if attention is None:
        if mscale and mscale_all_dim:
            attention = get_mscale(factor, mscale) / get_mscale(factor, mscale_all_dim)
        else:
            attention = get_mscale(factor)

    def dimension(turns):
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(beta_fast or 32), dimension(beta_slow or 1)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2).astype(F) - F(low)) / F(high - low), 0, 1).astype(F)
    keep = F(1) - ramp
    p = powers(base, dim)
    return F(1) / (F(factor) * p) * (F(1) - keep) + F(1) / p * keep, attention


def longrope(base, dim, max_positions, short, long, original, seq_len, attention=None):
    factor = max_positions / original
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    ext = np.array(long if seq_len > original else short, F)
    return F(1) / (ext * powers(base, dim)), attention


def case(model_type, config, context, freqs, attention, positions):
    head = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 320,
            "num_attention_heads": 1, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}
    return {"config": {"model_type": model_type, **head, **config}, "context": context,
            "max_positions": positions, "amplitude": float(attention),
            "inv_freq": [float("%.9g" % x) for x in freqs]}


def all_cases():
    D = 64
    yield case("llama", {"max_position_embeddings": 4096, "rope_theta": 10000.0,
                         "rope_scaling": {"type": "linear", "factor": 4.0}},
               4096, plain(10000.0, D) / F(4), 1, 4096)
    yield case("llama", {"max_position_embeddings": 4096, "rope_theta": 10000.0,
                         "rope_scaling": {"type": "dynamic", "factor": 2.0}},
               4096, plain(10000.0, D), 1, 4096)
    # as Qwen2.5's card asks for; max_position_embeddings is left as it was
    f, m = yarn(1e6, D, 32768, factor=4.0, original=32768)
    yield case("qwen2", {"max_position_embeddings": 32768, "rope_theta": 1000000.0,
                         "rope_scaling": {"type": "yarn", "factor": 4.0,
                                          "original_max_position_embeddings": 32768}},
               131072, f, m, 131072)
    # without `original...` it is max_position_embeddings
    f, m = yarn(10000.0, D, 2048, factor=16.0)
    yield case("llama", {"max_position_embeddings": 2048,
                         "rope_scaling": {"rope_type": "yarn", "factor": 16.0}},
               2048, f, m, 32768)
    # without `factor` it is the quotient
    f, m = yarn(10000.0, D, 65536, original=4096)
    yield case("llama", {"max_position_embeddings": 65536,
                         "rope_scaling": {"rope_type": "yarn",
                                          "original_max_position_embeddings": 4096}},
               65536, f, m, 65536)
    f, m = yarn(150000.0, D, 131072, factor=32.0, original=4096, beta_fast=32.0, beta_slow=1.0,
                truncate=False)
    yield case("llama", {"max_position_embeddings": 131072, "rope_theta": 150000.0,
                         "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "truncate": False,
                                          "beta_fast": 32.0, "beta_slow": 1.0,
                                          "original_max_position_embeddings": 4096}},
               131072, f, m, 131072)
    f, m = yarn(10000.0, D, 163840, factor=40.0, original=4096, mscale=1.0, mscale_all_dim=0.707,
                beta_fast=16.0, beta_slow=2.0)
    yield case("llama", {"max_position_embeddings": 163840,
                         "rope_scaling": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0,
                                          "mscale_all_dim": 0.707, "beta_fast": 16, "beta_slow": 2,
                                          "original_max_position_embeddings": 4096}},
               163840, f, m, 163840)
    f, m = yarn(10000.0, D, 8192, factor=2.0, original=4096, attention=1.25, mscale=1.0,
                mscale_all_dim=0.5)
    yield case("llama", {"max_position_embeddings": 8192,
                         "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0,
                                             "mscale_all_dim": 0.5, "attention_factor": 1.25,
                                             "rope_theta": 10000.0,
                                             "original_max_position_embeddings": 4096}},
               8192, f, m, 8192)
    # texts so short that no angle makes 32 turns, and a head of which half turns
    f, m = yarn(10000.0, 32, 64, factor=8.0)
    yield case("glm", {"max_position_embeddings": 64, "head_dim": 64, "partial_rotary_factor": 0.5,
                       "rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
               512, f, m, 512)
    short = [1.0 + 0.01 * i for i in range(32)]
    long = [1.0 + 0.35 * i * i for i in range(32)]
    for name, context in (("su", 4096), ("longrope", 4097), ("yarn", 131072)):
        f, m = longrope(10000.0, D, 131072, short, long, 4096, context)
        yield case("phi3", {"max_position_embeddings": 131072, "rope_theta": 10000.0,
                            "original_max_position_embeddings": 4096,
                            "rope_scaling": {"type": name, "short_factor": short,
                                             "long_factor": long}},
                   context, f, m, 131072)
    # Phi-4-mini: three quarters of a head turn
    f, m = longrope(10000.0, 48, 131072, short[:24], long[:24], 4096, 131072)
    yield case("phi3", {"max_position_embeddings": 131072, "partial_rotary_factor": 0.75,
                        "original_max_position_embeddings": 4096,
                        "rope_scaling": {"type": "longrope", "short_factor": short[:24],
                                         "long_factor": long[:24]}},
               131072, f, m, 131072)
    # version 5's spelling, in another family, with an attention factor of its own
    f, m = longrope(10000.0, D, 32768, short, long, 8192, 32768, attention=1.5)
    yield case("llama", {"max_position_embeddings": 32768,
                         "rope_parameters": {"rope_type": "longrope", "short_factor": short,
                                             "long_factor": long, "factor": 2.0,
                                             "attention_factor": 1.5, "rope_theta": 10000.0,
                                             "original_max_position_embeddings": 8192}},
               32768, f, m, 32768)
    # the published length is not over the original one: no factor on cos and sin
    f, m = longrope(10000.0, D, 4096, short, long, 4096, 4096)
    yield case("phi3", {"max_position_embeddings": 4096,
                        "rope_scaling": {"type": "longrope", "short_factor": short,
                                         "long_factor": long}},
               4096, f, m, 4096)


with open(os.path.join(os.path.dirname(__file__), "rope_cases.json"), "w") as out:
    out.write("[\n" + ",\n".join(json.dumps(c) for c in all_cases()) + "\n]\n")
