"""soak_watch.py - what the soak test reads of the server from outside while it runs: memory, threads,
descriptors, sizes of files, /metrics; and what must hold of them at the end."""
import os
import re
import statistics


def metrics(text):
    """{name: value} of Prometheus' text; buckets as {name: [(end, count up to it)]}."""
    values, buckets = {}, {}
    for line in text.splitlines():
        m = re.fullmatch(r'([\w:]+)(?:\{le="([^"]*)"\})? (\S+)', line)
        if m and m[2]:
            buckets.setdefault(m[1].removesuffix("_bucket"), []).append((float(m[2]), int(m[3])))
        elif m:
            values[m[1]] = float(m[3])
    return values, buckets


def quantile(buckets, q):
    """The end of the bucket in which it lies."""
    want = q * buckets[-1][1]
    return next(end for end, n in buckets if n >= want)


class Watch:
    """Samples of one process and its database; times are seconds since the load began."""

    def __init__(self, pid, db):
        self.pid, self.db, self.samples = pid, db, []

    def _size(self, suffix):
        try:
            return os.path.getsize(self.db + suffix)
        except OSError:
            return 0

    def _name(self, task):
        try:
            with open(f"/proc/{self.pid}/task/{task}/comm") as f:
                return f.read().strip()
        except OSError:  # it has ended
            return ""

    def sample(self, at):
        s = {"at": at}
        with open(f"/proc/{self.pid}/status") as f:
            status = f.read()
        s["rss"] = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024
        s["threads"] = int(re.search(r"Threads:\s+(\d+)", status)[1])
        with open(f"/proc/{self.pid}/smaps_rollup") as f:
            s["pss"] = int(re.search(r"Pss:\s+(\d+)", f.read())[1]) / 1024
        s["training"] = any(self._name(t) == "lorad-train" for t in os.listdir(f"/proc/{self.pid}/task"))
        s["fds"] = len(os.listdir(f"/proc/{self.pid}/fd"))
        s["db"], s["wal"] = self._size("") / 2**20, self._size("-wal") / 2**20
        self.samples.append(s)
        return s

    def medians(self, what, seconds, training):
        """Of 20-40 % and of 80-100 % of the run, of the samples with or without a job that runs (which takes memory
        of its own); None if there are too few."""
        def of(begin, end):
            return [s[what] for s in self.samples if begin * seconds <= s["at"] <= end * seconds and s["training"] == training]
        a, b = of(0.2, 0.4), of(0.8, 1.0)
        return (statistics.median(a), statistics.median(b)) if min(len(a), len(b)) >= 5 else None

    def largest(self, what):
        return max(s[what] for s in self.samples)
