#!/usr/bin/env python3
"""make_corpus.py LORAD - write the seeds of the fuzz targets to tests/corpus, where they are kept.

LORAD is the program (build/lorad), which imports the seeds of base files.  Run it again when a
format changes.  Inputs that once crashed are added by hand as tests/corpus/NAME/found-*, which this
leaves alone.
"""
import base64
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "corpus")
random.seed(1)


def seed(target, name, data):
    folder = os.path.join(HERE, target)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, name), "wb") as f:
        f.write(data if isinstance(data, bytes) else data.encode())


def dump(value):
    return json.dumps(value, separators=(",", ":"))


def bf16(n):
    return b"".join(struct.pack("<f", random.gauss(0, 0.1))[2:] for _ in range(n))


def f32(n):
    return b"".join(struct.pack("<f", random.gauss(0, 0.1)) for _ in range(n))


def f16(n):
    return b"".join(struct.pack("<e", random.gauss(0, 0.1)) for _ in range(n))


def i64(n):
    return b"".join(struct.pack("<q", i) for i in range(n))


def safetensors(tensors, meta=None):
    """tensors: name -> (dtype, shape, bytes)"""
    head, data = {}, b""
    if meta is not None:
        head["__metadata__"] = meta
    for name, (dtype, shape, raw) in tensors.items():
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = dump(head).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


# --- configs -----------------------------------------------------------------------------------
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
         "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 8,
         "max_position_embeddings": 64, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
         "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": [2, 3]}
LLAMA3 = dict(LLAMA, rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 16})
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
         "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 8,
         "max_position_embeddings": 64, "rms_norm_eps": 1e-06,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
         "use_sliding_window": False, "attention_bias": False, "tie_word_embeddings": False}
QWEN2 = dict(QWEN3, architectures=["Qwen2ForCausalLM"], model_type="qwen2", use_sliding_window=True,
             sliding_window=16, max_window_layers=1,
             layer_types=["full_attention", "sliding_attention"])
MISTRAL = dict(LLAMA, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=16)
CONFIGS = {"llama": LLAMA, "llama3": LLAMA3, "qwen2": QWEN2, "qwen3": QWEN3, "mistral": MISTRAL}

def charsmap(pairs):
    """What a SentencePiece model carries to rewrite characters: a trie in a double array, then texts."""
    units, used, texts = [0] * 512, set(), b""
    tree = {}
    for old, new in pairs:
        node = tree
        for c in old.encode():
            node = node.setdefault(c, {})
        node[None] = len(texts)
        texts += new.encode() + b"\0"

    def place(node, at, label):
        for at_base in range(256, 512):
            slots = {at_base ^ (c or 0) for c in node}
            if at_base not in used and not slots & used:
                break
        used.update(slots | {at_base})
        units[at] = label | (at ^ at_base) << 10 | (1 << 8 if None in node else 0)
        for c, child in node.items():
            if c is None:
                units[at_base] = child | 1 << 31
            else:
                place(child, at_base ^ c, c)
    place(tree, 0, 0)
    return struct.pack("<I512I", 2048, *units) + texts


CHARSMAP = charsmap([("é", "e"), ("ab", "xy"), ("\u3000", " "), ("ﬁ", "fi"), ("\u00ad", "")])


# --- tokenizers --------------------------------------------------------------------------------
ADDED = [{"id": i, "content": c, "single_word": False, "lstrip": False, "rstrip": i == 2,
          "normalized": False, "special": True} for i, c in enumerate(["<unk>", "<s>", "</s>"])]


def tokenizer(vocab, merges, **parts):
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": False, "vocab": {t: i for i, t in enumerate(vocab)}, "merges": merges}
    given = parts.pop("model", {})
    model = given if "type" in given else dict(model, **given)
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": ADDED,
             "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}
    whole.update(parts)
    return dump(dict(whole, model=model))


SMALL = ["<unk>", "<s>", "</s>", "a", "b", "ab", "e", "ee"]
POST = {"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}}
LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
TOKENIZERS = {
    "bytelevel": tokenizer(SMALL, ["a b", "e e"], pre_tokenizer=LEVEL, decoder=LEVEL,
                           post_processor=POST, normalizer={"type": "NFC"}),
    "sentencepiece": tokenizer(
        ["<unk>", "<s>", "</s>"] + ["<0x%02X>" % i for i in range(256)] + ["▁", "H", "e", "l", "He", "▁He"],
        [["H", "e"], ["▁", "He"]],
        model={"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
        normalizer={"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        post_processor=POST,
        decoder={"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}),
    "split": tokenizer(
        SMALL, ["a b"], decoder={"type": "ByteLevel", "add_prefix_space": False},
        pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+"},
             "behavior": "Isolated", "invert": False},
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}),
    "metaspace": tokenizer(
        SMALL, ["a b"], model={"unk_token": "<unk>"},
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        decoder={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}),
    "unigram": tokenizer(
        [], [], normalizer={"type": "Sequence", "normalizers": [
            {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(CHARSMAP).decode()},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}]},
        model={"type": "Unigram", "unk_id": 0, "byte_fallback": False,
               "vocab": [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], ["▁", -2.5], ["▁a", -1.5], ["a", -3.0],
                         ["xy", -2.0], ["e", -3.5], ["l", -3.0], ["▁Hel", -4.0]]},
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        decoder={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}),
    "wordlevel": tokenizer(
        [], [], model={"type": "WordLevel", "unk_token": "<unk>", "vocab": {t: i for i, t in enumerate(SMALL)}},
        normalizer={"type": "Lowercase"},
        pre_tokenizer={"type": "Whitespace"}),
}


# --- SentencePiece -----------------------------------------------------------------------------
def varint(n):
    out = b""
    while n > 0x7f:
        out += bytes([n & 0x7f | 0x80])
        n >>= 7
    return out + bytes([n])


def field(number, value):
    """An int, a float, or bytes."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece(pieces, trainer=((3, 2),), normalizer=((1, "identity"),)):
    """pieces: (text, score, type)"""
    model = b"".join(field(1, field(1, t) + field(2, s) + (field(3, k) if k != 1 else b"")) for t, s, k in pieces)
    for number, fields in (2, trainer), (3, normalizer):
        model += field(number, b"".join(field(n, v) for n, v in fields))
    return model


SPM_HEAD = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
SPM_BYTES = [("<0x%02X>" % i, 0.0, 6) for i in range(256)]
SPM_WORDS = [(t, -float(i), 1) for i, t in enumerate(["▁a", "ab", "▁ab", "▁", "a", "b", "e", "▁▁", "é"])]
SPM_CONFIG = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": True,
              "bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "unk_token": "<unk>",
              "added_tokens_decoder": {"14": {"content": "<x>", "lstrip": False, "normalized": False, "rstrip": True,
                                              "single_word": False, "special": True}}}


# --- adapter_model.bin ---------------------------------------------------------------------------
class Name:
    """What pickle writes as a name."""
    def __init__(self, module, name):
        self.module, self.name = module, name


class Storage:
    def __init__(self, kind, key, count):
        self.id = ("storage", Name("torch", kind), key, "cpu", count)


class Tensor:
    def __init__(self, storage, offset, shape, stride):
        self.args = (storage, offset, shape, stride, False, Name("collections", "OrderedDict"))


class Pickler(pickle._Pickler):
    """Protocol 2 as torch.save() has it, without torch."""
    def persistent_id(self, value):
        return value.id if isinstance(value, Storage) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Name):
            self.write(b"c%s\n%s\n" % (value.module.encode(), value.name.encode()))
            if value.name == "OrderedDict":
                self.write(b")R")
        elif isinstance(value, Tensor):
            self.save(Name("torch._utils", "_rebuild_tensor_v2"))
            self.save(value.args)
            self.write(b"R")
        else:
            super().save(value, save_persistent_id)


def pickled(value):
    out = io.BytesIO()
    Pickler(out, 2).dump(value)
    return out.getvalue()


def torch_file(value, storages):
    out = io.BytesIO()
    members = {"data.pkl": pickled(value), "byteorder": "little",
               **{"data/" + key: raw for key, raw in storages.items()}, "version": "3\n"}
    with zipfile.ZipFile(out, "w") as z:
        for name, data in members.items():
            z.writestr(zipfile.ZipInfo("archive/" + name), data)  # without the time of day
    return out.getvalue()


TORCH_STORAGES = {"0": struct.pack("<64f", *(i / 64 for i in range(64))),
                  "1": struct.pack("<16e", *(i / 16 for i in range(16)))}


def torch_lora():
    path = "base_model.model.model.layers.0.self_attn.q_proj.lora_%s.weight"
    a, b = Storage("FloatStorage", "0", 64), Storage("HalfStorage", "1", 16)
    return {path % "A": Tensor(a, 0, (2, 8), (8, 1)), path % "B": Tensor(b, 0, (8, 2), (1, 8))}


# --- chat templates --------------------------------------------------------------------------------
TALK = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi é"},
                     {"role": "assistant", "content": None, "tool_calls": [
                         {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": [1, 2.5, None]}}}]},
                     {"role": "tool", "content": "<b>"}, {"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {
            "type": "object", "properties": {"a": {"type": "array"}}, "required": ["a"]}}}],
        "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True, "n": 3, "items": [3, 1, 2, 1]}
TEMPLATES = {
    "turns": """{{- bos_token }}
{% for m in messages if m.role != 'tool' %}
    {%- if loop.first and m['role'] == "system" -%}
[{{ m.content | trim }}]
    {%- elif m.content is string %}
{{ loop.index0 ~ ':' + m.content.strip() }}{% if not loop.last %}, {% endif %}
    {%- else %}{% continue %}
    {%- endif %}
{% else %}{{ raise_exception("nothing") }}
{% endfor %}
{%- if add_generation_prompt %}{{ eos_token }}{% endif %}""",
    "tools": """{%- macro show(t, indent=2) -%}{{ t.function | tojson(indent=indent) }}{%- endmacro -%}
{%- set ns = namespace(n=0, seen=false) %}
{%- if tools is defined and tools %}{% for t in tools %}{{ show(t) }}{% set ns.n = ns.n + 1 %}{% endfor %}{% endif %}
{%- for m in messages %}{% for c in m.tool_calls or [] %}{% set ns.seen = true -%}
{% for k, v in c.function.arguments.items() %}{{ k }}={{ v|tojson }}{% endfor %}{% endfor %}{% endfor -%}
{{ ns.n }}{{ ns.seen }}{{ strftime_now("%d %b %Y") }}""",
    "filters": """{{ items|sort(reverse=true)|join(', ') }}{{ items|unique|list }}{{ items|map('string')|list|length }}
{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|first|upper|title|replace('I', 'j', 1) }}
{{ messages[::-1][0].content[-1:] }}{{ items|batch(2, 0)|list }}{{ items|sum // 2 * 3 % 4 ** 2 }}
{% set x = 'a,b'.split(',') + ["c"] %}{{ x[1:]|reverse|list }}{{ '%s %05.2f %x' % ('a', 1.5, 255) }}
{{ {'k': (1, 2,), 'l': none}|dictsort }}{{ 1 if n > 2 and n is divisibleby(3) else 'no'|e }}{{ 'abc'|indent(4, true)|wordcount }}
{% for g in messages|groupby('role') %}{{ g.grouper }}{{ g.list|length }}{% endfor %}{{ 7.0|round(1)|int }}{{ 3 in items }}""",
    "blocks": """{% macro m(a, b='x') %}{{ caller(a) if caller else b }}{{ varargs }}{{ kwargs }}{% endmacro %}
{%- call(v) m('q') %}<{{ v }}>{% endcall %}{{ m(1, 2, 3, z=4) }}
{%- filter upper %}a{% generation %}b{% endgeneration %}{% endfilter %}{% set t %}block{{ n }}{% endset %}{{ t|length }}
{%- for x in [[1, [2, []]]] recursive %}{{ loop.depth }}{% if x is iterable %}{{ loop(x) }}{% endif %}{% endfor %}
{%- with y = 5, z = y %}{{ y }}{{ z is undefined }}{% endwith %}{# comment #}{% raw %}{{ x }}{% endraw %}
{%- for i in range(10, 0, -3) %}{{ loop.cycle('a', 'b') }}{{ loop.previtem|default('-') }}{% if i < 4 %}{% break %}{% endif %}{% endfor %}""",
}


# --- base files --------------------------------------------------------------------------------
def base(lorad, config, *options):
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    hd = config["head_dim"]
    q, kv = config["num_attention_heads"] * hd, config["num_key_value_heads"] * hd
    shapes = {"model.embed_tokens.weight": [V, D], "model.norm.weight": [D]}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = [V, D]
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {"self_attn.q_proj": [q, D], "self_attn.k_proj": [kv, D],
                            "self_attn.v_proj": [kv, D], "self_attn.o_proj": [D, q],
                            "mlp.gate_proj": [F, D], "mlp.up_proj": [F, D], "mlp.down_proj": [D, F],
                            "input_layernorm": [D], "post_attention_layernorm": [D]}.items():
            shapes["model.layers.%d.%s.weight" % (layer, name)] = shape
        if config["model_type"] == "qwen3":
            for name in "q_norm", "k_norm":
                shapes["model.layers.%d.self_attn.%s.weight" % (layer, name)] = [hd]
    with tempfile.TemporaryDirectory() as d:
        tensors = {n: ("BF16", s, bf16(s[0] * (s[1] if len(s) > 1 else 1))) for n, s in shapes.items()}
        files = {"config.json": dump(config).encode(), "tokenizer.json": TOKENIZERS["bytelevel"].encode(),
                 "model.safetensors": safetensors(tensors)}
        for name, data in files.items():
            with open(os.path.join(d, name), "wb") as f:
                f.write(data)
        out = os.path.join(d, "out.base")
        subprocess.run([lorad, "import", d, "-o", out, "--name", "tiny", *options], check=True,
                       stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        with open(out, "rb") as f:
            return f.read()


# --- GGUF --------------------------------------------------------------------------------------
def gtext(s):
    return struct.pack("<Q", len(s.encode())) + s.encode()


def gvalue(v):
    if isinstance(v, bool):
        return 7, struct.pack("<?", v)
    if isinstance(v, int):
        return 4, struct.pack("<I", v)
    if isinstance(v, float):
        return 6, struct.pack("<f", v)
    if isinstance(v, str):
        return 8, gtext(v)
    kind = 5 if isinstance(v[0], int) else gvalue(v[0])[0]
    items = [struct.pack("<i", x) if kind == 5 else gvalue(x)[1] for x in v]
    return 9, struct.pack("<IQ", kind, len(v)) + b"".join(items)


def gguf(arch, vocab, matrix_type, model_keys=()):
    """A model of one layer; matrices of `matrix_type`: (id, elements and bytes of a block)."""
    D = 256 if matrix_type[1] == 256 else 32
    keys = {"general.architecture": arch, "general.alignment": 32}
    for name, v in {"block_count": 1, "embedding_length": D, "feed_forward_length": D, "context_length": 64,
                    "attention.head_count": 1, "attention.head_count_kv": 1, "attention.key_length": D,
                    "attention.value_length": D, "attention.layer_norm_rms_epsilon": 1e-5,
                    "rope.freq_base": 10000.0}.items():
        keys[arch + "." + name] = v
    keys.update(vocab)
    keys.update(dict(model_keys))
    V = len(vocab["tokenizer.ggml.tokens"])
    tensors = {"token_embd.weight": [D, V], "output_norm.weight": [D]}
    for name in "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down":
        tensors["blk.0.%s.weight" % name] = [D, D]
    for name in "attn_norm", "ffn_norm":
        tensors["blk.0.%s.weight" % name] = [D]
    if arch == "qwen3":
        tensors["blk.0.attn_q_norm.weight"] = tensors["blk.0.attn_k_norm.weight"] = [D]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for name, v in keys.items():
        kind, raw = gvalue(v)
        head += gtext(name) + struct.pack("<I", kind) + raw
    data = b""
    for name, shape in tensors.items():
        kind, block, size = matrix_type if len(shape) == 2 else (0, 1, 4)
        n = shape[0] * (shape[1] if len(shape) == 2 else 1) // block
        head += gtext(name) + struct.pack("<I%dQIQ" % len(shape), len(shape), *shape, kind, len(data))
        data += b"".join(b"\x01\x10" * (size // 2) for _ in range(n)) if block > 1 else f32(n)
        data += b"\0" * (-len(data) % 32)
    return head + b"\0" * (-len(head) % 32) + data


def gguf_lora(tensors, alpha=2.0):
    """tensors: name -> (shape with the fastest first, id of the type, bytes)"""
    keys = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora",
            "adapter.lora.alpha": alpha}
    head, data = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)), b""
    for name, v in keys.items():
        kind, raw = gvalue(v)
        head += gtext(name) + struct.pack("<I", kind) + raw
    for name, (shape, kind, raw) in tensors.items():
        head += gtext(name) + struct.pack("<I2QIQ", 2, *shape, kind, len(data))
        data += raw + b"\0" * (-len(raw) % 32)
    return head + b"\0" * (-len(head) % 32) + data


GPT2_VOCAB = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
              "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "b", "ab"], "tokenizer.ggml.merges": ["a b"],
              "tokenizer.ggml.token_type": [3, 3, 1, 1, 1], "tokenizer.ggml.bos_token_id": 0,
              "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.add_bos_token": True}
SPM_VOCAB = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "▁a"] +
             ["<0x%02X>" % i for i in range(256)], "tokenizer.ggml.scores": [0.0] * 3 + [-1.0, -2.0, -0.5] + [0.0] * 256,
             "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1] + [6] * 256, "tokenizer.ggml.bos_token_id": 1,
             "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0}

# --- adapters ----------------------------------------------------------------------------------
LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 2,
        "target_modules": ["q_proj"], "bias": "none", "lora_dropout": 0.0}
RSLORA = dict(LORA, use_rslora=True, alpha_pattern={"1.self_attn.q_proj": 4},
              rank_pattern={"model.layers.0.self_attn.q_proj": 2}, base_model_name_or_path="x")
ADALORA = {"peft_type": "ADALORA", "task_type": "CAUSAL_LM", "init_r": 2, "target_r": 1,
           "lora_alpha": 4, "target_modules": ["q_proj"], "tinit": 0, "tfinal": 0, "deltaT": 1,
           "total_step": 10, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5}


def q_proj(layers, width, rank, dtype="F32", adalora=False, extra=None):
    make = {"F32": f32, "F16": f16, "BF16": bf16}[dtype]
    t = {}
    for layer in range(layers):
        path = "base_model.model.model.layers.%d.self_attn.q_proj." % layer
        r = rank(layer)
        end = "" if adalora else ".weight"
        t[path + "lora_A" + end] = (dtype, [r, width], make(r * width))
        t[path + "lora_B" + end] = (dtype, [width, r], make(r * width))
        if adalora:
            t[path + "lora_E"] = (dtype, [r, 1], make(r))
    return safetensors(dict(t, **(extra or {})), {"format": "pt"})


def tar(files, form=tarfile.PAX_FORMAT, folder=False):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as t:
        if folder:
            t.addfile(tarfile.TarInfo("."))
            t.getmembers()
        for name, data in files.items():
            info = tarfile.TarInfo(("./" if folder else "") + name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return out.getvalue().rstrip(b"\0") + b"\0" * 1024


COMPLETION = {"model": "whitman", "prompt": "The sea", "max_tokens": 4, "temperature": 0.7, "top_p": 0.9,
              "top_k": 5, "min_p": 0.1, "seed": 1, "n": 2, "stop": ["\n", "x"], "logprobs": 2, "echo": True,
              "stream": True, "stream_options": {"include_usage": True}, "presence_penalty": 0.5,
              "frequency_penalty": -0.5, "repetition_penalty": 1.1, "logit_bias": {"5": -100, "7": 1.5}}
CHAT = {"messages": [{"role": "system", "content": "s"},
                     {"role": "user", "content": [{"type": "text", "text": "hi"}]},
                     {"role": "assistant", "content": "é\u0000"}, {"role": "user", "content": "x"}],
        "adapters": [{"name": "whitman", "weight": 0.5}, {"name": "whitman@1", "weight": -1}],
        "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 3, "tools": [], "seed": 7,
        "response_format": {"type": "text"}, "user": "u"}


# --- training data: a chat template, a NUL, a byte of options, the file ---------------------------
def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


CHATML = ("{% for m in messages %}{{ '[' ~ m.role ~ ']' ~ (m.content or '') ~ (m.tool_calls or '') ~ eos_token }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}")
REASONING = ("{{ bos_token }}{% for m in messages %}{{ m.role }}:{% if loop.last %}{{ m.content }}{% else %}"
             "{{ m.content.split('|')[-1] }}{% endif %}{{ eos_token }}{% endfor %}"
             "{% if add_generation_prompt %}assistant:>{% endif %}")
LINES = [{"text": "the sea"}, {"prompt": "the ", "completion": "sea"},
         {"instruction": "a", "input": "b", "output": "c"}, {"instruction": "a", "output": "c", "id": 1},
         {"messages": [{"role": "system", "content": "s"}] + turns("a", "b", "c", "d")},
         {"messages": turns("a", "x|b", "c", "y|d"), "tools": []},
         {"messages": turns("a") + [{"role": "assistant", "content": "b", "weight": 0}] + turns("c", "d")},
         {"messages": turns("a") + [{"role": "assistant", "content": None, "tool_calls": [
             {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
             {"role": "tool", "content": "r", "tool_call_id": "1"}] + turns("x", "y")[1:]},
         {"prompt": turns("a", "b", "c"), "completion": turns("", "d")[1:]},
         {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]


def main(lorad):
    for target in os.listdir(HERE) if os.path.isdir(HERE) else []:
        for name in os.listdir(os.path.join(HERE, target)):
            if not name.startswith("found-"):
                os.remove(os.path.join(HERE, target, name))

    tensors = {"a": ("F32", [2, 3], f32(6)), "b": ("BF16", [4], bf16(4)), "c": ("F16", [1, 2, 2], f16(4)),
               "d": ("U8", [3], b"xyz"), "e": ("I64", [2], i64(2)), "none": ("F32", [0], b""),
               "one": ("F32", [], f32(1))}
    seed("safetensors", "types", safetensors(tensors, {"format": "pt", "k": "v\n"}))
    seed("safetensors", "empty", safetensors({}))
    for name, config in CONFIGS.items():
        seed("config", name, dump(config))
    seed("config", "generation", dump(LLAMA) + "\0" + dump({"eos_token_id": [2, 3], "bos_token_id": 1}))
    for name, text in TOKENIZERS.items():
        seed("tokenizer", name, text)
    for name, text in TEMPLATES.items():
        seed("template", name, text + "\0" + dump(TALK))
    seed("sentencepiece", "plain", b"\0\0" + sentencepiece(SPM_HEAD + SPM_WORDS))
    seed("sentencepiece", "bytes", b"\0\0" + sentencepiece(
        SPM_HEAD + SPM_BYTES + SPM_WORDS, ((3, 2), (35, 1), (40, 0), (41, 1), (42, 2)),
        ((1, "identity"), (3, 0), (4, 0), (5, 1))))
    seed("sentencepiece", "config", dump(SPM_CONFIG).encode() + b"\0" + dump({"<x>": 14}).encode() + b"\0" +
         sentencepiece(SPM_HEAD + SPM_WORDS + [("<user>", 0.0, 4), ("gone", 0.0, 5)]))
    seed("sentencepiece", "unigram", b"\0\0" + sentencepiece(
        SPM_HEAD + SPM_WORDS, ((3, 1), (40, 0), (41, 1), (42, 2)), ((1, "nmt_nfkc"), (2, CHARSMAP), (5, 1))))
    seed("sentencepiece", "map", b"\0\0" + sentencepiece(SPM_HEAD + SPM_WORDS, normalizer=((2, CHARSMAP),)))
    whole = {"t": Tensor(Storage("FloatStorage", "0", 64), 0, (2, 4), (4, 1)), "u": torch_lora()}
    seed("torch", "pickle", b"P" + pickled(torch_lora()))
    seed("torch", "nested", b"P" + pickled(whole))
    seed("torch", "archive", torch_file(torch_lora(), TORCH_STORAGES))
    seed("text", "plain", b"\x03Hello, <s>world</s>! It's 12345.\n\n  x\t")
    seed("text", "bytes", "\x01naïve ▁ 漢字 😀".encode() + b"\xff\xc3 \xe6\xbc")
    seed("text", "ids", b"\x04" + struct.pack("<8h", 1, 400, 2, 195, 198, 2047, 3, 259))
    seed("base", "llama", base(lorad, LLAMA))
    small = dict(QWEN3, num_hidden_layers=1)
    seed("base", "qwen3", base(lorad, small))
    seed("base", "f32", base(lorad, dict(small, intermediate_size=16, hidden_size=16, head_dim=8), "--type", "f32"))

    seed("gguf", "llama", gguf("llama", GPT2_VOCAB, (8, 32, 34)))
    seed("gguf", "qwen3", gguf("qwen3", GPT2_VOCAB, (2, 32, 18)))
    seed("gguf", "spm", gguf("llama", SPM_VOCAB, (6, 32, 22)))
    seed("gguf", "plain", gguf("qwen3", GPT2_VOCAB, (0, 1, 4), {"tokenizer.chat_template": "x"}))

    lora, ada = q_proj(2, 8, lambda l: 1), q_proj(2, 8, lambda l: 2, "F32", True)
    seed("adapter", "lora", dump(LORA).encode() + b"\0" + lora)
    seed("adapter", "rslora", dump(RSLORA).encode() + b"\0" + q_proj(2, 8, lambda l: 2 - l, "F16"))
    seed("adapter", "adalora", dump(ADALORA).encode() + b"\0" + ada)
    pruned = dict(ADALORA, rank_pattern={"model.layers.%d.self_attn.q_proj.lora_E" % l: [True, l == 0]
                                         for l in range(2)})
    seed("adapter", "pruned", dump(pruned).encode() + b"\0" + q_proj(2, 8, lambda l: 2 - l, "BF16", True))

    files = {"adapter_config.json": dump(LORA).encode(), "adapter_model.safetensors": lora}
    seed("tar", "pax", tar(dict(files, **{"README.md": b"x"}), folder=True))
    seed("tar", "gnu", tar(files, tarfile.GNU_FORMAT))
    seed("tar", "ustar", tar(files, tarfile.USTAR_FORMAT))
    seed("tar", "bin", tar({"adapter_config.json": files["adapter_config.json"],
                            "adapter_model.bin": torch_file(torch_lora(), TORCH_STORAGES)}))
    seed("tar", "long", tar({"n" * 200: b"x"}, tarfile.GNU_FORMAT))

    seed("params", "completion", dump(COMPLETION))
    seed("params", "chat", dump(CHAT))
    seed("params", "lists", dump({"prompt": [[1, 2], [3]], "max_tokens": 1, "stop": "x"}))
    recipe = {"alpha": 8, "target_modules": ["q_proj"], "dropout": 0.1, "learning_rate": 1e-3, "schedule": "cosine",
              "warmup": 10, "max_steps": 9, "batch_size": 2, "accumulate": 2, "moments": "8bit", "dtype": "bf16",
              "eval_every": 5, "patience": 2, "shuffle": False, "seed": 7, "clip": 0, "adam_eps": 1e-6}
    seed("method", "lora", dump({"type": "lora", "lora": dict(
        recipe, rank=4, init="normal", rank_pattern={"b": 2, "a": 3}, alpha_pattern={"a": 1.5}, lr_b_ratio=16)}))
    seed("method", "adalora", dump({"type": "adalora", "adalora": dict(
        recipe, target_r=4, init_r=6, tinit=1, tfinal=2, deltaT=2, beta1=0.8, beta2=0.9, orth_reg_weight=0.1)}))
    seed("method", "supervised", dump({"type": "supervised", "supervised": {"hyperparameters": {
        "batch_size": 4, "n_epochs": "auto", "learning_rate_multiplier": 0.5}}}))
    seed("tokens", "list", "1,2, 3 400")
    seed("tokens", "file", b"F" + safetensors({"ids": ("I64", [2, 3], i64(6))}))
    seed("tokens", "file32", b"F" + safetensors({"ids": ("I32", [4], b"\1\0\0\0" * 4)}))
    seed("options", "args", "--port=80\n-b\nfile\n-m8G\n--adapter\na\n-ab\n--ratio\n0.25\n-v\n--\nrest")
    seed("options", "file", "x\n\n# comment\nport = 99\n\nmemory=1.5GiB\n other = 1\nverbose = false\r\n")
    seed("options", "help", "--help")

    part = 'Content-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    form = "multipart/form-data; boundary=xx\n" + "".join(
        "--xx\r\n" + part % p for p in [("name", "a"), ("config", "{}"), ("weights", "w" * 40)]) + "--xx--\r\n"
    seed("form", "plain", form)
    seed("form", "files", form.replace('name="weights"', 'name="weights"; filename="a"')
         .replace("xx\n", '"xx"\n', 1).replace("\r\n\r\nw", "\r\nContent-Type: text/plain\r\n\r\nw"))
    seed("form", "mixed", "multipart/form-data; boundary=xx\n--xx\r\nContent-Disposition: form-data; name=\"f\"\r\n"
         "Content-Type: multipart/mixed; boundary=yy\r\n\r\n--yy\r\nContent-Disposition: file; filename=\"a\"\r\n\r\n"
         "1\r\n--yy--\r\n--xx--\r\n")
    seed("form", "urlencoded", "application/x-www-form-urlencoded\nname=a%20b&weights=%00x&config")

    for name, path, body in [("completion", "/v1/completions", COMPLETION), ("chat", "/v1/chat/completions", CHAT),
                             ("tokenize", "/tokenize", {"content": "a<s>", "add_special": True, "with_pieces": True}),
                             ("detokenize", "/detokenize", {"tokens": [1, 400, 500]}),
                             ("promote", "/v1/adapters/whitman/promote", {"version": 1})]:
        seed("api", name, "POST %s\nContent-Type: application/json\n\n%s" % (path, dump(body)))
    for name, line in [("models", "GET /v1/models/whitman@1"), ("list", "GET /v1/adapters?limit=5&after=a"),
                       ("versions", "GET /v1/adapters/whitman/versions"), ("diff", "GET /v1/adapters/whitman/diff?to=whitman@1"),
                       ("delete", "DELETE /v1/adapters/none@1"), ("metrics", "GET /metrics"),
                       ("download", "GET /v1/adapters/default/whitman@1/download"), ("page", "HEAD /"),
                       ("key", "GET /v1/models\nAuthorization: Bearer sk-lorad-0123\nOrigin: http://x\nHost: localhost")]:
        seed("api", name, line + "\n\n")
    demo = q_proj(5, 192, lambda l: 1, "BF16")
    seed("api", "form", b"POST /v1/adapters\nContent-Type: multipart/form-data\n\nname\nf%%%%config\n" +
         dump(LORA).encode() + b"%%%%weights\n" + demo)
    demo_tar = tar({"adapter_config.json": dump(LORA).encode(), "adapter_model.safetensors": demo})
    seed("api", "put", b"PUT /v1/adapters/t?activate=false\n\n" + demo_tar)

    lines = "\n".join(map(dump, LINES))
    seed("dataset", "lines", "\0\x10" + lines)
    seed("dataset", "chatml", CHATML + "\0\x31" + lines)
    seed("dataset", "reasoning", REASONING + "\0\x02" + lines + "\r\n\r\n")
    seed("dataset", "array", "\0\x50\ufeff " + json.dumps(LINES, indent=1) + "\n")
    seed("dataset", "short", "\0\x0d" + lines)
    seed("dataset", "bad", "\0\x01" + "\n".join(['{"text":"a"}', "{", '{"text":1}', '{"text":"a"}', "[]", '{"messages":[]}',
                                                 '{"text":"\\ud800"}', '{"text":"a","text":"b"}', '{}']))

    q = {"blk.0.attn_q.weight.lora_a": ([8, 2], 0, f32(16)), "blk.0.attn_q.weight.lora_b": ([2, 8], 0, f32(16))}
    seed("gguf_lora", "q", gguf_lora(q))
    seed("gguf_lora", "types", gguf_lora(dict(q, **{
        "blk.1.attn_k.weight.lora_a": ([8, 1], 1, f16(8)), "blk.1.attn_k.weight.lora_b": ([1, 4], 1, f16(4)),
        "blk.1.ffn_down.weight.lora_a": ([12, 1], 30, bf16(12)), "blk.1.ffn_down.weight.lora_b": ([1, 8], 0, f32(8)),
        "token_embd.weight.lora_a": ([1, 16], 0, f32(16)), "token_embd.weight.lora_b": ([1, 8], 0, f32(8)),
        "output.weight.lora_a": ([8, 32], 0, f32(256)),
        "output.weight.lora_b": ([32, 16], 8, b"\0\x38" * 17 * 16)}), 0.0))

    delta = ".token_adapter.trainable_tokens_delta"
    tokens = {"base_model.model.model.embed_tokens" + delta: ("F32", [2, 8], f32(16)),
              "base_model.model.lm_head" + delta: ("F16", [1, 8], f16(8))}
    seed("adapter", "tokens", dump(dict(LORA, target_modules=["q_proj"], trainable_token_indices={
        "embed_tokens": [3, 0], "lm_head": [15]})).encode() + b"\0" + q_proj(2, 8, lambda l: 1, extra=tokens))
    merged = {"base_model.model.model.layers.%d.self_attn.q_proj.lora_%s.weight" % (l, part):
              ("F32", shape, f32(16 if part == "A" else 8))
              for l in range(2) for part, shape in (("A", [2, 8]), ("B", [8, 1, 1]))}
    seed("adapter", "merged", dump(dict(LORA, enable_lora=[True, True])).encode() + b"\0" + safetensors(merged))


if __name__ == "__main__":
    if len(sys.argv) != 2 or shutil.which(sys.argv[1]) is None:
        sys.exit(__doc__)
    main(sys.argv[1])
