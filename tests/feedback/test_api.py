"""The routes over a real store on both databases."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from perennial.feedback.committer import GroupCommitter
from perennial.feedback.key_cache import KeyCache
from perennial.feedback.keys import KeyStore, Scope
from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.infra.clock import utc_now
from perennial.infra.db import Database
from perennial.infra.errors import UnavailableError

MakeClient = Callable[..., TestClient]
INTERACTION: dict[str, Any] = {
    "task": "support",
    "messages": [{"role": "user", "content": "How long is the warranty?"}],
    "completion": "Two years.",
    "model_version": "support-v1-0a1b2c3d",
}
MESSAGES = INTERACTION["messages"]
SIGNALS: list[dict[str, Any]] = [
    {"kind": "binary", "value": False},
    {"kind": "score", "value": 4, "min": 1, "max": 5},
    {"kind": "label", "value": "off_topic"},
    {"kind": "correction", "text": "Three years."},
    {"kind": "preference", "chosen": "a", "rejected": "b"},
    {"kind": "demonstration", "text": "Three years."},
    {"kind": "comment", "text": "hm 🤔 \u202e"},
    {"kind": "implicit", "action": "edit", "text": "Three years"},
    {"kind": "implicit", "action": "copy", "text": None},
]


def _feedback(interaction_id: str = "int_unknown", **changes: Any) -> dict[str, Any]:
    base = {"target": {"interaction_id": interaction_id}, "signal": SIGNALS[0]}
    return {**base, **changes}


def test_interaction_is_created_and_read_back(client: TestClient) -> None:
    sent = {
        **INTERACTION,
        "occurred_at": "2026-05-01T14:00:00+02:00",
        "tags": {"plan": "pro"},
        "latency_ms": 12,
    }

    created = client.post("/v1/interactions", json=sent)

    assert created.status_code == 201
    found = client.get(f"/v1/interactions/{created.json()['id']}").json()
    assert found.items() >= {**sent, "occurred_at": "2026-05-01T12:00:00Z"}.items()
    assert found["route_role"] == "external"
    assert "tenant" not in found


@pytest.mark.parametrize("signal", SIGNALS, ids=lambda s: s.get("action", s["kind"]))
def test_every_signal_is_created_and_read_back(client: TestClient, signal: dict[str, Any]) -> None:
    about = client.post("/v1/interactions", json=INTERACTION).json()["id"]

    created = client.post("/v1/feedback", json=_feedback(about, signal=signal))

    assert created.status_code == 201
    assert created.json()["status"] == "joined"
    found = client.get(f"/v1/feedback/{created.json()['id']}").json()
    assert found["signal"] == signal
    assert (found["task"], found["interaction_id"]) == ("support", about)


def test_unknown_target_is_pending_until_it_arrives(client: TestClient) -> None:
    created = client.post("/v1/feedback", json=_feedback("int_later"))
    assert (created.status_code, created.json()["status"]) == (201, "pending")

    client.post("/v1/interactions", json={**INTERACTION, "id": "int_later"})

    assert client.get(f"/v1/feedback/{created.json()['id']}").json()["status"] == "joined"


@pytest.mark.parametrize(
    "target",
    [{"trace_id": "t"}, {"task": "support", "messages": MESSAGES, "completion": "Two."}],
)
def test_other_targets_are_accepted(client: TestClient, target: dict[str, Any]) -> None:
    created = client.post("/v1/feedback", json=_feedback() | {"target": target})

    assert created.status_code == 201
    inline = "messages" in target
    assert created.json()["status"] == ("joined" if inline else "pending")
    found = client.get(f"/v1/feedback/{created.json()['id']}").json()
    assert found["task"] == ("support" if inline else None)


@pytest.mark.parametrize(
    ("path", "body", "changed"),
    [
        ("/v1/interactions", INTERACTION, {**INTERACTION, "completion": "Three."}),
        ("/v1/feedback", _feedback(), _feedback("another")),
    ],
)
def test_idempotency_key_replays_or_refuses(
    client: TestClient, path: str, body: dict[str, Any], changed: dict[str, Any]
) -> None:
    headers = {"Idempotency-Key": "k-1"}
    first = client.post(path, json=body, headers=headers)
    reordered = dict(reversed(body.items())) | {"subject": None}

    again = client.post(path, json=reordered, headers=headers)
    other = client.post(path, json=changed, headers=headers)

    assert (first.status_code, again.status_code, other.status_code) == (201, 200, 422)
    assert again.json() == first.json()
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == "true"
    assert other.json()["code"] == "conflict"
    assert len(client.get(path).json()["items"]) == 1


def test_interaction_with_its_own_id_can_be_delivered_twice(client: TestClient) -> None:
    body = {**INTERACTION, "id": "int_mine"}

    statuses = [
        client.post("/v1/interactions", json=each).status_code
        for each in (body, body, {**body, "completion": "Three."})
    ]

    assert statuses == [201, 200, 422]


def test_simultaneous_posts_with_one_key_make_one_row(client: TestClient) -> None:
    def post(_: int) -> Any:
        return client.post("/v1/feedback", json=_feedback(), headers={"Idempotency-Key": "k"})

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(post, range(6)))

    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [201]
    assert len(client.get("/v1/feedback").json()["items"]) == 1


def test_batch_answers_every_item_by_itself(client: TestClient) -> None:
    about = client.post("/v1/interactions", json=INTERACTION).json()["id"]
    items = [
        _feedback(about, idempotency_key="a"),
        _feedback(signal={"kind": "score", "value": 9, "min": 1, "max": 5}),
        _feedback(occurred_at="2026-05-01T12:00:00Z"),
        _feedback(nonsense=1),
        _feedback(about, idempotency_key="a"),
        _feedback("another", idempotency_key="a"),
    ]

    answer = client.post("/v1/feedback/batch", json={"items": items})

    assert answer.status_code == 200
    replies = answer.json()["items"]
    assert [reply["index"] for reply in replies] == list(range(6))
    assert [reply["status"] for reply in replies] == [201, 422, 201, 422, 200, 422]
    assert replies[0]["feedback"] == replies[4]["feedback"]
    assert [r["feedback"]["status"] for r in replies if r["feedback"]] == [
        "joined",
        "pending",
        "joined",
    ]
    assert replies[3]["problem"]["errors"][0]["field"] == "nonsense"
    assert len(client.get("/v1/feedback").json()["items"]) == 2


def test_batch_key_makes_the_whole_batch_repeatable(client: TestClient) -> None:
    body, headers = {"items": [_feedback(), _feedback()]}, {"Idempotency-Key": "k"}

    first = client.post("/v1/feedback/batch", json=body, headers=headers).json()["items"]
    again = client.post("/v1/feedback/batch", json=body, headers=headers).json()["items"]

    assert [r["status"] for r in first + again] == [201, 201, 200, 200]
    assert [r["feedback"] for r in first] == [r["feedback"] for r in again]


def test_lists_are_read_by_cursor(client: TestClient) -> None:
    ids = [
        client.post("/v1/interactions", json={**INTERACTION, "task": task}).json()["id"]
        for task in ("a", "b", "a")
    ]

    first = client.get("/v1/interactions?limit=2").json()
    rest = client.get(f"/v1/interactions?after={first['next_after']}").json()
    of_task = client.get("/v1/interactions?task=a").json()

    assert [item["id"] for item in first["items"] + rest["items"]] == ids
    assert [item["id"] for item in of_task["items"]] == [ids[0], ids[2]]


@pytest.fixture
def tenants(
    make_client: MakeClient, sqlite_database: Database, keys: KeyStore
) -> tuple[TestClient, Callable[..., dict[str, str]]]:
    def headers(tenant: str, *scopes: Scope) -> dict[str, str]:
        return {"Authorization": f"Bearer {keys.issue(tenant, frozenset(scopes)).text}"}

    return make_client(
        sqlite_database, authenticate=KeyCache(keys.find, utc_now).authenticate
    ), headers


CALLS = [
    ("POST", "/v1/interactions", INTERACTION, Scope.INGEST),
    ("POST", "/v1/feedback", _feedback(), Scope.INGEST),
    ("POST", "/v1/feedback/batch", {"items": [_feedback()]}, Scope.INGEST),
    ("GET", "/v1/interactions", None, Scope.READ),
    ("GET", "/v1/feedback", None, Scope.READ),
    ("GET", "/v1/interactions/int_x", None, Scope.READ),
    ("GET", "/v1/feedback/fb_x", None, Scope.READ),
]


@pytest.mark.parametrize(("method", "path", "body", "needed"), CALLS)
def test_route_is_open_to_its_scope_only(
    tenants: Any, method: str, path: str, body: Any, needed: Scope
) -> None:
    client, headers = tenants
    others = [scope for scope in Scope if scope is not needed]

    nobody = client.request(method, path, json=body)
    forged = client.request(method, path, json=body, headers={"Authorization": "Bearer pnl_a_b"})
    wrong = client.request(method, path, json=body, headers=headers("acme", *others))
    right = client.request(method, path, json=body, headers=headers("acme", needed))

    assert (nobody.status_code, forged.status_code, wrong.status_code) == (401, 401, 403)
    assert nobody.headers["WWW-Authenticate"] == "Bearer"
    assert right.status_code in (200, 201, 404)
    assert nobody.json()["code"] == "unauthenticated"


def test_nobody_learns_what_another_tenant_has(tenants: Any) -> None:
    client, headers = tenants
    acme, bolt = (headers(name, Scope.INGEST, Scope.READ) for name in ("acme", "bolt"))
    mine = client.post("/v1/interactions", json={**INTERACTION, "id": "shared"}, headers=acme)
    judged = client.post("/v1/feedback", json=_feedback("shared"), headers=acme).json()["id"]

    assert mine.status_code == 201
    for path in ("/v1/interactions/shared", f"/v1/feedback/{judged}"):
        assert client.get(path, headers=acme).status_code == 200
        foreign, absent = client.get(path, headers=bolt), client.get(f"{path}x", headers=bolt)
        assert (foreign.status_code, absent.status_code) == (404, 404)
    for path in ("/v1/interactions", "/v1/feedback"):
        assert client.get(path, headers=bolt).json()["items"] == []
    theirs = client.post("/v1/feedback", json=_feedback("shared"), headers=bolt)
    assert theirs.json()["status"] == "pending"
    same_id = client.post(
        "/v1/interactions", json={**INTERACTION, "id": "shared", "task": "b"}, headers=bolt
    )
    assert same_id.status_code == 201


def test_tenant_cannot_be_named_in_the_body(client: TestClient) -> None:
    answer = client.post("/v1/interactions", json={**INTERACTION, "tenant": "bolt"})

    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"field": "tenant", "reason": "this field is not known"}]


def test_health_and_readiness(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ok"}


def test_lost_store_is_503_with_retry_after(
    make_client: MakeClient, sqlite_database: Database
) -> None:
    lost = SqlFeedbackStore(Database("postgresql+psycopg://nobody@127.0.0.1:1/none"), utc_now)
    client = make_client(sqlite_database, store=lost, committer=GroupCommitter(lost.write))

    for answer in (client.get("/readyz"), client.post("/v1/feedback", json=_feedback())):
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "2"
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert "127.0.0.1" not in answer.text
    assert client.get("/healthz").status_code == 200


def test_unexpected_error_is_a_500_without_internals(
    make_client: MakeClient, sqlite_database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: str | None) -> Any:
        raise KeyError("the secret of the house")

    client = make_client(sqlite_database, authenticate=broken)

    answer = client.get("/v1/feedback", headers={"X-Request-Id": "r1"})

    assert answer.status_code == 500
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert (answer.headers["X-Request-Id"], answer.json()["request_id"]) == ("r1", "r1")
    assert "secret" not in answer.text
    assert "KeyError" in caplog.text


def test_request_id_is_kept_only_when_plain(client: TestClient) -> None:
    kept = client.get("/healthz", headers={"X-Request-Id": "abc-1"}).headers["X-Request-Id"]
    replaced = client.get("/healthz", headers={"X-Request-Id": "a b;c"}).headers["X-Request-Id"]

    assert kept == "abc-1"
    assert replaced.startswith("req_")


def test_metrics_count_what_was_stored_once(client: TestClient) -> None:
    for _ in range(2):
        client.post("/v1/feedback", json=_feedback(), headers={"Idempotency-Key": "k"})
    client.post("/v1/interactions", json=INTERACTION)
    client.post("/v1/feedback/batch", json={"items": [_feedback()]})
    client.get("/v1/interactions/a")
    client.get("/v1/interactions/b")
    client.get("/nowhere")

    text = client.get("/metrics").text

    assert 'perennial_feedback_stored_total{kind="binary",status="pending"} 2.0' in text
    assert "perennial_interactions_stored_total 1.0" in text
    assert "perennial_write_queue_rows 0.0" in text
    route = 'route="/v1/interactions/{id}"'
    assert f'perennial_http_requests_total{{method="GET",{route},status="404"}} 2.0' in text
    assert 'method="any",route="unmatched",status="404"' in text


def test_openapi_describes_the_bodies_and_needs_no_cdn(client: TestClient) -> None:
    document = client.get("/openapi.json").json()

    assert client.get("/docs").status_code == 404
    body = document["paths"]["/v1/feedback"]["post"]["requestBody"]["content"]
    assert body["application/json"]["schema"] == {"$ref": "#/components/schemas/FeedbackBody"}
    kinds = document["components"]["schemas"]["FeedbackBody"]["properties"]["signal"]
    assert len(kinds["discriminator"]["mapping"]) == 8
    assert "application/problem+json" in str(document["paths"]["/v1/feedback"]["post"])


def test_added_routes_share_errors_request_ids_and_metrics(client: TestClient) -> None:
    async def chat(request: Request) -> JSONResponse:
        if request.query_params:
            raise UnavailableError("the engine is loading")
        return JSONResponse({"path": request.url.path})

    client.app.router.routes.append(Route("/v1/chat/completions", chat, methods=["POST"]))

    answer = client.post("/v1/chat/completions")
    failed = client.post("/v1/chat/completions?x=1")

    assert answer.json() == {"path": "/v1/chat/completions"}
    assert answer.headers["X-Request-Id"]
    assert (failed.status_code, failed.json()["code"]) == (503, "unavailable")
    assert client.get("/v1/chat/completions").status_code == 405
    assert client.delete("/v1/interactions").status_code == 405
    assert 'route="/v1/chat/completions",status="200"' in client.get("/metrics").text
