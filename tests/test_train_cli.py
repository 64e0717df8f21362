"""test_train_cli.py - `lorad train` and `lorad eval` as somebody types them, on the demo base: every
method, going on after Ctrl-C and kill -9 with the same bytes, what comes out, and what is refused."""
import hashlib
import json
import os
import pty
import re
import signal
import struct
import subprocess
import time

from harness import *

METHODS = ["lora", "rslora", "dora", "adalora"]
COLOURS = ["red", "blue", "green", "black", "white"]
THINGS = ["door", "boat", "hat", "bird", "stone", "book", "cup"]


def write_data(path, n, start=0):
    with open(path, "w") as f:
        for i in range(start, start + n):
            c, t = COLOURS[i % len(COLOURS)], THINGS[i % len(THINGS)]
            f.write(json.dumps({"prompt": f"The {t} is {c}. What is the {t}?", "completion": f" It is {c}."}) + "\n")


def run(*args, env=None):
    return subprocess.run([LORAD, *map(str, args)], capture_output=True, text=True, timeout=600,
                          env={**os.environ, **(env or {})})


def refused(code, text, *args):
    r = run(*args)
    ok = r.returncode == code and text in r.stderr
    check(ok, f"exit {code}, \"{text}\"" + ("" if ok else f": exit {r.returncode}: {r.stderr}"))


def sha(folder):
    """Of the adapter's two files."""
    return [hashlib.sha256(open(os.path.join(folder, n), "rb").read()).hexdigest()
            for n in ("adapter_model.safetensors", "adapter_config.json")]


def metrics(path):
    return [json.loads(line) for line in open(path)]


def lines_in(path):
    try:
        return open(path).read().count("\n")
    except OSError:
        return 0


def cut_off(args, out, lines, how):
    """Start a run, wait for so many lines of metrics, and stop it; its exit code."""
    p = subprocess.Popen([LORAD, *map(str, args)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while p.poll() is None and lines_in(out + ".partial/metrics.jsonl") < lines:
        time.sleep(0.005)
    if p.poll() is None:
        p.send_signal(how)
    return p.wait()


with Folder() as root:
    base, data, valid = (os.path.join(root, x) for x in ("demo.base", "d.jsonl", "v.jsonl"))
    at = lambda name: os.path.join(root, name)
    lorad("import", DEMO, "-o", base)
    write_data(data, 60)
    write_data(valid, 12, 60)
    common = ["--base", base, "--data", data, "--lr", "3e-3", "--rank", 4, "--batch", 4]
    # AdaLoRA begins with three small factors, so that it learns little in so few steps

    # every method: what comes out is a PEFT folder that loads, and helps
    before = json.loads(lorad("eval", "--base", base, "--data", valid))
    for m in METHODS:
        out = at(m)
        lorad("train", *common, "--method", m, "--max-steps", 16, "--valid", valid, "--out", out)
        files = sorted(os.listdir(out))
        after = json.loads(lorad("eval", "--base", base, "--data", valid, "--adapter", out))
        lorad("logits", "--base", base, "--adapter", out, "--tokens", "1,5,9", "--out", at("l"))
        check(files == ["adapter_config.json", "adapter_model.safetensors", "metrics.jsonl"] and
              after["loss"] < before["loss"] - (0.03 if m == "adalora" else 0.3), f"{m}: loss {before['loss']:.3f} -> {after['loss']:.3f}")
        last = metrics(out + "/metrics.jsonl")[-1]
        check(abs(last["valid_loss"] - after["loss"]) < 2e-2,
              f"{m}: validation in the run ({last['valid_loss']:.4f}) is what lorad eval says ({after['loss']:.4f})")
    ranks = [line.get("ranks") for line in metrics(at("adalora/metrics.jsonl"))]
    check(ranks[0] and len(ranks[0]) == 35 and set(ranks[0].values()) == {6}, "AdaLoRA: ranks of all modules in the first line")
    check(any(ranks[1:]), "AdaLoRA: changes of ranks in later lines")
    config = json.load(open(at("adalora/adapter_config.json")))
    kept = sum(sum(v) for v in config["rank_pattern"].values())
    check(kept == metrics(at("adalora/metrics.jsonl"))[-1]["kept"] == 35 * 4, f"AdaLoRA: {kept} triplets kept, as the budget says")

    # bits do not depend on threads, nor on being stopped
    for m in ("lora", "adalora"):
        args = ["train", *common, "--method", m, "--max-steps", 40, "--dropout", 0.1, "--checkpoint-every", 1]
        lorad(*args, "--out", at(m + "-1"), "-t", 1)
        code = cut_off([*args, "--out", at(m + "-2")], at(m + "-2"), 5, signal.SIGINT)
        check(code == 1 and not os.path.exists(at(m + "-2")) and os.path.exists(at(m + "-2.state")),
              f"{m}: Ctrl-C keeps the state, makes no folder, exit {code}")
        if m == "lora":
            refused(1, "is the state of a run that was stopped", *args, "--out", at(m + "-2"))
            refused(1, "it belongs to other options", *args, "--out", at(m + "-2"), "--resume", "--seed", 7)
        for n in (9, 14, 19):
            code = cut_off([*args, "--out", at(m + "-2"), "--resume", "-t", 2], at(m + "-2"), n, signal.SIGKILL)
            check(code == -9, f"{m}: killed")
        r = run(*args, "--out", at(m + "-2"), "--resume")
        check(r.returncode == 0 and sha(at(m + "-1")) == sha(at(m + "-2")),
              f"{m}: stopped once, killed three times, other threads: the same bytes" + ("" if r.returncode == 0 else r.stderr))
        one, two = (metrics(at(m + x) + "/metrics.jsonl") for x in ("-1", "-2"))
        check([(x["step"], x["loss"]) for x in one] == [(x["step"], x["loss"]) for x in two], f"{m}: and the same metrics, each step once")
        check(not os.path.exists(at(m + "-2.state")) and not os.path.exists(at(m + "-2.partial")), f"{m}: nothing is left behind")

    for keep in ("0", "1M"):
        lorad("train", *common, "--max-steps", 6, "--keep", keep, "--out", at("keep" + keep))
    check(sha(at("keep0")) == sha(at("keep1M")), "memory for speed changes no byte")

    # tensors of ids, versions in a database, going on from them
    ids = [[(7 * i + 3 * k) % 50 + 5 for k in range(12)] for i in range(8)]
    write_safetensors(at("ids.safetensors"), {"ids": ("I32", [8, 12], b"".join(struct.pack("<12i", *r) for r in ids))})
    db = at("a.db")
    tokens = ["--base", base, "--tokens", at("ids.safetensors") + ":ids", "--lr", "3e-3"]
    lorad("tenant", "add", "acme", "--db", db)
    lorad("train", *tokens, "--rank", 4, "--max-steps", 6, "--db", db, "--name", "counts", "--out", at("counts"))
    first = json.loads(lorad("adapter", "show", "counts", "--db", db, "--json"))
    check(first["origin"] == "train" and first["live"], "--db --name makes a live version")
    r = run("train", *tokens, "--max-steps", 6, "--from", "counts@1", "--db", db, "--name", "counts", "--no-activate",
            "--state", at("s.state"))
    check(r.returncode == 0 and "counts@2" in r.stderr, "--from goes on from a version" + ("" if r.returncode == 0 else r.stderr))
    two = json.loads(lorad("adapter", "show", "counts@2", "--db", db, "--json"))
    check(not two["live"], "--no-activate leaves the live version alone")
    losses = [json.loads(lorad("eval", "--base", base, "--tokens", at("ids.safetensors") + ":ids", *extra))["loss"]
              for extra in ([], ["--adapter", "counts@1", "--db", db], ["--adapter", "counts@2", "--db", db])]
    check(losses[0] > losses[1] > losses[2], "each goes on where the other ended: " + " > ".join(f"{x:.3f}" for x in losses))

    # what a run says
    out = run("train", *common, "--max-steps", 5, "--json", "--out", at("j")).stdout
    check([json.loads(x)["step"] for x in out.splitlines()] == [1, 2, 3, 4, 5], "--json: one object per step")
    r = run("train", *common, "--max-steps", 5, "--estimate", "--json")
    e = json.loads(r.stdout)
    check(r.returncode == 0 and e["steps"] == 5 and e["bytes"] > 4 * e["trainable"], "--estimate says and stops")
    r = run("train", *common, "--max-steps", 2, "--out", at("p"))
    check("peak memory" in r.stderr and "\r" not in r.stderr and "\033" not in r.stderr, "in a pipe: lines, no bar, no colours; the peak of memory")
    main, terminal = pty.openpty()
    subprocess.run([LORAD, *map(str, ["train", *common, "--max-steps", 3, "--out", at("t")])], stderr=terminal, timeout=600)
    shown = os.read(main, 65536).decode()
    check(shown.count("\r") >= 3 and "step 3/3" in shown and re.search("\\033\\[[0-9;]*m", shown) is None, "on a terminal: a bar on one line, no colours")
    lorad("train", "--base", base, "--data", data, "--batch", 4, "--epochs", 1, "--valid", valid, "--eval-every", 2, "--patience", 1, "--lr", "0.5", "--out", at("early"))
    check(len(metrics(at("early/metrics.jsonl"))) < 15, "stops early when the validation loss grows")

    # bad data, bad options
    with open(at("bad.jsonl"), "w") as f:
        f.write('{"prompt": "a", "completion": "b"}\n{"x": 1}\n{"prompt": "a", "completion": "b"}\nnot json\n')
    refused(1, "bad.jsonl:4: ", "train", "--check-data", at("bad.jsonl"))
    refused(1, "bad.jsonl:2: ", "train", "--check-data", at("bad.jsonl"), "--base", base)
    refused(1, "2 lines are unusable", "train", "--base", base, "--data", at("bad.jsonl"), "--out", at("x"))
    check("60 examples" in lorad("train", "--check-data", data, "--base", base), "--check-data counts what is good")
    lorad("train", "--base", base, "--data", at("bad.jsonl"), "--skip-bad-lines", "--max-steps", 1, "--out", at("skip"))
    refused(1, "is there already", "train", *common, "--out", at("lora"))
    refused(1, "there is no state", "train", *common, "--out", at("x"), "--resume")
    refused(1, "\"nonsense\" is no linear layer", "train", *common, "--target-modules", "nonsense", "--out", at("x"))
    refused(1, "is dora, the job is lora", "train", "--base", base, "--data", data, "--from", at("dora"), "--out", at("x"))
    refused(2, "--method is lora, rslora, dora or adalora", "train", *common, "--method", "qlora", "--out", at("x"))
    refused(2, "--rank must be a whole number", "train", "--base", base, "--data", data, "--rank", 0, "--out", at("x"))
    refused(2, "patience counts evaluations", "train", *common, "--patience", 2, "--out", at("x"))
    refused(2, "--rank-pattern: \"q_proj\" is not NAME=RANK", "train", *common, "--rank-pattern", "q_proj", "--out", at("x"))
    refused(2, "AdaLoRA has an initialisation", "train", *common, "--method", "adalora", "--init", "gaussian", "--out", at("x"))
    refused(2, "give one of --data FILE and --tokens", "train", "--base", base, "--out", at("x"))
    refused(2, "say where the adapter goes", "train", *common)
    refused(2, "--name needs the database", "train", *common, "--name", "x")
    refused(2, "--base FILE is needed", "train", "--data", data, "--out", at("x"))
    refused(2, "give one of --data FILE and --tokens", "eval", "--base", base)
    refused(1, "is not FILE.safetensors:TENSOR", "eval", "--base", base, "--tokens", "nothing")
    check(not os.path.exists(at("x")) and not os.path.exists(at("x.partial")), "a refused run leaves nothing")
done()
