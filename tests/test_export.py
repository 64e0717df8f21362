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


# --- merged ---------------------------------------------------------------------------------------
def split(source, out):
    """The same model in two weight files with an index."""
    os.makedirs(out)
    shutil.copy(os.path.join(source, "config.json"), out)
    tensors = read_safetensors(os.path.join(source, "model.safetensors"))
    names, where, total = sorted(tensors), {}, 0
    for i in (0, 1):
        part = {n: tensors[n] for n in names[i::2]}
        file = f"model-{i + 1:05}-of-00002.safetensors"
        write_safetensors(os.path.join(out, file), part)
        where.update({n: file for n in part})
        total += sum(len(t[2]) for t in part.values())
    with open(os.path.join(out, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": where}, f)


def merge(root, label, source, adapter, dtype="f32", limit=1e-6):
    out = os.path.join(root, label.replace(" ", "-") + "-merged")
    lorad("adapter", "merge", adapter, "--into", source, "-o", out, "--dtype", dtype)
    want = logits(root, f32_base(root, source), adapter)
    got = logits(root, f32_base(root, out))
    d = distance(got, want)
    check(d < limit, f"{label}: merged in {dtype}, the logits are those of base + adapter ({d:.2g})")
    return out


def merges(root):
    whitman = os.path.join(DEMO, "adapters", "whitman")
    out = merge(root, "demo whitman", DEMO, whitman)
    same = [open(os.path.join(d, "tokenizer.json"), "rb").read() for d in (DEMO, out)]
    check(same[0] == same[1], "the tokenizer comes along")
    check(not [n for n in os.listdir(out) if n.startswith("adapter")], "no adapter lies beside what was merged")
    merge(root, "demo whitman bf16", DEMO, whitman, "bf16", 0.02)
    config = json.load(open(os.path.join(root, "demo-whitman-bf16-merged", "config.json")))
    check(config.get("dtype", config.get("torch_dtype")) == "bfloat16", "config.json says the new type")
    kinds = {t[0] for t in read_safetensors(os.path.join(
        root, "demo-whitman-bf16-merged", "model.safetensors")).values()}
    check(kinds == {"BF16"}, f"every tensor has the type that was asked for {kinds}")

    # without --dtype, what no module changes keeps its bytes; shards keep their names
    two = os.path.join(root, "two")
    split(DEMO, two)
    out = os.path.join(root, "two-merged")
    lorad("adapter", "merge", whitman, "--into", two, "-o", out)
    names = sorted(n for n in os.listdir(two) if n.startswith("model"))
    check(names == sorted(n for n in os.listdir(out) if n.startswith("model")), "the shards keep their names")
    config = json.load(open(os.path.join(whitman, "adapter_config.json")))
    changed, kept = 0, 0
    for n in names[:2]:
        before, after = read_safetensors(os.path.join(two, n)), read_safetensors(os.path.join(out, n))
        assert before.keys() == after.keys()
        for t in before:
            pruned = config["rank_pattern"].get(t.removesuffix(".weight") + ".lora_E")
            if pruned is not None and any(pruned):
                changed += before[t] != after[t] and before[t][:2] == after[t][:2]
            else:
                kept += before[t] == after[t]
    total = len(json.load(open(os.path.join(out, "model.safetensors.index.json")))["weight_map"])
    check(changed == 32 and changed + kept == total, f"{changed} weights changed, {kept} kept their bytes")
    r = lorad("adapter", "merge", whitman, "--into", DEMO, "-o", out, ok=False)
    check(r.returncode == 1 and "already" in r.stderr, "a folder that is there is not written into")

    for label, source, adapter in [
            ("tiny-llama adalora", ("golden", "models", "tiny-llama"), ("golden", "adapters", "tiny-llama", "adalora")),
            ("tiny-qwen2 hetero", ("golden", "models", "tiny-qwen2"),
             ("golden", "adapters", "tiny-qwen2", "lora_hetero")),
            # weights stored transposed, and q, k, v in one matrix
            ("tiny-gpt2 hetero", ("golden", "models", "tiny-gpt2"), ("golden", "adapters", "tiny-gpt2", "lora_hetero")),
            ("tiny-bloom hetero", ("golden", "models", "tiny-bloom"),
             ("golden", "adapters", "tiny-bloom", "lora_hetero")),
            ("stories260K adalora", ("models", "stories260K"), ("adapters", "stories260K", "adalora_r8"))]:
        source, adapter = shared(*source), shared(*adapter)
        if source and adapter:
            merge(root, label, source, adapter, limit=2e-6)


def merge_refusals(root):
    base, db = os.path.join(root, "nf4.base"), os.path.join(root, "a.db")
    lorad("import", DEMO, "-o", base)
    lorad("adapter", "add", "w", os.path.join(DEMO, "adapters", "whitman"), "--base", base, "--db", db)
    out = os.path.join(root, "bound")
    lorad("adapter", "merge", "w", "--db", db, "--base", base, "--into", DEMO, "-o", out)
    check(os.path.exists(os.path.join(out, "model.safetensors")), "a version merges into its base's source")
    other = os.path.join(root, "two")
    for args, says in [
            (["--base", base, "--into", other], "not the folder"),
            (["--base", f32_base(root, DEMO), "--into", DEMO], "another base"),
            (["--into", DEMO, "--dtype", "q8"], "not q8"),
            (["--into", os.path.join(DEMO, "adapters")], "config.json")]:
        r = lorad("adapter", "merge", "w", "--db", db, *args, "-o", os.path.join(root, "no"), ok=False)
        left = [n for n in os.listdir(root) if n.startswith("no")]
        check(r.returncode == 1 and says in r.stderr and not left, f"refused: {says} {r.stderr.strip()[:100]}")
    quantised = shared("golden", "models", "tiny-llama-bnb-4bit")
    adapter = shared("golden", "adapters", "tiny-llama", "adalora")
    if quantised and adapter:
        r = lorad("adapter", "merge", adapter, "--into", quantised, "-o", os.path.join(root, "no"), ok=False)
        check(r.returncode == 1 and "4-bit" in r.stderr, f"4-bit weights are refused {r.stderr.strip()[:100]}")


# --- what is more than factors -------------------------------------------------------------------
def refusals(root):
    source = shared("golden", "models", "tiny-llama")
    if not source:
        return
    base, adapters = f32_base(root, source), os.path.join(SHARED, "golden", "adapters", "tiny-llama")
    for kind, says in [("dora", "method is dora"), ("lora_lorabias", "lora_B.bias"), ("lora_embed_head", "lm_head"),
                       ("lora_mts", "tensor lm_head.weight")]:
        adapter, out = os.path.join(adapters, kind), os.path.join(root, "refused-" + kind)
        for args in (["diff", adapter, os.path.join(adapters, "adalora")], ["export", adapter, "-o", out, "--as", "lora"],
                     ["export", adapter, "-o", out, "--as", "gguf"], ["merge", adapter, "--into", source, "-o", out]):
            r = lorad("adapter", *args, "--base", base, ok=False)
            check(r.returncode == 1 and says in r.stderr and not os.path.exists(out),
                  f"{args[0]} refuses {kind} by name: {r.stderr.strip()[:90]}")
        lorad("adapter", "export", adapter, "-o", out, "--base", base)
        name = "adapter_model.safetensors"
        kept, had = (read_safetensors(os.path.join(d, name)) for d in (out, adapter))
        check(kept and all(had.get(n) == t for n, t in kept.items()), f"export as peft keeps the bytes of {kind}")


with Folder() as root:
    refusals(root)
    merges(root)
    merge_refusals(root)
    plain_loras(root)
    bytes_stay(root)
    ggufs(root)
done()
