"""Traces and assessments of MLflow 3.

The shape is that of `mlflow.entities.Trace.to_dict()` and `Assessment.to_dictionary()` in MLflow
3.17: `info` as the protobuf message TraceInfoV3 in JSON, spans whose attributes are JSON texts.
"""

from collections.abc import Sequence
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

_SOURCES: dict[str, SourceKind] = {"HUMAN": "annotator", "LLM_JUDGE": "llm_judge"}
_MODEL_SPANS = ("CHAT_MODEL", "LLM")


class _Source(msgspec.Struct):
    source_type: str
    source_id: str | None = None


class _Value(msgspec.Struct):
    value: Any = None  # Any: JSON
    error: Any = None


class _Assessment(msgspec.Struct):
    assessment_name: str
    source: _Source
    trace_id: str | None = None
    assessment_id: str | None = None
    feedback: _Value | None = None
    expectation: _Value | None = None
    rationale: str | None = None
    create_time: str | None = None
    valid: bool = True


class _Info(msgspec.Struct):
    trace_id: str
    request_time: str | None = None
    execution_duration_ms: int | None = None
    trace_metadata: dict[str, str] = {}
    assessments: list[_Assessment] = []


class _Span(msgspec.Struct):
    attributes: dict[str, Any]
    parent_span_id: str | None = None
    end_time_unix_nano: int | None = None


class _Spans(msgspec.Struct):
    spans: list[_Span]


class _Trace(msgspec.Struct):
    info: _Info
    data: _Spans


def from_mlflow(row: Json, about: About) -> Lines:
    """A trace with its assessments, or an assessment alone.

    A trace may also be a row of `mlflow.search_traces()`, which holds it as text. Its last span of
    a chat model is the interaction, else its root.
    """
    if "assessment_name" in row:
        alone = msgspec.convert(row, _Assessment)
        return _assessment(alone, {"trace_id": alone.trace_id}, about.digest, about)
    trace = msgspec.convert(row if "info" in row else as_json(row.get("trace")), _Trace)
    id = own_id("mlflow", trace.info.trace_id)
    target = {"interaction_id": id}

    def verdict(numbered: tuple[int, _Assessment]) -> Lines:
        index, assessment = numbered
        return _assessment(assessment, target, f"{about.digest}:{index}", about)

    return [
        _interaction(id, trace.info, _answering_span(trace.data.spans), about),
        *each_alone(verdict, enumerate(trace.info.assessments)),
    ]


def _interaction(id: str, info: _Info, span: _Span, about: About) -> Json:
    attributes = {name: as_json(value) for name, value in span.attributes.items()}
    usage = attributes.get("mlflow.chat.tokenUsage") or {}
    return interaction_line(
        id,
        about,
        messages=messages_of(attributes.get("mlflow.spanInputs")),
        completion=answer_of(attributes.get("mlflow.spanOutputs")),
        model_version=attributes.get("mlflow.llm.model"),
        subject=info.trace_metadata.get("mlflow.trace.user"),
        session=info.trace_metadata.get("mlflow.trace.session"),
        trace_id=info.trace_id,
        num_prompt_tokens=usage.get("input_tokens"),
        num_completion_tokens=usage.get("output_tokens"),
        latency_ms=info.execution_duration_ms,
        occurred_at=utc(info.request_time),
    )


def _answering_span(spans: Sequence[_Span]) -> _Span:
    models = [s for s in spans if as_json(s.attributes.get("mlflow.spanType")) in _MODEL_SPANS]
    roots = [s for s in spans if not s.parent_span_id]
    if not models and not roots:
        raise InputError("the trace has no span")
    return max(models or roots, key=lambda span: span.end_time_unix_nano or 0)


def _assessment(row: _Assessment, target: Json, otherwise: str, about: About) -> Lines:
    """Nothing for an overridden one, a failed one, an issue, an expectation that is no answer.

    One that no server has stored has no id: then it is known by `otherwise`.
    """
    kind = _SOURCES.get(row.source.source_type, "code")
    signal = _signal(row, kind, about)
    if signal is None or not row.valid:
        return []
    verdict = Verdict(
        key=f"mlflow:{row.assessment_id or otherwise}",
        target=target,
        kind=kind,
        source_id=row.source.source_id,
        name=row.assessment_name,
        occurred_at=utc(row.create_time),
    )
    return feedback_lines(verdict, signal, row.rationale)


def _signal(row: _Assessment, kind: SourceKind, about: About) -> Json | None:
    if row.feedback is not None and row.feedback.error is None:
        return signal_of(row.feedback.value, kind, about)
    expected = row.expectation and row.expectation.value
    # The name that MLflow's own judges read the right answer from.
    if row.assessment_name == "expected_response" and isinstance(expected, str):
        return {"kind": "correction", "text": expected}
    return None
