"""test_openai.py - npm's `openai` client trains, watches, cancels and chats (test_openai.mjs).  Needs node, and
the package: in the folder LORAD_OPENAI, or fetched once into build/openai if there is an npm."""
import shutil
import subprocess

from harness import *

PACKAGE = "openai@7.59.0"


def client_folder():
    """A folder with node_modules/openai, or None and a loud line."""
    folder = os.environ.get("LORAD_OPENAI", os.path.join(ROOT, "build", "openai"))
    have = os.path.isdir(os.path.join(folder, "node_modules", "openai"))
    if shutil.which("node") is None:
        return skip("npm's openai client: there is no node")
    if not have and shutil.which("npm") is not None:
        os.makedirs(folder, exist_ok=True)
        try:
            have = subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", folder, PACKAGE],
                                  capture_output=True, timeout=120).returncode == 0
        except subprocess.TimeoutExpired:
            have = False
    return folder if have else skip(f"npm's openai client: {PACKAGE} is not in {folder} and could not be fetched")


with Folder() as root:
    folder = client_folder()
    if folder:
        base, text, script = (os.path.join(root, x) for x in ("demo.base", "ships.jsonl", "test_openai.mjs"))
        lorad("import", DEMO, "-o", base, "--name", "demo")
        with open(text, "w") as f:
            for i in range(12):
                f.write(json.dumps({"messages": [{"role": "user", "content": f"What is the colour of ship {i}?"},
                                                 {"role": "assistant", "content": f"Ship {i} is blue."}]}) + "\n")
        shutil.copy(os.path.join(ROOT, "tests", "test_openai.mjs"), script)
        os.symlink(os.path.join(os.path.abspath(folder), "node_modules"), os.path.join(root, "node_modules"))
        with Server(base, os.path.join(root, "x.db")) as server:
            r = subprocess.run(["node", script, f"http://127.0.0.1:{server.port}/v1", text], capture_output=True, text=True, timeout=600)
            lines = r.stdout.splitlines()
            for line in lines:
                check(line.startswith("ok"), line[8:])
            check(r.returncode == 0 and len(lines) >= 15, f"the client ended well {r.stderr[-1500:]}")
done()
