"""test_bench_serve.py - the parts of `lorad bench` that start servers: they run, their rows are there with
numbers that make sense, and nothing is left behind, also when they are killed.  No number is judged."""
import glob

from harness import *

PARTS = ["http", "cold", "registry", "rotation"]


def left(tmp):
    """Folders of the bench, and servers that use them."""
    servers = []
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            with open(path, "rb") as f:
                words = f.read().split(b"\0")
        except OSError:
            continue
        if b"serve" in words and any(w.startswith(tmp.encode()) for w in words):
            servers.append(path)
    return glob.glob(os.path.join(tmp, "*")) + servers


def bench(tmp, *args):
    # a server of the bench must not see what LORAD_ variables say to servers
    env = dict(os.environ, TMPDIR=tmp, LORAD_MAX_QUEUE="no number")
    return subprocess.Popen([LORAD, "bench", *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stop(p):
    """Nothing is to run on, whatever went wrong; its servers end with it."""
    p.kill()
    p.communicate()


def gone(tmp):
    for _ in range(200):
        if not left(tmp):
            return True
        time.sleep(0.05)
    return False


with Folder() as tmp:
    p = bench(tmp, "--quick", "--rounds", "1", "--shape", "tiny", "--json", "-", *PARTS)
    try:
        out, err = p.communicate(timeout=600)
    finally:
        stop(p)
    if check(p.returncode == 0, "the parts run" + (f": {err}" if p.returncode else "")):
        rows = {r["id"]: r for r in json.loads(out)["rows"]}
        for part, ids in {
                "http": ["http.tiny.c8.none", "http.tiny.c8.shared", "http.tiny.c8", "http.tiny.c8.first.p99",
                         "http.tiny.c8.none.first.p99", "http.tiny.c8.shared.first.p99"],
                "cold": ["cold.tiny.size", "cold.tiny.first", "cold.tiny.latency", "cold.tiny.stall",
                         "cold.tiny.busy.latency", "cold.tiny.unseen.latency", "cold.tiny.stall.quiet"],
                "registry": ["registry.a500.start", "registry.a500.lookup", "registry.a500.missing",
                             "registry.a500.page", "registry.a500.memory"],
                "rotation": [f"rotation.{m}.a{n}" for m in ("distinct", "uniform", "skewed", "identical")
                             for n in (5, 200)] + ["rotation.distinct.a200.tenth"]}.items():
            missing = [i for i in ids if i not in rows]
            check(not missing, f"{part} has its rows" + (f", but not {missing}" if missing else ""))
            check(all(rows[i]["value"] > 0 and rows[i]["part"] == part for i in ids if i in rows),
                  f"{part}: the values are numbers above 0")
        loads = rows.get("rotation.distinct.a200.tenth.loads", {}).get("value", 0)
        check(loads > 0.8, f"in turn through a tenth of the memory nearly every adapter is loaded again ({loads})")
    check(gone(tmp), f"nothing is left behind: {left(tmp)}")

for sig in (signal.SIGINT, signal.SIGKILL):
    with Folder() as tmp:
        p = bench(tmp, "--quick", "--shape", "tiny", "cold")
        try:
            for _ in range(600):
                if len(left(tmp)) > 1 or p.poll() is not None:
                    break
                time.sleep(0.02)
            check(p.poll() is None, f"a server runs when {sig.name} comes")
            p.send_signal(sig)
            p.wait(timeout=600)
        finally:
            stop(p)
        check(gone(tmp), f"nothing is left behind by {sig.name}: {left(tmp)}")
done()
