import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.feedback.bodies import FeedbackBody, InteractionBody
from perennial.feedback.formats.reading import (
    MAX_LINE_BYTES,
    Format,
    Item,
    Line,
    Reading,
    read_items,
    read_lines,
)
from perennial.feedback.records import (
    Binary,
    Comment,
    Correction,
    Demonstration,
    Feedback,
    Interaction,
    Label,
    Message,
    Preference,
    Score,
)
from perennial.infra.errors import InputError
from tests.feedback.conftest import START

INTERACTION = {
    "task": "support",
    "messages": [{"role": "user", "content": "How long is the warranty?"}],
    "completion": "Two years.",
    "model_version": "m",
}
FEEDBACK = {"target": {"interaction_id": "i1"}, "signal": {"kind": "binary", "value": True}}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Warranty?"}]},
        {"role": "assistant", "content": "Two years."},
    ]
}


def line_of(content: object) -> Line:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Line(number=1, start=0, end=len(raw), content=raw)


def items_of(content: object, **reading: Any) -> list[Item]:
    found = read_items(line_of(content), Reading(**{"task": "support", **reading}))
    errors = [each for each in found if isinstance(each, InputError)]
    assert errors == []
    return [each for each in found if isinstance(each, Item)]


def record_of(item: Item) -> Interaction | Feedback:
    """As the API would take it."""
    kind = InteractionBody if item.kind == "interaction" else FeedbackBody
    body: InteractionBody | FeedbackBody = msgspec.convert(item.body, kind)
    return body.to_record(id="given", tenant="acme", received_at=START)


def interactions_of(content: object, **reading: Any) -> list[Interaction]:
    records = map(record_of, items_of(content, **reading))
    return [record for record in records if isinstance(record, Interaction)]


def feedback_of(content: object, **reading: Any) -> list[Feedback]:
    records = map(record_of, items_of(content, **reading))
    return [record for record in records if isinstance(record, Feedback)]


@given(
    st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), max_size=20), st.data()
)
def test_reading_on_at_any_line_gives_the_rest(lines: list[bytes], data: st.DataObject) -> None:
    file = io.BytesIO(b"\n".join(lines))
    whole = list(read_lines(file))
    index = data.draw(st.integers(0, len(whole)))
    start = whole[index - 1].end if index else 0
    file.seek(start)

    assert list(read_lines(file, number=index, start=start)) == whole[index:]
    assert b"".join(line.content for line in whole) == file.getvalue()


def test_a_line_that_is_too_long_costs_itself_only() -> None:
    long = b"x" * (3 * MAX_LINE_BYTES)
    first, second, third = read_lines(io.BytesIO(b"1\n" + long + b"\n2\n"))

    assert (first.content, third.content, third.number) == (b"1\n", b"2\n", 3)
    assert second.is_too_long
    assert len(second.content) == MAX_LINE_BYTES + 1
    assert (second.start, second.end, third.start) == (2, 3 + len(long), 3 + len(long))
    with pytest.raises(InputError, match="more than"):
        read_items(second, Reading(task="support"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json", "not JSON"),
        (b'{"feedback": "\xff"}', "not JSON in UTF-8"),
        (b'{"feedback": "\\ud800"}', "not JSON"),
        (b'{"feedback": {"signal": {"value": NaN}}}', "not JSON"),
        (b'{"feedback": {"signal": {"value": 1e400}}}', "out of range"),
        (b'{"feedback": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"input": ' * 900 + b"1" + b"}" * 900, "nested too deeply|no known format"),
        (b"[1]", "not a JSON object"),
        (b"7", "not a JSON object"),
        ({"hello": 1}, "no known format"),
        ({"interaction": INTERACTION, "feedback": FEEDBACK}, "either an interaction or a feedback"),
        ({"feedback": FEEDBACK, "idempotency-key": "k"}, "unknown field"),
        ({"feedback": FEEDBACK, "idempotency_key": "a b"}, "idempotency_key"),
        ({"feedback": 3}, "not as its format says"),
        ({"messages": []}, "no conversation"),
        ({"messages": "hi"}, "not as its format says"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "not by the assistant"),
        ({"messages": [{"content": "hi"}]}, "must name its role"),
        ({"info": {}, "data": {}}, "missing required field"),
        ({"info": {"trace_id": "tr-1"}, "data": {"spans": []}}, "no span"),
        (
            {"id": "s", "data_type": "NUMERIC", "source": "API", "trace_id": "t", "value": 3},
            "scale",
        ),
        ({"id": "s", "data_type": "ODD", "source": "API", "trace_id": "t"}, "ODD"),
    ],
)
def test_a_bad_line_says_why(content: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_items(line_of(content), Reading(task="support"))


@pytest.mark.parametrize("content", [b"", b"\n", b"  \r\n", b"\xef\xbb\xbf\n"])
def test_a_blank_line_holds_nothing(content: bytes) -> None:
    assert items_of(content) == []


def test_own_lines_are_the_bodies_of_the_api() -> None:
    (interaction,) = items_of({"interaction": {**INTERACTION, "id": "i1"}})
    (feedback,) = items_of({"feedback": FEEDBACK, "idempotency_key": "k1"})

    assert interaction == Item(kind="interaction", body={**INTERACTION, "id": "i1"}, key=None)
    assert feedback == Item(kind="feedback", body=FEEDBACK, key="k1")


def test_a_line_without_a_name_is_known_by_what_it_says() -> None:
    (one,) = items_of({"feedback": FEEDBACK})
    (same,) = items_of(b" " + json.dumps({"feedback": dict(reversed(FEEDBACK.items()))}).encode())
    (elsewhere,) = items_of({"feedback": FEEDBACK}, task="sales")
    (other,) = items_of({"feedback": {**FEEDBACK, "may_train": False}})

    assert one.key == same.key == elsewhere.key != other.key


def test_a_chat_example_is_an_answer_and_a_demonstration() -> None:
    (answered,) = interactions_of(CHAT)
    (shown,) = feedback_of(CHAT)

    assert answered.messages[-1] == Message(role="user", content="Warranty?")
    assert (answered.completion, answered.route_role) == ("Two years.", "import")
    assert shown.signal == Demonstration(text="Two years.")
    assert shown.target.interaction_id == answered.id


def test_the_same_examples_for_another_task_are_other_examples() -> None:
    (one,), (other,) = interactions_of(CHAT), interactions_of(CHAT, task="sales")

    assert (one.task, other.task) == ("support", "sales")
    assert one.id != other.id


def test_an_answer_of_weight_zero_demonstrates_nothing() -> None:
    *asked, answer = CHAT["messages"]

    assert feedback_of({"messages": [*asked, {**answer, "weight": 0}]}) == []


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]},
        {"role": "assistant", "content": "Wait.", "tool_calls": [{"id": "c"}]},
        {"role": "user"},
    ],
)
def test_a_conversation_that_is_not_all_text_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be text"):
        items_of({"messages": [message, *CHAT["messages"]]})


def test_a_preference_example_is_a_preference() -> None:
    (preferred,) = feedback_of(
        {
            "input": {"messages": [{"role": "user", "content": "Warranty?"}], "tools": []},
            "preferred_output": [{"role": "assistant", "content": "Two years."}],
            "non_preferred_output": [{"role": "assistant", "content": "No."}],
        }
    )

    assert preferred.signal == Preference(chosen="Two years.", rejected="No.")
    assert (preferred.task, preferred.target.messages[0].content) == ("support", "Warranty?")


@pytest.fixture(scope="module")
def mlflow_exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the real library exports: a trace, a row of search_traces(), an assessment."""
    script = Path(__file__).with_name("mlflow_export.py")
    folder = tmp_path_factory.mktemp("mlflow")
    done = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, check=True)
    exports: dict[str, Any] = json.loads(done.stdout)
    return exports


@pytest.mark.parametrize("shape", ["trace", "row"])
def test_an_mlflow_trace_is_the_answer_of_its_chat_model(
    mlflow_exports: dict[str, Any], shape: str
) -> None:
    (answered,) = interactions_of(mlflow_exports[shape], scale=(1, 5))

    assert answered.messages == (Message(role="user", content="How long is the warranty?"),)
    assert (answered.completion, answered.model_version) == ("Two years.", "shop-7b")
    assert answered.id == answered.trace_id == mlflow_exports["trace"]["info"]["trace_id"]
    assert (answered.num_prompt_tokens, answered.num_completion_tokens) == (7, 3)
    assert answered.subject == "u1"
    assert answered.occurred_at is not None


def test_assessments_of_mlflow_are_signals(mlflow_exports: dict[str, Any]) -> None:
    found = feedback_of(mlflow_exports["trace"], scale=(1, 5))

    assert [(f.signal, f.source_kind, f.source_id, f.tags["name"]) for f in found] == [
        (Binary(value=False), "annotator", "robin", "helpful"),
        (Comment(text="It is three."), "annotator", "robin", "helpful"),
        (Label(value="false"), "llm_judge", "gpt", "toxic"),
        (Score(value=2, min=1, max=5), "code", "x.py", "stars"),
        (Correction(text="Three."), "annotator", "robin", "expected_response"),
    ]


def test_a_number_without_its_scale_costs_itself_only(mlflow_exports: dict[str, Any]) -> None:
    found = read_items(line_of(mlflow_exports["trace"]), Reading(task="support"))

    assert [str(e) for e in found if isinstance(e, InputError)] == [
        "a number says nothing without its scale, and none was given"
    ]
    assert len(found) == 6


def test_an_assessment_is_the_same_alone_and_in_its_trace(mlflow_exports: dict[str, Any]) -> None:
    alone = items_of(mlflow_exports["assessment"])
    in_trace = items_of(mlflow_exports["trace"], scale=(1, 5))

    assert [item.key for item in alone] == [item.key for item in in_trace[1:3]]
    assert alone[0].body["target"] == {"trace_id": mlflow_exports["trace"]["info"]["trace_id"]}


GENERATION = {
    "id": "obs-1",
    "trace_id": "t-1",
    "project_id": "p",
    "type": "GENERATION",
    "start_time": "2026-05-01 12:00:00.123000",
    "input": '[{"role": "user", "content": "Warranty?"}]',
    "output": '{"role": "assistant", "content": "Two years."}',
    "provided_model_name": "gpt-4o",
    "usage_details": {"input": 5, "output": 2, "total": 7},
    "latency": 0.25,
    "user_id": "u1",
    "session_id": "",
}
SCORE = {
    "id": "sc-1",
    "timestamp": "2026-05-01 12:01:00.000000",
    "trace_id": "t-1",
    "observation_id": "obs-1",
    "session_id": None,
    "name": "helpful",
    "value": 1,
    "source": "API",
    "data_type": "BOOLEAN",
    "string_value": None,
    "comment": None,
}


def test_a_langfuse_generation_is_an_interaction() -> None:
    (answered,) = interactions_of(GENERATION)

    assert (answered.id, answered.trace_id, answered.subject) == ("obs-1", "t-1", "u1")
    assert answered.messages == (Message(role="user", content="Warranty?"),)
    assert (answered.completion, answered.model_version) == ("Two years.", "gpt-4o")
    assert (answered.latency_ms, answered.num_prompt_tokens) == (250, 5)
    assert answered.occurred_at is not None
    assert answered.occurred_at.isoformat() == "2026-05-01T12:00:00.123000+00:00"


def test_a_plain_text_that_looks_like_a_number_stays_a_text() -> None:
    (answered,) = interactions_of({**GENERATION, "input": "17", "output": "true"})

    assert (answered.messages[0].content, answered.completion) == ("17", "true")


@pytest.mark.parametrize(
    ("changes", "signal", "source_kind"),
    [
        ({}, Binary(value=True), "end_user"),
        ({"source": "EVAL"}, Label(value="true"), "llm_judge"),
        (
            {"data_type": "NUMERIC", "value": 4, "source": "ANNOTATION"},
            Score(value=4, min=1, max=5),
            "annotator",
        ),
        (
            {"data_type": "CATEGORICAL", "value": 0, "string_value": "off_topic"},
            Label(value="off_topic"),
            "end_user",
        ),
        (
            {"data_type": "TEXT", "value": 0, "string_value": "Too long."},
            Comment(text="Too long."),
            "end_user",
        ),
        (
            {"data_type": "CORRECTION", "value": 0, "string_value": "Three years."},
            Correction(text="Three years."),
            "end_user",
        ),
    ],
)
def test_langfuse_scores_are_signals(
    changes: dict[str, Any], signal: object, source_kind: str
) -> None:
    (found,) = feedback_of({**SCORE, **changes}, scale=(1, 5))

    assert (found.signal, found.source_kind) == (signal, source_kind)
    assert found.target.interaction_id == "obs-1"


def test_the_score_of_a_trace_is_about_the_trace_and_that_of_a_session_about_nothing() -> None:
    (of_trace,) = feedback_of({**SCORE, "observation_id": None})

    assert of_trace.target.trace_id == "t-1"
    assert items_of({**SCORE, "observation_id": None, "trace_id": None, "session_id": "s"}) == []


def test_a_langfuse_trace_of_the_api_holds_its_observations_and_scores() -> None:
    camel = {"id": "sc-1", "dataType": "BOOLEAN", "traceId": "t-1", "value": 0, "source": "API"}
    trace = {
        "id": "t-1",
        "timestamp": "2026-05-01T12:00:00Z",
        "userId": "u1",
        "sessionId": None,
        "observations": [
            {"id": "o-0", "traceId": "t-1", "type": "SPAN"},
            {"id": "o-1", "traceId": "t-1", "type": "GENERATION", "input": "Hi", "output": "Hello"},
        ],
        "scores": [{**camel, "comment": "Rude."}],
    }

    (answered,) = interactions_of(trace)
    assert (answered.id, answered.subject, answered.completion) == ("o-1", "u1", "Hello")
    assert [f.signal for f in feedback_of(trace)] == [Binary(value=False), Comment(text="Rude.")]


def test_a_langfuse_trace_without_its_observations_holds_nothing() -> None:
    listed = {"id": "t-1", "timestamp": "2026-05-01T12:00:00Z", "observations": ["o-1"]}

    assert items_of(listed) == []


@pytest.mark.parametrize("format", [f for f in Format if f is not Format.AUTO])
def test_a_named_format_is_not_guessed(format: Format) -> None:
    odd = {"feedback": FEEDBACK, "messages": "odd", "info": 1}

    with pytest.raises(InputError):
        items_of({**odd, "data_type": 1}, format=format)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
FIELDS = (
    *("interaction", "feedback", "messages", "role", "content", "input", "preferred_output"),
    *("non_preferred_output", "info", "data", "spans", "attributes", "assessments", "trace"),
    *("assessment_name", "source", "id", "type", "data_type", "value", "observations", "scores"),
)


@given(st.dictionaries(st.sampled_from(FIELDS), json_values), st.sampled_from(Format))
def test_whatever_a_line_says_it_is_read_or_refused(row: dict[str, Any], format: Format) -> None:
    try:
        found = read_items(line_of(row), Reading(task="support", format=format))
    except InputError:
        return
    assert all(isinstance(each, Item | InputError) for each in found)
