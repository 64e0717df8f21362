"""harness.py - what the end-to-end tests share: files in the safetensors format, random adapters and
bases, a running server, HTTP.  Python's standard library only.

A test program prints one line per check and ends with `N passed, N failed[, N skipped]`."""
import array
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LORAD = os.path.abspath(os.environ.get("LORAD", os.path.join(ROOT, "build", "lorad")))
SHARED = os.path.abspath(os.environ.get("LORAD_SHARED", os.path.join(ROOT, "..", "shared")))
DEMO = os.path.join(ROOT, "examples", "demo-base")
SANITIZED = "/asan/" in LORAD or "/tsan/" in LORAD

passed = failed = skipped = 0


def check(ok, what):
    global passed, failed
    if ok:
        passed += 1
    else:
        failed += 1
    print(("ok      " if ok else "FAILED  ") + what, flush=True)
    return ok


def skip(what):
    global skipped
    skipped += 1
    print("SKIPPED " + what, flush=True)


def done():
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    sys.exit(1 if failed else 0)


def shared(*parts):
    """A path in the reference folder, or None (and a loud line) where it is missing."""
    path = os.path.join(SHARED, *parts)
    if os.path.exists(path):
        return path
    skip(f"{path} is not there")
    return None


class Folder:
    """A temporary folder that goes away."""

    def __enter__(self):
        self.path = tempfile.mkdtemp(prefix="lorad-test-")
        return self.path

    def __exit__(self, *_):
        shutil.rmtree(self.path, ignore_errors=True)


# --- safetensors ------------------------------------------------------------------------------
def write_safetensors(path, tensors):
    """tensors: {name: (dtype, shape, bytes)}"""
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, _, data in tensors.values():
            f.write(data)


def read_safetensors(path):
    with open(path, "rb") as f:
        (n,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(n))
        data = f.read()
    return {k: (v["dtype"], v["shape"], data[v["data_offsets"][0]:v["data_offsets"][1]])
            for k, v in header.items() if k != "__metadata__"}


_normal = [0.0] * 256
_rng = random.Random(0)
_normal = [_rng.gauss(0, 1) for _ in range(256)]


def random_floats(rng, n, scale, dtype="F32"):
    """n roughly normal numbers times `scale`, as bytes of F32, BF16 or F16."""
    table = [x * scale for x in _normal]
    if dtype == "F32":
        pack = [struct.pack("<f", x) for x in table]
    elif dtype == "BF16":
        pack = [struct.pack("<f", x)[2:] for x in table]
    else:
        pack = [struct.pack("<e", x) for x in table]
    return b"".join([pack[b] for b in rng.randbytes(n)])


# --- models and adapters ------------------------------------------------------------------------
class Shape:
    """The numbers of a config.json that adapters depend on."""

    def __init__(self, config):
        c = config
        self.L, self.D, self.H = c["num_hidden_layers"], c["hidden_size"], c["num_attention_heads"]
        self.G = c.get("num_key_value_heads", self.H)
        self.hd = c.get("head_dim") or self.D // self.H
        self.F, self.V = c["intermediate_size"], c["vocab_size"]

    def modules(self):
        q, k = self.H * self.hd, self.G * self.hd
        return {"self_attn.q_proj": (self.D, q), "self_attn.k_proj": (self.D, k),
                "self_attn.v_proj": (self.D, k), "self_attn.o_proj": (q, self.D),
                "mlp.gate_proj": (self.D, self.F), "mlp.up_proj": (self.D, self.F),
                "mlp.down_proj": (self.F, self.D)}


def shape_of(folder):
    with open(os.path.join(folder, "config.json")) as f:
        return Shape(json.load(f))


def random_base(folder, seed=1, D=128, H=4, G=2, F=256, L=3, context=512):
    """A random Llama in Hugging Face's layout with the demo base's tokenizer (2048 ids)."""
    os.makedirs(folder, exist_ok=True)
    rng, V, hd = random.Random(seed), 2048, D // H
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L,
              "num_attention_heads": H, "num_key_value_heads": G, "vocab_size": V,
              "max_position_embeddings": context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
              "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f)
    shutil.copy(os.path.join(DEMO, "tokenizer.json"), folder)
    shutil.copy(os.path.join(DEMO, "tokenizer_config.json"), folder)
    one = struct.pack("<f", 1.0)
    t = {"model.embed_tokens.weight": ("F32", [V, D], random_floats(rng, V * D, 1.0)),
         "lm_head.weight": ("F32", [V, D], random_floats(rng, V * D, D ** -0.5)),
         "model.norm.weight": ("F32", [D], one * D)}
    for layer in range(L):
        p = f"model.layers.{layer}."
        t[p + "input_layernorm.weight"] = t[p + "post_attention_layernorm.weight"] = ("F32", [D], one * D)
        for m, (n_in, n_out) in Shape(config).modules().items():
            t[p + m + ".weight"] = ("F32", [n_out, n_in], random_floats(rng, n_in * n_out, n_in ** -0.5))
    write_safetensors(os.path.join(folder, "model.safetensors"), t)
    return Shape(config)


def random_adapter(folder, shape, seed, method="lora", rank=8, dtype="F32", only=None, strength=1.0):
    """A PEFT folder of random numbers: method lora, rslora or adalora (ranks 0..rank per module)."""
    os.makedirs(folder, exist_ok=True)
    rng, tensors, pattern = random.Random(seed), {}, {}
    modules = {m: io for m, io in shape.modules().items() if only is None or m.split(".")[1] in only}
    for layer in range(shape.L):
        for m, (n_in, n_out) in modules.items():
            path = f"model.layers.{layer}.{m}"
            k, suffix = rank, ".weight"
            if method == "adalora":
                keep = [rng.random() < 0.6 for _ in range(rank)]
                pattern[path + ".lora_E"], k, suffix = keep, sum(keep), ""
            name = "base_model.model." + path
            tensors[name + ".lora_A" + suffix] = (dtype, [k, n_in], random_floats(rng, k * n_in, n_in ** -0.5, dtype))
            tensors[name + ".lora_B" + suffix] = (dtype, [n_out, k], random_floats(rng, k * n_out, strength * 0.3, dtype))
            if method == "adalora":
                tensors[name + ".lora_E"] = (dtype, [k, 1], random_floats(rng, k, 1.0, dtype))
    config = {"peft_type": "ADALORA" if method == "adalora" else "LORA", "task_type": "CAUSAL_LM",
              "base_model_name_or_path": "random", "bias": "none", "lora_alpha": 2 * rank, "r": rank,
              "target_modules": sorted({m.split(".")[1] for m in modules}), "inference_mode": True}
    if method == "rslora":
        config["use_rslora"] = True
        config["lora_alpha"] = rank
    if method == "adalora":
        config.update(init_r=rank, target_r=max(1, rank // 2), total_step=10, rank_pattern=pattern)
    with open(os.path.join(folder, "adapter_config.json"), "w") as f:
        json.dump(config, f)
    write_safetensors(os.path.join(folder, "adapter_model.safetensors"), tensors)


def lorad(*args, ok=True, text=True):
    """Run a subcommand; returns stdout.  Fails the program if it should have worked."""
    r = subprocess.run([LORAD, *map(str, args)], capture_output=True, text=text, timeout=600)
    if ok and r.returncode != 0:
        raise RuntimeError(f"lorad {' '.join(map(str, args))}: exit {r.returncode}: {r.stderr}")
    return r.stdout if ok else r


# --- the server -----------------------------------------------------------------------------------
class Server:
    """`lorad serve` on a free port of the loopback."""

    def __init__(self, base, db, *args):
        self.log = tempfile.TemporaryFile("w+")
        self.proc = subprocess.Popen([LORAD, "serve", "--base", base, "--db", db, "--port", "0", *map(str, args)],
                                     stdout=self.log, stderr=subprocess.STDOUT)
        self.port = self._wait_for_port()

    def output(self):
        self.log.seek(0)
        return self.log.read()

    def _wait_for_port(self):
        for _ in range(1200):
            m = re.search(r"http://127\.0\.0\.1:(\d+)", self.output())
            if m:
                return int(m.group(1))
            if self.proc.poll() is not None:
                raise RuntimeError("the server ended: " + self.output())
            time.sleep(0.05)
        raise RuntimeError("the server did not start: " + self.output())

    def call(self, method, path, body=None, headers=None, timeout=300):
        """Returns (status, headers, parsed JSON or bytes)."""
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        h = dict(headers or {})
        if isinstance(body, (dict, list)):
            body = json.dumps(body)
            h.setdefault("Content-Type", "application/json")
        c.request(method, path, body, h)
        r = c.getresponse()
        data = r.read()
        c.close()
        if (r.getheader("Content-Type") or "").startswith("application/json"):
            data = json.loads(data)
        return r.status, r.headers, data

    def upload(self, name, folder, key=None):
        """Upload a PEFT folder with curl; returns (status, answer)."""
        cmd = ["curl", "-s", "-w", "\n%{http_code}", f"http://127.0.0.1:{self.port}/v1/adapters",
               "-F", f"name={name}", "-F", f"config=@{folder}/adapter_config.json",
               "-F", f"weights=@{folder}/adapter_model.safetensors"]
        if key:
            cmd += ["-H", f"Authorization: Bearer {key}"]
        out = subprocess.run(cmd, capture_output=True, text=True, timeout=300).stdout
        answer, _, status = out.rpartition("\n")
        return int(status), json.loads(answer) if answer.strip() else None

    def rss(self):
        with open(f"/proc/{self.proc.pid}/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    def kill(self):
        self.proc.send_signal(signal.SIGKILL)
        self.proc.wait()

    def stop(self):
        """SIGTERM; the exit code."""
        if self.proc.poll() is None:
            self.proc.send_signal(signal.SIGTERM)
        try:
            return self.proc.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.kill()
            return -9

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
        self.log.close()


def free_port():
    s = socket.socket()
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
    s.close()
    return port
