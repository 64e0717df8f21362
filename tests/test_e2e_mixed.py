"""test_e2e_mixed.py - 20 concurrent requests, 16 of them with different adapters, over HTTP: text and
logprobs are byte for byte those of the same requests alone, for 1 and 2 threads and for every kernel,
while one client hangs up and memory for the cache is so short that sequences are preempted."""
import concurrent.futures
import http.client
import json
import os

from harness import *

N_ADAPTERS = 16
# A sanitizer looks for races and bad memory, once; the plain run compares everything.
KERNELS = ["scalar", "avx2", "avx512"] if not SANITIZED else ["auto"]
THREADS = (1, 2) if not SANITIZED else (2,)


def make_adapters(root, shape):
    folders = []
    for i in range(N_ADAPTERS):
        method = ["lora", "rslora", "adalora", "lora"][i % 4]
        dtype = ["F32", "BF16", "F16"][i % 3]
        folder = os.path.join(root, f"a{i}")
        random_adapter(folder, shape, 100 + i, method, rank=[1, 2, 3, 4, 7, 8, 12, 16][i % 8], dtype=dtype,
                       only=None if i % 3 else {"q_proj", "v_proj"}, strength=0.5)
        folders.append(folder)
    return folders


def requests(base_name):
    prompts = ["Once upon a time", "One day, a clever fox", "The little boy said", "There was a big tree and"]
    for i in range(20):
        yield {"model": f"a{i}" if i < N_ADAPTERS else base_name,
               "prompt": prompts[i % 4] + " so" * (i % 5), "max_tokens": 64, "logprobs": 3, "seed": 7 + i,
               "temperature": [0, 0.8, 1.0][i % 3], "top_k": [0, 20][i % 2], "ignore_eos": True}


def ask(server, request):
    status, _, body = server.call("POST", "/v1/completions", request)
    if status != 200:
        return f"status {status}: {body}"
    c = body["choices"][0]
    return json.dumps([c["text"], c["finish_reason"], c["logprobs"], body["usage"]["completion_tokens"]])


def hang_up(server, request):
    """Start a stream and go away after the first bytes."""
    c = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    c.request("POST", "/v1/completions", json.dumps({**request, "max_tokens": 200, "stream": True}),
              {"Content-Type": "application/json"})
    c.getresponse().read(20)
    c.close()


def metric(server, name):
    text = server.call("GET", "/metrics")[2].decode()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def run(root, label, source, kv):
    base = os.path.join(root, label + ".base")
    lorad("import", source, "-o", base, "--name", "thebase")
    folders = make_adapters(os.path.join(root, label), shape_of(source))
    todo = list(requests("thebase"))
    db = os.path.join(root, label + ".db")
    preempted = 0
    for precision in (["fast", "exact"] if not SANITIZED else ["fast"]):
        alone = None
        for kernel in KERNELS:
            for threads in THREADS:
                what = f"{label}, {precision}, {kernel}, {threads} thread(s)"
                try:
                    server = Server(base, db, "--threads", threads, "--kernel", kernel, "--precision", precision,
                                    "--kv", kv, "--max-seqs", 32)
                except RuntimeError as e:
                    if kernel != "scalar" and "CPU" in str(e):
                        skip(what + ": " + str(e).strip().splitlines()[-1])
                        continue
                    raise
                with server:
                    for i, folder in enumerate(folders):
                        status, answer = server.upload(f"a{i}", folder)
                        if status not in (200, 201):
                            check(False, f"{what}: upload of a{i}: {status} {answer}")
                    if alone is None:
                        alone = [ask(server, r) for r in todo]
                        check(not any(a.startswith("status") for a in alone), f"{what}: every request is answered alone"
                              + "".join(" " + a for a in alone if a.startswith("status")))
                        check(len(set(alone)) == len(alone), f"{what}: the answers differ from each other")
                    with concurrent.futures.ThreadPoolExecutor(21) as pool:
                        gone = pool.submit(hang_up, server, todo[3])
                        together = list(pool.map(lambda r: ask(server, r), todo))
                        gone.result()
                    same = sum(a == b for a, b in zip(alone, together))
                    check(same == len(todo), f"{what}: {same} of {len(todo)} answers are byte-identical to those alone")
                    preempted += metric(server, "lorad_preemptions_total")
                    check(server.stop() == 0, f"{what}: the server ends cleanly")
    check(preempted > 0, f"{label}: sequences were preempted on the way ({preempted:.0f} times)")


with Folder() as root:
    synthetic = os.path.join(root, "synthetic")
    random_base(synthetic)
    run(root, "synthetic", synthetic, "440K")
    stories = None if SANITIZED else shared("models", "stories260K")
    if stories:
        run(root, "stories260K", stories, "360K")
done()
