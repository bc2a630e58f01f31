"""A tiny OpenAI-compatible server: whole and streamed answers, some of them wrong."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = ("Two", " years", ".")
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
BASE = {"id": "chatcmpl-1", "created": 1, "model": "acme-1-0613", "object": "chat.completion"}


def whole(body: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "".join(WORDS)}
    if body.get("tools"):
        message = {"role": "assistant", "content": None}
    choices = [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}]
    return {**BASE, "choices": choices, "usage": USAGE}


def chunks() -> Iterator[dict[str, Any]]:
    base = {**BASE, "object": "chat.completion.chunk"}
    for index, word in enumerate(WORDS):
        delta = {"content": word, **({"role": "assistant"} if index == 0 else {})}
        yield {**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    yield {**base, "choices": [], "usage": USAGE}


class Handler(BaseHTTPRequestHandler):
    """The model's name chooses the behaviour: acme, gateway, broken (mid-stream), odd."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)  # type: ignore[attr-defined]  # the server below
        if body.get("stream"):
            self._stream(body)
        else:
            odd = {"object": "list", "nothing": "known"}
            self._begin(body, "application/json")
            self._piece(json.dumps(odd if body["model"] == "odd" else whole(body)))
            self._piece("")

    def log_message(self, *_: object) -> None:
        pass

    def _stream(self, body: dict[str, Any]) -> None:
        self._begin(body, "text/event-stream")
        for num_sent, chunk in enumerate(chunks()):
            if body["model"] == "broken" and num_sent == 2:
                self.close_connection = True
                return
            self._piece(f"data: {json.dumps(chunk)}\n\n")
        self._piece("data: [DONE]\n\n")
        self._piece("")

    def _begin(self, body: dict[str, Any], kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        if body["model"] == "gateway":
            self.send_header("x-interaction-id", "int_of_the_gateway")
        self.end_headers()

    def _piece(self, text: str) -> None:
        content = text.encode()
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")


class Server(ThreadingHTTPServer):
    """Remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server
        server.shutdown()
        thread.join()
