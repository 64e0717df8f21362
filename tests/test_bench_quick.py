"""test_bench_quick.py - `lorad bench` as somebody types it, on a tiny base: the rows of every part that
needs no server, the form of the JSON, what is refused.  How fast anything is, is not looked at."""
import json
import math

from harness import *

VERDICTS = ("met", "MISSED", "open", "no target")


def bench(*args, env=None):
    return subprocess.run([LORAD, "bench", *map(str, args)], capture_output=True, text=True, timeout=600,
                          env={**os.environ, **(env or {})})


def refused(code, sentence, *args, env=None):
    r = bench(*args, env=env)
    check(r.returncode == code and sentence in r.stderr and r.stderr.count("\n") <= 2,
          f"bench {' '.join(map(str, args))}: {sentence}" + ("" if sentence in r.stderr else f" [{r.stderr!r}]"))


def good_row(row, rounds):
    """A measured row has what docs/performance.md says."""
    if not isinstance(row["value"], float) or not row["unit"] or row["verdict"] not in VERDICTS:
        return False
    if not 0 <= row["foreign"] <= 1 or row["spread"] < 0:
        return False
    if len(row["values"]) not in (1, rounds) or not all(math.isfinite(v) and v > 0 for v in row["values"]):
        return False
    if not min(row["values"]) <= row["value"] <= max(row["values"]):
        return False
    ref = row.get("reference")
    return ref is None or (row["ratio"] > 0 and ref["name"] and len(ref["values"]) == len(row["values"]))


listed = json.loads(bench("--list", "--json", "-").stdout)
targets = {t["id"] for t in listed["targets"]}
text = bench("--list").stdout
check(all(p["name"] in text and p["about"] in text for p in listed["parts"]), "--list names every part")
check(all(s["name"] in text for s in listed["shapes"]) and "tiny" in text, "--list names every shape")
check({t["part"] for t in listed["targets"]} <= {p["name"] for p in listed["parts"]},
      "every target has a part that measures it")
check(all(t["id"] in text for t in listed["targets"] if t["peer"]), "--list names every row that needs a peer")

with Folder() as tmp:
    path = os.path.join(tmp, "bench.json")
    mine = os.path.join(tmp, "tmp")
    os.mkdir(mine)
    r = bench("memory", "decode", "--part", "prompt", "mixed", "train", "load", "--quick", "--rounds", 2,
              "--shape", "tiny,tiny", "--json", path, env={"TMPDIR": mine})
    check(r.returncode == 0 and r.stderr == "", f"a quick run of parts on a tiny base {r.stderr[-300:]}")
    with open(path) as f:
        j = json.load(f)
    rows = {row["id"]: row for row in j["rows"]}
    check(len(rows) == len(j["rows"]), "no row is there twice, also when a shape is named twice")
    check(targets <= set(rows), f"every target is a row {targets - set(rows)}")
    measured = {k: v for k, v in rows.items() if v["verdict"] != "open"}
    bad = [k for k, v in measured.items() if not good_row(v, 2)]
    check(not bad, f"rows have values, units, references, ratios {bad}")
    check(all(rows[k]["why"] for k in rows if k not in measured), "an open row says why")
    check({v["part"] for v in measured.values()} == {"memory", "decode", "prompt", "mixed", "train", "load"},
          "the parts that were named, and no others")
    expected = [f"decode.tiny.{p}.b{b}" for p in ("fast", "exact") for b in (1, 2, 4, 8, 16, 32)]
    expected += [f"prompt.tiny.{p}.t{t}" for p in ("fast", "exact") for t in (128, 512)]
    expected += [f"mixed.tiny.{p}.r{r}.a{a}" for p in ("fast", "exact") for r in (8, 16, 64) for a in (0, 1, 4, 8, 16)]
    expected += ["memory.huge.all", "memory.4k.one", "train.tiny.exact", "load.tiny", "load.tiny.bytes_per_parameter"]
    check(all(e in measured for e in expected), f"rows of every size {[e for e in expected if e not in measured]}")
    check(all(k in j["machine"] for k in ("lorad", "cpu", "cpus", "threads", "kernels", "huge_pages", "memory",
                                          "compiler", "openblas", "load")), "the machine is described")
    check(j["quick"] is True and j["rounds"] == 2 and j["format"] == 1 and j["precision"] == "both",
          "how it was measured is in the file")
    check(all(k in r.stdout for k in measured), "the table has every measured row")
    check(os.listdir(mine) == [], "nothing is left in TMPDIR")

    # the page that is made from it
    for folder, name in (("tools", "plot_bench.py"), ("docs", "performance.md")):
        os.mkdir(os.path.join(tmp, folder))
        shutil.copy(os.path.join(ROOT, folder, name), os.path.join(tmp, folder, name))
    page = os.path.join(tmp, "docs", "performance.md")
    plot = [sys.executable, os.path.join(tmp, "tools", "plot_bench.py")]
    pages = []
    for _ in range(2):
        r = subprocess.run(plot + [path], capture_output=True, text=True)
        with open(page) as f:
            pages.append(f.read())
    check(r.returncode == 0 and all(f"`{t}`" in pages[0] for t in targets) and "`load.tiny`" in pages[0],
          f"tools/plot_bench.py makes the page's tables {r.stderr[-300:]}")
    check(pages[0] == pages[1], "and the same ones again")
    r = subprocess.run(plot + [page], capture_output=True, text=True)
    check(r.returncode == 1 and "not what lorad bench --json writes" in r.stderr, "and refuses another file")

    def later(row, **changes):
        """A second file like the first, in which one row, and what `changes` says, is different."""
        second = {**j, "rows": [row], **changes}
        with open(os.path.join(tmp, "later.json"), "w") as f:
            json.dump(second, f)
        r = subprocess.run(plot + [path, os.path.join(tmp, "later.json")], capture_output=True, text=True)
        with open(page) as f:
            return r, f.read()

    was = rows["load.tiny"]
    r, made = later({**{k: was[k] for k in ("id", "part")}, "verdict": "open", "why": "not measured: it failed"})
    check(r.returncode == 0 and made == pages[0], f"a measured row stays when a later file has it open {r.stderr[-300:]}")
    r, made = later({**was, "value": 4321.0})
    check(r.returncode == 0 and "4,321 s" in made, "of two that are measured the later is taken")
    closed = next(row for row in j["rows"] if row["verdict"] == "open" and "not asked for" in row["why"])
    r, made = later({**closed, "why": "not measured: it tried"})
    check(r.returncode == 0 and "not measured: it tried" in made, "of two that are open the one that tried is taken")
    for what, changes in {"quick": {"quick": False}, "precision": {"precision": "fast"},
                          "lorad": {"machine": {**j["machine"], "lorad": "another"}}}.items():
        r, _ = later(was, **changes)
        check(r.returncode == 1 and f"they differ in {what} (" in r.stderr, f"and files that differ in {what} are refused")

    r = bench("decode", "--quick", "--rounds", 1, "--shape", "tiny", "--precision", "fast", "--threads", 1,
              "--kernel", "scalar", "--json", "-")
    j = json.loads(r.stdout)
    ids = [row["id"] for row in j["rows"] if row["verdict"] != "open"]
    check(r.returncode == 0 and ids and all(i.startswith("decode.tiny.fast.") for i in ids),
          "--json - writes nothing but JSON; --precision fast leaves exact out")
    check(j["precision"] == "fast", "and the file says so")
    check(j["machine"]["kernels"] == "scalar" and j["machine"]["threads"] == 1, "--kernel and --threads are obeyed")

    r = bench("attention", "--quick", "--rounds", 1, "--json", path)
    with open(path) as f:
        rows = {row["id"]: row for row in json.load(f)["rows"]}
    check(r.returncode == 0 and all(f"attention.1.1b.{k}" in rows for k in
                                    ("rows1.c512", "rows16.c512.read", "chunk512.c512")), "attention of rows and chunks")

    r = bench("kernels", "--quick", "--rounds", 1, "--precision", "exact", "--json", path)
    with open(path) as f:
        rows = {row["id"]: row for row in json.load(f)["rows"]}
    check(r.returncode == 0 and all(f"kernels.{k}.exact.m{m}" in rows for k in ("nf4", "head", "act_pack")
                                    for m in (1, 2, 4, 8, 16, 64, 512)) and "kernels.dx.quick.256x2048" in rows,
          "kernels of 1 to 512 rows, and the backward pass")

    r = bench("quality", "tokenizer", "--quick", "--json", path, env={"LORAD_SHARED": ""})
    with open(path) as f:
        j = json.load(f)
    check(r.returncode == 0 and "quality" in r.stdout and {s["id"] for s in j["skipped"]} == {"quality", "tokenizer"},
          "without reference models their parts say so")
    base = shared("models", "stories260K")
    if base:
        r = bench("quality", "--quick", "--shared", SHARED, "--json", path, env={"LORAD_KV_TYPE": "none of them"})
        with open(path) as f:
            rows = {row["id"]: row for row in json.load(f)["rows"]}
        check(r.returncode == 0 and rows["quality.exact"]["verdict"] == "met" and
              rows["quality.fast"]["verdict"] == "met", "perplexities are as near as the targets ask")

    r = bench("load", "memory", "--quick", "--rounds", 1, "--shape", "tiny", "--json", path,
              env={"TMPDIR": os.path.join(tmp, "nowhere")})
    check(r.returncode == 1 and "part load: cannot make a folder" in r.stderr and "memory.huge.all" in r.stdout,
          "a part that fails says why and does not stop the others")

    refused(1, "cannot write /nowhere/b.json: No such file or directory", "decode", "--json", "/nowhere/b.json")

refused(2, 'there is no part "speed"; --list shows them', "speed")
refused(2, 'there is no part "speed"; --list shows them', "--part", "speed")
refused(2, 'there is no shape "3b"; --list shows them', "--shape", "tiny,3b")
refused(2, 'there is no shape "";', "--shape", "tiny,,135m")
refused(2, "--shape names no shape", "--shape=")
refused(2, "--precision must be fast, exact or both, not f32", "--precision", "f32")
refused(2, "--rounds must be a whole number from 1 to 99, not 0", "--rounds", 0)
refused(2, "--threads must be a whole number from 0 to 1024, not many", "--threads", "many")
refused(2, "unknown", "--kernel", "sse")
refused(2, "--peer load.1.1b: no row of that name compares with a peer", "--peer", "load.1.1b=3")
refused(2, "--list goes to standard output", "--list", "--json", "x.json")
refused(2, "unknown option --fast; --help lists them", "--fast")
done()
