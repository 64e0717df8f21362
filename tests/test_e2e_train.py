"""test_e2e_train.py - fine-tuning on a real server: files and jobs over HTTP, events as they happen,
checkpoints and results that answer; pause, cancel, SIGTERM and kill -9 at random moments, after which the
adapter is byte-identical; a full disk; the condition for going live.

LORAD_KILLS says how often the server is killed."""
import hashlib
import random
import sqlite3
import subprocess
import threading
import time

from harness import *

KILLS = int(os.environ.get("LORAD_KILLS", "2" if SANITIZED else "5"))
STEPS = 60 if SANITIZED else 150  # of the job that is interrupted
SLOW = 10 if SANITIZED else 1


def questions(n, start=0):
    colours, things = ["red", "blue", "green", "black", "white"], ["door", "boat", "hat", "bird", "stone", "book", "cup"]
    return "".join(json.dumps({"prompt": f"The {things[i % 7]} is {colours[i % 5]}. What is the {things[i % 7]}?",
                               "completion": f" It is {colours[i % 5]}."}) + "\n" for i in range(start, start + n))


def post_file(server, path, purpose="fine-tune"):
    out = subprocess.run(["curl", "-s", f"http://127.0.0.1:{server.port}/v1/files", "-F", f"purpose={purpose}",
                          "-F", f"file=@{path}"], capture_output=True, text=True, timeout=60).stdout
    return json.loads(out)


def settings(steps, **more):
    return {"type": "lora", "lora": {"rank": 8, "batch_size": 4, "max_steps": steps, "learning_rate": 3e-3,
                                     "dropout": 0.1, "checkpoint_every": 5, **more}}


def start(server, file, suffix, method, **more):
    status, _, job = server.call("POST", "/v1/fine_tuning/jobs",
                                 {"model": "demo", "training_file": file, "suffix": suffix, "method": method, **more})
    if status != 200:
        raise RuntimeError(f"job refused: {status} {job}")
    return job["id"]


def job_of(server, job):
    return server.call("GET", f"/v1/fine_tuning/jobs/{job}")[2]


def events(server, job):
    """Oldest first."""
    return server.call("GET", f"/v1/fine_tuning/jobs/{job}/events?limit=1000")[2]["data"][::-1]


def wait_for(server, job, *states, step=0, seconds=300):
    """The job, once its own status is one of these (and so many steps are reported)."""
    end = time.time() + seconds * SLOW
    while time.time() < end:
        j = job_of(server, job)
        if j["lorad"]["status"] in states and j["lorad"]["step"] >= step:
            return j
        if j["lorad"]["status"] in ("failed", "cancelled", "succeeded"):
            return j
        time.sleep(0.02)
    raise RuntimeError(f"{job} does not become {states}: {job_of(server, job)} {events(server, job)[-5:]}")


def download(server, ref):
    """sha256 of the tar of a version."""
    status, _, body = server.call("GET", f"/v1/adapters/{ref}/download")
    return hashlib.sha256(body).hexdigest() if status == 200 else f"{status} {body}"


def complete(server, model):
    status, _, body = server.call("POST", "/v1/completions", {"model": model, "prompt": "The boat is blue. What is the boat?",
                                                              "max_tokens": 6, "temperature": 0})
    return body["choices"][0]["text"] if status == 200 else f"{status} {body}"


def stream(server, job, into):
    """Events as they happen, with curl, until the stream ends."""
    p = subprocess.run(["curl", "-sN", "--max-time", "1200", f"http://127.0.0.1:{server.port}/v1/fine_tuning/jobs/{job}/events?stream=true"],
                       capture_output=True, text=True)
    into += [line[6:] for line in p.stdout.splitlines() if line.startswith("data: ")]


def whole_life(server, file, valid):
    """One job from beginning to end."""
    job = start(server, file, "whole", settings(30, eval_every=10), validation_file=valid)
    seen = []
    listener = threading.Thread(target=stream, args=(server, job, seen))
    listener.start()
    done = wait_for(server, job, "succeeded")
    listener.join()
    check(done["status"] == "succeeded" and done["fine_tuned_model"].startswith("ft:demo:default:whole:"),
          f"a job succeeds: {done['fine_tuned_model']} {done['error'] or ''}")
    messages = [json.loads(x)["message"] for x in seen if x != "[DONE]"]
    check(seen and seen[-1] == "[DONE]" and any(m.startswith("Step 1/30: training loss=") for m in messages) and
          any("Step 30/30: training loss=" in m and "validation loss=" in m for m in messages) and
          messages[-1] == "The job has successfully completed", f"its events come as they happen ({len(messages)})")
    check([e["message"] for e in events(server, job)] == messages, "the list of events is what was streamed")
    m = server.call("GET", f"/v1/fine_tuning/jobs/{job}/metrics")[2]["data"]
    check([x["step"] for x in m] == list(range(1, 31)) and m[-1]["loss"] < m[0]["loss"] / 2 and m[9]["valid_loss"] and not m[8]["valid_loss"],
          "metrics: each step once, the loss falls, validation where it was asked for")
    check(done["trained_tokens"] == sum(x["tokens"] for x in m), "trained_tokens is the sum")
    points = server.call("GET", f"/v1/fine_tuning/jobs/{job}/checkpoints")[2]["data"]
    check([p["step_number"] for p in points] == [30, 25, 20, 15, 10, 5], "checkpoints as asked for, newest first")
    answers = {complete(server, p["fine_tuned_model_checkpoint"]) for p in points}
    check(len(answers) > 1 and not any(a[:3].isdigit() for a in answers), f"checkpoints answer: {sorted(answers)}")
    base, tuned = complete(server, "demo"), complete(server, done["fine_tuned_model"])
    check("It is" in tuned and tuned == complete(server, "whole") != base, f"the result answers under both names: {tuned!r}, not {base!r}")
    status, _, v = server.call("GET", "/v1/adapters/whole")
    check(status == 200 and '"train"' in json.dumps(v), "the version says where it comes from")


def same_as_command(server, root, base, text, valid):
    """`lorad train` with the same options."""
    out = os.path.join(root, "by-hand")
    lorad("train", "--base", base, "--data", text, "--valid", valid, "--rank", 8, "--batch", 4, "--max-steps", 30, "--lr", "3e-3",
          "--dropout", 0.1, "--checkpoint-every", 5, "--eval-every", 10, "--out", out)
    tar = os.path.join(root, "whole.tar")
    with open(tar, "wb") as f:
        f.write(server.call("GET", "/v1/adapters/whole/download")[2])
    os.mkdir(os.path.join(root, "whole"))
    subprocess.run(["tar", "-xf", tar, "-C", os.path.join(root, "whole")], check=True)
    same = all(open(os.path.join(out, n), "rb").read() == open(os.path.join(root, "whole", n), "rb").read()
               for n in ("adapter_config.json", "adapter_model.safetensors"))
    check(same, "lorad train gives the same two files as the job, byte for byte")


SCHED_IDLE = 5


def policies(server):
    """(name, scheduling policy) of each of the server's threads."""
    out = []
    for task in os.listdir(f"/proc/{server.proc.pid}/task"):
        with open(f"/proc/{server.proc.pid}/task/{task}/stat") as f:
            name, _, rest = f.read().rpartition(")")
        out.append((name.partition("(")[2], int(rest.split()[38])))
    return out


def two_processes(base, db, text):
    """Jobs that a server takes and does not run are run by another one on the same database."""
    with Server(base, db, "--jobs", "off") as taker:
        file = post_file(taker, text)["id"]
        job = start(taker, file, "shared", settings(3))
        time.sleep(1)
        check(job_of(taker, job)["status"] == "queued", "--jobs off: a job waits")
        with Server(base, db, "--train-threads", 2):
            check(wait_for(taker, job, "succeeded")["status"] == "succeeded", "another process runs it")
        status = taker.call("POST", "/v1/completions", {"model": "shared", "prompt": "The", "max_tokens": 2})[0]
        check(status == 200, "the first one serves what came out")


def interrupted(root, base, db, text):
    """Pause and resume, SIGTERM, and kill -9 at random moments: the same bytes as a job left alone."""
    rng = random.Random(3)
    method = settings(STEPS, moments="8bit")
    with Server(base, db, "--train-threads", 1) as server:
        file = post_file(server, text)["id"]
        job = start(server, file, "calm", method)
        t0 = time.time()
        wait_for(server, job, "succeeded")
        whole = time.time() - t0
        want = download(server, "calm")
        job = start(server, file, "paused", method)
        wait_for(server, job, "running", step=1)
        tasks = policies(server)
        check(tasks.count(("lorad-train", SCHED_IDLE)) == 1 and ("lorad-jobs", 0) in tasks and
              [p for _, p in tasks].count(SCHED_IDLE) == 1, "the thread that trains is at idle priority, and no other is")
        server.call("POST", f"/v1/fine_tuning/jobs/{job}/pause")
        j = wait_for(server, job, "paused")
        at = j["lorad"]["step"]
        check(j["lorad"]["paused"] and 0 < at < STEPS, f"a running job is paused, at step {at}")
        other = start(server, file, "quick", settings(2))
        check(wait_for(server, other, "succeeded")["status"] == "succeeded", "another one runs meanwhile")
        server.call("POST", f"/v1/fine_tuning/jobs/{job}/resume")
        wait_for(server, job, "succeeded")
        check(download(server, "paused") == want, "resumed, it gives the same bytes")
        text_of = [e["message"] for e in events(server, job)]
        check(f"The job goes on: step {at} of {STEPS} is done" in text_of, f"and says that it went on after step {at}")
        job = start(server, file, "gone", method)
        wait_for(server, job, "running", step=1)
        server.call("POST", f"/v1/fine_tuning/jobs/{job}/cancel")
        j = wait_for(server, job, "cancelled")
        check(j["status"] == "cancelled" and server.call("GET", "/v1/adapters/gone")[0] == 404, "a cancelled job makes no version")
        job = start(server, file, "killed", method)
        wait_for(server, job, "running", step=1)
        check(server.stop() == 0, "SIGTERM ends the server while a job runs")
    kept = []
    for i in range(KILLS):
        with Server(base, db, "--train-threads", 1 + i % 2) as server:
            time.sleep(rng.random() * max(0.2, whole / KILLS))
            kept.append(job_of(server, job)["lorad"]["step"])
            server.kill()
    with Server(base, db) as server:
        wait_for(server, job, "succeeded")
        check(download(server, "killed") == want, f"stopped once, killed {KILLS} times (seen at steps {kept}), threads changing: the same bytes")
        m = server.call("GET", f"/v1/fine_tuning/jobs/{job}/metrics?limit=1000")[2]["data"]
        told = [e["data"]["step"] for e in events(server, job) if e["type"] == "metrics"]
        check([x["step"] for x in m] == list(range(1, STEPS + 1)) and len(told) == len(set(told)), "each step is reported once")
        check(job_of(server, job)["trained_tokens"] == sum(x["tokens"] for x in m), "and counted once")
    check(lorad("check", "--db", db, ok=False).returncode == 0, "lorad check finds nothing")


def gates_and_failures(server, file, valid):
    def end(suffix, **more):
        job = start(server, file, suffix, settings(8), **more)
        j = wait_for(server, job, "succeeded")
        return j, " ".join(e["message"] for e in events(server, job))

    j, said = end("gated", activate_if={"max_loss": 0.0001, "file": valid})
    check(j["status"] == "succeeded" and "does not go live" in said and complete(server, "gated@1")[:4] != "404 ",
          "a version that is not good enough does not go live, and is there")
    check(server.call("POST", "/v1/completions", {"model": j["fine_tuned_model"], "prompt": "x", "max_tokens": 1})[0] == 200,
          "under its own name it answers")
    v1 = server.call("GET", "/v1/adapters/gated/versions")[2]["data"]
    check(len(v1) == 1 and v1[0]["live"] is False, "no version is live")
    j, said = end("gated", activate_if={"max_loss": 100}, validation_file=valid)
    check("goes live" in said and any(v["live"] for v in server.call("GET", "/v1/adapters/gated/versions")[2]["data"]),
          "one that is goes live")
    job = start(server, file, "huge", {"type": "lora", "lora": {"rank": 4096, "max_steps": 3}})
    j = wait_for(server, job, "failed")
    check(j["status"] == "failed" and j["error"]["code"] == "out_of_memory" and "needs" in j["error"]["message"],
          f"what does not fit in memory fails with the arithmetic: {(j['error'] or {}).get('message')}")
    status, _, j = server.call("POST", "/v1/fine_tuning/jobs", {"model": "gated", "training_file": file, "suffix": "further",
                                                               "method": {"type": "lora", "lora": {"max_steps": 4}}})
    j = wait_for(server, j["id"], "succeeded") if status == 200 else j
    check(status == 200 and j["status"] == "succeeded", f"a job goes on from a version {j if status != 200 else ''}")


def little_memory(root, base):
    """The data counts, and what measuring the result takes, before a step is made."""
    def put(name, lines):
        path = os.path.join(root, name)
        with open(path, "w") as f:
            f.writelines(json.dumps(x) + "\n" for x in lines)
        return post_file(server, path)["id"]

    with Server(base, os.path.join(root, "z.db"), "--train-memory", "20M") as server:
        few = put("few.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
        long = put("long.jsonl", [{"text": "word " * 600}])
        much = put("much.jsonl", ({"text": f"{i} " * 200} for i in range(15000)))
        j = wait_for(server, start(server, few, "few", settings(2)), "succeeded")
        check(j["status"] == "succeeded", f"a small job runs in little memory {j['error'] or ''}")
        j = wait_for(server, start(server, few, "looks", settings(2), activate_if={"max_loss": 9, "file": long}), "failed")
        check(j["status"] == "failed" and j["error"]["code"] == "out_of_memory" and j["lorad"]["step"] == 0,
              f"with long examples to be measured on it does not start: {(j['error'] or {}).get('message')}")
        j = wait_for(server, start(server, much, "much", settings(2)), "failed")
        e = j["error"] or {}
        check(j["status"] == "failed" and e.get("code") == "out_of_memory" and e.get("param") == "training_file" and
              "does not fit" in e.get("message", ""), f"data that memory does not hold is refused: {e.get('message')}")


def unwritten_end(server, db, file):
    """A database that takes everything but the end of a job: the job does not stay running for ever."""
    with sqlite3.connect(db, timeout=30) as other:
        other.execute("CREATE TRIGGER no_end BEFORE UPDATE OF status ON job WHEN NEW.status = 'failed'"
                      " BEGIN SELECT RAISE(ABORT, 'not now'); END")
    job = start(server, file, "stuck", {"type": "lora", "lora": {"rank": 4096, "max_steps": 3}})
    end = time.time() + 60 * SLOW
    while time.time() < end and not any("cut off" in e["message"] for e in events(server, job)):
        time.sleep(0.1)
    check("it starts again" in " ".join(e["message"] for e in events(server, job)), "a job whose end cannot be written is run again")
    with sqlite3.connect(db, timeout=30) as other:
        other.execute("DROP TRIGGER no_end")
    j = wait_for(server, job, "failed")
    check(j["status"] == "failed" and j["error"]["code"] == "out_of_memory", "and ends when it can be")


def stuff(path):
    """Fill the disk to the last byte."""
    f = os.open(path, os.O_WRONLY | os.O_CREAT)
    for size in (1 << 20, 4096, 1):
        try:
            while True:
                os.write(f, b"x" * size)
        except OSError:
            pass
    os.close(f)


def full_disk(root, base, text):
    """A database on a small tmpfs: only root can make one."""
    small = os.path.join(root, "small")
    os.mkdir(small)
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", small], capture_output=True).returncode != 0:
        return skip("a full disk: no tmpfs can be mounted here")
    try:
        with Server(base, os.path.join(small, "x.db")) as server:
            file = post_file(server, text)["id"]
            want = start(server, file, "roomy", settings(60, rank=16))
            wait_for(server, want, "succeeded")
            want = download(server, "roomy")
            job = start(server, file, "tight", settings(60, rank=16))
            wait_for(server, job, "running", step=6)
            stuffing = os.path.join(small, "stuffing")
            stuff(stuffing)
            j = wait_for(server, job, "paused")
            check(j["lorad"]["status"] == "paused" and "disk is full" in (j["lorad"]["pause_reason"] or ""),
                  f"a checkpoint that finds the disk full pauses the job: {j['lorad']['pause_reason']}")
            check("disk is full" in events(server, job)[-1]["message"], "with an event that says so")
            check("It is" in complete(server, "roomy"), "serving goes on")
            os.unlink(stuffing)
            server.call("POST", f"/v1/fine_tuning/jobs/{job}/resume")
            wait_for(server, job, "succeeded")
            check(download(server, "tight") == want, "with room again, it goes on to the same bytes")
    finally:
        subprocess.run(["umount", "-l", small])


with Folder() as root:
    base, db, text, more = (os.path.join(root, x) for x in ("demo.base", "x.db", "q.jsonl", "v.jsonl"))
    lorad("import", DEMO, "-o", base, "--name", "demo")
    with open(text, "w") as f:
        f.write(questions(40))
    with open(more, "w") as f:
        f.write(questions(10, 40))
    with Server(base, db, "--train-memory", "256M") as server:
        file, valid = post_file(server, text)["id"], post_file(server, more)["id"]
        whole_life(server, file, valid)
        same_as_command(server, root, base, text, more)
        gates_and_failures(server, file, valid)
        unwritten_end(server, db, file)
    interrupted(root, base, os.path.join(root, "y.db"), text)
    two_processes(base, os.path.join(root, "z.db"), text)
    little_memory(root, base)
    full_disk(root, base, text)
    r = lorad("serve", "--base", base, "--train-precision", "f32", ok=False)
    check(r.returncode == 2 and "--precision f32" in r.stderr, "--train-precision f32 without --precision f32 is refused")
done()
