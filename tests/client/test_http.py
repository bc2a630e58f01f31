"""Both clients against the real API."""

import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import perennial_client as pc
import pytest
from perennial_client import Retry, Signal, Target

from perennial.feedback.keys import Principal, Scope, open_access
from perennial.infra.errors import AuthError
from tests.client.site import Fault, Site

ASKED: dict[str, Any] = {
    "task": "support",
    "messages": [{"role": "user", "content": "How long is the warranty?"}],
    "completion": "Two years.",
    "model_version": "acme-1",
}
SIGNALS = {
    "binary": pc.thumb(up=False),
    "score": pc.score(4, min=1, max=5),
    "label": pc.label("off_topic"),
    "correction": pc.correction("Three years."),
    "preference": pc.preference(chosen="Three years.", rejected="Two years."),
    "demonstration": pc.demonstration("It is three years."),
    "comment": pc.comment("It was rude."),
    "implicit": pc.implicit("edit", text="Three."),
}


@pytest.mark.parametrize("kind", SIGNALS)
def test_every_signal_is_stored(client: Any, site: Site, kind: str) -> None:
    receipt = client.send_feedback("int_unknown", SIGNALS[kind])

    (stored,) = site.feedback()
    assert (stored.id, stored.signal.kind) == (receipt.id, kind)
    assert receipt.is_pending


@pytest.mark.parametrize(
    "target",
    [
        pc.trace("trace-1"),
        pc.inline(task="support", messages=[{"role": "user", "content": "?"}], completion="!"),
    ],
)
def test_every_target_is_taken(client: Any, site: Site, target: Target) -> None:
    client.send_feedback(target, pc.thumb(up=True))

    assert len(site.feedback()) == 1


def test_every_field_arrives(client: Any, site: Site) -> None:
    noon = datetime(2026, 5, 1, 12, 30, tzinfo=UTC)
    fields = {"subject": "s", "session": "c", "trace_id": "t", "finish_reason": "stop"}
    numbers = {"num_prompt_tokens": 7, "num_completion_tokens": 3, "latency_ms": 12.5}

    asked = client.record_interaction(
        **ASKED, **fields, **numbers, id="int_1", occurred_at=noon, tags={"plan": "pro"}
    )
    judged = client.send_feedback(
        "int_1", pc.thumb(up=True), source_kind="annotator", source_id="ann", may_train=False
    )

    (interaction,), (feedback,) = site.interactions(), site.feedback()
    assert {name: getattr(interaction, name) for name in fields} == fields
    assert {name: getattr(interaction, name) for name in numbers} == numbers
    assert (interaction.occurred_at, interaction.tags) == (noon, {"plan": "pro"})
    assert (feedback.source_kind, feedback.source_id) == ("annotator", "ann")
    assert not feedback.may_train
    assert (asked.is_pending, judged.is_pending) == (False, False)


def test_lost_answer_is_asked_for_again_with_the_same_key(client: Any, site: Site) -> None:
    site.faults += [Fault(status=502, is_late=True), Fault(status=504, is_late=True)]

    receipt = client.send_feedback("int_1", pc.comment("once"))

    assert receipt.is_replay
    assert site.comments() == ["once"]
    assert len(site.seen) == 3
    assert len({seen.key for seen in site.seen}) == 1
    assert site.seen[0].key


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_in_seconds_is_honoured(client: Any, site: Site, status: int) -> None:
    site.faults.append(Fault(status=status, headers={"Retry-After": "1"}))

    client.record_interaction(**ASKED)

    assert 1.0 <= site.seen[1].at_s - site.seen[0].at_s < 5
    assert len(site.interactions()) == 1


def test_retry_after_as_a_date_is_honoured(client: Any, site: Site) -> None:
    until = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    site.faults.append(Fault(status=503, headers={"Retry-After": until}))

    client.record_interaction(**ASKED)

    assert 0.5 <= site.seen[1].at_s - site.seen[0].at_s < 5


def test_refusal_names_the_field_and_is_not_tried_again(client: Any, site: Site) -> None:
    with pytest.raises(pc.RefusedError) as caught:
        client.send_feedback("int_1", Signal({"kind": "label", "value": ""}))

    assert caught.value.problem.status == 422
    assert "value" in str(caught.value)
    assert len(site.seen) == 1


def test_key_with_another_payload_is_a_conflict(client: Any, site: Site) -> None:
    client.send_feedback("int_1", pc.thumb(up=True), idempotency_key="k")

    with pytest.raises(pc.ConflictError):
        client.send_feedback("int_1", pc.thumb(up=False), idempotency_key="k")

    assert len(site.seen) == 2


def test_api_key_is_sent_and_its_absence_named(connect: Callable[..., Any], down: Site) -> None:
    down.authenticate = _only("pnl_good")
    down.start()
    try:
        connect(down.url, "pnl_good").record_interaction(**ASKED)
        with pytest.raises(pc.AccessError, match="401 unauthenticated"):
            connect(down.url).record_interaction(**ASKED)
    finally:
        down.stop()

    assert len(down.seen) == 2


def _only(secret: str) -> Callable[[str | None], Principal]:
    def authenticate(token: str | None) -> Principal:
        if token != secret:
            raise AuthError("no valid API key")
        return open_access()(token)

    assert Scope.INGEST in open_access()(None).scopes
    return authenticate


def test_server_that_is_down_is_tried_until_the_limit(
    connect: Callable[..., Any], down: Site
) -> None:
    with pytest.raises(pc.UnreachableError, match="ConnectError"):
        connect(down.url).record_interaction(**ASKED)


def test_silent_server_costs_its_timeouts_only(connect: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = connect(
            f"http://127.0.0.1:{silent.getsockname()[1]}",
            timeout_s=0.2,
            retry=Retry(max_attempts=2, base_wait_s=0.01),
        )
        started_s = time.monotonic()
        with pytest.raises(pc.UnreachableError, match="ReadTimeout"):
            client.record_interaction(**ASKED)

    assert time.monotonic() - started_s < 5


def test_server_that_comes_back_is_met_by_the_same_call(
    connect: Callable[..., Any], down: Site
) -> None:
    patient = Retry(max_attempts=200, max_total_s=60, base_wait_s=0.05, max_wait_s=0.1)
    down.faults += [Fault(status=503)] * 20
    down.start()
    try:
        connect(down.url, retry=patient).record_interaction(**ASKED)
    finally:
        down.stop()

    assert len(down.seen) == 21
    assert len(down.interactions()) == 1


@pytest.mark.parametrize("text", ["<html>Welcome to the hotel</html>", "[]", "{}"])
def test_answer_of_another_server_is_an_error(client: Any, site: Site, text: str) -> None:
    site.faults.append(Fault(status=200, text=text, headers={"Content-Type": "text/html"}))

    with pytest.raises(pc.ApiError, match="unexpected_answer"):
        client.record_interaction(**ASKED)


def test_batch_answers_each_item_in_its_place(client: Any, site: Site) -> None:
    asked = pc.interaction(**ASKED)
    items = [
        pc.feedback(asked.body["id"], pc.comment("a")),
        pc.feedback("int_1", Signal({"kind": "label", "value": ""})),
        asked,
        pc.feedback("int_1", pc.comment("b")),
    ]

    first, refused, third, fourth = client.send_batch(items)
    again = client.send_batch(items)

    assert third.id == asked.body["id"]
    assert (first.is_pending, fourth.is_pending) == (False, True)  # interactions went first
    assert (refused.status, type(refused)) == (422, pc.Problem)
    assert [getattr(each, "is_replay", None) for each in again] == [True, None, True, True]
    assert site.comments() == ["a", "b"]


def test_empty_batch_asks_nothing(client: Any, site: Site) -> None:
    assert client.send_batch([]) == []
    assert site.seen == []
