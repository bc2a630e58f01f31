"""Who may call what: every route of the real app, every kind of caller, and other tenants' things.

The app is the one of `perennial serve` but for the model. A route that is not in ACCESS fails
`test_every_route_of_the_app_is_in_the_matrix`.
"""

from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import iter_route_contexts
from starlette.testclient import TestClient

from perennial.feedback.keys import KeyStore, Scope
from perennial.flows.app import compose
from perennial.infra.clock import utc_now
from perennial.infra.db import Database
from perennial.infra.migrate import upgrade
from perennial.infra.settings import load_settings
from perennial.serving.engine import (
    BASE,
    AdapterRef,
    Answer,
    ChatRequest,
    Delta,
    EngineHealth,
    Finish,
    collect,
)

CHAT = {"model": "assistant", "messages": [{"role": "user", "content": "How long?"}]}
INTERACTION = {
    "task": "assistant",
    "messages": [{"role": "user", "content": "How long?"}],
    "completion": "Two years.",
    "model_version": "v1",
    "route_role": "champion",
}
FEEDBACK = {
    "target": {"interaction_id": "int_of_acme"},
    "signal": {"kind": "correction", "text": "Three years."},
}
OPEN = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A route, the scope that opens it, and a request about something of acme's.

    A caller of acme is answered with `status`, one of another tenant with `foreign`.
    """

    method: str
    template: str
    needed: Scope | None
    path: str = ""
    body: dict[str, Any] | None = None
    status: int = 200
    foreign: int = 200

    def __str__(self) -> str:
        return f"{self.method} {self.template}"


def _writes(template: str, body: dict[str, Any], status: int = 201) -> Call:
    return Call(
        method="POST",
        template=template,
        needed=Scope.INGEST,
        body=body,
        status=status,
        foreign=status,
    )


def _reads(template: str, needed: Scope | None, path: str = "", foreign: int = 200) -> Call:
    return Call(method="GET", template=template, needed=needed, path=path, foreign=foreign)


ACCESS = [
    _writes("/v1/interactions", INTERACTION),
    _writes("/v1/interactions/batch", {"items": [INTERACTION]}, status=200),
    _writes("/v1/feedback", FEEDBACK),
    _writes("/v1/feedback/batch", {"items": [FEEDBACK]}, status=200),
    _writes("/v1/traces", {"resourceSpans": []}, status=200),
    _writes("/v1/chat/completions", CHAT, status=200),
    _reads("/v1/interactions", Scope.READ),
    _reads("/v1/interactions/{id}", Scope.READ, "/v1/interactions/int_of_acme", foreign=404),
    _reads("/v1/feedback", Scope.READ),
    _reads("/v1/feedback/{id}", Scope.READ, "/v1/feedback/FEEDBACK_OF_ACME", foreign=404),
    Call(
        method="DELETE",
        template="/v1/subjects/{subject:path}",
        needed=Scope.ADMIN,
        path="/v1/subjects/nobody",
    ),
    _reads("/v1/models", Scope.INGEST),
    _reads("/v1/models/{task}", Scope.INGEST, "/v1/models/assistant"),
    _reads("/v1/serving", OPEN),
    _reads("/healthz", OPEN),
    _reads("/readyz", OPEN),
    _reads("/metrics", OPEN),
    _reads("/openapi.json", OPEN),
]
WITHOUT_KEY = [
    "no key",
    "other scheme",
    "malformed",
    "unknown",
    "wrong secret",
    "expired",
    "revoked",
]
OTHERS, FOREIGN = "every scope but the one needed", "foreign tenant with every scope"
CALLERS = [*WITHOUT_KEY, *Scope, OTHERS, FOREIGN]


class EchoEngine:
    """A model that says what it was asked."""

    def ensure_loaded(self, adapter: AdapterRef) -> None: ...

    def unload(self, name: str) -> None: ...

    def close(self) -> None: ...

    async def chat(self, request: ChatRequest, adapter: AdapterRef = BASE) -> Answer:
        return await collect(self.stream(request, adapter))

    async def stream(
        self, request: ChatRequest, adapter: AdapterRef = BASE
    ) -> AsyncGenerator[Delta, None]:
        finish = Finish(reason="stop", num_prompt_tokens=1, num_completion_tokens=1)
        yield Delta(text=request.messages[-1].content, finish=finish)

    def health(self) -> EngineHealth:
        return EngineHealth(is_ready=True, loaded=(), num_running=0, num_waiting=0, max_waiting=1)


class House:
    """The app behind keys, with things that belong to acme, and keys of every kind."""

    def __init__(self, client: TestClient, keys: KeyStore) -> None:
        self.client = client
        self._keys = keys
        self._everything = self.key("acme", *Scope)
        self._sent = self._make_authorizations()
        item = {**INTERACTION, "id": "int_of_acme", "subject": "robin"}
        assert self._post("/v1/interactions", item).status_code == 201
        self.feedback_id = str(self._post("/v1/feedback", FEEDBACK).json()["id"])

    def key(self, tenant: str, *scopes: Scope) -> str:
        return self._keys.issue(tenant, frozenset(scopes)).text

    def authorization(self, caller: str, needed: Scope | None) -> str | None:
        """What a `caller` sends, who is of tenant acme unless foreign."""
        if caller == OTHERS:
            return f"Bearer {self.key('acme', *(scope for scope in Scope if scope != needed))}"
        return self._sent[caller]

    def _make_authorizations(self) -> dict[str, str | None]:
        text = self._everything
        expired = self._keys.issue("acme", frozenset(Scope), lifetime=timedelta(0))
        revoked = self._keys.issue("acme", frozenset(Scope))
        self._keys.revoke(revoked.key.id)
        return {
            "no key": None,
            "other scheme": f"Basic {text}",
            "malformed": "Bearer pnl_a_b",
            "unknown": f"Bearer pnl_0123456789abcdef_{'a' * 43}",
            "wrong secret": f"Bearer {text[:-3]}xyz",
            "expired": f"Bearer {expired.text}",
            "revoked": f"Bearer {revoked.text}",
            FOREIGN: f"Bearer {self.key('bolt', *Scope)}",
            **{scope: f"Bearer {self.key('acme', scope)}" for scope in Scope},
        }

    def request(self, call: Call, authorization: str | None) -> Any:
        path = (call.path or call.template).replace("FEEDBACK_OF_ACME", self.feedback_id)
        headers = {"Authorization": authorization} if authorization else {}
        return self.client.request(call.method, path, json=call.body, headers=headers)

    def get(self, path: str, key: str) -> Any:
        return self.client.get(path, headers={"Authorization": f"Bearer {key}"})

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Authorization": f"Bearer {self._everything}"}
        return self.client.post(path, json=body, headers=headers)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    home: Path = tmp_path_factory.mktemp("house")
    settings = load_settings({"PERENNIAL_HOME": str(home), "PERENNIAL_API__AUTH": "keys"})
    upgrade(settings.resolved_database_url)
    database = Database(settings.resolved_database_url)
    app = compose(settings, database, EchoEngine())
    with TestClient(app, raise_server_exceptions=False) as client:
        yield House(client, KeyStore(database, utc_now))


def test_every_route_of_the_app_is_in_the_matrix(house: House) -> None:
    routes = list(iter_route_contexts(house.client.app.routes))  # type: ignore[attr-defined]  # FastAPI

    found = {f"{m} {route.path}" for route in routes for m in (route.methods or {"*"}) - {"HEAD"}}

    assert found == {str(call) for call in ACCESS}


def test_documented_scope_is_the_real_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    rows = {
        str(
            call
        ): f"| `{call.method} {call.template.replace(':path', '')}` | {call.needed or 'none'} |"
        for call in ACCESS
        if call.template != "/openapi.json"
    }

    assert [name for name, row in rows.items() if row not in text] == []


@pytest.mark.parametrize("caller", CALLERS, ids=str)
@pytest.mark.parametrize("call", ACCESS, ids=str)
def test_route_answers_who_may_and_nobody_else(house: House, call: Call, caller: str) -> None:
    answer = house.request(call, house.authorization(caller, call.needed))

    if caller == FOREIGN:
        assert answer.status_code == call.foreign, answer.text
    elif call.needed is OPEN or caller == call.needed:
        assert answer.status_code == call.status, answer.text
    elif caller in WITHOUT_KEY:
        assert answer.status_code == 401, answer.text
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    else:
        assert answer.status_code == 403, answer.text


@pytest.mark.parametrize("path", ["/v1/interactions/int_of_acme", "/v1/feedback/{feedback}"])
def test_foreign_thing_looks_exactly_like_one_that_is_not_there(house: House, path: str) -> None:
    path = path.replace("{feedback}", house.feedback_id)
    stranger = house.key("bolt", *Scope)

    foreign, absent = house.get(path, stranger), house.get(f"{path}x", stranger)

    assert (foreign.status_code, absent.status_code) == (404, 404)
    assert _without_id(foreign, path) == _without_id(absent, f"{path}x")


@pytest.mark.parametrize("path", ["/v1/interactions", "/v1/feedback"])
def test_lists_hold_nothing_of_another_tenant(house: House, path: str) -> None:
    assert house.get(path, house.key("acme", Scope.READ)).json()["items"]

    assert house.get(path, house.key("curious", *Scope)).json()["items"] == []


def test_writing_tells_nothing_of_another_tenant(house: House) -> None:
    stranger = {"Authorization": f"Bearer {house.key('bolt', Scope.INGEST)}"}
    post: Callable[..., Any] = house.client.post
    on_absent = {**FEEDBACK, "target": {"interaction_id": "int_of_nobody"}}

    judged = [post("/v1/feedback", json=item, headers=stranger) for item in (FEEDBACK, on_absent)]
    same_id = {**INTERACTION, "id": "int_of_acme", "completion": "One year."}
    taken = post("/v1/interactions", json=same_id, headers=stranger)

    assert [(answer.status_code, answer.json()["status"]) for answer in judged] == [
        (201, "pending"),
        (201, "pending"),
    ]
    assert taken.status_code == 201
    mine = house.get("/v1/interactions/int_of_acme", house.key("acme", Scope.READ)).json()
    assert mine["completion"] == "Two years."


def test_erasure_reaches_nothing_of_another_tenant(house: House) -> None:
    stranger = {"Authorization": f"Bearer {house.key('bolt', Scope.ADMIN)}"}

    erased = house.client.delete("/v1/subjects/robin", headers=stranger)

    assert (erased.status_code, erased.json()) == (200, {"num_rows": 0})
    mine = house.get("/v1/interactions/int_of_acme", house.key("acme", Scope.READ)).json()
    assert mine["completion"] == "Two years."


def test_answer_of_the_gateway_belongs_to_the_tenant_of_the_key(house: House) -> None:
    asker = {"Authorization": f"Bearer {house.key('bolt', Scope.INGEST)}"}

    answer = house.client.post("/v1/chat/completions", json=CHAT, headers=asker)

    path = f"/v1/interactions/{answer.headers['x-interaction-id']}"
    assert house.get(path, house.key("bolt", Scope.READ)).status_code == 200
    assert house.get(path, house.key("acme", Scope.READ)).status_code == 404


def _without_id(answer: Any, path: str) -> dict[str, Any]:
    problem: dict[str, Any] = answer.json()
    del problem["request_id"]
    return {**problem, "detail": problem["detail"].replace(path.rpartition("/")[2], "…")}
