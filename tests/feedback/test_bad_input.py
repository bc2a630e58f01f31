"""What must never be stored: a 4xx problem, no stack, no echo, and the app still answers."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

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


def _score(value: str) -> bytes:
    signal = b'{"kind":"score","value":%s,"min":0,"max":5}' % value.encode()
    return b'{"target":{"interaction_id":"i"},"signal":%s}' % signal


def _interaction(**changes: Any) -> bytes:
    return json.dumps({**INTERACTION, **changes}).encode()


def _feedback(**changes: Any) -> bytes:
    return json.dumps({**FEEDBACK, **changes}).encode()


MALFORMED = {
    "empty": b"",
    "no json": b"hello",
    "cut off": b'{"task": "su',
    "two values": b"{} {}",
    "trailing comma": b'{"task": "x",}',
    "depth bomb": b"[" * 100_000,
    "closed depth bomb": b"[" * 5_000 + b"]" * 5_000,
    "deep objects": b'{"a":' * 50_000,
    "bad utf-8": b'{"task": "\xff\xfe"}',
    "overlong utf-8": b'{"task": "\xc0\xaf"}',
    "utf-8 surrogate": b'{"task": "\xed\xa0\x80"}',
    "utf-16": json.dumps(INTERACTION).encode("utf-16"),
    "lone surrogate": b'{"task": "\\ud800"}',
    "late surrogate": b'{"task": "\\udc00\\ud800"}',
    "python": b"{'task': None}",
    "number of 5,000 digits": _score("9" * 5000),
}
INVALID_INTERACTIONS = {
    "null": b"null",
    "array": b"[]",
    "number": b"17",
    "text": b'"x"',
    "empty object": b"{}",
    "unknown field": _interaction(surprise=1),
    "tenant": _interaction(tenant="bolt"),
    "received_at": _interaction(received_at="2026-01-01T00:00:00Z"),
    "task of wrong type": _interaction(task=7),
    "task empty": _interaction(task=""),
    "task long": _interaction(task="x" * 257),
    "task with NUL": _interaction(task="a\0b"),
    "completion with NUL": _interaction(completion="a\0b"),
    "completion long": _interaction(completion="x" * 1_000_001),
    "message with NUL": _interaction(messages=[{"role": "user", "content": "\0"}]),
    "no messages": _interaction(messages=[]),
    "messages as text": _interaction(messages="q"),
    "unknown role": _interaction(messages=[{"role": "god", "content": "q"}]),
    "message with more": _interaction(messages=[{"role": "user", "content": "q", "name": "n"}]),
    "1,001 messages": _interaction(messages=[{"role": "user", "content": ""}] * 1001),
    "id with slash": _interaction(id="../../etc/passwd"),
    "id with newline": _interaction(id="a\n"),
    "id long": _interaction(id="x" * 129),
    "tokens negative": _interaction(num_prompt_tokens=-1),
    "tokens 2^31": _interaction(num_prompt_tokens=2**31),
    "tokens 2^64": _interaction(num_prompt_tokens=2**64),
    "tokens of 4,000 digits": _interaction(num_prompt_tokens=10**3999),
    "tokens fractional": _interaction(num_prompt_tokens=1.5),
    "tokens as text": _interaction(num_prompt_tokens="1"),
    "tokens as bool": _interaction(num_prompt_tokens=True),
    "latency negative": _interaction(latency_ms=-1),
    "latency NaN": _interaction(latency_ms=float("nan")),
    "latency infinite": _interaction(latency_ms=float("inf")),
    "10,000 tags": _interaction(tags={str(i): "" for i in range(10_000)}),
    "17 tags": _interaction(tags={str(i): "" for i in range(17)}),
    "tag name long": _interaction(tags={"k" * 65: ""}),
    "tag name empty": _interaction(tags={"": ""}),
    "tag value long": _interaction(tags={"k": "v" * 513}),
    "tag value number": _interaction(tags={"k": 1}),
    "tag with NUL": _interaction(tags={"k": "\0"}),
    "tags as list": _interaction(tags=["a"]),
    "time naive": _interaction(occurred_at="2026-01-01T00:00:00"),
    "time as number": _interaction(occurred_at=1700000000),
    "time as digits": _interaction(occurred_at="1700000000"),
    "time nonsense": _interaction(occurred_at="yesterday"),
    "time year 1": _interaction(occurred_at="0001-01-01T00:00:00+14:00"),
    "time year 9999": _interaction(occurred_at="9999-12-31T23:59:59-14:00"),
}
INVALID_FEEDBACK = {
    "no target": json.dumps({"signal": FEEDBACK["signal"]}).encode(),
    "no signal": json.dumps({"target": FEEDBACK["target"]}).encode(),
    "empty target": _feedback(target={}),
    "target of two kinds": _feedback(target={"interaction_id": "a", "trace_id": "b"}),
    "target null": _feedback(target=None),
    "target id null": _feedback(target={"interaction_id": None}),
    "inline without task": _feedback(target={"messages": [{"role": "user", "content": "q"}]}),
    "signal null": _feedback(signal=None),
    "signal without kind": _feedback(signal={"value": True}),
    "unknown kind": _feedback(signal={"kind": SECRET, "value": True}),
    "kind as list": _feedback(signal={"kind": ["binary"], "value": True}),
    "binary as number": _feedback(signal={"kind": "binary", "value": 1}),
    "binary as text": _feedback(signal={"kind": "binary", "value": "true"}),
    "binary with a text": _feedback(signal={"kind": "binary", "value": True, "text": "x"}),
    "score NaN": _score("NaN"),
    "score 1e400": _score("1e400"),
    "score of 4,000 digits": _score("9" * 4000),
    "score above max": _score("5.1"),
    "score text": _score('"4"'),
    "score reversed": _feedback(signal={"kind": "score", "value": 1, "min": 2, "max": 0}),
    "correction empty": _feedback(signal={"kind": "correction", "text": ""}),
    "correction with NUL": _feedback(signal={"kind": "correction", "text": "\0"}),
    "edit text on a copy": _feedback(signal={"kind": "implicit", "action": "copy", "text": "x"}),
    "unknown action": _feedback(signal={"kind": "implicit", "action": "rm -rf"}),
    "unknown source": _feedback(source={"kind": "cat"}),
    "may_train as text": _feedback(may_train="yes"),
    "subject with NUL": _feedback(subject="\0"),
    "status": _feedback(status="joined"),
}
INVALID_BATCHES = {
    "no items": b'{"items": []}',
    "1,001 items": json.dumps({"items": [{}] * 1001}).encode(),
    "items as object": b'{"items": {}}',
    "items of numbers": b'{"items": [1, 2]}',
    "array": b"[{}]",
}
CASES = [
    *[pytest.param("/v1/interactions", b, 400, id=f"i {n}") for n, b in MALFORMED.items()],
    *[pytest.param("/v1/feedback", b, 400, id=f"f {n}") for n, b in MALFORMED.items()],
    *[pytest.param("/v1/feedback/batch", b, 400, id=f"b {n}") for n, b in MALFORMED.items()],
    *[
        pytest.param("/v1/interactions", b, 422, id=f"i {n}")
        for n, b in INVALID_INTERACTIONS.items()
    ],
    *[pytest.param("/v1/feedback", b, 422, id=f"f {n}") for n, b in INVALID_FEEDBACK.items()],
    *[pytest.param("/v1/feedback/batch", b, 422, id=f"b {n}") for n, b in INVALID_BATCHES.items()],
    pytest.param("/v1/interactions", b" " * (1 << 20) + b"{}", 413, id="i oversize"),
    pytest.param("/v1/feedback", b" " * (1 << 20) + b"{}", 413, id="f oversize"),
    pytest.param("/v1/feedback/batch", b" " * (5 << 20) + b"{}", 413, id="b oversize"),
]


def _assert_problem(answer: Any, status: int) -> None:
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert problem["request_id"] == answer.headers["X-Request-Id"]
    assert len(answer.content) < 8_000
    for leak in ("Traceback", ".py", "sqlalchemy", "psycopg", SECRET):
        assert leak not in answer.text


def _assert_nothing_stored(client: TestClient) -> None:
    assert client.get("/v1/interactions").json()["items"] == []
    assert client.get("/v1/feedback").json()["items"] == []


@pytest.mark.parametrize(("path", "body", "status"), CASES)
def test_bad_body_is_a_problem_and_stores_nothing(
    sqlite_client: TestClient, path: str, body: bytes, status: int
) -> None:
    answer = sqlite_client.post(path, content=body, headers={"Content-Type": "application/json"})

    _assert_problem(answer, status)
    _assert_nothing_stored(sqlite_client)


@pytest.mark.parametrize("body", INVALID_FEEDBACK.values(), ids=INVALID_FEEDBACK)
def test_bad_item_of_a_batch_is_refused_alone(sqlite_client: TestClient, body: bytes) -> None:
    batch = b'{"items": [%s, %s]}' % (body, json.dumps(FEEDBACK).encode())

    answer = sqlite_client.post(
        "/v1/feedback/batch", content=batch, headers={"Content-Type": "application/json"}
    )

    assert [item["status"] for item in answer.json()["items"]] == [422, 201]
    assert SECRET not in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/jsonp"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
def test_other_media_type_is_415(sqlite_client: TestClient, headers: dict[str, str]) -> None:
    answer = sqlite_client.post("/v1/interactions", content=_interaction(), headers=headers)

    _assert_problem(answer, 415)
    _assert_nothing_stored(sqlite_client)


@pytest.mark.parametrize("kind", ["application/json", 'Application/JSON; Charset="UTF-8"'])
def test_json_by_any_spelling_is_accepted(sqlite_client: TestClient, kind: str) -> None:
    answer = sqlite_client.post(
        "/v1/interactions", content=_interaction(), headers={"Content-Type": kind}
    )

    assert answer.status_code == 201


def test_chunked_oversize_is_refused_while_it_is_read(sqlite_client: TestClient) -> None:
    chunks = (b" " * 65_536 for _ in range(64))

    answer = sqlite_client.post(
        "/v1/interactions", content=chunks, headers={"Content-Type": "application/json"}
    )

    _assert_problem(answer, 413)


@pytest.mark.parametrize("key", ["", " ", "a b", "é".encode("latin-1"), "x" * 256, b"a\x7f"])
def test_bad_idempotency_key_is_refused(sqlite_client: TestClient, key: Any) -> None:
    answer = sqlite_client.post(
        "/v1/interactions",
        content=_interaction(),
        headers={"Content-Type": "application/json", "Idempotency-Key": key},
    )

    _assert_problem(answer, 422)
    _assert_nothing_stored(sqlite_client)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/interactions/nope", 404),
        ("/v1/feedback/nope", 404),
        ("/v1/interactions/a%00b", 422),
        ("/v1/interactions/%ff", 422),
        ("/v1/interactions/..%2f..%2fetc", 404),
        ("/v1/interactions/" + "x" * 200, 422),
        ("/v1/interactions?after=-1", 422),
        ("/v1/interactions?after=x", 422),
        ("/v1/interactions?after=9223372036854775808", 422),
        ("/v1/interactions?limit=0", 422),
        ("/v1/interactions?limit=201", 422),
        ("/v1/interactions?task=a%00b", 422),
        ("/v1/interactions?task=", 422),
        ("/v1/interactions?tsk=support", 422),
        ("/v1/feedback?task=support", 422),
        ("/v1/feedback?limit=NaN", 422),
        ("/nowhere", 404),
        ("/v1/feedback/batch/x", 404),
    ],
)
def test_bad_path_or_query_is_a_problem(sqlite_client: TestClient, path: str, status: int) -> None:
    _assert_problem(sqlite_client.get(path), status)


@pytest.mark.parametrize(
    ("method", "path"),
    [("DELETE", "/v1/interactions"), ("PUT", "/v1/feedback"), ("POST", "/healthz")],
)
def test_wrong_method_is_405(sqlite_client: TestClient, method: str, path: str) -> None:
    answer = sqlite_client.request(method, path)

    _assert_problem(answer, 405)
    assert "Allow" in answer.headers


@pytest.mark.parametrize(
    "text",
    [
        "'; DROP TABLE interactions; --",
        "{{7*7}}",
        "${jndi:ldap://x}",
        "a\r\nSet-Cookie: x",
        "😀\u202e",
    ],
)
def test_hostile_text_is_only_text(client: TestClient, text: str) -> None:
    created = client.post("/v1/interactions", json={**INTERACTION, "completion": text})

    found = client.get(f"/v1/interactions/{created.json()['id']}").json()
    assert found["completion"] == text
