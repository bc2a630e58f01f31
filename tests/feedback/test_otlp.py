import base64
import contextlib
import gzip
import inspect
import json
import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from google.protobuf import json_format  # type: ignore[import-untyped]  # ships no types
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue, KeyValueList
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.schemas import Schemas
from starlette.testclient import TestClient

from perennial.feedback.admission import Admission, Rate, TokenBuckets
from perennial.feedback.bodies import FeedbackItemBody, InteractionItemBody
from perennial.feedback.formats import otlp
from perennial.feedback.formats.otlp import (
    JSON,
    PROTOBUF,
    Converted,
    gunzip,
    reply,
    traces_to_items,
)
from perennial.feedback.records import Comment, Feedback, Interaction, Label, Message, Score
from perennial.infra.db import Database
from perennial.infra.errors import InputError, MalformedError, TooLargeError
from tests.feedback.conftest import START

TRACE_ID = bytes.fromhex("5b8efff798038103d269b633813fc60c")
SPAN_ID = bytes.fromhex("eee19b7ec3c1b174")
KEY = f"otlp:{TRACE_ID.hex()}:{SPAN_ID.hex()}"
STARTED_NS = 1_780_000_000_000_000_000
ASKED = [
    {"role": "user", "parts": [{"type": "text", "content": "Warranty?"}]},
]
ANSWERED = [
    {
        "role": "assistant",
        "parts": [
            {"type": "reasoning", "content": "Hm."},
            {"type": "text", "content": "Two years."},
        ],
        "finish_reason": "stop",
    }
]
CHAT: dict[str, Any] = {
    "gen_ai.operation.name": "chat",
    "gen_ai.request.model": "shop",
    "gen_ai.response.model": "shop-7b",
    "gen_ai.response.id": "chatcmpl-1",
    "gen_ai.response.finish_reasons": ["stop"],
    "gen_ai.usage.input_tokens": 7,
    "gen_ai.usage.output_tokens": 3,
    "gen_ai.conversation.id": "c-1",
    "gen_ai.input.messages": json.dumps(ASKED),
    "gen_ai.output.messages": json.dumps(ANSWERED),
}


def any_value(value: Any) -> AnyValue:
    match value:
        case bool():
            return AnyValue(bool_value=value)
        case int():
            return AnyValue(int_value=value)
        case float():
            return AnyValue(double_value=value)
        case list():
            return AnyValue(array_value=ArrayValue(values=map(any_value, value)))
        case dict():
            return AnyValue(kvlist_value=KeyValueList(values=pairs(value)))
    return AnyValue(string_value=value)


def pairs(values: dict[str, Any]) -> list[KeyValue]:
    return [KeyValue(key=key, value=any_value(value)) for key, value in values.items()]


def event(name: str, **values: Any) -> Span.Event:
    attributes = {key.replace("__", "."): value for key, value in values.items()}
    return Span.Event(name=name, attributes=pairs(attributes), time_unix_nano=STARTED_NS)


def span(attributes: dict[str, Any], *events: Span.Event, **changes: Any) -> Span:
    return Span(
        **{
            "trace_id": TRACE_ID,
            "span_id": SPAN_ID,
            "start_time_unix_nano": STARTED_NS,
            "end_time_unix_nano": STARTED_NS + 250_000_000,
            "attributes": pairs(attributes),
            "events": events,
            **changes,
        }
    )


def request(*spans: Span, resource: dict[str, Any] | None = None) -> ExportTraceServiceRequest:
    return ExportTraceServiceRequest(
        resource_spans=[
            ResourceSpans(
                resource=Resource(attributes=pairs(resource or {})),
                scope_spans=[ScopeSpans(spans=spans)],
            )
        ]
    )


def as_otlp_json(message: ExportTraceServiceRequest) -> bytes:
    """The JSON of OTLP: that of protobuf but for ids, which are in hex."""
    found = json_format.MessageToDict(message)
    for each in found["resourceSpans"][0]["scopeSpans"][0]["spans"]:
        for name in ("traceId", "spanId"):
            each[name] = base64.b64decode(each[name]).hex().upper()
    return json.dumps({**found, "aFieldOfTheFuture": 1}).encode()


def convert(*spans: Span, resource: dict[str, Any] | None = None) -> Converted:
    content = request(*spans, resource=resource).SerializeToString()
    return traces_to_items(content, PROTOBUF, task="support")


def interaction_of(found: Converted) -> Interaction:
    (item,) = found.interactions
    body = msgspec.convert(item, InteractionItemBody)
    return body.to_record(id="given", tenant="acme", received_at=START)


def feedback_of(found: Converted) -> list[Feedback]:
    bodies = [msgspec.convert(item, FeedbackItemBody) for item in found.feedback]
    return [body.to_record(id="given", tenant="acme", received_at=START) for body in bodies]


def test_the_names_are_those_of_the_pinned_conventions() -> None:
    known = {value for value in vars(gen_ai_attributes).values() if isinstance(value, str)}
    names = set(re.findall(r'"(gen_ai\.[a-z_.]+)"', inspect.getsource(otlp)))
    events = {
        "gen_ai.choice",
        "gen_ai.client.inference.operation.details",
        "gen_ai.event.content",
        "gen_ai.evaluation.result",
    }

    assert list(Schemas)[-1].value.endswith("/1.44.0")
    assert names - events - known == set()
    assert len(names) > 12


def test_a_chat_span_is_an_interaction() -> None:
    found = convert(span({**CHAT, "user.id": "u1"}))
    answered = interaction_of(found)

    assert (found.num_ignored, found.rejected, found.warnings) == (0, (), ())
    assert found.interactions[0]["idempotency_key"] == KEY
    assert (answered.id, answered.trace_id) == ("chatcmpl-1", TRACE_ID.hex())
    assert answered.messages == (Message(role="user", content="Warranty?"),)
    assert (answered.completion, answered.finish_reason) == ("Two years.", "stop")
    assert (answered.model_version, answered.route_role) == ("shop-7b", "external")
    assert (answered.num_prompt_tokens, answered.num_completion_tokens) == (7, 3)
    assert (answered.subject, answered.session, answered.latency_ms) == ("u1", "c-1", 250)
    assert answered.occurred_at is not None
    assert answered.occurred_at.timestamp() == STARTED_NS / 1e9


def test_json_and_protobuf_say_the_same() -> None:
    message = request(span(CHAT, event("gen_ai.evaluation.result", gen_ai__evaluation__name="x")))

    by_json = traces_to_items(as_otlp_json(message), f"{JSON}; charset=utf-8", task="support")

    assert by_json == traces_to_items(message.SerializeToString(), PROTOBUF, task="support")
    assert by_json.interactions[0]["idempotency_key"] == KEY


def test_messages_may_be_structured_and_instructions_apart() -> None:
    rules = [{"type": "text", "content": "Be brief."}]
    structured = {
        **CHAT,
        "gen_ai.input.messages": ASKED,
        "gen_ai.output.messages": ANSWERED,
        "gen_ai.system_instructions": rules,
    }

    assert [m.role for m in interaction_of(convert(span(structured))).messages] == [
        "system",
        "user",
    ]


def test_messages_may_come_as_the_event_of_the_details() -> None:
    content = ("gen_ai.input.messages", "gen_ai.output.messages")
    told = {key: value for key, value in CHAT.items() if key in content}
    rest = {key: value for key, value in CHAT.items() if key not in content}
    details = event("gen_ai.client.inference.operation.details", **told)

    assert convert(span(rest, details)) == convert(span(CHAT))


@pytest.mark.parametrize("is_json", [True, False])
def test_messages_may_be_events_as_until_1_36(is_json: bool) -> None:
    def said(name: str, **body: Any) -> Span.Event:
        if is_json:
            return event(name, gen_ai__event__content=json.dumps(body))
        return event(name, **body)

    answered = interaction_of(
        convert(
            span(
                {"gen_ai.operation.name": "chat", "gen_ai.request.model": "shop"},
                said("gen_ai.system.message", content="Be brief."),
                said("gen_ai.user.message", content="Warranty?"),
                said("gen_ai.choice", index=0, message={"content": "Two years."}),
                said("gen_ai.choice", index=1, message={"content": "No."}),
            )
        )
    )

    assert [(m.role, m.content) for m in answered.messages] == [
        ("system", "Be brief."),
        ("user", "Warranty?"),
    ]
    assert (answered.completion, answered.id, answered.model_version) == ("Two years.", KEY, "shop")


def test_the_task_is_that_of_the_span_or_of_its_resource() -> None:
    of_resource = convert(span(CHAT), resource={"perennial.task": "sales"})
    of_span = convert(span({**CHAT, "perennial.task": "hr"}), resource={"perennial.task": "sales"})

    assert [interaction_of(f).task for f in (convert(span(CHAT)), of_resource, of_span)] == [
        "support",
        "sales",
        "hr",
    ]


def test_other_and_failed_spans_are_ignored() -> None:
    found = convert(
        span({"http.request.method": "GET"}),
        span({**CHAT, "gen_ai.operation.name": "embeddings"}),
        span({**CHAT, "gen_ai.operation.name": "execute_tool"}),
        span(CHAT, status=Status(code=Status.STATUS_CODE_ERROR)),
    )

    assert (found.num_ignored, found.interactions, found.rejected) == (4, (), ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gen_ai.input.messages": "", "gen_ai.output.messages": ""}, "no messages"),
        ({"gen_ai.input.messages": "[]"}, "no conversation"),
        ({"gen_ai.output.messages": "[]"}, "no messages"),
        ({"gen_ai.output.messages": "{}"}, "no messages"),
        (
            {
                "gen_ai.output.messages": [
                    {"role": "assistant", "parts": [{"type": "tool_call", "name": "f"}]}
                ]
            },
            "must be text",
        ),
    ],
)
def test_a_span_without_a_text_to_learn_from_is_rejected_alone(
    changes: dict[str, Any], message: str
) -> None:
    found = convert(span({**CHAT, **changes}), span(CHAT))

    assert len(found.interactions) == 1
    assert [message in reason for reason in found.rejected] == [True]


@pytest.mark.parametrize("ids", [{"trace_id": b""}, {"span_id": b"1"}, {"trace_id": b"1" * 17}])
def test_a_span_without_proper_ids_is_rejected(ids: dict[str, bytes]) -> None:
    assert len(convert(span(CHAT, **ids)).rejected) == 1


def evaluation(**values: Any) -> Span.Event:
    return event("gen_ai.evaluation.result", gen_ai__evaluation__name="relevance", **values)


def test_an_evaluation_is_feedback_on_the_answer_of_its_span() -> None:
    judged = evaluation(
        gen_ai__evaluation__score__label="relevant", gen_ai__evaluation__explanation="On topic."
    )
    label, comment = feedback_of(convert(span(CHAT, judged)))

    assert (label.signal, label.source_kind) == (Label(value="relevant"), "llm_judge")
    assert comment.signal == Comment(text="On topic.")
    assert label.target.interaction_id == comment.target.interaction_id == "chatcmpl-1"
    assert label.tags == {"name": "relevance"}
    assert [item["idempotency_key"] for item in convert(span(CHAT, judged)).feedback] == [
        f"{KEY}:0",
        f"{KEY}:0:comment",
    ]


def test_an_evaluation_elsewhere_is_about_the_response_it_names_or_its_trace() -> None:
    named = evaluation(gen_ai__evaluation__score__label="ok", gen_ai__response__id="chatcmpl-9")
    unnamed = evaluation(gen_ai__evaluation__score__label="ok")
    one, other = feedback_of(convert(span({}, named, unnamed)))

    assert one.target.interaction_id == "chatcmpl-9"
    assert other.target.trace_id == TRACE_ID.hex()


def test_a_score_needs_its_scale() -> None:
    scaled = evaluation(
        gen_ai__evaluation__score__value=4.0,
        perennial__score__min=1,
        perennial__score__max=5,
    )
    bare = evaluation(gen_ai__evaluation__score__value=4.0)
    found = convert(span(CHAT, scaled, bare))

    assert [f.signal for f in feedback_of(found)] == [Score(value=4, min=1, max=5)]
    assert [("scale" in warning) for warning in found.warnings] == [True]
    assert (len(found.interactions), found.rejected) == (1, ())


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"\xff\xff", PROTOBUF),
        (b"{", JSON),
        (b"\xff", JSON),
        (b"[]", JSON),
        (b'{"resourceSpans": 7}', JSON),
        (b"[" * 100_000, JSON),
        (b'{"resourceSpans": [{"scopeSpans": [{"spans": [{"kind": 1e400}]}]}]}', JSON),
    ],
)
def test_what_is_no_trace_export_is_malformed(content: bytes, content_type: str) -> None:
    with pytest.raises(MalformedError, match="not an OTLP trace export"):
        traces_to_items(content, content_type, task="support")


odd_values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
odd_values |= st.sampled_from([[], {}, [7], [None], [[]], "", "0", "NaN", "=", {"values": 7}])


@st.composite
def odd_requests(draw: st.DrawFn) -> bytes:
    """A good request in JSON with one odd value anywhere."""
    found = json.loads(as_otlp_json(request(span(CHAT, evaluation()))))
    spot: Any = found
    while True:
        key = draw(st.sampled_from(list(range(len(spot)) if isinstance(spot, list) else spot)))
        if not (isinstance(spot[key], list | dict) and spot[key] and draw(st.booleans())):
            spot[key] = draw(odd_values)
            return json.dumps(found).encode()
        spot = spot[key]


@given(odd_requests())
def test_an_odd_request_is_converted_or_refused(content: bytes) -> None:
    with contextlib.suppress(InputError):
        assert traces_to_items(content, JSON, task="support") is not None


@given(st.binary(max_size=200), st.integers(0), st.integers(0))
def test_odd_bytes_are_converted_or_refused(odd: bytes, at: int, length: int) -> None:
    good = request(span(CHAT, evaluation())).SerializeToString()
    at %= len(good)
    with contextlib.suppress(InputError):
        changed = good[:at] + odd + good[at + length % 50 :]
        assert traces_to_items(changed, PROTOBUF, task="support") is not None


def test_everything_was_taken_is_an_empty_reply() -> None:
    assert reply(0, (), PROTOBUF) == b""
    assert reply(0, (), JSON) == b"{}"


def test_a_reply_counts_the_rejected_and_says_why_once() -> None:
    content = reply(2, ("no text", "no text"), PROTOBUF)
    partial = ExportTraceServiceResponse.FromString(content).partial_success

    assert (partial.rejected_spans, partial.error_message) == (2, "no text")
    assert json.loads(reply(2, ("no text",), JSON)) == {
        "partialSuccess": {"rejectedSpans": "2", "errorMessage": "no text"}
    }
    assert len(reply(2, ("é" * 10_000,), PROTOBUF)) < 2_100


def test_gzip_is_unpacked_up_to_a_limit() -> None:
    assert gunzip(gzip.compress(b"x" * 100), 100) == b"x" * 100
    with pytest.raises(TooLargeError):
        gunzip(gzip.compress(bytes(100 << 20)), 1_000)
    with pytest.raises(MalformedError, match="not gzip"):
        gunzip(b"plain", 100)
    with pytest.raises(MalformedError, match="too early"):
        gunzip(gzip.compress(b"x" * 1_000)[:-9], 1_000)


class Bursts:
    """The app where each subject may send two rows at once, then one a second."""

    def __init__(self, make_client: Callable[..., TestClient], database: Database) -> None:
        self.now = 0.0
        admission = Admission(
            keys=TokenBuckets(Rate(per_s=0, burst=0)),
            subjects=TokenBuckets(Rate(per_s=1, burst=2), lambda: self.now),
            disk=None,
        )
        self.client = make_client(database, admission=admission)

    def export(self, *subjects: str) -> int:
        """The status of a trace with one answer to each of `subjects`."""
        spans = [
            span(
                {**CHAT, "gen_ai.response.id": f"answer-{i}", "user.id": subject},
                span_id=i.to_bytes(8, "big"),
            )
            for i, subject in enumerate(subjects, start=1)
        ]
        content = request(*spans).SerializeToString()
        headers = {"content-type": PROTOBUF}
        return self.client.post("/v1/traces", content=content, headers=headers).status_code

    def stored(self) -> list[str]:
        items = self.client.get("/v1/interactions").json()["items"]
        return [item["subject"] for item in items]


@pytest.fixture
def bursts(make_client: Callable[..., TestClient], sqlite_database: Database) -> Bursts:
    return Bursts(make_client, sqlite_database)


def test_an_export_with_more_rows_of_a_subject_than_the_burst_is_taken_whole(
    bursts: Bursts,
) -> None:
    assert bursts.export(*["ada"] * 5) == 200
    assert bursts.stored() == ["ada"] * 5


def test_a_subject_whose_bucket_is_not_full_enough_delays_its_own_rows_alone(
    bursts: Bursts,
) -> None:
    bursts.export("ada")

    assert bursts.export("ada", "ada", "bob") == 429
    assert bursts.stored() == ["ada", "bob"]
    bursts.now += 2
    assert bursts.export("ada", "ada", "bob") == 200
    assert sorted(bursts.stored()) == ["ada", "ada", "bob"]
