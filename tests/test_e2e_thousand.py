"""test_e2e_thousand.py - a thousand adapters uploaded with curl, a cache for ten: memory stays inside
the budget, evictions and reloads are counted, and every adapter answers as it does alone."""
import os

from harness import *

N = 100 if SANITIZED else 1000
MEMORY = 80 << 20  # base, workspace, KV, adapters: everything


def metric(server, name):
    text = server.call("GET", "/metrics")[2].decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def ask(server, model):
    status, _, body = server.call("POST", "/v1/completions", {
        "model": model, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "logprobs": 1,
        "ignore_eos": True})
    return (body["choices"][0]["text"], tuple(body["choices"][0]["logprobs"]["token_logprobs"])) if status == 200 else body


with Folder() as root:
    source, base, db = (os.path.join(root, x) for x in ("source", "x.base", "x.db"))
    shape = random_base(source)
    lorad("import", source, "-o", base, "--name", "thebase")
    one = os.path.join(root, "one")
    random_adapter(one, shape, 0, rank=16)
    size = os.path.getsize(os.path.join(one, "adapter_model.safetensors"))
    with Server(base, db, "--adapter-cache", 10 * size + 65536, "--kv", "8M",
                "--memory", MEMORY) as server:
        ask(server, "thebase")
        bad = []
        for i in range(N):
            random_adapter(one, shape, i, ["lora", "rslora", "adalora"][i % 3], rank=16)
            status, answer = server.upload(f"a{i}", one)
            if status != 201:
                bad.append((i, status, answer))
        check(not bad, f"{N} adapters of {size} bytes are uploaded with curl" + (f": {bad[:3]}" if bad else ""))
        before = server.rss()
        first = [ask(server, f"a{i}") for i in range(N)]
        check(all(isinstance(a, tuple) for a in first), f"all {N} answer")
        check(len(set(first)) == N, "no two answer the same")
        again = [ask(server, f"a{i}") for i in range(0, N, 3)]
        check(again == first[::3], "after eviction and reload they answer the same")
        wrong = []
        for i in range(0, N, max(1, N // 20)):
            random_adapter(one, shape, i, ["lora", "rslora", "adalora"][i % 3], rank=16)
            text = lorad("generate", "--base", base, "--adapter", one, "-p", "Once upon a time", "-n", 8,
                         "--temperature", 0, "--ignore-eos", "--precision", "fast")
            if not text.rstrip("\n").endswith(first[i][0].rstrip("\n")):
                wrong.append((i, text, first[i][0]))
        check(not wrong, "the command line, with the adapter's folder, writes the same text" + (f": {wrong[:2]}" if wrong else ""))
        evictions, loads = metric(server, "lorad_adapter_evictions_total"), metric(server, "lorad_adapter_loads_total")
        check(evictions >= N - 20, f"evictions are counted ({evictions:.0f})")
        check(loads >= N + N // 3 - 20, f"loads and reloads are counted ({loads:.0f})")
        resident = metric(server, "lorad_adapter_cache_bytes")
        check(0 < resident <= 10 * size + 65536, f"the cache holds {resident:.0f} bytes, its budget is {10 * size + 65536}")
        grown = server.rss() - before
        check(SANITIZED or grown < 10 * size + (64 << 20), f"memory grew by {grown >> 20} MiB while {N * size >> 20} MiB of adapters passed through")
        check(SANITIZED or server.rss() < MEMORY, f"{server.rss() >> 20} MiB are resident, the whole budget is {MEMORY >> 20} MiB")
        check(server.stop() == 0, "the server ends cleanly")
done()
