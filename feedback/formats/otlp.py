"""OpenTelemetry traces as interactions and feedback: what `POST /v1/traces` takes and answers.

Pure. Names are those of the semantic conventions 1.44.0 (the package 0.66b2; GenAI is at status
Development there and moves to a repository of its own), and of 1.36 and before, where the messages
were events of the span. Mounting the route and storing the items are left to others.
"""

import re
import zlib
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
from google.protobuf import json_format  # type: ignore[import-untyped]  # ships no types
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # ships no types
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from perennial.feedback.formats.chat import Json, answer_of, messages_of, text_of
from perennial.feedback.formats.lines import (
    About,
    Verdict,
    as_json,
    feedback_lines,
    interaction_line,
    own_id,
    signal_of,
)
from perennial.infra.errors import InputError, MalformedError, TooLargeError

PROTOBUF = "application/x-protobuf"
JSON = "application/json"
TASK = "perennial.task"
"""Of a span or a resource: the task, where it is not the installation's only one."""

SCALE = ("perennial.score.min", "perennial.score.max")
"""Of an evaluation: the ends of its scale, which the conventions do not name."""

_ANSWERING = ("chat", "text_completion", "generate_content")
_DETAILS = "gen_ai.client.inference.operation.details"
_EVALUATION = "gen_ai.evaluation.result"
_CHOICE = "gen_ai.choice"
_MESSAGE = re.compile(r"gen_ai\.(system|user|assistant|tool)\.message")
_MAX_MESSAGE_CHARS = 1_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """The items of a batch of each kind, and what became of the rest.

    Attributes:
        num_ignored: spans that are no answer of a model, or of one that failed.
        rejected: why, for each span of an answer that cannot be kept.
        warnings: why, for each evaluation that cannot be kept.
    """

    interactions: tuple[Json, ...]
    feedback: tuple[Json, ...]
    num_ignored: int
    rejected: tuple[str, ...]
    warnings: tuple[str, ...]


def traces_to_items(content: bytes, content_type: str, *, task: str) -> Converted:
    """The answers and evaluations in an export request; `task` is for spans that name none.

    An interaction is known by its `gen_ai.response.id`, else by (trace id, span id), which are also
    its idempotency key: an export that is sent again stores nothing twice.

    Raises:
        MalformedError: the content is not an ExportTraceServiceRequest in that encoding.
    """
    interactions, feedback, rejected, warnings, num_ignored = [], [], [], [], 0
    for each in _spans(_parse(content, content_type), _is_json(content_type), task):
        if each.is_answer:
            try:
                interactions.append(_interaction(each))
            except InputError as error:
                rejected.append(f"span {each.span_id}: {error}")
        else:
            num_ignored += 1
        for index, event in enumerate(each.span.events):
            if event.name == _EVALUATION:
                try:
                    feedback += _evaluation(each, event, index)
                except InputError as error:
                    warnings.append(f"evaluation in span {each.span_id}: {error}")
    return Converted(
        interactions=tuple(interactions),
        feedback=tuple(feedback),
        num_ignored=num_ignored,
        rejected=tuple(rejected),
        warnings=tuple(warnings),
    )


def reply(num_rejected: int, reasons: Sequence[str], content_type: str) -> bytes:
    """The ExportTraceServiceResponse in the encoding of the request.

    With `partial_success` where something was refused or warned of; a client must not send refused
    spans again.
    """
    response = ExportTraceServiceResponse()
    if num_rejected or reasons:
        text = "; ".join(dict.fromkeys(reasons))
        response.partial_success.rejected_spans = num_rejected
        response.partial_success.error_message = text[:_MAX_MESSAGE_CHARS]
    if _is_json(content_type):
        return str(json_format.MessageToJson(response, indent=None)).encode()
    return bytes(response.SerializeToString())


def gunzip(content: bytes, max_bytes: int) -> bytes:
    """What a body with `Content-Encoding: gzip` holds; collectors compress by default.

    Raises:
        TooLargeError: it holds more than `max_bytes`; no more than that is ever unpacked.
        MalformedError: it is not gzip.
    """
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        unpacked = unpacker.decompress(content, max_bytes + 1)
    except zlib.error as error:
        raise MalformedError(f"the body is not gzip: {error}") from error
    if len(unpacked) > max_bytes:
        raise TooLargeError(f"the body may hold at most {max_bytes} bytes", max_bytes=max_bytes)
    if not unpacker.eof:
        raise MalformedError("the body is not gzip: it ends too early")
    return unpacked


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """A span with its ids in hex and its attributes as JSON."""

    span: Span
    trace_id: str
    span_id: str
    attributes: Json
    task: str

    @property
    def is_answer(self) -> bool:
        is_failed = self.span.status.code == Status.STATUS_CODE_ERROR
        return self.attributes.get("gen_ai.operation.name") in _ANSWERING and not is_failed

    @property
    def key(self) -> str:
        return f"otlp:{self.trace_id}:{self.span_id}"

    @property
    def answer_id(self) -> str:
        return own_id("otlp", str(self.attributes.get("gen_ai.response.id") or self.key))


def _is_json(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() == JSON


def _parse(content: bytes, content_type: str) -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    try:
        if _is_json(content_type):
            sent = msgspec.json.decode(content, type=dict)
            json_format.ParseDict(sent, request, ignore_unknown_fields=True)
        else:
            request.ParseFromString(content)
    except _NO_EXPORT as error:
        raise MalformedError(f"the body is not an OTLP trace export: {error}") from error
    return request


_NO_EXPORT = (
    DecodeError,
    json_format.ParseError,
    msgspec.DecodeError,
    UnicodeDecodeError,
    RecursionError,
)


def _spans(request: ExportTraceServiceRequest, is_json: bool, task: str) -> Iterator[_Read]:
    # The JSON of OTLP has ids in hex where that of protobuf has base64: encoding gives them back.
    in_hex = (lambda id: b64encode(id).decode().lower()) if is_json else bytes.hex
    for resource in request.resource_spans:
        shared = _attributes(resource.resource.attributes)
        for span in (span for scope in resource.scope_spans for span in scope.spans):
            own = _attributes(span.attributes)
            for event in span.events:
                own |= _attributes(event.attributes) if event.name == _DETAILS else {}
            yield _Read(
                span=span,
                trace_id=in_hex(span.trace_id),
                span_id=in_hex(span.span_id),
                attributes=own,
                task=str(own.get(TASK) or shared.get(TASK) or task),
            )


def _interaction(read: _Read) -> Json:
    if not re.fullmatch("otlp:[0-9a-f]{32}:[0-9a-f]{16}", read.key):
        raise InputError("trace_id must have 16 bytes and span_id 8")
    have = read.attributes
    reasons = have.get("gen_ai.response.finish_reasons")
    asked, answer = _conversation(read)
    line = interaction_line(
        read.answer_id,
        About(task=read.task, digest=read.key),
        route_role="external",
        messages=asked,
        completion=answer,
        model_version=have.get("gen_ai.response.model") or have.get("gen_ai.request.model"),
        subject=have.get("user.id") or have.get("enduser.id"),
        session=have.get("gen_ai.conversation.id") or have.get("session.id"),
        trace_id=read.trace_id,
        num_prompt_tokens=have.get("gen_ai.usage.input_tokens"),
        num_completion_tokens=have.get("gen_ai.usage.output_tokens"),
        latency_ms=max(0, read.span.end_time_unix_nano - read.span.start_time_unix_nano) / 1e6,
        finish_reason=reasons[0] if isinstance(reasons, list) and reasons else None,
        occurred_at=_time(read.span.start_time_unix_nano),
    )
    return {**line["interaction"], "idempotency_key": read.key}


def _conversation(read: _Read) -> tuple[list[Json], str]:
    """What was asked and the first choice of what was answered."""
    asked, answers = _of_events(read.span.events)
    if "gen_ai.input.messages" in read.attributes:
        asked = messages_of(as_json(read.attributes["gen_ai.input.messages"]))
    if "gen_ai.output.messages" in read.attributes:
        answers = as_json(read.attributes["gen_ai.output.messages"])
    if "gen_ai.system_instructions" in read.attributes:
        rules = text_of(as_json(read.attributes["gen_ai.system_instructions"]))
        asked = [{"role": "system", "content": rules}, *asked]
    match answers:
        case [first, *_] if asked:
            return asked, answer_of(first)
    raise InputError("it holds no messages: let the instrumentation capture their content")


def _of_events(events: Iterable[Span.Event]) -> tuple[list[Json], list[object]]:
    """Messages and choices as the conventions had them until 1.36."""
    asked: list[Json] = []
    answers: list[object] = []
    for event in events:
        said = _attributes(event.attributes)
        inner = as_json(said.get("gen_ai.event.content"))
        said |= inner if isinstance(inner, dict) else {}
        if event.name == _CHOICE:
            answers.append(as_json(said.get("message", said.get("content"))))
        elif found := _MESSAGE.fullmatch(event.name):
            asked += messages_of({"role": found[1], **said})
    return asked, answers


def _evaluation(read: _Read, event: Span.Event, index: int) -> list[Json]:
    have = _attributes(event.attributes)
    answer_id = have.get("gen_ai.response.id") or read.attributes.get("gen_ai.response.id")
    if read.is_answer or answer_id:
        target = {"interaction_id": own_id("otlp", str(answer_id or read.key))}
    else:
        target = {"trace_id": read.trace_id}
    low, high = (have.get(name) for name in SCALE)
    about = About(
        task=read.task,
        digest=read.key,
        scale=None if low is None or high is None else (low, high),
    )
    verdict = Verdict(
        key=f"{read.key}:{index}",
        target=target,
        kind="llm_judge",
        name=have.get("gen_ai.evaluation.name"),
        occurred_at=_time(event.time_unix_nano),
    )
    label = have.get("gen_ai.evaluation.score.label")
    signal = signal_of(label or have.get("gen_ai.evaluation.score.value"), "llm_judge", about)
    lines = feedback_lines(verdict, signal, have.get("gen_ai.evaluation.explanation"))
    return [{**each["feedback"], "idempotency_key": each["idempotency_key"]} for each in lines]


def _attributes(pairs: Iterable[KeyValue]) -> Json:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> object:
    match value.WhichOneof("value"):
        case "array_value":
            return [_value(each) for each in value.array_value.values]
        case "kvlist_value":
            return _attributes(value.kvlist_value.values)
        case None:
            return None
        case name:
            return getattr(value, name)


def _time(nanoseconds: int) -> str | None:
    if not nanoseconds:
        return None
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC).isoformat()
