import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import httpx
import openai
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from perennial.infra.errors import AuthError
from perennial.serving.embedded import create_embedded_engine
from perennial.serving.engine import BASE, AdapterRef
from perennial.serving.gateway import GatewayDeps, create_gateway
from perennial.serving.openai_upstream import OpenAIUpstream
from perennial.serving.recorder import SpoolingRecorder
from perennial.serving.scheduler import Limits
from tests.serving.builders import (
    DOWN,
    FakeSink,
    FakeSource,
    ListRecorder,
    save_adapter,
    serving_http,
    wait_until,
)

# peft 0.21 reads an attribute that transformers 5 deprecates
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]
HI = [{"role": "user", "content": "hi"}]


def _client(url, **options):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, **options)


class Rig:
    """A real gateway on a real server over the tiny model."""

    def __init__(self, engine, recorder=None, **options):
        self.source, self.engine = FakeSource(), engine
        self.recorder = recorder or ListRecorder()
        self.gateway = create_gateway(
            GatewayDeps(
                engine=engine,
                source=self.source,
                recorder=self.recorder,
                tasks=("support",),
                poll_interval_s=0.02,
                **options,
            )
        )

    def version(self):
        return self.gateway.health()["tasks"][0]["version"]


@pytest.fixture
def rig(engine):
    return Rig(engine)


@pytest.fixture
def url(rig):
    with serving_http(rig.gateway.app()) as found:
        yield found


@pytest.fixture
def client(url):
    with _client(url) as made:
        yield made


def test_the_official_client_gets_a_whole_answer(rig, client):
    raw = client.chat.completions.with_raw_response.create(
        model="support", messages=HI, max_tokens=8, user="u1", metadata={"session": "s1", "k": "v"}
    )
    answer = raw.parse()
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == 8 + answer.usage.prompt_tokens
    assert raw.headers["x-interaction-id"] == answer.id
    assert (raw.headers["x-model-version"], raw.headers["x-route-role"]) == ("base", "base")
    (kept,) = rig.recorder.answers
    assert (kept.id, kept.completion) == (answer.id, answer.choices[0].message.content)
    assert (kept.tenant, kept.subject, kept.session, kept.tags) == (
        "default",
        "u1",
        "s1",
        {"k": "v"},
    )
    assert kept.latency_ms > 0


def test_a_stream_is_the_same_answer_and_is_recorded(rig, client):
    whole = client.chat.completions.create(model="support", messages=HI, max_tokens=9)
    with client.chat.completions.create(
        model="support",
        messages=HI,
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        assert stream.response.headers["x-model-version"] == "base"
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert {c.id for c in chunks} == {stream.response.headers["x-interaction-id"]}
    assert rig.recorder.answers[1].completion == text
    assert rig.recorder.answers[1].num_completion_tokens == 9


def test_models_are_the_tasks(rig, client, adapters):
    assert [m.id for m in client.models.list()] == ["support"]
    rig.source.champions["support"] = adapters[0]
    wait_until(lambda: rig.version() == adapters[0].name)
    assert client.models.retrieve("support").version == adapters[0].name
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


BAD = [
    (400, b""),
    (400, b"{"),
    (400, b"\xff"),
    (400, b"[" * 50_000),
    (400, b'{"model":"support","messages":[{"role":"user","content":"\\u0000"}]}'),
    (400, b'{"model":"support","messages":[{"role":"user","content":"\\ud800"}]}'),
    (400, json.dumps({"model": "support", "messages": HI, "temprature": 1}).encode()),
    (400, json.dumps({"model": "support", "messages": "hi"}).encode()),
    (404, json.dumps({"model": "other", "messages": HI}).encode()),
    (404, json.dumps({"model": "support\ud83d\ude00", "messages": HI}).encode()),
    (413, b'{"model":"' + b"x" * (300 << 10) + b'"}'),
    (
        400,
        json.dumps(
            {"model": "support", "messages": [{"role": "user", "content": "word " * 5000}]}
        ).encode(),
    ),
]


def test_bad_bodies_are_4xx_in_openai_shape_and_nothing_is_kept(rig, url):
    with httpx.Client(base_url=url) as http:
        for stream in (b"", b'"stream":true,'):
            for status, body in BAD:
                content = body.replace(b'{"model"', b"{" + stream + b'"model"', 1)
                answer = http.post(
                    "/v1/chat/completions",
                    content=content,
                    headers={"content-type": "application/json"},
                )
                assert answer.status_code == status, (body[:60], answer.text)
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
                assert "Traceback" not in answer.text
        form = http.post("/v1/chat/completions", content=b"{}")
        assert form.status_code == 400
    assert rig.recorder.answers == []
    assert rig.engine.health().num_waiting == 0


def test_a_caller_without_a_key_is_refused(engine):
    async def authenticate(request):
        if request.headers["authorization"] != "Bearer good":
            raise AuthError("no valid key")
        return "tenant-a"

    rig = Rig(engine, authenticate=authenticate)
    with serving_http(rig.gateway.app()) as url:
        with _client(url) as client, pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="support", messages=HI)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="good") as client:
            client.chat.completions.create(model="support", messages=HI, max_tokens=2)
    assert [a.tenant for a in rig.recorder.answers] == ["tenant-a"]


def test_routes_mount_in_a_fastapi_application(rig):
    app = FastAPI(lifespan=lambda _app: rig.gateway.running())
    app.router.routes.extend(rig.gateway.routes())
    with serving_http(app) as url, _client(url) as client:
        assert client.chat.completions.create(model="support", messages=HI, max_tokens=2).id
        assert httpx.get(f"{url}/v1/serving").json()["tasks"][0]["version"] == "base"


def test_swaps_under_load_fail_no_request_and_mix_no_versions(rig, url, adapters, tiny_dir):
    prompts = [f"question number {i} " * (1 + i % 4) for i in range(4)]
    stop, answers, failures = threading.Event(), [], []

    def use(number):
        with _client(url) as client:
            turn = number
            while not stop.is_set():
                turn += 1
                prompt = prompts[turn % 4]
                try:
                    answers.append((prompt, *_ask(client, prompt, is_streamed=turn % 2 == 0)))
                except openai.OpenAIError as error:
                    failures.append(error)

    order = [adapters[0], adapters[1], adapters[2], adapters[1], adapters[0], BASE, adapters[2]]
    with ThreadPoolExecutor(8) as pool:
        users = [pool.submit(use, i) for i in range(8)]
        for adapter in order:
            rig.source.champions["support"] = adapter
            wait_until(lambda a=adapter: rig.version() == a.name, 30)
            seen = len(answers)
            wait_until(lambda n=seen: len(answers) > n + 16, 30)
        stop.set()
        [u.result() for u in users]
    assert failures == []
    expected = _expected(tiny_dir, {BASE.name: BASE} | {a.name: a for a in adapters}, prompts)
    mixed = [a for a in answers if a[2] != expected[a[1], a[0]]]
    assert mixed == []
    assert len({version for _, version, _ in answers}) == 4
    kept = {(a.model_version, a.messages[0].content, a.completion) for a in rig.recorder.answers}
    assert kept == {(version, prompt, text) for prompt, version, text in answers}
    assert len(rig.recorder.answers) == len(answers)


def _ask(client, prompt, *, is_streamed):
    options = {
        "model": "support",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 12,
    }
    if not is_streamed:
        raw = client.chat.completions.with_raw_response.create(**options)
        return raw.headers["x-model-version"], raw.parse().choices[0].message.content
    with client.chat.completions.create(**options, stream=True) as stream:
        version = stream.response.headers["x-model-version"]
        return version, "".join(c.choices[0].delta.content or "" for c in stream)


def _expected(tiny_dir, versions, prompts):
    """What each version answers alone, from an engine that never held another."""
    expected = {}
    for name, adapter in versions.items():
        engine = create_embedded_engine(tiny_dir)
        rig = Rig(engine)
        rig.source.champions["support"] = adapter
        with serving_http(rig.gateway.app()) as url, _client(url) as client:
            for prompt in prompts:
                version, text = _ask(client, prompt, is_streamed=False)
                assert version == name
                expected[name, prompt] = text
        engine.close()
    assert len(set(expected.values())) > len(prompts)
    return expected


def test_a_tampered_champion_is_refused_and_the_last_good_answers(
    rig, client, adapters, tiny_dir, tmp_path
):
    rig.source.champions["support"] = adapters[0]
    wait_until(lambda: rig.version() == adapters[0].name)
    bad = save_adapter(tiny_dir, tmp_path / "support-v9-bad", seed=9)
    path = bad.path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    rig.source.champions["support"] = bad
    wait_until(lambda: rig.gateway.health()["tasks"][0]["failure"] is not None)
    raw = client.chat.completions.with_raw_response.create(model="support", messages=HI)
    assert raw.headers["x-model-version"] == adapters[0].name
    assert "SHA-256" in rig.gateway.health()["tasks"][0]["failure"]


def test_a_full_queue_is_503_with_retry_after_and_a_left_client_frees_its_place(tiny_dir):
    engine = create_embedded_engine(
        tiny_dir, limits=Limits(max_batch=1, max_waiting=1, max_answer_tokens=2000)
    )
    rig = Rig(engine)
    with serving_http(rig.gateway.app()) as url, httpx.Client(base_url=url) as http:
        body = {"model": "support", "messages": HI, "max_tokens": 2000}
        streaming = _open(url, {**body, "stream": True})
        streaming.recv(4096)
        waiting = _open(url, body)
        wait_until(lambda: engine.health().num_waiting == 1)
        refused = http.post("/v1/chat/completions", json=body)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "unavailable"
        waiting.close()
        wait_until(lambda: engine.health().num_waiting == 0)
        assert engine.health().num_running == 1
        streaming.close()
        wait_until(lambda: engine.health().num_running == 0)
        assert http.post("/v1/chat/completions", json={**body, "max_tokens": 1}).is_success
        wait_until(lambda: len(rig.recorder.answers) == 2)
        assert rig.recorder.answers[0].finish_reason == "cancelled"
        assert rig.recorder.answers[0].completion
    engine.close()


def _open(url, body):
    """A raw connection with the request sent, to be closed at will."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + content)
    return connection


@pytest.mark.parametrize("trouble", ["down", "slow", "full"])
def test_a_store_in_trouble_fails_no_answer(engine, tmp_path, trouble):
    sink = FakeSink()
    recorder = SpoolingRecorder(
        sink,
        tmp_path / "spool",
        retry_s=0.02,
        budget_s=0.1,
        max_bytes=1 if trouble == "full" else 1 << 20,
    )
    if trouble == "slow":
        sink.gate.clear()
    else:
        sink.error = DOWN
    rig = Rig(engine, recorder)
    with serving_http(rig.gateway.app()) as url, _client(url) as client:
        ids = [
            client.chat.completions.create(model="support", messages=HI, max_tokens=2).id
            for _ in range(5)
        ]
        sink.error = None
        sink.gate.set()
        wait_until(lambda: not recorder.health().is_degraded)
    recorder.close()
    assert sink.ids == ([] if trouble == "full" else ids)
    assert recorder.health().num_refused == (5 if trouble == "full" else 0)


def _app_over(upstream, rig):
    @asynccontextmanager
    async def lifespan(_app):
        async with rig.gateway.running():
            yield
        await upstream.aclose()

    return Starlette(routes=rig.gateway.routes(), lifespan=lifespan)


def test_another_gateway_serves_as_upstream(rig, url):
    upstream = OpenAIUpstream(f"{url}/v1", base_model="support")
    front = Rig(upstream)
    with serving_http(_app_over(upstream, front)) as front_url, _client(front_url) as client:
        with _client(url) as direct:
            expected = direct.chat.completions.create(model="support", messages=HI, max_tokens=7)
        answer = client.chat.completions.create(model="support", messages=HI, max_tokens=7)
        assert answer.choices[0].message.content == expected.choices[0].message.content
        assert answer.usage == expected.usage
        front.source.champions["support"] = AdapterRef(name="not-there")
        wait_until(lambda: front.gateway.health()["tasks"][0]["failure"] is not None)
        assert front.version() == "base"
        long = [{"role": "user", "content": "word " * 5000}]
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="support", messages=long)


def test_an_upstream_may_stream_line_separators_unescaped():
    told = "first\u2028second\u0085third"

    async def chat(_request):
        events = [
            {"choices": [{"delta": {"content": told}}]},
            {"choices": [{"delta": {}, "finish_reason": "stop"}]},
        ]
        lines = [f"data: {json.dumps(event, ensure_ascii=False)}\r\n\r\n" for event in events]
        raw = "".join([*lines, "data: [DONE]"]).encode()
        return StreamingResponse(raw[i : i + 7] for i in range(0, len(raw), 7))

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])
    with serving_http(app) as upstream_url:
        front = Rig(OpenAIUpstream(f"{upstream_url}/v1", base_model="b"))
        with serving_http(_app_over(front.engine, front)) as url:
            body = {"model": "support", "messages": HI}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert answer.json()["choices"][0]["message"]["content"] == told


def test_an_upstream_that_is_away_is_503():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        upstream = OpenAIUpstream(f"http://127.0.0.1:{free.getsockname()[1]}/v1", base_model="b")
        front = Rig(upstream)
        with serving_http(_app_over(upstream, front)) as url:
            body = {"model": "support", "messages": HI}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 503
