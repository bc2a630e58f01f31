"""A running site, clients of both kinds behind one blocking face, and senders."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import perennial_client
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from perennial_client import AsyncClient, BackgroundSender, Client, Retry, Spooling

from tests.client.site import Site

SWIFT = Retry(max_attempts=4, max_total_s=20, base_wait_s=0.01, max_wait_s=0.05)


class Blocking:
    """An `AsyncClient` whose methods block."""

    def __init__(self, portal: BlockingPortal, client: AsyncClient) -> None:
        self._portal = portal
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *args, **fields: self._portal.call(partial(method, *args, **fields))


@pytest.fixture
def down(tmp_path: Path) -> Iterator[Site]:
    """A site that is not started."""
    site = Site(tmp_path)
    yield site
    site.close()


@pytest.fixture
def site(down: Site) -> Iterator[Site]:
    down.start()
    yield down
    down.stop()


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes clients of either kind, and closes them."""
    opened: list[Any] = []
    with start_blocking_portal() as portal:

        def make(url: str, api_key: str | None = None, **options: Any) -> Any:
            options = {"retry": SWIFT, **options}
            if request.param == "sync":
                client: Any = Client(url, api_key, **options)
            else:
                client = Blocking(portal, AsyncClient(url, api_key, **options))
            opened.append(client)
            return client

        yield make
        for client in opened:
            client.close()


@pytest.fixture
def client(connect: Callable[..., Any], site: Site) -> Any:
    return connect(site.url)


@pytest.fixture
def spool_dir(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def make_sender(spool_dir: Path) -> Iterator[Callable[..., BackgroundSender]]:
    opened: list[BackgroundSender] = []

    def make(site: Site, **spooling: Any) -> BackgroundSender:
        how = Spooling(**{"max_batch_wait_s": 60, **spooling})
        sender = BackgroundSender(site.url, spool_dir=spool_dir, spooling=how, retry=SWIFT)
        opened.append(sender)
        return sender

    yield make
    for sender in opened:
        sender.close()


@pytest.fixture
def environment() -> dict[str, str]:
    """For a process that imports the client as this one does."""
    source = Path(perennial_client.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": str(source)}
