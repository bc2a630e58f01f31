import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from perennial.feedback.connections import MAX_HEAD_BYTES, BoundedHttp

GET = b"GET / HTTP/1.1\r\nHost: test\r\n"
POST = b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 100\r\n\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Streams]]


class Hasty(BoundedHttp):
    head_timeout_s = body_timeout_s = 0.05


@asynccontextmanager
async def _served(protocol: type[BoundedHttp], app: ASGIApp) -> AsyncIterator[Connect]:
    """What opens a connection to `app`."""
    config, state = Config(app, lifespan="off"), ServerState()
    config.load()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: protocol(config, state, {}), "127.0.0.1", 0)
    writers = []

    async def connect() -> Streams:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writers.append(writer)
        return reader, writer

    async with server:
        try:
            yield connect
        finally:
            for writer in writers:
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()


@asynccontextmanager
async def _connected(protocol: type[BoundedHttp], app: ASGIApp) -> AsyncIterator[Streams]:
    async with _served(protocol, app) as connect:
        yield await connect()


async def _status(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    return head.split(maxsplit=2)[1]


async def _read(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that reads the whole body before it answers."""
    with suppress(ClientDisconnect):
        await Request(scope, receive).body()
    await PlainTextResponse("hello")(scope, receive, send)


@pytest.mark.parametrize("start", [b"", b"G", GET, POST, POST + b"half a body"])
def test_request_that_never_ends_is_hung_up_on(start: bytes) -> None:
    async def wait() -> bytes:
        async with _connected(Hasty, _read) as (reader, writer):
            writer.write(start)
            return await asyncio.wait_for(reader.read(), 5)

    assert asyncio.run(wait()) == b""


def test_second_head_has_as_much_time_as_the_first() -> None:
    async def wait() -> bytes:
        async with _connected(Hasty, _read) as (reader, writer):
            writer.write(GET + b"\r\n")
            assert await _status(reader) == b"200"
            await reader.readexactly(len("hello"))
            writer.write(GET)
            return await asyncio.wait_for(reader.read(), 5)

    assert asyncio.run(wait()) == b""


@pytest.mark.parametrize("num_bytes", [1, MAX_HEAD_BYTES // 2, MAX_HEAD_BYTES])
def test_head_is_answered_up_to_its_limit(num_bytes: int) -> None:
    async def ask(*parts: bytes) -> bytes:
        async with _connected(BoundedHttp, _read) as (reader, writer):
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0)
            return await _status(reader)

    head = GET + b"X-Big: " + b"x" * num_bytes + b"\r\n\r\n"
    expected = b"200" if num_bytes < MAX_HEAD_BYTES else b"400"
    assert asyncio.run(ask(head)) == expected
    assert asyncio.run(ask(*(head[i : i + 4096] for i in range(0, len(head), 4096)))) == expected


def test_answer_may_take_longer_than_its_request() -> None:
    async def answer_late(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(4 * Hasty.body_timeout_s)
        await PlainTextResponse("hello")(scope, receive, send)

    async def ask() -> bytes:
        async with _connected(Hasty, answer_late) as (reader, writer):
            writer.write(POST + b"x" * 100)
            return await _status(reader)

    assert asyncio.run(ask()) == b"200"


def test_endless_header_is_not_kept() -> None:
    async def ask() -> bytes:
        async with _connected(BoundedHttp, _read) as (reader, writer):
            writer.write(GET + b"X-Big: " + b"x" * (2 * MAX_HEAD_BYTES))
            return await _status(reader)

    assert asyncio.run(ask()) == b"400"


class Crowded(BoundedHttp):
    max_requests = 1
    held_timeout_s = 0.05


class Full(Crowded):
    max_held_bytes = 0


async def _refusal(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]  # it is there
    return head, await reader.readexactly(length)


class Gate:
    """An app that answers when it is told to."""

    def __init__(self) -> None:
        self.is_open = asyncio.Event()
        self.is_asked = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.is_asked.set()
        await self.is_open.wait()
        await PlainTextResponse("hello")(scope, receive, send)


@asynccontextmanager
async def _behind_another(protocol: type[BoundedHttp]) -> AsyncIterator[tuple[Gate, Streams]]:
    """A second client's streams, who asks while the answer to the first is not there yet."""
    gate = Gate()
    async with _served(protocol, gate) as connect:
        _, first = await connect()
        first.write(GET + b"\r\n")
        await gate.is_asked.wait()
        reader, writer = await connect()
        writer.write(GET + b"\r\n")
        yield gate, (reader, writer)


def test_request_beyond_the_limit_waits_for_its_turn() -> None:
    class Patient(Crowded):
        held_timeout_s = 60.0

    async def ask() -> bytes:
        async with _behind_another(Patient) as (gate, (reader, writer)):
            gate.is_open.set()
            assert await asyncio.wait_for(_status(reader), 5) == b"200"
            await reader.readexactly(len("hello"))
            writer.write(GET + b"\r\n")
            return await asyncio.wait_for(_status(reader), 5)

    assert asyncio.run(ask()) == b"200"


@pytest.mark.parametrize("protocol", [Crowded, Full])
def test_request_that_would_wait_too_long_is_told_when_to_come_back(
    protocol: type[BoundedHttp],
) -> None:
    async def ask() -> tuple[bytes, bytes]:
        async with _behind_another(protocol) as (_, (reader, _)):
            return await asyncio.wait_for(_refusal(reader), 5)

    head, body = asyncio.run(ask())

    assert head.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 1" in head
    assert json.loads(body)["code"] == "overloaded"


def test_client_that_leaves_while_it_waits_costs_nobody_a_turn() -> None:
    class Patient(Crowded):
        held_timeout_s = 60.0

    async def ask() -> bytes:
        gate = Gate()
        async with _served(Patient, gate) as connect:
            streams = [await connect() for _ in range(3)]
            for _, writer in streams:
                writer.write(GET + b"\r\n")
                await gate.is_asked.wait()
            streams[1][1].close()
            gate.is_open.set()
            return await asyncio.wait_for(_status(streams[2][0]), 5)

    assert asyncio.run(ask()) == b"200"
