"""soak_http.py - an HTTP/1.1 client for thousands of requests at once in one thread, which can also hang
up in the middle and read slowly.  Python's standard library only."""
import asyncio
import json
import time

UNUSED_SECONDS = 20  # less than the server keeps an unused connection


class Incomplete(Exception):
    """The server ended an answer in the middle, or said something that is no HTTP."""


class Answer:
    def __init__(self, status, headers):
        self.status, self.headers, self.body = status, headers, b""

    def json(self):
        return json.loads(self.body)

    def events(self):
        """The JSON of each server-sent event; the last must be [DONE]."""
        lines = [x[6:] for x in self.body.decode().split("\n") if x.startswith("data: ")]
        if not lines or lines[-1] != "[DONE]":
            raise Incomplete(f"a stream without its end: {self.body[-300:]}")
        return [json.loads(x) for x in lines[:-1]]


def form(parts):
    """multipart/form-data of {name: text, or (filename, bytes)}: (body, content type)."""
    boundary, body = "----soak", b""
    for name, value in parts.items():
        filename, data = ("", value.encode()) if isinstance(value, str) else (f'; filename="{value[0]}"', value[1])
        body += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode() + data + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


class Client:
    """Requests to one port.  Connections are kept and used again, unless told otherwise."""

    def __init__(self, port):
        self.port, self.free = port, []

    async def _open(self, fresh):
        while self.free and not fresh:
            reader, writer, since = self.free.pop()
            if not reader.at_eof() and not writer.is_closing() and time.monotonic() - since < UNUSED_SECONDS:
                return reader, writer
            writer.close()
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)

    async def call(self, method, path, body=None, key=None, headers=None, fresh=True, hang_up=None, pauses=0, began=None):
        """The whole answer.  body: bytes, or what becomes JSON.  hang_up: the connection is closed once so many
        bytes of the body have come (-1: before anything is read), and the answer is None.  pauses: between
        so many reads.  began: an asyncio.Event that is set when the first bytes of a good answer are there."""
        head = {"Host": "127.0.0.1", **(headers or {})}
        if key:
            head["Authorization"] = f"Bearer {key}"
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            head.setdefault("Content-Type", "application/json")
        head["Content-Length"] = str(len(body or b""))
        reader, writer = await self._open(fresh)
        keep = False
        try:
            text = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in head.items()) + "\r\n"
            writer.write(text.encode() + (body or b""))
            if hang_up != -1:
                await writer.drain()
            else:
                await asyncio.sleep(0)
                return None
            answer = await self._head(reader)
            while answer.status == 100:
                answer = await self._head(reader)
            async for piece in self._pieces(reader, answer.headers):
                answer.body += piece
                if began is not None and answer.status == 200:
                    began.set()
                if hang_up is not None and len(answer.body) >= hang_up:
                    return None
                if pauses > 0:
                    pauses -= 1
                    await asyncio.sleep(0.3)
            keep = answer.headers.get("connection", "").lower() != "close"
            return answer
        except asyncio.IncompleteReadError as e:
            raise Incomplete(f"{method} {path}: the answer ended in the middle ({e})") from e
        finally:
            if keep and len(self.free) < 32:
                self.free.append((reader, writer, time.monotonic()))
            else:
                writer.close()

    @staticmethod
    async def _head(reader):
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, _, rest = lines[0].partition(" ")
        if version != "HTTP/1.1":
            raise Incomplete(f"not HTTP: {lines[0]!r}")
        fields = (line.partition(":") for line in lines[1:] if line)
        return Answer(int(rest.split()[0]), {k.lower(): v.strip() for k, _, v in fields})

    @staticmethod
    async def _pieces(reader, headers):
        if headers.get("transfer-encoding") == "chunked":
            while True:
                n = int((await reader.readuntil(b"\r\n")).split(b";")[0], 16)
                data = await reader.readexactly(n + 2)
                if n == 0:
                    return
                yield data[:-2]
        left = int(headers.get("content-length", "0"))
        while left > 0:
            data = await reader.read(min(left, 1 << 16))
            if not data:
                raise asyncio.IncompleteReadError(b"", left)
            left -= len(data)
            yield data

    def close(self):
        for _, writer, _ in self.free:
            writer.close()
        self.free = []
