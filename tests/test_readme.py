"""test_readme.py - every command block of README.md is run, in order, in a copy of the project.

Blocks fenced with ```sh are run by one shell each with `set -e`; a block whose first line holds
`make run` is started in the background and stays until the end.  Blocks fenced with ```sh skip are
not run (they need root or a download)."""
import os
import re
import signal
import subprocess
import time
import urllib.request

from harness import *


def blocks(text):
    return re.findall(r"^```sh *(\w*)\n(.*?)^```", text, re.M | re.S)


def wait_until_ready(url, seconds):
    for _ in range(int(seconds * 10)):
        try:
            if urllib.request.urlopen(url, timeout=2).status == 200:
                return True
        except OSError:
            time.sleep(0.1)
    return False


if SANITIZED:
    skip("the README is run with the plain program")
    done()

with Folder() as root:
    copy = os.path.join(root, "lorad")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = listed.stdout.split("\n") if listed.returncode == 0 else []
    for f in filter(None, files):
        if os.path.exists(os.path.join(ROOT, f)):
            os.makedirs(os.path.join(copy, os.path.dirname(f)), exist_ok=True)
            shutil.copy2(os.path.join(ROOT, f), os.path.join(copy, f))
    # the program as it was built: compiling once more proves nothing here
    shutil.copytree(os.path.dirname(LORAD), os.path.join(copy, "build"), ignore=shutil.ignore_patterns("asan", "tsan", "tests", "aarch64", "fuzz"))
    env = {**os.environ, "LORAD_SHARED": SHARED}
    env.pop("LORAD", None)
    servers = []
    text = open(os.path.join(ROOT, "README.md")).read()
    found = blocks(text)
    check(len(found) >= 4, f"README.md has {len(found)} command blocks")
    port = str(free_port())  # 8085 may be taken where the tests run
    for flag, block in found:
        block = block.replace("8085", port)
        title = block.strip().splitlines()[0]
        if flag == "skip" or "make test" in block or "git clone" in block:
            continue
        if re.search(r"^make run|lorad serve", block, re.M):
            servers.append(subprocess.Popen(["bash", "-ec", block], cwd=copy, env=env, start_new_session=True,
                                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            check(wait_until_ready(f"http://127.0.0.1:{port}/ready", 120), f"`{title}` serves on port {port}")
            continue
        r = subprocess.run(["bash", "-eo", "pipefail", "-c", block], cwd=copy, env=env, capture_output=True, text=True, timeout=600)
        bad = r.returncode != 0 or '"error"' in r.stdout
        check(not bad, f"`{title}`" + (f": exit {r.returncode}\n{r.stdout[-2000:]}{r.stderr[-2000:]}" if bad else ""))
    for s in servers:
        os.killpg(s.pid, signal.SIGTERM)
        s.wait(timeout=60)
done()
