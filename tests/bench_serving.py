"""Serving while a job trains: tokens per second and time between tokens of streaming clients, each on an
adapter of its own, without and with a running fine-tuning job, in alternation.

    bench_serving.py [CLIENTS] [SECONDS] [ROUNDS]        default 8 10 3

The base is a random Llama of 135 million parameters (12 layers of 1024), the adapters have rank 16 on every
linear layer; the job is a LoRA of rank 16 on 512 tokens at a time.  One process is both: clients read in
threads of this one.
"""
import http.client
import json
import os
import statistics
import sys
import threading
import time

import harness as h

CLIENTS, SECONDS, ROUNDS = (int(a) for a in (sys.argv[1:] + ["8", "10", "3"][len(sys.argv) - 1:]))


def client(port, model, until, out):
    """Streams completions until the time is up; appends the arrival times of tokens to out."""
    seed = 0
    while time.monotonic() < until:
        seed += 1
        c = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        c.request("POST", "/v1/completions", json.dumps(
            {"model": model, "prompt": "The sea was calm and the captain", "max_tokens": 64, "stream": True,
             "temperature": 1, "seed": seed, "ignore_eos": True}), {"Content-Type": "application/json"})
        times = []
        for line in c.getresponse():
            if line.startswith(b"data: {"):
                times.append(time.monotonic())
        c.close()
        out.append(times)


def phase(port, names):
    began, runs = time.monotonic(), [[] for _ in names]
    threads = [threading.Thread(target=client, args=(port, n, began + SECONDS, r)) for n, r in zip(names, runs)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    all_runs = [times for r in runs for times in r]
    gaps = sorted(b - a for times in all_runs for a, b in zip(times, times[1:]))
    tokens = sum(1 for times in all_runs for t in times if t < began + SECONDS)
    return tokens / SECONDS, gaps[len(gaps) // 2] * 1e3, gaps[len(gaps) * 95 // 100] * 1e3


def start_job(s, path):
    boundary = "----bench"
    with open(path) as f:
        text = f.read()
    body = (f"--{boundary}\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n--{boundary}\r\n"
            f"Content-Disposition: form-data; name=\"file\"; filename=\"t.jsonl\"\r\n\r\n{text}\r\n--{boundary}--\r\n")
    status, _, file = s.call("POST", "/v1/files", body,
                             {"Content-Type": f"multipart/form-data; boundary={boundary}"})
    assert status == 200, file
    status, _, job = s.call("POST", "/v1/fine_tuning/jobs", {
        "model": "random", "training_file": file["id"],
        "method": {"type": "lora", "lora": {"max_steps": 100000, "checkpoint_every": 100000, "batch_size": 8}}})
    assert status == 200, job
    return job["id"]


def wait_for(s, job, running):
    for _ in range(600):
        _, _, j = s.call("GET", f"/v1/fine_tuning/jobs/{job}")
        if j["lorad"]["status"] == ("running" if running else "paused"):
            return
        time.sleep(0.1)
    raise RuntimeError(f"the job does not get {'going' if running else 'to a stop'}: {j}")


def tokens_trained(s, job):
    _, _, m = s.call("GET", f"/v1/fine_tuning/jobs/{job}/metrics?limit=1000")
    return sum(p.get("tokens", 0) for p in m["data"])


with h.Folder() as tmp:
    shape = h.random_base(os.path.join(tmp, "hf"), D=1024, H=16, G=4, F=2816, L=12)
    base = os.path.join(tmp, "random.base")
    h.lorad("import", os.path.join(tmp, "hf"), "-o", base, "--name", "random")
    with open(os.path.join(tmp, "t.jsonl"), "w") as f:
        for i in range(64):
            f.write(json.dumps({"text": " ".join(f"word{(i * 7 + k) % 97}" for k in range(20))}) + "\n")
    with h.Server(base, os.path.join(tmp, "b.db")) as s:
        names = []
        for i in range(CLIENTS):
            folder = os.path.join(tmp, f"a{i}")
            h.random_adapter(folder, shape, i, rank=16, dtype="BF16", strength=0.01)
            assert s.upload(f"a{i}", folder)[0] in (200, 201)
            names.append(f"a{i}")
        phase(s.port, names)  # warms up
        job = start_job(s, os.path.join(tmp, "t.jsonl"))
        alone, beside, trained = [], [], 0
        for _ in range(ROUNDS):
            wait_for(s, job, True)
            before = tokens_trained(s, job)
            beside.append(phase(s.port, names))
            trained += tokens_trained(s, job) - before
            s.call("POST", f"/v1/fine_tuning/jobs/{job}/pause")
            wait_for(s, job, False)
            alone.append(phase(s.port, names))
            s.call("POST", f"/v1/fine_tuning/jobs/{job}/resume")
        s.call("POST", f"/v1/fine_tuning/jobs/{job}/cancel")
        a, b = ([statistics.median(x[k] for x in xs) for k in range(3)] for xs in (alone, beside))
        print(f"{CLIENTS} streaming clients, each on its own adapter, 135M base:")
        print(f"  alone        {a[0]:8.1f} tokens/s   between tokens {a[1]:6.1f} ms (p50) {a[2]:6.1f} ms (p95)")
        print(f"  with a job   {b[0]:8.1f} tokens/s   between tokens {b[1]:6.1f} ms (p50) {b[2]:6.1f} ms (p95);"
              f" the job: {trained / (ROUNDS * SECONDS):.1f} tokens/s")
        print(f"  serving keeps {100 * b[0] / a[0]:.0f} % of its tokens/s")
