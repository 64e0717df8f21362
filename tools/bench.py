"""`make bench`: `lorad bench` with its arguments, beside what PyTorch reaches on this machine.

    bench.py BUILD [ARGUMENT...]

PyTorch's fine-tuning step is measured first where python3-torch is installed (tests/bench_train_torch.py),
and handed on as a peer's figure.  The folder with reference models is LORAD_SHARED or --shared.  Everything
measured ends up in BUILD/bench.json, unless --json names another file.
"""
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PYTHON = "/usr/bin/python3"  # Debian's, which has python3-torch
build, args = sys.argv[1], sys.argv[2:]
lorad = os.path.join(build, "lorad")


def torch_peers(shapes):
    """Arguments of lorad bench; none where PyTorch is missing or fails."""
    if subprocess.run([PYTHON, "-c", "import torch"], capture_output=True).returncode != 0:
        print("PyTorch is not there (python3-torch): the rows that compare with it stay open", file=sys.stderr)
        return []
    shape = next(s for s in shapes if s["name"] == "1.1b")
    tokens = 64 if "--quick" in args else 512
    numbers = [shape[k] for k in ("L", "D", "H", "G", "hd", "F", "V")] + [tokens, len(os.sched_getaffinity(0))]
    print("PyTorch: fine-tuning steps of the 1.1B shape", file=sys.stderr)
    run = subprocess.run([PYTHON, os.path.join(ROOT, "tests", "bench_train_torch.py"), *map(str, numbers)],
                         capture_output=True, text=True)
    if run.returncode != 0:
        print(f"PyTorch failed: {run.stderr.strip()[-300:]}", file=sys.stderr)
        return []
    seconds, peak = map(float, run.stdout.split())
    return ["--peer", f"train.1.1b.pytorch={tokens / seconds}",
            "--peer", f"train.1.1b.memory.pytorch={peak / 2 ** 20}"]


def main():
    listed = json.loads(subprocess.run([lorad, "bench", "--list", "--json", "-"], check=True,
                                       capture_output=True).stdout)
    named = {a.split("=")[-1] for a in args} & {p["name"] for p in listed["parts"]}
    more = []
    # --shape LIST or --shape=LIST: PyTorch is asked for the one shape that a target compares.
    chosen = [v for a, v in zip(args, args[1:]) if a == "--shape"] + [a[8:] for a in args if a.startswith("--shape=")]
    compared = not chosen or "1.1b" in chosen[0].split(",")
    if "--list" not in args and "--help" not in args:
        if not any(a == "--json" or a.startswith("--json=") for a in args):
            more += ["--json", os.path.join(build, "bench.json")]
        if compared and (not named or "train" in named):
            more += torch_peers(listed["shapes"])
    sys.stdout.flush()
    os.execv(lorad, [lorad, "bench", *more, *args])


main()
