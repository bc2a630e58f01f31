import json

import pytest

from perennial.infra.errors import InputError
from perennial.serving.engine import ChatMessage
from perennial.serving.wire import legible, parse_chat_body

BODY = {"model": "support", "messages": [{"role": "user", "content": "hi"}]}


def _parse(**changes):
    return parse_chat_body(json.dumps({**BODY, **changes}).encode())


def test_a_plain_body_is_greedy_and_whole():
    call = _parse()
    assert call.task == "support"
    assert call.request.temperature == 0
    assert call.request.messages == (ChatMessage(role="user", content="hi"),)
    assert call.delivery == "whole"


def test_user_and_metadata_become_subject_session_and_tags():
    call = _parse(user="u1", metadata={"session": "s1", "trace_id": "t1", "screen": "help"})
    assert (call.subject, call.session, call.trace_id) == ("u1", "s1", "t1")
    assert call.tags == {"screen": "help"}


def test_an_empty_session_or_trace_is_none():
    call = _parse(metadata={"session": "", "trace_id": ""})
    assert (call.session, call.trace_id, call.tags) == (None, None, {})


@pytest.mark.parametrize("key", ["session", "trace_id"])
def test_a_session_or_trace_is_refused_where_a_record_would_be(key):
    assert _parse(metadata={key: "x" * 256}).tags == {}
    with pytest.raises(InputError, match="at most 256 characters, got 257") as caught:
        _parse(metadata={key: "x" * 257})
    assert caught.value.fields["param"] == f"metadata.{key}"


def test_what_no_record_can_hold_is_legible():
    assert legible("a\x00b\ud800c\U0001f600") == "a\ufffdb\ufffdc\U0001f600"


def test_text_parts_are_joined_and_developer_is_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = _parse(messages=[{"role": "developer", "content": parts}])
    assert call.request.messages == (ChatMessage(role="system", content="ab"),)


def test_openai_fields_that_do_not_apply_are_ignored():
    _parse(logit_bias={"5": 1}, frequency_penalty=0.1, n=1, stream_options=None, store=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": 5},
        {"model": ""},
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": [{"role": "user", "content": "a\x00b"}]},
        {"messages": [{"role": "user", "content": "x", "extra": 1}]},
        {"messages": [{"role": "user", "content": "\ud800"}]},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"max_tokens": "5"},
        {"max_tokens": True},
        {"max_tokens": 10**30},
        {"temperature": -0.1},
        {"temperature": 2.5},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": float("inf")},
        {"n": 2},
        {"stop": ""},
        {"stop": ["a"] * 5},
        {"seed": 1 << 64},
        {"stream": "yes"},
        {"stream_options": {"other": 1}},
        {"user": ""},
        {"user": "\x00"},
        {"metadata": {"a": 1}},
        {"metadata": {"": "x"}},
        {"metadata": {str(i): "x" for i in range(10_000)}},
        {"temprature": 0.5},
    ],
)
def test_a_wrong_field_is_refused_by_name(changes):
    with pytest.raises(InputError) as caught:
        _parse(**changes)
    assert caught.value.fields.get("param") is None or next(iter(changes)) in str(caught.value)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"tools":' + b"[" * 100_000]
)
def test_what_is_no_json_object_is_refused(raw):
    with pytest.raises(InputError):
        parse_chat_body(raw)
