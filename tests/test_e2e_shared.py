"""test_e2e_shared.py - every adapter among the reference files, uploaded to a server over HTTP: a
completion from a base of the shape it was trained for, or the refusal with its reason.

Bases have all layers of the real models with their widths; weights are a repeated pattern, the
vocabulary is the demo's, feed-forward layers that no adapter touches are as narrow as their family
allows, and what makes a file large is zero, a hole in it.  So what they say is noise; what is looked at is that it is said, and that
the adapter changes it."""
import glob
import os

from harness import *

VOCABULARY = 2048
PATTERN = (1 << 19) - 1  # a prime: rows of a matrix are not the same
ONE = struct.pack("<f", 1.0)[2:]


def write_base(folder, config, tensors):
    """tensors: {name: (shape, what)}; what is a standard deviation, "one", or 0, which makes a hole
    in the file."""
    header, at = {}, 0
    for name, (shape, _) in tensors.items():
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    scaled = {}
    with open(os.path.join(folder, "model.safetensors"), "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        start = f.tell()
        for i, (name, (shape, what)) in enumerate(tensors.items()):
            begin, end = header[name]["data_offsets"]
            if what == 0:
                continue
            f.seek(start + begin)
            if what == "one":
                f.write(ONE * ((end - begin) // 2))
                continue
            if what not in scaled:
                scaled[what] = random_floats(random.Random(7), PATTERN, what, "BF16")
            pattern, left = scaled[what], end - begin
            first = 2 * (7919 * i % 1000)  # so that no two layers are the same
            while left > 0:
                f.write(pattern[first:first + left])
                left -= min(left, len(pattern) - first)
                first = 0
        f.truncate(start + at)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(DEMO, name), folder)


def norm(t, name, D, bias=False):
    t[name + ".weight"] = ([D], "one")
    if bias:
        t[name + ".bias"] = ([D], 0)


def linear(t, name, n_in, n_out, std, bias=False, transposed=False):
    t[name + ".weight"] = ([n_in, n_out] if transposed else [n_out, n_in], std)
    if bias:
        t[name + ".bias"] = ([n_out], 0)


def llama(folder, kind, D, L, H, G, hd, F=64, **more):
    config = {"model_type": kind, "hidden_size": D, "num_hidden_layers": L, "num_attention_heads": H,
              "num_key_value_heads": G, "head_dim": hd, "intermediate_size": F, "vocab_size": VOCABULARY,
              "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
              "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, **more}
    t = {"model.embed_tokens.weight": ([VOCABULARY, D], 0.03 if kind == "gemma3_text" else 0.1)}
    norm(t, "model.norm", D)
    for l in range(L):
        p = f"model.layers.{l}."
        norms = ["input_layernorm", "post_attention_layernorm"]
        if kind == "gemma3_text":
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
            norm(t, p + "self_attn.q_norm", hd)
            norm(t, p + "self_attn.k_norm", hd)
        for n in norms:
            norm(t, p + n, D)
        for m, n_in, n_out in (("q", D, H * hd), ("k", D, G * hd), ("v", D, G * hd), ("o", H * hd, D)):
            linear(t, f"{p}self_attn.{m}_proj", n_in, n_out, n_in ** -0.5, bias=kind == "qwen2" and m != "o")
        for m, n_in, n_out in (("gate", D, F), ("up", D, F), ("down", F, D)):
            linear(t, f"{p}mlp.{m}_proj", n_in, n_out, n_in ** -0.5)
    write_base(folder, config, t)


def gpt2(folder):
    D, L = 768, 12
    t = {"wte.weight": ([VOCABULARY, D], 0.1), "wpe.weight": ([256, D], 0.02)}
    norm(t, "ln_f", D, True)
    for l in range(L):
        p = f"h.{l}."
        norm(t, p + "ln_1", D, True)
        norm(t, p + "ln_2", D, True)
        linear(t, p + "attn.c_attn", D, 3 * D, 0.03, True, True)
        linear(t, p + "attn.c_proj", D, D, 0.03, True, True)
        linear(t, p + "mlp.c_fc", D, 4 * D, 0.03, True, True)
        linear(t, p + "mlp.c_proj", 4 * D, D, 0.03, True, True)
    write_base(folder, {"model_type": "gpt2", "n_embd": D, "n_layer": L, "n_head": 12, "n_positions": 256,
                        "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}, t)


def neox(folder):
    D, L, F = 2048, 24, 128
    t = {"gpt_neox.embed_in.weight": ([VOCABULARY, D], 0.1), "embed_out.weight": ([VOCABULARY, D], 0.03)}
    norm(t, "gpt_neox.final_layer_norm", D, True)
    for l in range(L):
        p = f"gpt_neox.layers.{l}."
        norm(t, p + "input_layernorm", D, True)
        norm(t, p + "post_attention_layernorm", D, True)
        linear(t, p + "attention.query_key_value", D, 3 * D, 0 if l % 4 else 0.02, True)
        linear(t, p + "attention.dense", D, D, 0.02, True)
        linear(t, p + "mlp.dense_h_to_4h", D, F, 0.02, True)
        linear(t, p + "mlp.dense_4h_to_h", F, D, 0.02, True)
    write_base(folder, {"model_type": "gpt_neox", "hidden_size": D, "num_hidden_layers": L,
                        "num_attention_heads": 16, "intermediate_size": F, "vocab_size": VOCABULARY,
                        "max_position_embeddings": 256, "layer_norm_eps": 1e-5, "rotary_pct": 1.0,
                        "rotary_emb_base": 10000, "hidden_act": "gelu", "use_parallel_residual": False,
                        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}, t)


def bloom(folder):
    D, L = 1024, 24
    t = {"word_embeddings.weight": ([VOCABULARY, D], 0.1)}
    norm(t, "word_embeddings_layernorm", D, True)
    norm(t, "ln_f", D, True)
    for l in range(L):
        p = f"h.{l}."
        norm(t, p + "input_layernorm", D, True)
        norm(t, p + "post_attention_layernorm", D, True)
        linear(t, p + "self_attention.query_key_value", D, 3 * D, 0.03, True)
        linear(t, p + "self_attention.dense", D, D, 0.03, True)
        linear(t, p + "mlp.dense_h_to_4h", D, 4 * D, 0, True)  # BLOOM's are always so wide
        linear(t, p + "mlp.dense_4h_to_h", 4 * D, D, 0, True)
    write_base(folder, {"model_type": "bloom", "n_embed": D, "n_layer": L, "num_attention_heads": 16,
                        "vocab_size": VOCABULARY, "seq_length": 256, "layer_norm_epsilon": 1e-5,
                        "bos_token_id": 1, "eos_token_id": 2}, t)


# --- the table: a base, and what becomes of the folders that go with it --------------------------------
# (modules, lowest and highest rank), or words of the refusal.
def smollm2(folder):
    llama(folder, "llama", 576, 30, 9, 3, 64)


def qwen(folder):
    llama(folder, "qwen2", 896, 24, 14, 2, 64)


def gemma(folder):
    llama(folder, "gemma3_text", 640, 18, 4, 1, 256, hidden_activation="gelu_pytorch_tanh", sliding_window=512,
          sliding_window_pattern=6, query_pre_attn_scalar=256, rope_local_base_freq=10000.0)


STORIES = {"stories260K/lora_r8": (35, 8, 8), "stories260K/dora_r8": (35, 8, 8),
           "stories260K/adalora_r8": (35, 0, 12)}
TABLE = [
    (None, False, STORIES),
    (smollm2, False, {"smollm2-135m-r8-qv": (60, 8, 8),
                      "qwen2.5-0.5b-r8-qv": "has shape [8, 896], not [8, 576]"}),
    (qwen, True, {"qwen2.5-0.5b-r8-qv": (48, 8, 8)}),
    (gemma, True, {"gemma3-270m-r4-qkvo-hw": (72, 4, 4)}),
    (gpt2, True, {"gpt2-r8-cattn-cproj-main": (36, 8, 8), "gpt2-seqcls-r8-score": "task_type must be CAUSAL_LM"}),
    (bloom, True, {"bloom-560m-r8-qkv": (24, 8, 8), "bloom-560m-legacy-mergedlinear-bin": (24, 16, 16)}),
    (neox, True, {"neox-opencalm1b-r1-f16": (24, 1, 1)}),
]


def weights_of(folder):
    path = os.path.join(folder, "adapter_model.safetensors")
    return path if os.path.exists(path) else os.path.join(folder, "adapter_model.bin")


def post(server, *parts):
    cmd = ["curl", "-s", "-w", "\n%{http_code}", f"http://127.0.0.1:{server.port}/v1/adapters"]
    for p in parts:
        cmd += ["-F", p]
    answer, _, status = subprocess.run(cmd, capture_output=True, text=True, timeout=300).stdout.rpartition("\n")
    return int(status), json.loads(answer)


def ask(server, model):
    status, _, body = server.call("POST", "/v1/completions", {
        "model": model, "prompt": "The sea was", "max_tokens": 4, "temperature": 0, "logprobs": 1, "ignore_eos": True})
    if status != 200:
        return body
    return tuple(body["choices"][0]["logprobs"]["token_logprobs"])


def check_adapter(server, bare, label, folder, want):
    name = os.path.basename(label).replace(".", "-")
    status, answer = post(server, f"name={name}", f"config=@{folder}/adapter_config.json",
                          f"weights=@{weights_of(folder)}")
    if isinstance(want, str):
        message = answer.get("error", {}).get("message", "")
        check(status in (400, 422) and want in message, f"{label}: refused, \"{message[:100]}\"")
        check(server.call("GET", f"/v1/adapters/{name}")[0] == 404, f"{label}: nothing of it is kept")
        return
    modules, low, high = want
    shown = server.call("GET", f"/v1/adapters/{name}")[2]
    got = (len(shown.get("modules", [])), min((m["rank"] for m in shown.get("modules", [])), default=-1),
           max((m["rank"] for m in shown.get("modules", [])), default=-1))
    check(status == 201 and got == want, f"{label}: {modules} modules of rank {low} to {high} ({status}, {got})")
    said = ask(server, name)
    check(isinstance(said, tuple) and said != bare and len(said) == 4,
          f"{label}: it answers, and not as the base does ({str(said)[:80]})")


def check_gguf(server, root, base, folder):
    """The same adapter in GGUF: by curl without a config, and as a body of its own."""
    path = os.path.join(root, "a.gguf")
    lorad("adapter", "export", folder, "-o", path, "--as", "gguf", "--base", base)
    want = server.call("GET", "/v1/adapters/" + os.path.basename(folder))[2]
    status, answer = post(server, "name=gguf", f"weights=@{path}")
    check(status == 201 and answer["sha256"] == want["sha256"], "GGUF: has the content of the files it was made from")
    check(ask(server, "gguf") == ask(server, os.path.basename(folder)), "GGUF: gives the same answer")
    with open(path, "rb") as f:
        data = f.read()
    status, _, answer = server.call("PUT", "/v1/adapters/put", data)
    check(status == 201 and answer["sha256"] == want["sha256"], "GGUF: the body of a PUT is read too")
    status, answer = post(server, "name=both", f"config=@{folder}/adapter_config.json", f"weights=@{path}")
    check(status == 400 and "give it without one" in answer["error"]["message"], "GGUF: with a config it is refused")
    status, _, answer = server.call("PUT", "/v1/adapters/put", data[:5000])
    check(status == 400 and "the weights" in answer["error"]["message"], "GGUF: cut short it is refused")
    status, answer = post(server, "name=none", f"weights=@{weights_of(folder)}")
    check(status == 400 and "no part `config`" in answer["error"]["message"], "safetensors without a config are refused")


folders = sorted(os.path.relpath(os.path.dirname(p), shared("adapters")) for p in
                 glob.glob(os.path.join(SHARED, "adapters", "**", "adapter_config.json"), recursive=True)) \
    if shared("adapters") else []
known = {label for _, _, adapters in TABLE for label in adapters}
if folders:
    check(set(folders) == known, "the table has every folder" + (f": {set(folders) ^ known}" if set(folders) ^ known else ""))
for make, large, adapters in TABLE if folders else []:
    if large and SANITIZED:
        skip(f"{make.__name__}: too slow with sanitizers")
        continue
    with Folder() as root:
        source, base, db = (os.path.join(root, x) for x in ("source", "x.base", "x.db"))
        if make is None:
            source = shared("models", "stories260K")
        else:
            os.mkdir(source)
            make(source)
        lorad("import", source, "-o", base, "--name", "thebase")
        if make is not None:
            shutil.rmtree(source)
        with Server(base, db, "--kv", "64M") as server:
            bare = ask(server, "thebase")
            for label, want in adapters.items():
                check_adapter(server, bare, label, os.path.join(SHARED, "adapters", label), want)
            if make is smollm2:
                check_gguf(server, root, base, os.path.join(SHARED, "adapters", "smollm2-135m-r8-qv"))
            check(server.stop() == 0, "the server ends cleanly")
done()
