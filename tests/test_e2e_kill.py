"""test_e2e_kill.py - kill -9 in the middle of an upload, again and again: the file opens, every adapter
is whole or absent, and after the next start no spool is left behind."""
import os
import random
import socket
import threading
import time

from harness import *

ROUNDS = 4 if SANITIZED else 50


def slow_upload(port, name, body, boundary, pause_at, pause):
    """Multipart by hand, so that it can stand still in the middle."""
    try:
        s = socket.create_connection(("127.0.0.1", port), timeout=30)
        s.sendall((f"POST /v1/adapters HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
                   f"Content-Type: multipart/form-data; boundary={boundary}\r\n\r\n").encode())
        s.sendall(body[:pause_at])
        time.sleep(pause)
        s.sendall(body[pause_at:])
        s.recv(4096)
        s.close()
    except OSError:
        pass


def multipart(name, folder, boundary):
    parts = []
    for field, data in (("name", name.encode()),
                        ("config", open(os.path.join(folder, "adapter_config.json"), "rb").read()),
                        ("weights", open(os.path.join(folder, "adapter_model.safetensors"), "rb").read())):
        filename = "" if field == "name" else f'; filename="{field}"'
        parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"{filename}\r\n\r\n'.encode()
                     + data + b"\r\n")
    return b"".join(parts) + f"--{boundary}--\r\n".encode()


with Folder() as root:
    source, base, db = (os.path.join(root, x) for x in ("source", "x.base", "x.db"))
    shape = random_base(source)
    lorad("import", source, "-o", base, "--name", "thebase")
    folder = os.path.join(root, "adapter")
    rng, whole, absent, problems = random.Random(5), 0, 0, []
    spool = db + ".spool"
    for i in range(ROUNDS):
        random_adapter(folder, shape, i, rank=64)
        body = multipart(f"a{i}", folder, "xyz")
        with Server(base, db) as server:
            if os.path.isdir(spool) and os.listdir(spool):
                problems.append(f"round {i}: {os.listdir(spool)} left in the spool after a start")
            listed = server.call("GET", "/v1/adapters?limit=1000")[2]
            if not isinstance(listed, dict) or len(listed["data"]) != whole:
                problems.append(f"round {i}: {whole} adapters expected, got {listed}")
            t = threading.Thread(target=slow_upload, args=(server.port, f"a{i}", body, "xyz",
                                                           rng.randrange(1, len(body)) if i % 2 else len(body), 0.02))
            t.start()
            time.sleep(rng.random() * (0.12 if not SANITIZED else 0.6))
            server.kill()
            t.join()
        r = lorad("check", "--db", db, ok=False)
        if r.returncode != 0:
            problems.append(f"round {i}: lorad check: {r.stderr}")
        there = lorad("adapter", "show", f"a{i}", "--db", db, ok=False).returncode == 0
        whole += there
        absent += not there
    check(not problems, f"{ROUNDS} kills: the file opens, checks, and lists what it should" + "".join("\n  " + p for p in problems[:5]))
    check(SANITIZED or (whole > 0 and absent > 0), f"some uploads came through whole ({whole}), some not at all ({absent})")
    with Server(base, db) as server:
        check(not os.path.isdir(spool) or not os.listdir(spool), "no spool is left behind")
        status, _, body = server.call("POST", "/v1/completions", {"model": "thebase", "prompt": "Hello", "max_tokens": 3})
        check(status == 200, "the server answers")
        names = [a["name"] for a in server.call("GET", "/v1/adapters?limit=1000")[2]["data"]]
        answers = [server.call("POST", "/v1/completions", {"model": n, "prompt": "Hello", "max_tokens": 3})[0] for n in names]
        check(answers == [200] * whole, f"each of the {whole} adapters answers")
done()
