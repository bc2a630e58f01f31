"""Real OpenAI clients, wrapped, against a real server that is not ours."""

import asyncio
import gc
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from perennial_client import BackgroundSender, interaction_id, thumb, wrap
from perennial_client import feedback as feedback_item

from perennial.feedback.records import Interaction
from tests.client import vendor
from tests.client.site import Site

MakeSender = Callable[..., BackgroundSender]
ANSWER = "".join(vendor.WORDS)
ASKED: dict[str, Any] = {
    "model": "acme",
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "How long?"}]},
    ],
}


@pytest.fixture
def server() -> Iterator[vendor.Server]:
    with vendor.serving() as server:
        yield server


@pytest.fixture
def plain(server: vendor.Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def sender(site: Site, make_sender: MakeSender) -> BackgroundSender:
    return make_sender(site)


@pytest.fixture
def wrapped(server: vendor.Server, sender: BackgroundSender) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        yield wrap(client, sender)


@pytest.fixture
def recorded(site: Site, sender: BackgroundSender) -> Callable[[], Interaction]:
    """The only interaction that is stored."""

    def only() -> Interaction:
        assert sender.flush()
        (stored,) = site.interactions()
        return stored

    return only


def test_whole_answer_is_untouched_and_recorded(
    plain: openai.OpenAI, wrapped: openai.OpenAI, recorded: Callable[[], Interaction]
) -> None:
    expected = plain.chat.completions.create(**ASKED)

    response = wrapped.chat.completions.create(
        **ASKED, user="u1", metadata={"session": "s1", "trace_id": "t1", "plan": "pro"}
    )

    assert type(response) is type(expected)
    assert response == expected
    assert response.to_json() == expected.to_json()
    assert interaction_id(expected) is None
    stored = recorded()
    assert stored.id == interaction_id(response)
    assert (stored.task, stored.model_version) == ("acme", "acme-1-0613")
    assert [(m.role, m.content) for m in stored.messages] == [
        ("developer", "Be brief."),
        ("user", "How long?"),
    ]
    assert (stored.completion, stored.finish_reason) == (ANSWER, "stop")
    assert (stored.num_prompt_tokens, stored.num_completion_tokens) == (7, 3)
    assert (stored.subject, stored.session, stored.trace_id) == ("u1", "s1", "t1")
    assert (stored.tags, stored.route_role) == ({"plan": "pro"}, "external")
    assert stored.latency_ms is not None


def test_an_empty_session_or_trace_costs_no_record(
    wrapped: openai.OpenAI, recorded: Callable[[], Interaction]
) -> None:
    wrapped.chat.completions.create(**ASKED, metadata={"session": "", "trace_id": ""})

    stored = recorded()
    assert (stored.session, stored.trace_id) == (None, None)


def test_feedback_meets_the_recorded_answer(
    wrapped: openai.OpenAI, sender: BackgroundSender, site: Site
) -> None:
    response = wrapped.chat.completions.create(**ASKED)

    sender.enqueue(feedback_item(interaction_id(response) or "", thumb(up=False)))

    assert sender.flush()
    assert [each.status for each in site.feedback()] == ["joined"]


def test_stream_is_untouched_and_recorded_when_it_ends(
    plain: openai.OpenAI, wrapped: openai.OpenAI, recorded: Callable[[], Interaction]
) -> None:
    expected = list(plain.chat.completions.create(**ASKED, stream=True))

    stream = wrapped.chat.completions.create(**ASKED, stream=True)
    id = interaction_id(stream)

    assert isinstance(stream, openai.Stream)
    assert list(stream) == expected
    stored = recorded()
    assert (stored.id, stored.completion, stored.finish_reason) == (id, ANSWER, "stop")
    assert stored.num_completion_tokens == 3


def test_stream_is_recorded_when_it_is_closed(
    wrapped: openai.OpenAI, recorded: Callable[[], Interaction]
) -> None:
    with wrapped.chat.completions.create(**ASKED, stream=True) as stream:
        next(stream)

    assert (recorded().completion, recorded().finish_reason) == ("Two", "cancelled")
    assert stream.response.is_closed


def test_stream_that_is_left_behind_is_recorded_when_it_is_collected(
    wrapped: openai.OpenAI, recorded: Callable[[], Interaction]
) -> None:
    for _ in wrapped.chat.completions.create(**ASKED, stream=True):
        break
    gc.collect()

    assert (recorded().completion, recorded().finish_reason) == ("Two", "cancelled")


def test_stream_that_breaks_raises_as_ever_and_is_recorded(
    wrapped: openai.OpenAI, recorded: Callable[[], Interaction]
) -> None:
    stream = wrapped.chat.completions.create(**{**ASKED, "model": "broken"}, stream=True)

    with pytest.raises(openai.APIConnectionError):
        list(stream)

    assert (recorded().completion, recorded().finish_reason) == ("Two years", "cancelled")


def test_stream_that_was_never_read_is_not_recorded(
    wrapped: openai.OpenAI, sender: BackgroundSender, site: Site
) -> None:
    wrapped.chat.completions.create(**ASKED, stream=True).close()

    assert sender.flush()
    assert site.interactions() == []


def test_async_answers_are_recorded(
    server: vendor.Server, sender: BackgroundSender, site: Site
) -> None:
    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none") as plain:
            client = wrap(plain, sender)
            response = await client.chat.completions.create(**ASKED)
            stream = await client.chat.completions.create(**ASKED, stream=True)
            said = [chunk.choices[0].delta.content async for chunk in stream if chunk.choices]
            left = await client.chat.completions.create(**ASKED, stream=True)
            async for _ in left:
                break
            await left.close()
        assert "".join(word or "" for word in said) == response.choices[0].message.content
        return [interaction_id(each) for each in (response, stream, left)]

    ids = asyncio.run(ask())

    assert sender.flush()
    assert [each.id for each in site.interactions()] == ids
    assert [each.completion for each in site.interactions()] == [ANSWER, ANSWER, "Two"]


def test_stream_helper_and_parse_are_recorded(
    wrapped: openai.OpenAI, sender: BackgroundSender, site: Site
) -> None:
    with wrapped.chat.completions.stream(**ASKED) as events:
        events.until_done()
    wrapped.chat.completions.parse(**ASKED)

    assert sender.flush()
    assert [each.completion for each in site.interactions()] == [ANSWER, ANSWER]


@pytest.mark.parametrize("options", [{}, {"stream": True}])
def test_answer_of_the_gateway_is_not_recorded_twice(
    wrapped: openai.OpenAI, sender: BackgroundSender, site: Site, options: dict[str, Any]
) -> None:
    response = wrapped.chat.completions.create(**{**ASKED, "model": "gateway"}, **options)
    if options:
        assert len(list(response)) == 5

    assert sender.flush()
    assert interaction_id(response) == "int_of_the_gateway"
    assert site.interactions() == []


def test_conversation_may_hold_answers_and_may_be_read_once(
    wrapped: openai.OpenAI, server: vendor.Server, recorded: Callable[[], Interaction]
) -> None:
    earlier = openai.types.chat.ChatCompletionMessage(role="assistant", content="Yes?")
    messages = iter([earlier, {"role": "user", "content": "How long?"}])

    wrapped.chat.completions.create(model="acme", messages=messages)  # type: ignore[arg-type]  # an iterator

    assert [message["content"] for message in server.asked[-1]["messages"]] == ["Yes?", "How long?"]
    assert [message.content for message in recorded().messages] == ["Yes?", "How long?"]


def test_answer_without_text_is_recorded_as_empty(
    wrapped: openai.OpenAI, recorded: Callable[[], Interaction]
) -> None:
    tool = {"type": "function", "function": {"name": "look_up"}}

    wrapped.chat.completions.create(**ASKED, tools=[tool])

    assert recorded().completion == ""


def test_task_may_be_named(
    plain: openai.OpenAI, sender: BackgroundSender, recorded: Callable[[], Interaction]
) -> None:
    wrap(plain, sender, task="support").chat.completions.create(**ASKED)

    assert recorded().task == "support"


@pytest.mark.parametrize("when", ["down", "full", "closed"])
def test_app_does_not_notice_that_nothing_is_recorded(
    plain: openai.OpenAI,
    down: Site,
    make_sender: MakeSender,
    when: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sender = make_sender(down, max_bytes=10 if when == "full" else 1 << 20)
    if when == "closed":
        sender.close()
    client = wrap(plain, sender)

    with caplog.at_level(logging.WARNING):
        response = client.chat.completions.create(**ASKED)
        said = list(client.chat.completions.create(**ASKED, stream=True))

    assert response.choices[0].message.content == ANSWER
    assert len(said) == 5
    assert ("not recorded" in caplog.text) == (when != "down")


def test_answer_of_an_unknown_shape_reaches_the_app(
    plain: openai.OpenAI, wrapped: openai.OpenAI, sender: BackgroundSender, site: Site
) -> None:
    odd = {**ASKED, "model": "odd"}

    assert wrapped.chat.completions.create(**odd) == plain.chat.completions.create(**odd)
    assert sender.flush()
    assert site.interactions() == []


def test_errors_of_the_vendor_are_the_apps(wrapped: openai.OpenAI, server: vendor.Server) -> None:
    server.shutdown()
    server.server_close()

    with pytest.raises(openai.APIConnectionError):
        wrapped.chat.completions.create(**ASKED)


EXITS = """
import sys
from pathlib import Path
import openai
from perennial_client import BackgroundSender, wrap

client = openai.OpenAI(base_url=sys.argv[1], api_key="none")
client = wrap(client, BackgroundSender(sys.argv[2], spool_dir=Path(sys.argv[3])))
stream = client.chat.completions.create(
    model="acme", messages=[{"role": "user", "content": "?"}], stream=True
)
next(stream)
"""


@pytest.mark.slow
def test_stream_that_a_process_leaves_at_its_end_is_recorded(
    site: Site, server: vendor.Server, spool_dir: Path, environment: dict[str, str]
) -> None:
    command = [sys.executable, "-c", EXITS, server.url, site.url, str(spool_dir)]

    subprocess.run(command, env=environment, check=True, timeout=60)

    assert [each.completion for each in site.interactions()] == ["Two"]
