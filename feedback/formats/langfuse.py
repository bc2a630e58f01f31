"""Generations and scores of Langfuse.

Field names are those of its API (camelCase: `GET /traces/{id}`, `/observations` and `/v2/scores`)
and of its blob storage export (snake_case: `observations`, `observations_v2` and `scores`), as
documented in 2026.
"""

import re
from typing import Any

import msgspec

from perennial.feedback.formats.chat import Json, answer_of, messages_of
from perennial.feedback.formats.lines import (
    About,
    Lines,
    Verdict,
    as_json,
    each_alone,
    feedback_lines,
    interaction_line,
    own_id,
    signal_of,
    utc,
)
from perennial.feedback.records import SourceKind
from perennial.infra.errors import InputError

# API is whatever an SDK sent; the thumbs of users come that way.
_SOURCES: dict[str, SourceKind] = {
    "ANNOTATION": "annotator",
    "API": "end_user",
    "EVAL": "llm_judge",
}


class _Generation(msgspec.Struct):
    id: str
    input: Any = None  # Any: JSON, or a text that may be JSON
    output: Any = None
    model: str | None = None
    provided_model_name: str | None = None
    trace_id: str | None = None
    user_id: str | None = None
    session_id: str | None = None
    usage_details: dict[str, int] | None = None
    latency: float | None = None  # seconds
    start_time: str | None = None


class _Score(msgspec.Struct):
    id: str
    data_type: str
    source: str
    value: Any = None
    string_value: str | None = None
    name: str | None = None
    comment: str | None = None
    trace_id: str | None = None
    observation_id: str | None = None
    author_user_id: str | None = None
    timestamp: str | None = None


class _Trace(msgspec.Struct):
    """With its observations and scores in it, as only `GET /traces/{id}` gives it."""

    observations: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    user_id: str | None = None
    session_id: str | None = None


def from_langfuse(row: Json, about: About) -> Lines:
    """What a generation, a score, or a trace around them holds.

    A trace without its observations holds nothing, nor does an observation that is no generation.
    """
    row = {_snake(name): value for name, value in row.items()}
    if "id" not in row:
        raise InputError("the line is no trace, observation or score of Langfuse")
    if "data_type" in row:
        return _score(msgspec.convert(row, _Score), about)
    if row.get("type") == "GENERATION":
        return [_interaction(msgspec.convert(row, _Generation), about)]
    try:
        trace = msgspec.convert(row, _Trace)
    except msgspec.ValidationError:
        return []
    same = {"user_id": trace.user_id, "session_id": trace.session_id}
    inner = [{**each, **same} for each in trace.observations] + trace.scores
    return each_alone(lambda each: from_langfuse(each, about), inner)


def _interaction(row: _Generation, about: About) -> Json:
    usage = row.usage_details or {}
    return interaction_line(
        own_id("langfuse", row.id),
        about,
        messages=messages_of(as_json(row.input)),
        completion=answer_of(as_json(row.output)),
        model_version=row.model or row.provided_model_name,
        subject=row.user_id,
        session=row.session_id,
        trace_id=row.trace_id,
        num_prompt_tokens=usage.get("input"),
        num_completion_tokens=usage.get("output"),
        latency_ms=None if row.latency is None else row.latency * 1000,
        occurred_at=utc(row.start_time),
    )


def _score(row: _Score, about: About) -> Lines:
    """Nothing for the score of a session or a dataset run, which is about no single answer."""
    if row.observation_id:
        target = {"interaction_id": own_id("langfuse", row.observation_id)}
    elif row.trace_id:
        target = {"trace_id": row.trace_id}
    else:
        return []
    verdict = Verdict(
        key=f"langfuse:{row.id}",
        target=target,
        kind=_SOURCES.get(row.source, "code"),
        source_id=row.author_user_id,
        name=row.name,
        occurred_at=utc(row.timestamp),
    )
    return feedback_lines(verdict, _signal(row, verdict.kind, about), row.comment)


def _signal(row: _Score, kind: SourceKind, about: About) -> Json:
    said = row.string_value or row.value
    match row.data_type:
        case "BOOLEAN" if row.value in (0, 1):
            return signal_of(bool(row.value), kind, about)
        case "NUMERIC":
            return signal_of(row.value, kind, about)
        case "CATEGORICAL":
            return signal_of(said, kind, about)
        case "TEXT":
            return {"kind": "comment", "text": said}
        case "CORRECTION":
            return {"kind": "correction", "text": said}
    raise InputError(f"a score of type {row.data_type!r} with such a value is not known")


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])([A-Z])", r"_\1", name).lower()
