import itertools
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from perennial.feedback.records import (
    MAX_COUNT,
    Binary,
    Comment,
    Correction,
    Demonstration,
    Feedback,
    Implicit,
    Interaction,
    Label,
    Message,
    Preference,
    Score,
    Target,
)
from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.infra.clock import new_id
from perennial.infra.db import Database
from perennial.infra.errors import InputError
from tests.feedback.writing import put

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=40)
filled = texts.filter(bool)
ids = st.text("abcXYZ019._:-", min_size=1, max_size=128)
# hypothesis takes naive bounds and adds the zone.
FIRST, LAST = datetime(1970, 1, 2), datetime(2999, 12, 30)  # noqa: DTZ001
times = st.datetimes(FIRST, LAST, timezones=st.just(UTC))
messages = st.lists(
    st.builds(Message, role=st.sampled_from(["system", "user", "assistant"]), content=texts),
    min_size=1,
    max_size=3,
).map(tuple)
tags = st.dictionaries(filled, texts, max_size=16)
counts = st.none() | st.integers(0, MAX_COUNT)
interactions = st.builds(
    Interaction,
    id=ids,
    tenant=filled,
    task=filled,
    messages=messages,
    completion=texts,
    model_version=filled,
    route_role=filled,
    received_at=times,
    subject=st.none() | filled,
    session=st.none() | filled,
    trace_id=st.none() | filled,
    num_prompt_tokens=counts,
    num_completion_tokens=counts,
    latency_ms=st.none() | st.floats(0, 1e12),
    finish_reason=st.none() | filled,
    occurred_at=st.none() | times,
    tags=tags,
)
signals = st.one_of(
    st.builds(Binary, value=st.booleans()),
    st.builds(Score, value=st.floats(1, 5), min=st.just(1.0), max=st.just(5.0)),
    st.builds(Label, value=filled),
    st.builds(Correction, text=filled),
    st.builds(Preference, chosen=filled, rejected=filled),
    st.builds(Demonstration, text=filled),
    st.builds(Comment, text=filled),
    st.builds(Implicit, action=st.just("edit"), text=st.none() | filled),
    st.builds(Implicit, action=st.sampled_from(["copy", "regenerate", "accept", "abandon"])),
)
targets = st.one_of(
    st.builds(Target, interaction_id=ids),
    st.builds(Target, trace_id=filled),
    st.builds(Target, messages=messages, completion=st.none() | texts),
)
feedbacks = st.builds(
    Feedback,
    id=ids,
    tenant=filled,
    task=filled,
    target=targets,
    signal=signals,
    source_kind=st.sampled_from(["end_user", "annotator", "llm_judge", "code"]),
    source_id=st.none() | filled,
    subject=st.none() | filled,
    may_train=st.booleans(),
    received_at=times,
    occurred_at=st.none() | times,
    tags=tags,
)


_stored = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@_stored
@given(item=interactions)
def test_interaction_comes_back_from_a_database_as_it_was(
    database: Database, item: Interaction
) -> None:
    store = SqlFeedbackStore(database, lambda: item.received_at)
    sent = replace(item, id=new_id("int"), tenant="acme")

    put(store, sent)

    found = store.get_interaction("acme", sent.id)
    assert found == replace(sent, received_at=found.received_at)


@_stored
@given(item=feedbacks)
def test_feedback_comes_back_from_a_database_as_it_was(database: Database, item: Feedback) -> None:
    store = SqlFeedbackStore(database, lambda: item.received_at)
    sent = replace(item, id=new_id("fb"), tenant="acme")

    stored = put(store, sent)

    found = store.get_feedback("acme", sent.id)
    at = found.received_at
    joined_at = at if stored.status == "joined" else None
    assert found == replace(sent, received_at=at, status=stored.status, joined_at=joined_at)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Score(value=6, min=1, max=5), "must lie in"),
        (lambda: Score(value=1, min=5, max=5), "below max"),
        (lambda: Score(value=math.nan, min=1, max=5), "finite"),
        (lambda: Score(value=1, min=1, max=math.inf), "finite"),
        (lambda: Label(value=""), "empty"),
        (lambda: Correction(text="a\0b"), "NUL"),
        (lambda: Correction(text="\ud800"), "surrogate"),
        (lambda: Correction(text="x" * 1_000_001), "at most 1000000"),
        (lambda: Implicit(action="copy", text="x"), "only the action edit"),
        (lambda: Implicit(action="sneeze"), "one of copy"),
        (lambda: Message(role="robot", content=""), "one of system"),
        (Target, "one of interaction_id"),
        (lambda: Target(interaction_id="a", trace_id="b"), "one of interaction_id"),
        (lambda: Target(interaction_id="a b"), "interaction_id must be"),
        (lambda: Target(interaction_id="a\n"), "interaction_id must be"),
        (lambda: Target(trace_id="t", completion="x"), "comes with target.messages"),
    ],
    ids=itertools.count(),
)
def test_record_refuses(make: Callable[[], object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"id": ""}, "id must be"),
        ({"task": ""}, "task must not be empty"),
        ({"task": "x" * 257}, "at most 256"),
        ({"messages": ()}, "1 to 1000 messages"),
        ({"latency_ms": -1.0}, "latency_ms"),
        ({"latency_ms": math.inf}, "latency_ms"),
        ({"num_prompt_tokens": -1}, "num_prompt_tokens"),
        ({"num_completion_tokens": 2**31}, "num_completion_tokens"),
        ({"received_at": datetime(2026, 1, 1)}, "offset from UTC"),  # noqa: DTZ001 naive on purpose
        ({"occurred_at": datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14)))}, "years"),
        ({"tags": {str(i): "" for i in range(17)}}, "at most 16 tags"),
        ({"tags": {"k" * 65: ""}}, "64 characters"),
        ({"tags": {"k": "v" * 513}}, "512 in its value"),
        ({"tags": {"": "v"}}, "empty"),
    ],
    ids=itertools.count(),
)
def test_interaction_refuses(
    make_interaction: Callable[..., Interaction], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        make_interaction(**changes)


def test_inline_feedback_must_name_its_task(make_feedback: Callable[..., Feedback]) -> None:
    with pytest.raises(InputError, match="name its task"):
        make_feedback(target=Target(messages=(Message(role="user", content="q"),)))
