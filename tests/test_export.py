"""test_export.py - adapters written for other programs: as plain LoRA with the same logits, as GGUF with
the same change to every weight, merged into the weights with the same logits."""
import json
import math
import os
import re
import struct

from harness import *

TOKENS = ",".join(map(str, [1, 40, 7, 99, 12, 63, 5, 81, 30, 2]))


def floats(tensor):
    dtype, _, data = tensor
    if dtype == "F32":
        return list(struct.unpack(f"<{len(data) // 4}f", data))
    if dtype == "F16":
        return list(struct.unpack(f"<{len(data) // 2}e", data))
    assert dtype == "BF16"
    return [struct.unpack("<f", b"\0\0" + data[i:i + 2])[0] for i in range(0, len(data), 2)]


def logits(root, base, *adapter):
    out = os.path.join(root, "logits.safetensors")
    args = [x for a in adapter for x in ("--adapter", a)]
    lorad("logits", "--base", base, "--precision", "f32", "--tokens", TOKENS, "--out", out, *args)
    return floats(read_safetensors(out)["logits"])


def distance(x, y):
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y)) / sum(b * b for b in y))


def f32_base(root, source):
    base = os.path.join(root, "f32.base")
    if os.path.exists(base):
        os.unlink(base)
    lorad("import", source, "-o", base, "--type", "f32")
    return base


# --- as plain LoRA ------------------------------------------------------------------------------
def plain_lora(root, label, source, adapter):
    base, out = f32_base(root, source), os.path.join(root, label + "-lora")
    lorad("adapter", "export", adapter, "-o", out, "--as", "lora", "--base", base)
    config = json.load(open(os.path.join(out, "adapter_config.json")))
    check(config["peft_type"] == "LORA" and "init_r" not in config, f"{label}: the config is plain LoRA's")
    bare, want, got = logits(root, base), logits(root, base, adapter), logits(root, base, out)
    check(distance(bare, want) > 1e-3, f"{label}: the adapter does something ({distance(bare, want):.3g})")
    check(distance(got, want) < 1e-6, f"{label}: the same logits as plain LoRA ({distance(got, want):.2g})")

    # alpha / r of every module is the scaling of the source, to the last bit
    source_config = json.load(open(os.path.join(adapter, "adapter_config.json")))
    if source_config["peft_type"] == "ADALORA":
        init_r, alpha = source_config["init_r"], source_config["lora_alpha"]
        scaling = (alpha if alpha > 0 else init_r) / (init_r + 1e-5)
        bad = [p for p in config["target_modules"]
               if config["alpha_pattern"].get(p, config["lora_alpha"]) /
               config["rank_pattern"].get(p, config["r"]) not in (scaling, 1.0)]
        check(not bad, f"{label}: alpha / r is AdaLoRA's scaling, bit for bit {bad[:2]}")
    return out


def plain_loras(root):
    plain_lora(root, "demo whitman", DEMO, os.path.join(DEMO, "adapters", "whitman"))
    for label, source, adapter in [
            ("tiny-llama adalora", ("golden", "models", "tiny-llama"), ("golden", "adapters", "tiny-llama", "adalora")),
            ("tiny-llama rslora", ("golden", "models", "tiny-llama"),
             ("golden", "adapters", "tiny-llama", "lora_rslora")),
            ("tiny-llama hetero", ("golden", "models", "tiny-llama"),
             ("golden", "adapters", "tiny-llama", "lora_hetero")),
            ("stories260K adalora", ("models", "stories260K"), ("adapters", "stories260K", "adalora_r8"))]:
        source, adapter = shared(*source), shared(*adapter)
        if source and adapter:
            plain_lora(root, label, source, adapter)


def bytes_stay(root):
    """What needs no folding keeps its bytes."""
    adapter, base = os.path.join(DEMO, "adapters", "shakespeare"), f32_base(root, DEMO)
    out = os.path.join(root, "shakespeare-lora")
    lorad("adapter", "export", adapter, "-o", out, "--as", "lora", "--base", base)
    name = "adapter_model.safetensors"
    check(read_safetensors(os.path.join(out, name)) == read_safetensors(os.path.join(adapter, name)),
          "plain LoRA exported as plain LoRA has the same bytes")
    peft = os.path.join(root, "shakespeare-peft")
    lorad("adapter", "export", adapter, "-o", peft, "--base", base)
    with open(os.path.join(adapter, "adapter_config.json"), "rb") as x, \
            open(os.path.join(peft, "adapter_config.json"), "rb") as y:
        check(x.read() == y.read(), "as peft the config is as it was")
    r = lorad("adapter", "export", adapter, "-o", peft, "--base", base, ok=False)
    check(r.returncode == 1 and "already" in r.stderr, "nothing is overwritten")


# --- GGUF -----------------------------------------------------------------------------------------
def read_gguf(path):
    """Metadata and tensors {name: (dims, floats)}, from the format's description."""
    data, at = open(path, "rb").read(), 0

    def take(fmt):
        nonlocal at
        v = struct.unpack_from("<" + fmt, data, at)
        at += struct.calcsize("<" + fmt)
        return v[0]

    def text():
        nonlocal at
        n = take("Q")
        at += n
        return data[at - n:at].decode()

    assert data[:4] == b"GGUF"
    at = 4
    version, ntensors, nmeta = take("I"), take("Q"), take("Q")
    meta, infos = {"version": version}, []
    for _ in range(nmeta):
        key, kind = text(), take("I")
        meta[key] = {4: lambda: take("I"), 6: lambda: take("f"), 8: text}[kind]()
    for _ in range(ntensors):
        name, ndim = text(), take("I")
        dims = [take("Q") for _ in range(ndim)]
        kind, offset = take("I"), take("Q")
        assert kind == 0 and offset % 32 == 0
        infos.append((name, dims, offset))
    start = (at + 31) // 32 * 32
    tensors = {}
    for name, dims, offset in infos:
        n = math.prod(dims)
        tensors[name] = (dims, struct.unpack_from(f"<{n}f", data, start + offset))
    assert start + max(o + (4 * math.prod(d) + 31) // 32 * 32 for _, d, o in infos) == len(data)
    return meta, tensors


GGUF_NAME = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down"}


def gguf(root, label, source, adapter, permuted):
    base, out = f32_base(root, source), os.path.join(root, label + ".gguf")
    lorad("adapter", "export", adapter, "-o", out, "--as", "gguf", "--base", base)
    meta, got = read_gguf(out)
    shape, config = shape_of(source), json.load(open(os.path.join(adapter, "adapter_config.json")))
    check(meta["general.type"] == "adapter" and meta["adapter.type"] == "lora" and meta["version"] == 3 and
          meta["general.architecture"] == ("llama" if permuted else json.load(open(
              os.path.join(source, "config.json")))["model_type"]), f"{label}: GGUF says what it is")
    tensors = read_safetensors(os.path.join(adapter, "adapter_model.safetensors"))
    ada = config["peft_type"] == "ADALORA"
    worst, compared, missing = 0.0, 0, 0
    for layer in (0, shape.L - 1):
        for m, (n_in, n_out) in shape.modules().items():
            path = f"base_model.model.model.layers.{layer}.{m}"
            suffix = "" if ada else ".weight"
            if path + ".lora_A" + suffix not in tensors:
                continue
            A, B = tensors[path + ".lora_A" + suffix], tensors[path + ".lora_B" + suffix]
            k = A[1][0]
            name = f"blk.{layer}.{GGUF_NAME[m]}.weight"
            if k == 0:
                missing += name + ".lora_a" not in got
                compared += 1
                continue
            E = floats(tensors[path + ".lora_E"]) if ada else [1.0] * k
            alpha = next((v for key, v in config.get("alpha_pattern", {}).items()
                          if re.match(rf"(.*\.)?({key})$", path.removeprefix("base_model.model."))), config["lora_alpha"])
            scaling = alpha / (config["init_r"] + 1e-5) if ada else \
                alpha / math.sqrt(k) if config.get("use_rslora") else alpha / k
            A, B = floats(A), floats(B)
            (ga, gb), scale = (got[name + ".lora_a"], got[name + ".lora_b"]), meta["adapter.lora.alpha"] / k
            assert ga[0] == [n_in, k] and gb[0] == [k, n_out]
            for o in range(0, n_out, 7):
                row = o  # where llama.cpp has row o of the Hugging Face matrix
                if permuted and m in ("self_attn.q_proj", "self_attn.k_proj"):
                    head, i, half = o // shape.hd, o % shape.hd, shape.hd // 2
                    row = head * shape.hd + (2 * i if i < half else 2 * (i - half) + 1)
                for i in range(0, n_in, 5):
                    want = scaling * sum(B[o * k + j] * E[j] * A[j * n_in + i] for j in range(k))
                    have = scale * sum(gb[1][row * k + j] * ga[1][j * n_in + i] for j in range(k))
                    size = scaling * sum(abs(B[o * k + j] * E[j] * A[j * n_in + i]) for j in range(k))
                    worst = max(worst, abs(want - have) / (size + 1e-30))
            compared += 1
            missing += 1
    check(compared > 0 and missing == compared and worst < 3e-7,
          f"{label}: GGUF makes the same change to {compared} weights ({worst:.2g})")


def ggufs(root):
    gguf(root, "demo whitman", DEMO, os.path.join(DEMO, "adapters", "whitman"), True)
    gguf(root, "demo shakespeare", DEMO, os.path.join(DEMO, "adapters", "shakespeare"), True)
    for family in ("tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-qwen3"):
        source = shared("golden", "models", family)
        for kind in ("adalora", "lora_rslora", "lora_hetero"):
            adapter = source and os.path.join(SHARED, "golden", "adapters", family, kind)
            if adapter and os.path.isdir(adapter):
                gguf(root, f"{family} {kind}", source, adapter, family in ("tiny-llama", "tiny-mistral"))


with Folder() as root:
    plain_loras(root)
    bytes_stay(root)
    ggufs(root)
done()
