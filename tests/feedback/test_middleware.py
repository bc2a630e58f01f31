"""What every answer carries, whoever gave it, and what is written down about it."""

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from perennial.feedback.key_cache import KeyCache
from perennial.feedback.keys import KeyStore, Scope, split_key
from perennial.infra.clock import utc_now
from perennial.infra.db import Database

SAFE = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
SECRET = "my mother's maiden name"


async def _lax(_: Request) -> JSONResponse:
    headers = {"Cache-Control": "public", "Content-Security-Policy": "*", "X-Request-Id": "mine"}
    return JSONResponse({}, headers=headers)


async def _stream(_: Request) -> StreamingResponse:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"12345"

    return StreamingResponse(pieces())


async def _broken(_: Request) -> JSONResponse:
    raise KeyError(SECRET)


@pytest.fixture
def client(
    make_client: Callable[..., TestClient], sqlite_database: Database, keys: KeyStore
) -> TestClient:
    authenticate = KeyCache(keys.find, utc_now).authenticate
    client = make_client(sqlite_database, authenticate=authenticate)
    routes = {"/v1/lax": _lax, "/stream": _stream, "/v1/broken": _broken}
    client.app.router.routes.extend(  # type: ignore[attr-defined]  # FastAPI
        Route(path, endpoint, methods=["GET", "POST"]) for path, endpoint in routes.items()
    )
    return client


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.INFO, logger="perennial.access")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "perennial.access"]


def _fields(line: str) -> dict[str, str]:
    return dict(field.split("=", 1) for field in line.split(" "))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/healthz", 200),
        ("GET", "/metrics", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/v1/lax", 200),
        ("GET", "/stream", 200),
        ("POST", "/v1/feedback", 401),
        ("GET", "/nowhere", 404),
        ("DELETE", "/v1/feedback", 405),
        ("GET", "/v1/broken", 500),
    ],
)
def test_every_answer_carries_each_header_once(
    client: TestClient, method: str, path: str, status: int
) -> None:
    answer = client.request(method, path, headers={"X-Request-Id": "r-1"})

    assert answer.status_code == status
    for name, value in {**SAFE, "X-Request-Id": "r-1"}.items():
        assert answer.headers.get_list(name) == [value]
    assert "Server" not in answer.headers


def test_request_id_of_a_client_is_kept_only_when_plain(client: TestClient) -> None:
    for sent in ("a b;c", "x" * 65, "a\tkey_id=admin", ""):
        answer = client.get("/healthz", headers={"X-Request-Id": sent})
        assert answer.headers["X-Request-Id"].startswith("req_")


def test_line_names_the_caller_and_the_sizes(
    client: TestClient, keys: KeyStore, log: Callable[[], list[str]]
) -> None:
    issued = keys.issue("acme", frozenset({Scope.INGEST}))
    headers = {"Authorization": f"Bearer {issued.text}", "X-Request-Id": "r-1"}
    body = b'{"target":{"interaction_id":"a"},"signal":{"kind":"binary","value":true}}'

    answer = client.post(
        "/v1/feedback", content=body, headers={**headers, "Content-Type": "application/json"}
    )

    (line,) = map(_fields, log())
    assert float(line.pop("ms")) > 0
    assert line == {
        "method": "POST",
        "route": "/v1/feedback",
        "status": "201",
        "tenant": "acme",
        "key_id": issued.key.id,
        "request_id": "r-1",
        "bytes_in": str(len(body)),
        "bytes_out": str(len(answer.content)),
    }


@pytest.mark.parametrize(
    ("path", "route", "status"),
    [
        ("/v1/feedback/{}?after={}", "/v1/feedback/{id}", "403"),
        ("/{}?q={}", "unmatched", "404"),
        ("/v1/broken?q={}{}", "/v1/broken", "500"),
    ],
)
def test_line_holds_nothing_that_a_client_wrote(
    client: TestClient,
    keys: KeyStore,
    log: Callable[[], list[str]],
    path: str,
    route: str,
    status: str,
) -> None:
    text = keys.issue("acme", frozenset({Scope.INGEST})).text
    path = path.format("maiden-name", "maiden-name")

    client.get(path, headers={"Authorization": f"Bearer {text}", "User-Agent": "maiden-name"})

    (line,) = log()
    assert (_fields(line)["route"], _fields(line)["status"]) == (route, status)
    assert "maiden" not in line
    assert split_key(text).secret not in line


def test_unauthenticated_line_names_nobody(
    client: TestClient, log: Callable[[], list[str]]
) -> None:
    client.get("/v1/feedback", headers={"Authorization": "Bearer pnl_a_b"})

    (line,) = map(_fields, log())
    assert (line["status"], line["tenant"], line["key_id"]) == ("401", "-", "-")


def test_streamed_bytes_are_counted(client: TestClient, log: Callable[[], list[str]]) -> None:
    client.get("/stream")

    assert [_fields(line)["bytes_out"] for line in log()] == ["15"]


def test_nothing_is_logged_unless_asked_for(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="perennial.access")

    client.get("/healthz")

    assert [r for r in caplog.records if r.name == "perennial.access"] == []


def test_clients_cannot_invent_labels(client: TestClient) -> None:
    for number in range(3):
        client.request(f"BREW{number}", "/v1/feedback")
        client.request("BREW", f"/nowhere/{number}")

    text = client.get("/metrics").text

    assert "BREW" not in text
    route = 'route="/v1/feedback",status="405"'
    assert f'perennial_http_requests_total{{method="any",{route}}} 3.0' in text
    assert 'method="any",route="unmatched",status="404"} 3.0' in text


def test_answers_are_counted_and_timed_by_template(client: TestClient) -> None:
    for _ in range(2):
        client.get("/v1/lax")

    text: Any = client.get("/metrics").text

    labels = 'method="GET",route="/v1/lax",status="200"'
    assert f"perennial_http_requests_total{{{labels}}} 2.0" in text
    assert 'perennial_http_request_seconds_count{route="/v1/lax"} 2.0' in text
