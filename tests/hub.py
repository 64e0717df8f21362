"""hub.py - a hub of the tests' own, with its bad days.

Two servers: the hub, which lists files and redirects large ones, and a store on another port, where the
bytes of large files are.  `faults` says what goes wrong, per file and in order: each request for that
file takes the first fault off its list.  Everything that is asked is written down in `log`."""
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    def __init__(self):
        self.repos = {}   # "org/name": {file: bytes}
        self.edit = {}    # "org/name": function that changes the list before it is sent
        self.faults = {}  # file or "list": [fault, ...]
        self.log = []     # (server, path, Authorization, Range)
        self.hub, self.store = (self._serve(name) for name in ("hub", "store"))
        self.endpoint = f"http://127.0.0.1:{self.hub.server_port}"

    def _serve(self, name):
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                owner.log.append((name, self.path, self.headers.get("Authorization"), self.headers.get("Range")))
                try:
                    (owner.at_hub if name == "hub" else owner.at_store)(self)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def log_message(self, *_):
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *_):
                pass  # a client that went away in the middle is what half of these tests are about

        server = Server(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def close(self):
        for s in (self.hub, self.store):
            s.shutdown()
            s.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def asked(self, server, part):
        return [e for e in self.log if e[0] == server and part in e[1]]

    # --- answers ---------------------------------------------------------------------------------
    @staticmethod
    def answer(r, status, body=b"", headers=()):
        r.send_response(status)
        r.send_header("Content-Length", str(len(body)))
        for k, v in headers:
            r.send_header(k, v)
        r.end_headers()
        r.wfile.write(body)

    def fault(self, name):
        todo = self.faults.get(name)
        return todo.pop(0) if todo else None

    def listing(self, repo):
        files = []
        for name, data in sorted(self.repos[repo].items()):
            entry = {"rfilename": name, "size": len(data),
                     "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
            if name.endswith(".safetensors"):
                entry["blobId"] = "f" * 40  # of the pointer, which nobody sees
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            files.append(entry)
        listing = {"id": repo, "sha": COMMIT, "siblings": files}
        return self.edit.get(repo, lambda x: x)(listing)

    def at_hub(self, r):
        path = urllib.parse.urlsplit(r.path)
        m = re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", path.path)
        if m:
            return self.send_list(r, m.group(1), urllib.parse.unquote(m.group(2)))
        if r.path.startswith("/org/renamed/"):
            return self.answer(r, 307, b"", [("Location", r.path.replace("renamed", "demo"))])
        m = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^/]+)", path.path)
        if not m or m.group(1) not in self.repos or m.group(2) != COMMIT or m.group(3) not in self.repos[m.group(1)]:
            return self.answer(r, 404, b"Entry not found")
        repo, _, name = m.groups()
        if name.endswith(".safetensors"):
            to = f"http://127.0.0.1:{self.store.server_port}/{repo}/{name}?signature=1"
            return self.answer(r, 302, b"somewhere else", [("Location", to)])
        self.send_file(r, name, self.repos[repo][name])

    def at_store(self, r):
        org, repo, name = urllib.parse.urlsplit(r.path).path.lstrip("/").split("/")
        self.send_file(r, name, self.repos[f"{org}/{repo}"][name])

    def send_list(self, r, repo, rev):
        fault = self.fault("list")
        if isinstance(fault, int):
            return self.answer(r, fault, b"no", [("Retry-After", "0")] if fault == 429 else [])
        if fault == "loop":
            return self.answer(r, 307, b"", [("Location", r.path)])
        if fault == "file":
            return self.answer(r, 302, b"", [("Location", "file:///etc/passwd")])
        if fault == "garbage":
            return self.answer(r, 200, b"<html>maintenance</html>")
        if repo == "org/renamed":
            return self.answer(r, 307, b"", [("Location", r.path.replace("renamed", "demo"))])
        if repo == "org/gated":
            return self.answer(r, 403 if r.headers.get("Authorization") else 401, b"gated")
        if repo not in self.repos or rev not in ("main", "v1/x", COMMIT):
            return self.answer(r, 404, b"Repository not found")
        self.answer(r, 200, json.dumps(self.listing(repo)).encode(), [("Content-Type", "application/json")])

    def send_file(self, r, name, data):
        fault, size, first = self.fault(name), len(data), 0
        if isinstance(fault, int):
            return self.answer(r, fault, b"no", [("Retry-After", "1")] if fault == 429 else [])
        if fault == "wrong":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault == "long":
            data += b"more"
        m = re.fullmatch(r"bytes=(\d+)-", r.headers.get("Range") or "")
        ranged = m and fault != "norange"
        if ranged:
            first = int(m.group(1))
            if first >= size:
                return self.answer(r, 416, b"", [("Content-Range", f"bytes */{size}")])
        if fault == "badrange":
            first //= 2
        r.send_response(206 if ranged else 200)
        r.send_header("Content-Length", str(len(data) - first))
        if ranged:
            r.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        r.end_headers()
        body = data[first:]
        if fault in ("cut", "stall"):
            r.wfile.write(body[:len(body) // 3])
            r.wfile.flush()
            if fault == "stall":
                time.sleep(6)
            r.close_connection = True
            return
        step = 1 << 16
        for i in range(0, len(body), step):
            r.wfile.write(body[i:i + step])
            if fault == "slow":
                time.sleep(0.02)
