"""What the gateway shows is what it records, whatever the model says."""

import json
from collections.abc import AsyncGenerator, Iterator

import pytest
from starlette.testclient import TestClient

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
from perennial.serving.gateway import GatewayDeps, create_gateway
from tests.serving.builders import FakeSource, ListRecorder

SAID = ("a\x00", "b", "\x00c")
SHOWN = "a\ufffdb\ufffdc"


class Parrot:
    """An engine that says the same whatever it is asked."""

    def ensure_loaded(self, adapter: AdapterRef) -> None:
        pass

    def unload(self, name: str) -> None:
        pass

    async def chat(self, request: ChatRequest, adapter: AdapterRef = BASE) -> Answer:
        return await collect(self.stream(request, adapter))

    async def stream(
        self, request: ChatRequest, adapter: AdapterRef = BASE
    ) -> AsyncGenerator[Delta, None]:
        for piece in SAID:
            yield Delta(text=piece)
        finish = Finish(reason="stop", num_prompt_tokens=1, num_completion_tokens=len(SAID))
        yield Delta(text="", finish=finish)

    def health(self) -> EngineHealth:
        return EngineHealth(is_ready=True, loaded=(), num_running=0, num_waiting=0, max_waiting=1)


@pytest.fixture
def recorder() -> ListRecorder:
    return ListRecorder()


@pytest.fixture
def client(recorder: ListRecorder) -> Iterator[TestClient]:
    deps = GatewayDeps(engine=Parrot(), source=FakeSource(), recorder=recorder, tasks=("support",))
    with TestClient(create_gateway(deps).app()) as client:
        yield client


def _ask(client: TestClient, **options: object) -> str:
    body = {"model": "support", "messages": [{"role": "user", "content": "hi"}], **options}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    return answer.text


def test_a_nul_of_the_model_is_shown_and_recorded_as_another_character(
    client: TestClient, recorder: ListRecorder
) -> None:
    whole = json.loads(_ask(client))["choices"][0]["message"]["content"]

    assert whole == SHOWN
    assert [kept.completion for kept in recorder.answers] == [SHOWN]


def test_a_nul_in_a_stream_is_shown_and_recorded_as_another_character(
    client: TestClient, recorder: ListRecorder
) -> None:
    events = [line.removeprefix("data: ") for line in _ask(client, stream=True).split("\n\n")]
    choices = [c for event in events[:-2] for c in json.loads(event)["choices"]]

    assert "".join(choice["delta"].get("content", "") for choice in choices) == SHOWN
    assert [kept.completion for kept in recorder.answers] == [SHOWN]
