"""`Client` and `AsyncClient`: one request per call, tried again with the same key.

They send and read the same; they differ in how they wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import httpx

from perennial_client.errors import BusyError, UnreachableError
from perennial_client.items import (
    FeedbackFields,
    InteractionFields,
    Item,
    Signal,
    Target,
    encode,
    feedback,
    interaction,
)
from perennial_client.retry import Attempts, Retry
from perennial_client.wire import (
    Outcome,
    Receipt,
    accepted,
    batches,
    headers,
    read_outcomes,
    read_receipt,
)

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

TIMEOUT_S = 10.0


class Client:
    """The API of one Perennial server; may be shared by threads."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        retry: Retry = Retry(),
    ) -> None:
        self._http = httpx.Client(base_url=base_url, headers=headers(api_key), timeout=timeout_s)
        self._retry = retry

    def record_interaction(self, **fields: Unpack[InteractionFields]) -> Receipt:
        """Store one answered request."""
        return self.send(interaction(**fields))

    def send_feedback(
        self, target: str | Target, signal: Signal, **fields: Unpack[FeedbackFields]
    ) -> Receipt:
        """Store one signal about one answer."""
        return self.send(feedback(target, signal, **fields))

    def send(self, item: Item) -> Receipt:
        """Store one item."""
        return read_receipt(self._post(f"/v1/{item.kind}", encode(item.body), item.key))

    def send_batch(self, items: Sequence[Item]) -> list[Outcome]:
        """Store up to 1,000 items of each kind; the outcome of each, in their order."""
        found: dict[int, Outcome] = {}
        for batch in batches(items):
            response = self._post(batch.path, batch.content)
            outcomes = read_outcomes(response, len(batch.indexes))
            found |= zip(batch.indexes, outcomes, strict=True)
        return [found[index] for index in range(len(items))]

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _post(self, path: str, content: bytes, key: str | None = None) -> httpx.Response:
        attempts = Attempts(self._retry)
        while True:
            try:
                return accepted(self._http.post(path, content=content, headers=_key(key)))
            except httpx.TransportError as error:
                wait_s = attempts.wait_s_after(_unreachable(self._http.base_url, error))
            except BusyError as error:
                wait_s = attempts.wait_s_after(error)
            time.sleep(wait_s)


class AsyncClient:
    """`Client` for asyncio; may be shared by the tasks of one event loop."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        retry: Retry = Retry(),
    ) -> None:
        self._http = httpx.AsyncClient(
            base_url=base_url, headers=headers(api_key), timeout=timeout_s
        )
        self._retry = retry

    async def record_interaction(self, **fields: Unpack[InteractionFields]) -> Receipt:
        """Store one answered request."""
        return await self.send(interaction(**fields))

    async def send_feedback(
        self, target: str | Target, signal: Signal, **fields: Unpack[FeedbackFields]
    ) -> Receipt:
        """Store one signal about one answer."""
        return await self.send(feedback(target, signal, **fields))

    async def send(self, item: Item) -> Receipt:
        """Store one item."""
        return read_receipt(await self._post(f"/v1/{item.kind}", encode(item.body), item.key))

    async def send_batch(self, items: Sequence[Item]) -> list[Outcome]:
        """Store up to 1,000 items of each kind; the outcome of each, in their order."""
        found: dict[int, Outcome] = {}
        for batch in batches(items):
            response = await self._post(batch.path, batch.content)
            outcomes = read_outcomes(response, len(batch.indexes))
            found |= zip(batch.indexes, outcomes, strict=True)
        return [found[index] for index in range(len(items))]

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _post(self, path: str, content: bytes, key: str | None = None) -> httpx.Response:
        attempts = Attempts(self._retry)
        while True:
            try:
                return accepted(await self._http.post(path, content=content, headers=_key(key)))
            except httpx.TransportError as error:
                wait_s = attempts.wait_s_after(_unreachable(self._http.base_url, error))
            except BusyError as error:
                wait_s = attempts.wait_s_after(error)
            await asyncio.sleep(wait_s)


def _key(key: str | None) -> dict[str, str]:
    # The items of a batch carry their keys themselves.
    return {} if key is None else {"Idempotency-Key": key}


def _unreachable(base_url: httpx.URL, error: httpx.TransportError) -> UnreachableError:
    return UnreachableError(f"no answer from {base_url}: {type(error).__name__} {error}")
