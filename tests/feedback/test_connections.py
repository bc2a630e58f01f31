import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from starlette.responses import PlainTextResponse
from uvicorn import Config
from uvicorn.server import ServerState

from perennial.feedback.connections import MAX_HEAD_BYTES, BoundedHttp

GET = b"GET / HTTP/1.1\r\nHost: test\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Hasty(BoundedHttp):
    head_timeout_s = 0.05


@asynccontextmanager
async def _connected(protocol: type[BoundedHttp]) -> AsyncIterator[Streams]:
    config, state = Config(PlainTextResponse("hello"), lifespan="off"), ServerState()
    config.load()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: protocol(config, state, {}), "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        yield reader, writer
        writer.close()


async def _status(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    return head.split(maxsplit=2)[1]


@pytest.mark.parametrize("start", [b"", b"G", GET])
def test_head_that_never_ends_is_hung_up_on(start: bytes) -> None:
    async def wait() -> bytes:
        async with _connected(Hasty) as (reader, writer):
            writer.write(start)
            return await asyncio.wait_for(reader.read(), 5)

    assert asyncio.run(wait()) == b""


def test_second_head_has_as_much_time_as_the_first() -> None:
    async def wait() -> bytes:
        async with _connected(Hasty) as (reader, writer):
            writer.write(GET + b"\r\n")
            assert await _status(reader) == b"200"
            await reader.readexactly(len("hello"))
            writer.write(GET)
            return await asyncio.wait_for(reader.read(), 5)

    assert asyncio.run(wait()) == b""


@pytest.mark.parametrize("num_bytes", [1, MAX_HEAD_BYTES // 2, MAX_HEAD_BYTES, 1 << 20])
def test_head_is_answered_up_to_its_limit(num_bytes: int) -> None:
    async def ask(*parts: bytes) -> bytes:
        async with _connected(BoundedHttp) as (reader, writer):
            for part in parts:
                writer.write(part)
                await asyncio.sleep(0)
            return await _status(reader)

    head = GET + b"X-Big: " + b"x" * num_bytes + b"\r\n\r\n"
    expected = b"200" if num_bytes < MAX_HEAD_BYTES else b"400"
    assert asyncio.run(ask(head)) == expected
    assert asyncio.run(ask(*(head[i : i + 4096] for i in range(0, len(head), 4096)))) == expected


def test_endless_header_is_not_kept() -> None:
    async def ask() -> bytes:
        async with _connected(BoundedHttp) as (reader, writer):
            writer.write(GET + b"X-Big: " + b"x" * (2 * MAX_HEAD_BYTES))
            return await _status(reader)

    assert asyncio.run(ask()) == b"400"
