"""HTTP/1.1 over a plain socket: what was sent and what came back, byte for byte.

A client library would repair a bad request and retry a broken one; the tests must see both.
"""

import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A whole answer; the names of its headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """One keep-alive connection; every failure is an OSError."""

    def __init__(self, port: int, timeout_s: float = 30) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = self.socket.makefile("rb")

    def post(self, path: str, body: object, headers: Mapping[str, str] | None = None) -> Answer:
        content = json.dumps(body).encode()
        self.socket.sendall(request("POST", path, content, {**JSON, **(headers or {})}))
        return self.receive()

    def get(self, path: str) -> Answer:
        self.socket.sendall(request("GET", path))
        return self.receive()

    def receive(self) -> Answer:
        """The next answer; ConnectionError when the server hung up before its last byte."""
        status = int(self._line().split()[1])
        lines = iter(self._line, b"")
        pairs = (line.decode("latin-1").partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        if status < 200:
            return self.receive()
        size = int(headers.get("content-length", 0))
        body = self._file.read(size)
        if len(body) < size:
            raise ConnectionResetError("the answer was cut off")
        return Answer(status=status, headers=headers, body=body)

    def close(self) -> None:
        self._file.close()
        self.socket.close()

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self) -> bytes:
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionResetError("the server hung up")
        return line[:-2]


def request(
    method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> bytes:
    """A well-formed request around any body."""
    lines = [f"{method} {path} HTTP/1.1", "Host: test", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
