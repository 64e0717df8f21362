"""test_pull.py - models and adapters from a hub that redirects, cuts connections, lies about hashes, asks
for patience and lists hostile names.  No network: the hub is tests/hub.py."""
import os
import resource
import signal
import subprocess
import time

from harness import *
from hub import COMMIT, Hub

SHARD = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NEEDED = ["config.json", "tokenizer.json", "model.safetensors"]


def read_folder(folder):
    return {n: open(os.path.join(folder, n), "rb").read() for n in os.listdir(folder)
            if os.path.isfile(os.path.join(folder, n))}


class Puller:
    def __init__(self, hub, root):
        self.hub, self.root, self.n = hub, root, 0

    def fresh(self):
        """A cache that nobody has used."""
        self.n += 1
        self.cache = os.path.join(self.root, f"cache{self.n}")
        self.out = os.path.join(self.root, f"{self.n}.base")
        self.hub.log.clear()
        self.hub.faults.clear()
        self.hub.edit.clear()
        return self

    def command(self, *args):
        return [LORAD, "pull", *args, "-o", self.out, "--cache", self.cache, "--name", "demo", "--stall", "2"]

    def env(self, token=None):
        env = {k: v for k, v in os.environ.items() if k.lower() not in ("http_proxy", "all_proxy", "hf_token")}
        env.update(HF_ENDPOINT=self.hub.endpoint, **({"HF_TOKEN": token} if token else {}))
        return env

    def run(self, *args, token=None, **more):
        return subprocess.run(self.command(*args), capture_output=True, text=True, timeout=120,
                              env=self.env(token), **more)

    def folder(self, repo="org--demo"):
        return os.path.join(self.cache, "hub", repo, COMMIT)

    def kept(self, repo="org--demo"):
        folder = self.folder(repo)
        return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def ok(p, r, want, what):
    same = r.returncode == 0 and os.path.exists(p.out) and open(p.out, "rb").read() == want
    check(same and not [n for n in p.kept() if n.endswith(".part")], what + ("" if same else f": {r.stderr.strip()}"))


def refused(p, r, says, what):
    good = r.returncode == 1 and says in r.stderr and not os.path.exists(p.out) and r.stderr.count("\n") == 1
    check(good, f"{what}: {r.stderr.strip()[:160]}")


def good_days(p, want):
    r = p.fresh().run("org/demo", token="hf_secret")
    ok(p, r, want, "a pulled base is byte for byte the imported one")
    check(set(NEEDED) <= set(p.kept()) and "README.md" not in p.kept() and "pytorch_model.bin" not in p.kept(),
          f"only what import needs is downloaded: {p.kept()}")
    check(all(e[2] == "Bearer hf_secret" for e in p.hub.log if e[0] == "hub") and
          all(e[2] is None for e in p.hub.log if e[0] == "store") and p.hub.asked("store", ""),
          "the token goes to the hub and not to where it redirects")
    p.hub.log.clear()
    os.unlink(p.out)
    ok(p, p.run("org/demo"), want, "a second pull")
    check(len(p.hub.log) == 1, "downloads nothing again but the list")
    ok(p.fresh(), p.run("org/demo@v1/x"), want, "a revision with a slash")
    check(p.hub.asked("hub", "revision/v1%2Fx"), "which is escaped in the address")
    ok(p.fresh(), p.run("org/sharded"), want_of(p, "org/sharded"), "two shards and an index")
    p.fresh()
    r = p.run("org/renamed", token="hf_secret")
    check(r.returncode == 0 and open(p.out, "rb").read() == want, f"a repository that moved {r.stderr.strip()}")


def want_of(p, repo):
    """What a local import of the same files gives."""
    folder = os.path.join(p.root, repo.replace("/", "-"))
    os.makedirs(folder, exist_ok=True)
    for name, data in p.hub.repos[repo].items():
        with open(os.path.join(folder, name), "wb") as f:
            f.write(data)
    out = folder + ".base"
    lorad("import", folder, "-o", out, "--name", "demo")
    return open(out, "rb").read()


def bad_days(p, want):
    p.fresh().hub.faults["model.safetensors"] = ["cut", "cut", 503, "cut", 429]
    began = time.monotonic()
    ok(p, p.run("org/demo"), want, "a download that was cut off four times")
    ranges = [int(e[3][6:-1]) for e in p.hub.asked("store", "model.safetensors") if e[3]]
    check(len(ranges) >= 4 and ranges == sorted(ranges) and ranges[0] > 0, f"goes on where it ended {ranges}")
    check(time.monotonic() - began >= 1, "and waits as long as Retry-After says")

    p.fresh().hub.faults["model.safetensors"] = ["stall"]
    ok(p, p.run("org/demo"), want, "a connection that says nothing is given up and begun again")
    p.fresh().hub.faults["model.safetensors"] = ["slow"]
    ok(p, p.run("org/demo"), want, "a slow one is waited for")
    p.fresh().hub.faults["model.safetensors"] = ["cut", "norange"]
    ok(p, p.run("org/demo"), want, "a server without ranges sends all of it again")
    p.fresh().hub.faults["model.safetensors"] = ["cut", "badrange"]
    refused(p, p.run("org/demo"), "another part", "another range than was asked for")
    p.fresh().hub.faults["list"] = [500, 429, 502]
    ok(p, p.run("org/demo"), want, "the list of files after 500, 429 and 502")

    p.fresh().hub.faults["model.safetensors"] = ["wrong"]
    refused(p, p.run("org/demo"), "another sha256", "wrong bytes")
    check(not [n for n in p.kept() if n.startswith("model.safetensors")], f"are removed {p.kept()}")
    ok(p, p.run("org/demo"), want, "and the next pull is right")
    p.fresh().hub.faults["tokenizer.json"] = ["wrong"]
    refused(p, p.run("org/demo"), "git hash", "a wrong byte in a small file")
    p.fresh().hub.faults["model.safetensors"] = ["long"]
    refused(p, p.run("org/demo"), "more bytes came", "more bytes than the list says")

    # what an earlier run left is not trusted: bad bytes there cost one download, not the pull
    p.fresh().hub.faults["model.safetensors"] = [403]
    p.run("org/demo")
    with open(os.path.join(p.folder(), "model.safetensors.part"), "wb") as f:
        f.write(b"not what it should be")
    ok(p, p.run("org/demo"), want, "a spoilt beginning is found out and downloaded again")


def refusals(p):
    for fault, says in [(401, "asks for a token"), (403, "accept its terms"), (404, "there is no org/demo"), (451, "status 451"),
                        ("loop", "redirects"), ("file", "is not followed"), ("garbage", "not a list of files")]:
        p.fresh().hub.faults["list"] = [fault] * 8
        refused(p, p.run("org/demo"), says, f"the list is answered with {fault}")
    p.fresh().hub.faults["model.safetensors"] = [404]
    refused(p, p.run("org/demo"), "model.safetensors is not at", "a file that is listed and not there")
    p.fresh()
    refused(p, p.run("org/gated"), "HF_TOKEN", "a gated repository without a token")
    refused(p, p.run("org/gated", token="hf_x"), "accept its terms", "a gated repository with a token")
    refused(p, p.run("org/demo", token="a\r\nX-Evil: 1"), "no token has", "a token with a line break")
    refused(p, p.run("org/nobody"), "404", "a repository that is not there")
    refused(p, p.run("org/pickled"), "pickled", "weights in a pickle only")
    refused(p, p.run("org/adapter"), "lorad adapter add", "an adapter in place of a model")
    for ref in ("demo", "../demo", "org/..", "org/a/b", "org/demo@../x", "org/demo@", "/org/demo", "org/de mo", ".org/x"):
        r = p.run(ref)
        check(r.returncode == 2 and "is not ORG/NAME" in r.stderr, f"not a repository: {ref}")


def hostile_lists(p, want):
    def with_names(names):
        def edit(listing):
            for n in names:
                listing["siblings"].append({"rfilename": n, "size": 4, "blobId": "0" * 40})
            return listing
        return edit

    before = set(os.listdir(p.root))
    p.fresh().hub.edit["org/demo"] = with_names(["../evil", "/etc/evil", "a/../../evil", "..", "~/evil", ""])
    ok(p, p.run("org/demo"), want, "hostile names in the list are not asked for")
    check(not [e for e in p.hub.log if "evil" in e[1]] and
          set(os.listdir(p.root)) - before <= {os.path.basename(p.cache), os.path.basename(p.out)},
          "and nothing is written outside of the cache")
    p.fresh().hub.edit["org/demo"] = with_names(["config.json"])
    refused(p, p.run("org/demo"), "twice", "a name that is listed twice")
    for shard in ("../evil.safetensors", "/tmp/evil.safetensors", "sub/evil.safetensors", "config.json",
                  ".evil.safetensors", "a" * 300 + ".safetensors"):
        p.fresh()
        p.hub.repos["org/index"] = dict(p.hub.repos["org/sharded"])
        p.hub.repos["org/index"]["model.safetensors.index.json"] = json.dumps(
            {"weight_map": {"x": shard}}).encode()
        refused(p, p.run("org/index"), "not a plain", f"an index that names {shard[:30]}")

    def sha_with_path(listing):
        listing["sha"] = "../../../../evil"
        return listing

    def no_hash(listing):
        for e in listing["siblings"]:
            e.pop("lfs", None)
            e.pop("blobId", None)
        return listing

    def huge(listing):
        for e in listing["siblings"]:
            if "lfs" in e:
                e["lfs"]["size"] = e["size"] = 1 << 60
        return listing

    for edit, says in [(sha_with_path, "not a list of files"), (no_hash, "cannot be checked"), (huge, "left"),
                       (with_names(["con\u0000fig"]), "not a list"), (lambda x: [], "not a list"), (lambda x: {"sha": COMMIT, "siblings": [1, None, {}]}, "config.json")]:
        p.fresh().hub.edit["org/demo"] = edit
        refused(p, p.run("org/demo"), says, "a list that is wrong")

    # a link in the cache is not followed
    p.fresh()
    os.makedirs(p.folder())
    target = os.path.join(p.root, "target")
    os.symlink(target, os.path.join(p.folder(), "config.json.part"))
    refused(p, p.run("org/demo"), "config.json.part", "a link in place of a file")
    check(not os.path.exists(target), "is not written through")


def full_disk(p, want):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    p.fresh()
    refused(p, p.run("org/demo", preexec_fn=limit), "cannot write model.safetensors.part", "no room for a file")
    ok(p, p.run("org/demo"), want, "with room it goes on")
    check(p.hub.asked("store", "model.safetensors")[-1][3] is not None, "where it ended")


def interrupted(p, want):
    p.fresh().hub.faults["model.safetensors"] = ["slow"]
    proc = subprocess.Popen(p.command("org/demo"), env=p.env(), stderr=subprocess.PIPE, text=True)
    part = os.path.join(p.folder(), "model.safetensors.part")
    for _ in range(400):
        if os.path.exists(part) and os.path.getsize(part) > 0:
            break
        time.sleep(0.02)
    again = p.run("org/demo")
    check("another program" in again.stderr, "two pulls of one file do not mix")
    proc.send_signal(signal.SIGINT)
    message = proc.communicate(timeout=60)[1]
    check(proc.returncode == 1 and "stopped" in message, f"an interrupt stops it: {message.strip()}")
    p.hub.faults.clear()
    p.hub.log.clear()
    ok(p, p.run("org/demo"), want, "and the next one goes on")
    check(p.hub.asked("store", "model.safetensors")[-1][3] is not None, "where the first ended")


def adapters(p):
    p.fresh()
    db = os.path.join(p.root, "a.db")
    base = os.path.join(p.root, "demo.base")
    args = ["--base", base, "--db", db, "--cache", p.cache, "--endpoint", p.hub.endpoint]
    p.hub.faults["adapter_model.safetensors"] = ["cut"]
    out = subprocess.run([LORAD, "adapter", "add", "w", "hub:org/adapter", *args], capture_output=True, text=True,
                         env=p.env(), timeout=120)
    check(out.returncode == 0 and "w@1: adalora" in out.stdout, f"an adapter from the hub: {out.stdout or out.stderr}")
    same = lorad("adapter", "add", "w", os.path.join(DEMO, "adapters", "whitman"), *args)
    check("has this content already" in same, "is the one in the folder")
    for ref, says in [("hub:org/demo", "not an adapter"), ("hub:nothing", "is not ORG/NAME"), ("hub:org/nobody", "404")]:
        r = lorad("adapter", "add", "x", ref, *args, ok=False)
        check(r.returncode == 1 and says in r.stderr, f"refused: {r.stderr.strip()[:120]}")


def fill(hub):
    demo = read_folder(DEMO)
    hub.repos["org/demo"] = dict(demo, **{"README.md": b"# demo", "pytorch_model.bin": b"pickle", ".gitattributes": b"x"})
    hub.repos["org/adapter"] = read_folder(os.path.join(DEMO, "adapters", "whitman"))
    hub.repos["org/pickled"] = {"config.json": demo["config.json"], "pytorch_model.bin": b"x"}
    hub.repos["org/gated"] = {}
    with Folder() as tmp:
        tensors = read_safetensors(os.path.join(DEMO, "model.safetensors"))
        names, shards = sorted(tensors), {}
        for i, file in enumerate(SHARD):
            write_safetensors(os.path.join(tmp, file), {n: tensors[n] for n in names[i::2]})
            shards[file] = open(os.path.join(tmp, file), "rb").read()
    index = {"weight_map": {n: SHARD[i % 2] for i, n in enumerate(names)}}
    hub.repos["org/sharded"] = {n: d for n, d in demo.items() if n != "model.safetensors"} | shards | {
        "model.safetensors.index.json": json.dumps(index).encode()}


with Hub() as hub, Folder() as root:
    fill(hub)
    base = os.path.join(root, "demo.base")
    lorad("import", DEMO, "-o", base, "--name", "demo")
    want = open(base, "rb").read()
    p = Puller(hub, root)
    good_days(p, want)
    bad_days(p, want)
    refusals(p)
    hostile_lists(p, want)
    full_disk(p, want)
    interrupted(p, want)
    adapters(p)
done()
