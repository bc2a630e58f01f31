"""Requests that nobody should send, as bytes, each with the statuses that may answer it.

`BODIES` are wrong bodies in right requests, by route; `REQUESTS` are wrong around their body;
`GARBAGE` is hardly HTTP: there the server may also hang up without a word.
"""

import gzip
import json
from collections.abc import Iterator, Mapping
from typing import Any

from tests.faults.wire import JSON, request

INTERACTION: dict[str, Any] = {
    "task": "support",
    "messages": [{"role": "user", "content": "q"}],
    "completion": "a",
    "model_version": "v1",
}
FEEDBACK: dict[str, Any] = {
    "target": {"interaction_id": "int_1"},
    "signal": {"kind": "binary", "value": True},
}
SECRET = "pnl_0123_sup3rs3cret"
MIB = 1 << 20


def interaction(**changes: Any) -> bytes:
    return json.dumps({**INTERACTION, **changes}).encode()


def feedback(**changes: Any) -> bytes:
    return json.dumps({**FEEDBACK, **changes}).encode()


def _score(value: str) -> bytes:
    signal = b'{"kind":"score","value":%s,"min":0,"max":5}' % value.encode()
    return b'{"target":{"interaction_id":"i"},"signal":%s}' % signal


def _signal(**fields: Any) -> bytes:
    return feedback(signal=fields)


NOT_JSON = {
    "empty": b"",
    "blank": b" \n\t ",
    "no json": b"hello",
    "cut off": b'{"task": "su',
    "two values": b"{} {}",
    "two lines": b"{}\n{}",
    "trailing comma": b'{"task": "x",}',
    "comment": b'{"task": "x" /* y */}',
    "python": b"{'task': None}",
    "xml": b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>",
    "form": b"task=support&completion=a",
    "depth of open arrays": b"[" * 100_000,
    "depth of closed arrays": b"[" * 10_000 + b"]" * 10_000,
    "depth of open objects": b'{"a":' * 50_000,
    "depth of closed objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "byte order mark": b"\xef\xbb\xbf{}",
    "bad utf-8": b'{"task": "\xff\xfe"}',
    "cut utf-8": b'{"task": "\xe2\x82"}',
    "overlong utf-8": b'{"task": "\xc0\xaf"}',
    "utf-8 surrogate": b'{"task": "\xed\xa0\x80"}',
    "utf-8 beyond unicode": b'{"task": "\xf5\x80\x80\x80"}',
    "utf-16": json.dumps(INTERACTION).encode("utf-16"),
    "utf-32": json.dumps(INTERACTION).encode("utf-32"),
    "lone surrogate": b'{"task": "\\ud800"}',
    "late surrogate": b'{"task": "\\udc00\\ud800"}',
    "bad escape": b'{"task": "\\x41"}',
    "raw NUL": b'{"task": "a\0b"}',
    "raw newline": b'{"task": "a\nb"}',
    "only NULs": b"\0" * 100,
    "number of 5,000 digits": _score("9" * 5000),
    "gzip": gzip.compress(interaction()),
}
BAD_INTERACTIONS = {
    "null": b"null",
    "true": b"true",
    "number": b"17",
    "text": b'"x"',
    "array": b"[]",
    "array of itself": b"[%s]" % interaction(),
    "empty object": b"{}",
    "unknown field": interaction(surprise=1),
    "unknown field of a message": interaction(
        messages=[{"role": "user", "content": "q", "name": "n"}]
    ),
    "field in other case": interaction(Task="x"),
    "__proto__": interaction(__proto__={"admin": True}),
    "tenant": interaction(tenant="bolt"),
    "received_at": interaction(received_at="2026-01-01T00:00:00Z"),
    "task missing": json.dumps({k: v for k, v in INTERACTION.items() if k != "task"}).encode(),
    "task null": interaction(task=None),
    "task number": interaction(task=7),
    "task list": interaction(task=["support"]),
    "task object": interaction(task={"$ne": None}),
    "task empty": interaction(task=""),
    "task long": interaction(task="x" * 257),
    "task with NUL": interaction(task="a\0b"),
    "completion number": interaction(completion=0),
    "completion with NUL": interaction(completion="a\0b"),
    "completion long": interaction(completion="x" * 1_000_001),
    "model_version bool": interaction(model_version=True),
    "route_role list": interaction(route_role=[]),
    "subject number": interaction(subject=1.5),
    "session object": interaction(session={}),
    "trace_id empty": interaction(trace_id=""),
    "finish_reason long": interaction(finish_reason="x" * 257),
    "no messages": interaction(messages=[]),
    "messages null": interaction(messages=None),
    "messages as text": interaction(messages="q"),
    "messages as object": interaction(messages={"role": "user", "content": "q"}),
    "message null": interaction(messages=[None]),
    "message as list": interaction(messages=[["user", "q"]]),
    "message with NUL": interaction(messages=[{"role": "user", "content": "\0"}]),
    "message without content": interaction(messages=[{"role": "user"}]),
    "content null": interaction(messages=[{"role": "user", "content": None}]),
    "content of parts": interaction(messages=[{"role": "user", "content": [{"type": "text"}]}]),
    "unknown role": interaction(messages=[{"role": "god", "content": "q"}]),
    "1,001 messages": interaction(messages=[{"role": "user", "content": ""}] * 1001),
    "id number": interaction(id=1),
    "id empty": interaction(id=""),
    "id with slash": interaction(id="../../etc/passwd"),
    "id with newline": interaction(id="a\n"),
    "id with emoji": interaction(id="😀"),
    "id right to left": interaction(id="\u202eabc"),
    "id long": interaction(id="x" * 129),
    "tokens negative": interaction(num_prompt_tokens=-1),
    "tokens 2^31": interaction(num_prompt_tokens=2**31),
    "tokens 2^63": interaction(num_completion_tokens=2**63),
    "tokens 2^64": interaction(num_prompt_tokens=2**64),
    "tokens of 4,000 digits": interaction(num_prompt_tokens=10**3999),
    "tokens fractional": interaction(num_prompt_tokens=1.5),
    "tokens as text": interaction(num_prompt_tokens="1"),
    "tokens as bool": interaction(num_prompt_tokens=True),
    "latency negative": interaction(latency_ms=-1),
    "latency as text": interaction(latency_ms="1"),
    "latency as bool": interaction(latency_ms=True),
    "17 tags": interaction(tags={str(i): "" for i in range(17)}),
    "10,000 tags": interaction(tags={str(i): "" for i in range(10_000)}),
    "tag name long": interaction(tags={"k" * 65: ""}),
    "tag name empty": interaction(tags={"": ""}),
    "tag value long": interaction(tags={"k": "v" * 513}),
    "tag value number": interaction(tags={"k": 1}),
    "tag value null": interaction(tags={"k": None}),
    "tag with NUL": interaction(tags={"k": "\0"}),
    "tags null": interaction(tags=None),
    "tags as list": interaction(tags=["a"]),
    "time naive": interaction(occurred_at="2026-01-01T00:00:00"),
    "time as number": interaction(occurred_at=1700000000),
    "time as digits": interaction(occurred_at="1700000000"),
    "time nonsense": interaction(occurred_at="yesterday"),
    "time February 30": interaction(occurred_at="2026-02-30T00:00:00Z"),
    "time year 1": interaction(occurred_at="0001-01-01T00:00:00+14:00"),
    "time year 9999": interaction(occurred_at="9999-12-31T23:59:59-14:00"),
}
BAD_FEEDBACK = {
    "null": b"null",
    "empty object": b"{}",
    "no target": json.dumps({"signal": FEEDBACK["signal"]}).encode(),
    "no signal": json.dumps({"target": FEEDBACK["target"]}).encode(),
    "unknown field": feedback(surprise=1),
    "status": feedback(status="joined"),
    "target null": feedback(target=None),
    "target text": feedback(target="int_1"),
    "target empty": feedback(target={}),
    "target of two kinds": feedback(target={"interaction_id": "a", "trace_id": "b"}),
    "target with more": feedback(target={"interaction_id": "a", "surprise": 1}),
    "target id null": feedback(target={"interaction_id": None}),
    "target id with quote": feedback(target={"interaction_id": "' OR 1=1 --"}),
    "target inline without task": feedback(target={"messages": [{"role": "user", "content": "q"}]}),
    "target inline without messages": feedback(target={"task": "support", "messages": []}),
    "signal null": feedback(signal=None),
    "signal list": feedback(signal=[]),
    "signal without kind": _signal(value=True),
    "kind unknown": _signal(kind=SECRET, value=True),
    "kind list": _signal(kind=["binary"], value=True),
    "kind null": _signal(kind=None, value=True),
    "signal with more": _signal(kind="binary", value=True, surprise=1),
    "binary number": _signal(kind="binary", value=1),
    "binary text": _signal(kind="binary", value="true"),
    "binary null": _signal(kind="binary", value=None),
    "score 1e400": _score("1e400"),
    "score -1e400": _score("-1e400"),
    "score of 4,000 digits": _score("9" * 4000),
    "score above max": _score("5.1"),
    "score text": _score('"4"'),
    "score bool": _score("true"),
    "score without scale": _signal(kind="score", value=1),
    "score reversed": _signal(kind="score", value=1, min=2, max=0),
    "label number": _signal(kind="label", value=1),
    "correction empty": _signal(kind="correction", text=""),
    "correction with NUL": _signal(kind="correction", text="\0"),
    "preference without rejected": _signal(kind="preference", chosen="a"),
    "demonstration null": _signal(kind="demonstration", text=None),
    "comment list": _signal(kind="comment", text=["a"]),
    "edit text on a copy": _signal(kind="implicit", action="copy", text="x"),
    "unknown action": _signal(kind="implicit", action="rm -rf"),
    "source text": feedback(source="end_user"),
    "source unknown": feedback(source={"kind": "cat"}),
    "source with more": feedback(source={"kind": "code", "surprise": 1}),
    "may_train text": feedback(may_train="yes"),
    "may_train null": feedback(may_train=None),
    "subject with NUL": feedback(subject="\0"),
}
BAD_BATCHES = {
    "null": b"null",
    "array": b"[{}]",
    "no items": b"{}",
    "0 items": b'{"items": []}',
    "1,001 items": json.dumps({"items": [FEEDBACK] * 1001}).encode(),
    "items null": b'{"items": null}',
    "items as object": b'{"items": {}}',
    "items as text": b'{"items": "[]"}',
    "unknown field": json.dumps({"items": [FEEDBACK], "surprise": 1}).encode(),
}
# JSON has no such numbers: some parsers refuse the text, some the value.
NO_NUMBERS = {
    "latency NaN": interaction(latency_ms=float("nan")),
    "latency infinite": interaction(latency_ms=float("inf")),
    "latency -infinite": interaction(latency_ms=float("-inf")),
    "tokens 007": interaction(num_prompt_tokens=7).replace(b": 7", b": 007"),
    "tokens +7": interaction(num_prompt_tokens=7).replace(b": 7", b": +7"),
    "tokens 0x7": interaction(num_prompt_tokens=7).replace(b": 7", b": 0x7"),
    "tokens 1e400": interaction(num_prompt_tokens=7).replace(b": 7", b": 1e400"),
}
ROUTES = {
    "/v1/interactions": BAD_INTERACTIONS,
    "/v1/feedback": BAD_FEEDBACK,
    "/v1/interactions/batch": BAD_BATCHES,
    "/v1/feedback/batch": BAD_BATCHES,
}


def bodies() -> Iterator[tuple[str, bytes, frozenset[int]]]:
    """A name, a whole request and its statuses, for each wrong body on each route."""
    for path, invalid in ROUTES.items():
        short = path.removeprefix("/v1/")
        for name, body in NOT_JSON.items():
            # What is wrong first is said first: the fields, or that it is no JSON after all.
            yield f"{short}, {name}", _post(path, body), frozenset({400, 422})
        for name, body in invalid.items():
            yield f"{short}, {name}", _post(path, body), frozenset({422})
        oversize = b" " * (5 if "batch" in path else 1) * MIB + b"{}"
        yield f"{short}, oversize", _post(path, oversize), frozenset({413})
        yield f"{short}, oversize in chunks", _chunked(path, oversize), frozenset({413})
    for name, body in NO_NUMBERS.items():
        yield name, _post("/v1/interactions", body), frozenset({400, 422})
    yield "score NaN", _post("/v1/feedback", _score("NaN")), frozenset({400, 422})


def _post(path: str, body: bytes, headers: Mapping[str, str] = JSON) -> bytes:
    return request("POST", path, body, headers)


def _chunked(path: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    parts = (body[i : i + 65_536] for i in range(0, len(body), 65_536))
    return head.encode() + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in parts) + b"0\r\n\r\n"


def _head(*lines: str) -> bytes:
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _typed(kind: str) -> bytes:
    return _post("/v1/interactions", interaction(), {"Content-Type": kind})


def _encoded(encoding: str, body: bytes) -> bytes:
    return _post("/v1/interactions", body, {**JSON, "Content-Encoding": encoding})


def _keyed(key: str) -> bytes:
    return _post("/v1/interactions", interaction(), {**JSON, "Idempotency-Key": key})


def _get(path: str) -> bytes:
    return _head(f"GET {path} HTTP/1.1", "Host: test")


def _with_headers(*lines: str) -> bytes:
    body = interaction()
    length = f"Content-Length: {len(body)}"
    head = _head("POST /v1/interactions HTTP/1.1", length, "Content-Type: application/json", *lines)
    return head + body


def _framed(*headers: str, body: bytes = b"") -> bytes:
    """A post whose length is said by `headers`."""
    first = ("POST /v1/interactions HTTP/1.1", "Host: test", "Content-Type: application/json")
    return _head(*first, *headers) + body


def _announced(size: int) -> bytes:
    """A post that promises a body and sends none."""
    return _framed(f"Content-Length: {size}")


BOMB = gzip.compress(b" " * (64 * MIB))
REQUESTS: dict[str, tuple[bytes, frozenset[int]]] = {
    "no content type": (_post("/v1/interactions", interaction(), {}), frozenset({415})),
    "text/plain": (_typed("text/plain"), frozenset({415})),
    "form": (_typed("application/x-www-form-urlencoded"), frozenset({415})),
    "multipart": (_typed("multipart/form-data; boundary=x"), frozenset({415})),
    "jsonp": (_typed("application/jsonp"), frozenset({415})),
    "latin-1": (_typed("application/json; charset=latin-1"), frozenset({415})),
    "type with NUL-like escape": (_typed("application/json%00"), frozenset({415})),
    "gzip bomb": (_encoded("gzip", BOMB), frozenset({415})),
    "unknown encoding": (_encoded("br", interaction()), frozenset({415})),
    "key empty": (_keyed(""), frozenset({422})),
    "key with space": (_keyed("a b"), frozenset({422})),
    "key with tab": (_keyed("a\tb"), frozenset({400, 422})),
    "key latin-1": (_keyed("é"), frozenset({422})),
    "key with DEL": (_keyed("a\x7f"), frozenset({400, 422})),
    "key long": (_keyed("x" * 256), frozenset({422})),
    "key very long": (_keyed("x" * 60_000), frozenset({400, 422, 431})),
    "header of 64 KiB": (_with_headers("X-Big: " + "x" * 65_536), frozenset({400, 431})),
    "10,000 headers": (_with_headers(*(f"X-{i}: x" for i in range(10_000))), frozenset({400, 431})),
    "path of 64 KiB": (_get("/v1/interactions/" + "x" * 65_536), frozenset({400, 414, 422})),
    "path of 10,000 steps": (_get("/v1" * 10_000), frozenset({400, 404, 414})),
    "no such interaction": (_get("/v1/interactions/nope"), frozenset({404})),
    "no such feedback": (_get("/v1/feedback/nope"), frozenset({404})),
    "no such path": (_get("/nowhere"), frozenset({404})),
    "below a path": (_get("/v1/feedback/batch/x"), frozenset({404})),
    "id with NUL": (_get("/v1/interactions/a%00b"), frozenset({422})),
    "id of bad utf-8": (_get("/v1/interactions/%ff"), frozenset({422})),
    "id overlong utf-8": (_get("/v1/interactions/%c0%af"), frozenset({422})),
    "id of half an escape": (_get("/v1/interactions/%4"), frozenset({400, 422})),
    "id of no escape": (_get("/v1/interactions/%zz"), frozenset({400, 422})),
    "id long": (_get("/v1/interactions/" + "x" * 200), frozenset({422})),
    "id of SQL": (_get("/v1/interactions/'%20OR%201=1--"), frozenset({422})),
    "path traversal": (_get("/v1/interactions/../../../etc/passwd"), frozenset({400, 404})),
    "path traversal, escaped": (_get("/v1/interactions/..%2f..%2fetc"), frozenset({404})),
    "path of a template": (_get("/v1/interactions/${jndi:ldap://x}"), frozenset({404, 422})),
    "path raw utf-8": (_get("/v1/interactions/\xf0\x9f\x98\x80"), frozenset({400, 422})),
    "cursor negative": (_get("/v1/interactions?after=-1"), frozenset({422})),
    "cursor text": (_get("/v1/interactions?after=x"), frozenset({422})),
    "cursor of bad utf-8": (_get("/v1/interactions?after=%ff"), frozenset({422})),
    "cursor 2^63": (_get("/v1/interactions?after=9223372036854775808"), frozenset({422})),
    "cursor of 5,000 digits": (_get("/v1/interactions?after=" + "9" * 5000), frozenset({422})),
    "cursor arabic digits": (_get("/v1/interactions?after=%D9%A3x"), frozenset({422})),
    "limit 0": (_get("/v1/interactions?limit=0"), frozenset({422})),
    "limit 201": (_get("/v1/interactions?limit=201"), frozenset({422})),
    "limit NaN": (_get("/v1/feedback?limit=NaN"), frozenset({422})),
    "task with NUL": (_get("/v1/interactions?task=a%00b"), frozenset({422})),
    "task empty": (_get("/v1/interactions?task="), frozenset({422})),
    "parameter misspelt": (_get("/v1/interactions?tsk=support"), frozenset({422})),
    "parameter twice": (_get("/v1/interactions?limit=1&limit=2"), frozenset({422})),
    "parameter of the other list": (_get("/v1/feedback?task=support"), frozenset({422})),
    "DELETE": (request("DELETE", "/v1/interactions"), frozenset({405})),
    "PUT": (request("PUT", "/v1/feedback"), frozenset({405})),
    "POST to health": (request("POST", "/healthz"), frozenset({405})),
    "TRACE": (request("TRACE", "/v1/interactions"), frozenset({405})),
    "PROPFIND": (request("PROPFIND", "/v1/interactions"), frozenset({405})),
    "announced 100 MiB": (_announced(100 * MIB), frozenset({413})),
    "announced 2^62": (_announced(1 << 62), frozenset({413})),
}
_HIDDEN = _post("/v1/interactions", interaction())
_CHUNKED = "Transfer-Encoding: chunked"
_VALID_CHUNK = b"%x\r\n%s\r\n0\r\n\r\n" % (len(interaction()), interaction())
GARBAGE = {
    "length negative": _framed("Content-Length: -1", body=interaction()),
    "length text": _framed("Content-Length: ten", body=interaction()),
    "length with sign": _framed(f"Content-Length: +{len(interaction())}", body=interaction()),
    "length list": _framed("Content-Length: 5, 6", body=interaction()),
    "length hexadecimal": _framed("Content-Length: 0x10", body=interaction()),
    "length 10^30": _framed("Content-Length: 1" + "0" * 30, body=interaction()),
    "two lengths": _framed("Content-Length: 5", "Content-Length: 6", body=interaction()),
    "length and chunks": _framed("Content-Length: 4", _CHUNKED, body=b"0\r\n\r\n" + _HIDDEN),
    "chunks and length": _framed(_CHUNKED, "Content-Length: 4", body=b"0\r\n\r\n" + _HIDDEN),
    "unknown transfer": _framed("Transfer-Encoding: xchunked", body=_VALID_CHUNK),
    "transfer twice": _framed("Transfer-Encoding: chunked, identity", body=_VALID_CHUNK),
    "transfer gzip": _framed("Transfer-Encoding: gzip", body=_VALID_CHUNK),
    "chunk size text": _framed(_CHUNKED, body=b"zz\r\n{}\r\n0\r\n\r\n"),
    "chunk size negative": _framed(_CHUNKED, body=b"-2\r\n{}\r\n0\r\n\r\n"),
    "chunk size 2^64": _framed(_CHUNKED, body=b"1" + b"0" * 16 + b"\r\n{}\r\n0\r\n\r\n"),
    "chunk longer than said": _framed(_CHUNKED, body=b"1\r\n{}\r\n0\r\n\r\n"),
    "chunk without end": _framed(_CHUNKED, body=b"2\r\n{}0\r\n\r\n"),
    "method unknown": _head("BREW /v1/interactions HTTP/1.1", "Host: test"),
    "method in lower case": _head("post /v1/interactions HTTP/1.1", "Host: test"),
    "method long": _head("X" * 10_000 + " / HTTP/1.1", "Host: test"),
    "method with NUL": _head("GE\0T / HTTP/1.1", "Host: test"),
    "CONNECT": _head("CONNECT evil.test:443 HTTP/1.1", "Host: test"),
    "version 9.9": _head("GET / HTTP/9.9", "Host: test"),
    "version of nothing": _head("GET / HTTPS/1.1", "Host: test"),
    "no version": b"GET /nowhere\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 9,
    "TLS hello": bytes.fromhex("16030100f8010000f40303") + b"\x17" * 241,
    "SSH banner": b"SSH-2.0-OpenSSH_9.9\r\n",
    "noise": bytes(range(256)) * 16,
    "NULs": b"\0" * 4096,
    "header of 1 MiB": _with_headers("X-Big: " + "x" * MIB),
    "header without colon": _with_headers("Surprise"),
    "header without name": _with_headers(": x"),
    "header with space in its name": _with_headers("X Y: x"),
    "header with NUL": _with_headers("X-Nul: a\0b"),
    "header with bare return": _with_headers("X-Return: a\rb"),
    "folded header": _with_headers("X-Fold: a", " b", "\tc"),
    "target with space": b"GET /v1/inter actions HTTP/1.1\r\nHost: test\r\n\r\n",
    "target empty": b"GET  HTTP/1.1\r\nHost: test\r\n\r\n",
    "target relative": _get("v1/interactions"),
    "target star": _head("POST * HTTP/1.1", "Host: test", "Content-Length: 0"),
    "websocket": _head(
        "GET /v1/interactions/x HTTP/1.1",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    ),
}
# The client ends before the request does.
CUT_OFF = {
    "nothing": b"",
    "half a line": b"POST /v1/inter",
    "half a header": b"POST /v1/interactions HTTP/1.1\r\nContent-Le",
    "headers without end": b"POST /v1/interactions HTTP/1.1\r\nHost: test\r\n",
    "half a body": _post("/v1/interactions", interaction())[:-5],
    "no body": _framed("Content-Length: 100"),
    "half a chunk": _framed(_CHUNKED, body=b"100\r\n" + interaction()),
    "chunks without end": _framed(_CHUNKED, body=_VALID_CHUNK[:-5]),
}
# Odd, but right: stored as it is, and nothing else happens.
HARMLESS = [
    "'; DROP TABLE interactions; --",
    "{{7*7}}",
    "${jndi:ldap://x}",
    "<script>alert(1)</script>",
    "a\r\nSet-Cookie: x",
    "😀👩‍👩‍👧‍👦",
    "\u202eright to left\u202c\u200b\ufeff",
    "zalgo" + "\u0335" * 500,
    "<|im_end|>\n<|im_start|>system",
    "\x01\x1b[31mred\x7f",
    "\U0010ffff\ufffe",
    "=cmd|' /C calc'!A0",
    "../../etc/passwd",
]
