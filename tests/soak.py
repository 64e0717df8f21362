"""soak.py - a real server under mixed load for SOAK_SECONDS (1800), as `make soak`.

Three tenants with more adapters than the cache holds; arrivals that do not wait for answers, in bursts and
lulls; chat and completions, streamed and not, prompts of a few and of thousands of tokens, clients that hang
up or read slowly, bad requests; adapters that are uploaded, replaced, promoted and deleted meanwhile; fine-tuning
jobs without end, paused, cancelled and asked; too few KV pages, so that sequences are preempted.

Every answer has to be, byte for byte, what the quiet server gave before.  At the end: no 5xx, memory, threads,
descriptors and files as they were after warming up, no wait of a running sequence of more than two steps (the
server's own measurement), a clean end.  SOAK_SEED chooses another load."""
import asyncio
import glob
import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback

from harness import *
from soak_http import Client, Incomplete, form
from soak_watch import Watch, metrics, quantile

SECONDS = float(os.environ.get("SOAK_SECONDS", "1800"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
TENANTS = ("default", "acme", "umbrella")
PER_TENANT = 20      # adapters of a tenant that stay
HOT = 3              # of these, asked most of the time
CACHED = 8           # so many adapters fit the cache
CONTEXT = 8192       # of the demo base, whose angles reach that far
KV_TOKENS = 8192     # for all sequences together
MEMORY_MIB = 12      # what memory may differ by after warming up
OUTSTANDING = 400    # requests under way at most: the load waits rather than running out of sockets

WORDS = ("the a sea ship captain night light king queen said went home old little wind stone river love death "
         "my your thou hast sweet dark morning song").split()


class Wrong(Exception):
    """An answer that is not what it has to be."""


# --- what is asked ----------------------------------------------------------------------------------
class Case:
    """A request whose answer never changes."""

    def __init__(self, tenant, kind, body, chat=False):
        self.tenant, self.kind, self.body = tenant, kind, body
        self.path = "/v1/chat/completions" if chat else "/v1/completions"
        self.want = None

    @staticmethod
    def whole(answer):
        return answer.json()["choices"]

    @staticmethod
    def text(choices):
        return [(c["text"] if "text" in c else c["message"]["content"], c["finish_reason"]) for c in choices]

    @staticmethod
    def streamed(answer, n):
        """The same from a stream."""
        text, finish = [""] * n, [None] * n
        for e in answer.events():
            if "error" in e:
                raise Wrong(f"an error in a stream: {e}")
            for c in e["choices"]:
                text[c["index"]] += c["text"] if "text" in c else c["delta"].get("content") or ""
                finish[c["index"]] = c["finish_reason"] or finish[c["index"]]
        return list(zip(text, finish))


def prompt(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def make_cases(rng, models):
    """models: {tenant: names of adapters that stay}; every tenant also asks the base."""
    cases = []

    def add(tenant, kind, model, words, tokens, chat=False, **more):
        body = {"model": model, "max_tokens": tokens, "temperature": 0, **{"ignore_eos": rng.random() < 0.5, **more}}
        text = prompt(rng, words)
        body.update({"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text})
        cases.append(Case(tenant, kind, body, chat))

    for tenant, names in models.items():
        for i, name in enumerate(["demo", *names]):
            hot = i <= HOT
            for k in range(4 if hot else 1):
                more = {"temperature": 0.8, "seed": 100 + i, "top_p": 0.95} if (i + k) % 4 == 3 else {}
                chat = (i + k) % 3 == 1
                if (i + k) % 5 == 2:
                    more.update({"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2})
                add(tenant, "hot" if hot else "cold", name, rng.randint(2, 40), rng.randint(8, 64), chat, **more)
        for k in range(3):
            add(tenant, "middle", rng.choice(["demo", *names]), rng.randint(150, 500), 48, chat=k == 1)
            pair = [{"name": n, "weight": rng.choice([0.25, 0.5, 1])} for n in rng.sample(names, 2)]
            add(tenant, "other", "demo", 12, 24, adapters=pair)
        add(tenant, "other", names[0], 10, 24, n=3, temperature=1, seed=5)
        add(tenant, "other", names[1], 40, 2, echo=True, logprobs=1)
        for words in (1500, 4000):
            add(tenant, "long", rng.choice(["demo", *names]), words, 32)
        for _ in range(2):
            add(tenant, "growing", rng.choice(["demo", *names[:HOT]]), 20, 800, ignore_eos=True)
    return cases


BAD = [  # path, body, status
    ("/v1/completions", b"{", 400),
    ("/v1/completions", b"\xff\xfe", 400),
    ("/v1/completions", {"model": "demo"}, 400),
    ("/v1/completions", {"model": "nothing-of-that-name", "prompt": "x"}, 404),
    ("/v1/completions", {"model": "demo", "prompt": "x", "temperature": "hot"}, 400),
    ("/v1/completions", {"model": "demo", "prompt": "x", "max_tokens": -1}, 400),
    ("/v1/completions", {"model": "demo", "prompt": "x", "no_such_field": 1}, 400),
    ("/v1/completions", {"model": "demo", "prompt": "sea " * 20000, "max_tokens": 4}, 400),
    ("/v1/completions", {"model": "demo", "prompt": "x", "adapters": [{"name": "none", "weight": 1}]}, 404),
    ("/v1/chat/completions", {"model": "demo", "messages": []}, 400),
    ("/v1/chat/completions", {"model": "demo", "messages": [{"role": "nobody", "content": 7}]}, 400),
    ("/v1/adapters/x/promote", {"version": 1}, 404),
    ("/v1/adapters", form({"name": "bad", "config": ("c", b"{}"), "weights": ("w", b"\x08" + b"\0" * 40)}), 400),
    ("/v1/adapters", form({"name": "../bad", "config": ("c", b"{}"), "weights": ("w", b"x")}), 400),
    ("/v1/files", form({"purpose": "fine-tune", "file": ("f.jsonl", b"no json\n")}), 400),
    ("/v1/fine_tuning/jobs", {"model": "demo", "training_file": "file-nothere"}, 400),
    ("/v1/nowhere", {}, 404),
]


# --- the load -----------------------------------------------------------------------------------------
class Soak:
    def __init__(self, server, root, base, db, keys):
        self.server, self.root, self.base, self.db, self.keys = server, root, base, db, keys
        self.rng = random.Random(SEED)
        self.http = Client(server.port)
        self.under_way, self.wrong, self.counts = set(), [], {}
        self.began = time.monotonic()
        self.seconds = []  # that right answers took

    # helpers
    def count(self, what, n=1):
        self.counts[what] = self.counts.get(what, 0) + n

    def now(self):
        return time.monotonic() - self.began

    def bad(self, what):
        self.count("wrong")
        if len(self.wrong) < 20:
            self.wrong.append(f"at {self.now():.1f} s: {what}"[:1500])
            print("WRONG   " + self.wrong[-1], flush=True)

    async def call(self, method, path, body=None, tenant="default", ok=(200,), retry=True, **how):
        """The answer; what is busy is asked again."""
        if isinstance(body, tuple):
            body, kind = body
            how["headers"] = {"Content-Type": kind, **how.get("headers", {})}
        while True:
            a = await self.http.call(method, path, body, key=self.keys[tenant], **how)
            if a is None:
                return None
            if a.status == 429 and 429 not in ok:
                self.count("busy")
                if "retry-after" not in a.headers:
                    raise Wrong(f"429 without Retry-After at {path}")
                if not retry:
                    return None
                await asyncio.sleep(self.rng.uniform(0.2, 1))
                continue
            if a.status not in ok:
                raise Wrong(f"{method} {path}: {a.status} {a.body[:600]} (wanted {ok})")
            return a

    async def case(self, c, stream=None, **how):
        """Ask; raises Wrong if it is not the answer."""
        stream = self.rng.random() < 0.5 if stream is None else stream
        n = c.body.get("n", 1)
        begin = time.monotonic()
        a = await self.call("POST", c.path, {**c.body, "stream": True} if stream else c.body, c.tenant, **how)
        if a is None:
            return
        got, want = (c.streamed(a, n), c.text(c.want)) if stream else (c.whole(a), c.want)
        if got != want:
            raise Wrong(f"{c.kind} of {c.tenant}, stream {stream}, {json.dumps(c.body)[:300]}: got {got!r:.400}, not {want!r:.400}")
        self.count(c.kind)
        self.seconds.append(time.monotonic() - begin)

    async def guard(self, what, awaitable):
        try:
            await awaitable
        except (Wrong, Incomplete, OSError, ValueError, KeyError) as e:
            self.bad(f"{what}: {e!r}" if not isinstance(e, Wrong) else f"{what}: {e}")
        except Exception:
            self.bad(f"{what}: {traceback.format_exc()}")

    # one arrival
    async def hang_up(self, c):
        body = {**c.body, "stream": self.rng.random() < 0.6, "max_tokens": 200}
        how = {"hang_up": self.rng.choice([-1, 0, 1, 400, 2000])} if self.rng.random() < 0.4 else {}
        try:
            await asyncio.wait_for(self.http.call("POST", c.path, body, key=self.keys[c.tenant], **how),
                                   self.rng.choice([0.01, 0.05, 0.2, 0.5]))
        except asyncio.TimeoutError:
            pass
        self.count("hung up")

    async def refused(self):
        path, body, status = self.rng.choice(BAD)
        if self.rng.random() < 0.1:
            a = await self.http.call("POST", "/v1/completions", b"{}", key="lorad_no-such-key")
            if a.status != 401:
                raise Wrong(f"a foreign key: {a.status}")
        else:
            a = await self.call("POST", path, body, self.rng.choice(TENANTS), ok=(status,))
            if a.status != 200 and "message" not in a.json()["error"]:
                raise Wrong(f"an error without a message: {a.body}")
        self.count("refused")

    async def look(self):
        tenant = self.rng.choice(TENANTS)
        path = self.rng.choice(["/v1/models", "/v1/adapters?limit=7", "/v1/files", "/v1/fine_tuning/jobs?limit=5",
                                f"/v1/adapters/{tenant[0]}3", f"/v1/adapters/{tenant[0]}3/versions", "tokenize"])
        if path == "tokenize":
            text = prompt(self.rng, 30)
            a = await self.call("POST", "/tokenize", {"content": text}, tenant)
            b = await self.call("POST", "/detokenize", {"tokens": a.json()["tokens"]}, tenant)
            if b.json()["content"].strip() != text:
                raise Wrong(f"tokens of {text!r} give {b.body}")
        else:
            a = await self.call("GET", path, None, tenant, fresh=False)
            a.json()
        self.count("looked")

    async def arrival(self):
        x = self.rng.random()
        if x < 0.10:
            await self.hang_up(self.rng.choice(self.rng.choice([self.of["hot"], self.of["cold"], self.of["middle"]])))
        elif x < 0.15:
            await self.refused()
        elif x < 0.20:
            await self.look()
        else:
            kind = self.rng.choices(["hot", "cold", "middle", "other", "long"], [50, 30, 8, 9, 1.5])[0]
            await self.case(self.rng.choice(self.of[kind]), retry=False, fresh=self.rng.random() < 0.5,
                            pauses=10 if self.rng.random() < 0.02 else 0)

    def launch(self, request):
        t = asyncio.create_task(self.guard("a request", request))
        self.under_way.add(t)
        t.add_done_callback(self.under_way.discard)

    async def arrivals(self, capacity):
        """Poisson, at a rate that changes: lulls, usual times, bursts.  `capacity`: requests/s when all go well."""
        while self.now() < SECONDS:
            rate, length = self.rng.choice([(0.1, (3, 10)), (0.45, (5, 15)), (0.6, (5, 15)), (2.5, (0.5, 1.5))])
            end = min(SECONDS, self.now() + self.rng.uniform(*length))
            while self.now() < end:
                await asyncio.sleep(self.rng.expovariate(rate * capacity))
                if len(self.under_way) >= OUTSTANDING:
                    self.count("held back")
                    continue
                self.launch(self.arrival())

    async def volleys(self):
        """More sequences that grow than there are pages for."""
        while self.now() < SECONDS:
            for _ in range(14):
                self.launch(self.case(self.rng.choice(self.of["growing"])))
            await asyncio.sleep(self.rng.uniform(8, 30))

    # adapters that come and go
    async def churn(self, number):
        tenant, name = TENANTS[number % len(TENANTS)], f"churn-{number}"

        async def answers(model, content):
            await self.case(Case.of(self.contents[content]["short"], tenant, model))

        while self.now() < SECONDS:
            one, two = self.rng.sample(range(len(self.contents)), 2)
            if self.rng.random() < 0.5:
                v1 = await self.call("POST", "/v1/adapters", form({"name": name, **self.contents[one]["form"]}), tenant, ok=(201,))
            else:
                v1 = await self.call("PUT", f"/v1/adapters/{name}", self.contents[one]["tar"], tenant, ok=(201,))
            v1 = v1.json()["id"]
            await answers(name, one)
            # a stream that runs while its version is replaced
            begun = asyncio.Event()
            long = asyncio.create_task(self.case(Case.of(self.contents[one]["long"], tenant, name), stream=True, began=begun))
            await asyncio.wait([long, asyncio.create_task(begun.wait())], return_when=asyncio.FIRST_COMPLETED)
            v2 = (await self.call("PUT", f"/v1/adapters/{name}", self.contents[two]["tar"], tenant, ok=(201,))).json()["id"]
            await answers(name, two)
            await answers(v1, one)
            await self.call("POST", f"/v1/adapters/{v1}/promote", {}, tenant)
            await answers(name, one)
            await self.call("DELETE", f"/v1/adapters/{v2}", None, tenant)
            await self.call("POST", "/v1/completions", {"model": v2, "prompt": "x"}, tenant, ok=(404,))
            got = await self.call("GET", f"/v1/adapters/{name}/download", None, tenant)
            with tarfile.open(fileobj=io.BytesIO(got.body)) as tar:
                tar.getmember("adapter_model.safetensors")
            await long
            # and one that runs while all is deleted
            begun = asyncio.Event()
            long = asyncio.create_task(self.case(Case.of(self.contents[one]["long"], tenant, name), stream=True, began=begun))
            await asyncio.wait([long, asyncio.create_task(begun.wait())], return_when=asyncio.FIRST_COMPLETED)
            await self.call("DELETE", f"/v1/adapters/{name}", None, tenant)
            await self.call("POST", "/v1/completions", {"model": name, "prompt": "x"}, tenant, ok=(404,))
            await long
            self.count("adapters replaced and deleted")
            await asyncio.sleep(self.rng.uniform(0, 2))

    # fine-tuning
    async def train_once(self, tenant, method, end):
        """One job; `end` is done, pause, or cancel.  Returns the answers of its result and of a checkpoint."""
        file = (await self.call("POST", "/v1/files", form({"purpose": "fine-tune", "file": ("q.jsonl", self.data)}), tenant)).json()["id"]
        job = (await self.call("POST", "/v1/fine_tuning/jobs", {
            "model": "demo", "training_file": file, "suffix": "trained", "method":
            {"type": method, method: {"rank": 4, "batch_size": 4, "max_steps": 30, "learning_rate": 3e-3,
                                      "checkpoint_every": 10}}}, tenant)).json()["id"]
        path, asked, answers = f"/v1/fine_tuning/jobs/{job}", False, None
        listener = asyncio.create_task(self.listen(path, tenant, end != "done" and self.rng.random() < 0.5))
        at = self.rng.randint(1, 25)
        while True:
            j = (await self.call("GET", path, None, tenant)).json()
            own = j["lorad"]
            if own["status"] in ("succeeded", "failed", "cancelled"):
                break
            if not asked and end != "done" and own["step"] >= at:
                asked = True
                await self.call("POST", path + "/" + end, {}, tenant, ok=(200, 409))
            if own["status"] == "paused":
                await asyncio.sleep(self.rng.uniform(0, 1))
                await self.call("POST", path + "/resume", {}, tenant)
            await asyncio.sleep(0.05)
        if own["status"] == "failed" or (own["status"] == "cancelled") != (end == "cancel" and own["status"] == "cancelled"):
            raise Wrong(f"a job of {method} that was to be {end}: {json.dumps(j)[:800]}")
        if own["status"] == "succeeded":
            points = (await self.call("GET", path + "/checkpoints", None, tenant)).json()["data"]
            models = ["trained", j["fine_tuned_model"], points[-1]["fine_tuned_model_checkpoint"]]
            answers = [Case.whole(await self.call("POST", "/v1/completions", {
                "model": m, "prompt": "The boat is blue. What is the boat?", "max_tokens": 6, "temperature": 0}, tenant))
                for m in models]
            await self.call("GET", path + "/metrics", None, tenant)
            await self.call("DELETE", "/v1/adapters/trained", None, tenant)
        await listener
        await self.call("DELETE", path, None, tenant)
        await self.call("DELETE", f"/v1/files/{file}", None, tenant)
        self.count(f"jobs {own['status']}")
        return answers

    async def listen(self, path, tenant, impatient):
        """To a job's events, until it has ended or for a moment."""
        a = await self.call("GET", path + "/events?stream=true", None, tenant, hang_up=300 if impatient else None)
        if a is not None and not any(e["type"] == "message" for e in a.events()):
            raise Wrong(f"events of a job: {a.body[:400]}")
        self.count("jobs listened to")

    async def train(self):
        while self.now() < SECONDS:
            method = self.rng.choice(list(self.trained))
            end = self.rng.choice(["done", "pause", "cancel"])
            answers = await self.train_once(self.rng.choice(TENANTS), method, end)
            if answers is not None and answers != self.trained[method]:
                raise Wrong(f"a job of {method} made another adapter than before: {answers!r:.500}, not {self.trained[method]!r:.500}")

    # another process at the same database
    async def command(self, *args):
        p = await asyncio.create_subprocess_exec(LORAD, *args, "--db", self.db, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
        out, _ = await p.communicate()
        if p.returncode != 0:
            raise Wrong(f"lorad {' '.join(args)}: exit {p.returncode}: {out[-500:]}")

    async def commands(self):
        while self.now() < SECONDS:
            i = self.rng.randrange(len(self.contents))
            await self.command("adapter", "add", "typed", os.path.join(self.root, f"content{i}"), "--base", self.base)
            await self.case(Case.of(self.contents[i]["short"], "default", "typed"))
            await self.command("adapter", "list")
            await self.command("adapter", "rm", "typed")
            await self.call("POST", "/v1/completions", {"model": "typed", "prompt": "x"}, ok=(404,))
            self.count("adapters added and removed by command")
            await asyncio.sleep(self.rng.uniform(1, 8))

    # watching
    async def poll(self, watch):
        last = 0
        while self.now() < SECONDS:
            t = time.monotonic()
            if (await self.call("GET", "/health", fresh=False)).json().get("status") != "ok":
                raise Wrong("/health is not ok")
            self.count("slowest /health, ms", max(0, int(1000 * (time.monotonic() - t)) - self.counts.get("slowest /health, ms", 0)))
            await self.call("GET", "/ready")
            values, _ = metrics((await self.call("GET", "/metrics", fresh=False)).body.decode())
            s = watch.sample(self.now())
            if self.now() - last >= 10:
                last = self.now()
                print(f"{last:6.0f} s  {sum(self.counts.get(k, 0) for k in self.of):7} right  {len(self.under_way):3} under way"
                      f"  {values['vllm:num_requests_running']:3.0f} run {values['vllm:num_requests_waiting']:3.0f} wait"
                      f"  rss {s['rss']:.1f} pss {s['pss']:.1f} MiB  {s['threads']} threads {s['fds']:3} fds  db {s['db']:.1f} wal {s['wal']:.1f} MiB"
                      f"  gap {1000 * values['lorad_running_gap_seconds_max']:.0f} ms step {1000 * values['lorad_step_seconds_max']:.0f} ms", flush=True)
            await asyncio.sleep(0.5)

    # from beginning to end
    async def quiet(self, models):
        """The answers, each alone; and how many a second there are at best."""
        self.cases = make_cases(random.Random(SEED), models)
        self.of = {}
        for c in self.cases:
            self.of.setdefault(c.kind, []).append(c)
            c.want = c.whole(await self.call("POST", c.path, c.body, c.tenant))
        for content in self.contents:
            await self.call("POST", "/v1/adapters", form({"name": "content", **content["form"]}), ok=(201,))
            for c in (content["short"], content["long"]):
                c.want = c.whole(await self.call("POST", c.path, c.body, c.tenant))
            await self.call("DELETE", "/v1/adapters/content")
        answers = [json.dumps(c.want) for c in self.cases + [x["short"] for x in self.contents]]
        check(len(set(answers)) > 0.95 * len(answers), f"{len(answers)} answers, which differ from each other")
        self.trained = {m: await self.train_once("default", m, "done") for m in ("lora", "adalora", "dora")}
        begin, n = time.monotonic(), 0

        async def worker():
            nonlocal n
            while time.monotonic() < begin + 3:
                await self.case(self.rng.choice(self.of["hot"] + self.of["cold"]))
                n += 1
        await asyncio.gather(*[worker() for _ in range(8)])
        return n / (time.monotonic() - begin)

    async def load(self, watch, capacity):
        self.counts, self.seconds = {}, []
        self.began = time.monotonic()
        await asyncio.gather(self.arrivals(capacity), self.volleys(), self.guard("watching", self.poll(watch)), self.guard("training", self.train()),
                             self.guard("the command line", self.commands()),
                             *[self.guard(f"churn {i}", self.churn(i)) for i in range(4)])
        while self.under_way:
            await asyncio.wait(self.under_way)

    async def after(self):
        """Everything once more, quiet again."""
        for c in self.cases:
            await self.guard("afterwards", self.case(c))


def of(case, tenant, model):
    c = Case(tenant, "churn", {**case.body, "model": model})
    c.want = case.want
    return c


Case.of = staticmethod(of)


# --- making it all -------------------------------------------------------------------------------------
def long_demo(folder):
    """The demo base with room for long prompts."""
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("adapters", "make"))
    path = os.path.join(folder, "config.json")
    with open(path) as f:
        config = json.load(f)
    config["max_position_embeddings"] = CONTEXT
    with open(path, "w") as f:
        json.dump(config, f)
    return Shape(config)


def adapter(folder, shape, seed):
    random_adapter(folder, shape, seed, ["lora", "rslora", "adalora"][seed % 3], rank=[4, 8, 16][seed // 3 % 3],
                   dtype=["F32", "BF16", "F16"][seed // 9 % 3], strength=0.3)
    return folder


def read(folder):
    """A content for churn: form, tar."""
    files = {n: open(os.path.join(folder, n), "rb").read() for n in ("adapter_config.json", "adapter_model.safetensors")}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return {"form": {"config": ("adapter_config.json", files["adapter_config.json"]),
                     "weights": ("adapter_model.safetensors", files["adapter_model.safetensors"])},
            "tar": out.getvalue(),
            "short": Case("default", "churn", {"model": "content", "prompt": "The king went", "max_tokens": 12, "temperature": 0}),
            "long": Case("default", "churn", {"model": "content", "prompt": "The sea was", "max_tokens": 150, "temperature": 0,
                                              "ignore_eos": True})}


def questions(n):
    colours, things = ["red", "blue", "green", "black", "white"], ["door", "boat", "hat", "bird", "stone", "book", "cup"]
    return "".join(json.dumps({"prompt": f"The {things[i % 7]} is {colours[i % 5]}. What is the {things[i % 7]}?",
                               "completion": f" It is {colours[i % 5]}."}) + "\n" for i in range(n)).encode()


def judge(soak, watch, text):
    values, buckets = metrics(text)
    print("  " + ", ".join(f"{k}: {v}" for k, v in sorted(soak.counts.items())))
    check(not soak.counts.get("wrong"), f"{sum(soak.counts.get(k, 0) for k in soak.of)} answers, all of them right")
    for name, least in (("lorad_preemptions_total", 1), ("lorad_cancelled_total", 1), ("lorad_adapter_evictions_total", 20)):
        check(values[name] >= least, f"{name} is {values[name]:.0f}")
    check(soak.counts.get("adapters replaced and deleted", 0) >= 1 and soak.counts.get("jobs succeeded", 0) >= 1, "adapters came and went, jobs succeeded")
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "lorad_adapters_pinned"):
        check(values[name] == 0, f"afterwards {name} is {values[name]:g}")
    took = sorted(soak.seconds)
    print("  answers took " + ", ".join(f"p{q * 100:g} {took[int(q * (len(took) - 1))]:.3f} s" for q in (0.5, 0.9, 0.99, 1)))
    step, decode, gap, between = (values[f"lorad_{x}_seconds_max"] for x in ("step", "decode_step", "running_gap", "between_steps"))
    for what in ("lorad_step_seconds", "lorad_between_steps_seconds", "lorad_running_gap_seconds", "vllm:inter_token_latency_seconds"):
        print(f"  {what}: " + ", ".join(f"p{q * 100:g} <= {1000 * quantile(buckets[what], q):g} ms" for q in (0.5, 0.9, 0.99, 0.999)) +
              f", longest {1000 * values[what + '_max']:.1f} ms, {values[what + '_count']:.0f} in all")
    check(gap <= 2 * decode, f"a running sequence waited {1000 * gap:.1f} ms for a token at most; the longest step while any did took {1000 * decode:.1f} ms")
    check(between <= step, f"between two steps passed {1000 * between:.1f} ms at most")
    for what in ("threads", "fds"):
        a, b = watch.samples[0][what], watch.samples[-1][what]
        check(b <= a + 2, f"{what} before the load {a}, afterwards {b}")
    for what, bound, unit in (("rss", MEMORY_MIB, "MiB"), ("pss", MEMORY_MIB, "MiB"), ("wal", 16, "MiB"), ("db", 16, "MiB")):
        if SANITIZED and what in ("rss", "pss"):
            continue
        medians = [(t, watch.medians(what, SECONDS, t)) for t in (False, True)]
        if not any(m for _, m in medians):
            if SECONDS < 120:
                skip(f"{what}: too few samples in {SECONDS:.0f} s")
            else:
                check(False, f"{what}: too few samples to compare")
        for training, m in medians:
            if m is not None:
                check(m[1] - m[0] <= bound, f"{what} after warming up, {'with a job' if training else 'without a job'}: "
                      f"median {m[0]:.1f} -> {m[1]:.1f} {unit} (largest {watch.largest(what):.1f})")


async def run(server, root, base, db, models, keys, contents):
    soak = Soak(server, root, base, db, keys)
    soak.contents, soak.data = contents, questions(40)
    capacity = await soak.quiet(models)
    print(f"the quiet server answers {capacity:.0f} requests a second; {SECONDS:.0f} s of load", flush=True)
    watch = Watch(server.proc.pid, db)
    soak.http.close()
    await asyncio.sleep(0.5)
    watch.sample(-1)  # no connections
    await soak.load(watch, capacity)
    await soak.after()
    text = (await soak.call("GET", "/metrics")).body.decode()
    soak.http.close()
    for _ in range(60):  # until the server has noticed
        if watch.sample(SECONDS + 1)["fds"] <= watch.samples[0]["fds"]:
            break
        await asyncio.sleep(0.5)
    judge(soak, watch, text)


def main(root):
    base, db = os.path.join(root, "demo.base"), os.path.join(root, "x.db")
    shape = long_demo(os.path.join(root, "demo"))
    lorad("import", os.path.join(root, "demo"), "-o", base, "--name", "demo")
    keys = {}
    for t in TENANTS:
        if t != "default":
            lorad("tenant", "add", t, "--db", db)
        keys[t] = lorad("key", "create", "--tenant", t, "--db", db).split()[-1]
    contents = [read(adapter(os.path.join(root, f"content{i}"), shape, 1000 + i)) for i in range(5)]
    folder = adapter(os.path.join(root, "size"), shape, 6)
    size = os.path.getsize(os.path.join(folder, "adapter_model.safetensors"))
    with Server(base, db, "--adapter-cache", CACHED * size, "--kv", KV_TOKENS * shape.L * shape.G * shape.hd * 4,
                "--max-seqs", 24, "--max-queue", 64, "--train-memory", "128M") as server:
        models = {}
        for number, t in enumerate(TENANTS):
            models[t] = [f"{t[0]}{i}" for i in range(PER_TENANT)]
            for i, name in enumerate(models[t]):
                # the first of each tenant have the same bytes: one entry of the cache
                status, answer = server.upload(name, adapter(folder, shape, number * PER_TENANT + i if i > 0 else 0), keys[t])
                if status != 201:
                    raise RuntimeError(f"{name}: {status} {answer}")
        try:
            asyncio.run(run(server, root, base, db, models, keys, contents))
        except Exception:
            print(server.output()[-3000:])
            raise
        check(server.proc.poll() is None, "the server still runs")
        check(server.stop() == 0, "and ends cleanly")
        said = server.output()
    check(lorad("check", "--db", db, ok=False).returncode == 0, "lorad check finds nothing")
    check(not glob.glob(db + ".spool/*"), "no upload is left in the spool")
    check(not glob.glob(os.path.join(tempfile.gettempdir(), "lorad-spool-*")), "nor in the folder for temporary files")
    if failed:
        print(said[-3000:])


signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
with Folder() as root_folder:
    main(root_folder)
done()
