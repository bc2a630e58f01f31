"""`BackgroundSender`: items are kept on disk at once and sent in batches by a thread."""

from __future__ import annotations

import logging
import os
import random
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from perennial_client.errors import ClientError, ItemTooLargeError, RefusedError
from perennial_client.http import TIMEOUT_S, Client
from perennial_client.items import Item, Json, encode
from perennial_client.retry import Retry
from perennial_client.segment import Segment
from perennial_client.spool import Spool, Spooling
from perennial_client.wire import Outcome, Receipt

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

_MAX_ITEM_BYTES = 1 << 20  # what the server takes


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What this process did with items; those adopted from dead processes included."""

    num_delivered: int
    num_refused: int
    num_dropped: int


class BackgroundSender:
    """Delivers items to one Perennial server, also those that a killed process left in `spool_dir`.

    May be shared by threads, and the folder by processes. A forked child begins anew and leaves
    to its parent what the parent holds.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        spool_dir: Path,
        spooling: Spooling = Spooling(),
        timeout_s: float = TIMEOUT_S,
        retry: Retry = Retry(),
    ) -> None:
        # One attempt per request: this thread waits between them, so that close() can end it.
        once = Retry(max_attempts=1)
        self._connect = partial(Client, base_url, api_key, timeout_s=timeout_s, retry=once)
        self._open_spool = partial(Spool, spool_dir, spooling)
        self._retry = retry
        self._reset()
        self._running()
        _call_in_child(weakref.WeakMethod(self._after_fork))
        # Not atexit: finalizers run newest first, so a wrapped stream is recorded before.
        self._at_exit = weakref.finalize(self, self.close)

    def enqueue(self, item: Item) -> None:
        """Keep `item` until the server has it or refuses it.

        Raises:
            ItemTooLargeError: the server would not take it.
            SpoolFullError: nothing fits until the server is back, and `when_full` is "raise".
            SenderClosedError: `close()` was called.
            OSError: the disk failed; unknown whether `item` is kept.
        """
        line = encode({"kind": item.kind, "body": item.keyed_body}) + b"\n"
        if len(line) > _MAX_ITEM_BYTES:
            raise ItemTooLargeError(f"an item has at most {_MAX_ITEM_BYTES} bytes, got {len(line)}")
        self._running().put(line)

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Whether all that was enqueued before was delivered or refused within `timeout_s`."""
        return self._running().flush(timeout_s)

    def close(self, timeout_s: float = 5.0) -> None:
        """Deliver what waits, giving up at the first failure; what remains stays in the spool."""
        self._at_exit.detach()
        if self._thread is not None:
            self._spool.close()
            self._thread.join(timeout_s)

    def counts(self) -> Counts:
        """What became of items so far."""
        return Counts(
            num_delivered=self._num_delivered,
            num_refused=self._num_refused,
            num_dropped=self._running().num_dropped,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reset(self) -> None:
        self._starting = threading.RLock()
        self._thread: threading.Thread | None = None
        self._num_delivered = self._num_refused = 0

    def _after_fork(self) -> None:
        self._spool.release()
        self._reset()

    def _running(self) -> Spool:
        """The spool of this process, its thread started."""
        with self._starting:
            if self._thread is None:
                self._spool = self._open_spool()
                # Made here: a fork must not meet the thread while it imports what a client needs.
                work = [self._connect(), self._spool]
                self._thread = threading.Thread(
                    target=self._run, args=work, name="perennial-sender", daemon=True
                )
                self._thread.start()
            return self._spool

    def _run(self, client: Client, spool: Spool) -> None:
        with client:
            while (segment := spool.take()) is not None:
                if not self._is_delivered(client, spool, segment):
                    break
                spool.settle(segment)
        spool.release()

    def _is_delivered(self, client: Client, spool: Spool, segment: Segment) -> bool:
        """Whether all was stored or refused; False when the spool was closed after a failure."""
        items = [_item(record) for record in segment.read()]
        num_failed = 0
        while items:
            failure = None
            try:
                outcomes = _outcomes(client, items)
            except ClientError as error:
                failure = error
            else:
                items = self._unsettled(items, outcomes)
            if items:
                num_failed += 1
                wait_s = self._retry.wait_s(num_failed, failure, random.random())
                logger.warning("not delivered num_items=%d error=%s", len(items), failure or "busy")
                if spool.is_closed_within(wait_s):
                    return False
        return True

    def _unsettled(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> list[Item]:
        """Those that are to be sent again; counts the others."""
        left = []
        for item, outcome in zip(items, outcomes, strict=True):
            if isinstance(outcome, Receipt):
                self._num_delivered += 1
            elif outcome.is_passing:
                left.append(item)
            else:
                self._num_refused += 1
                logger.warning("refused kind=%s key=%s problem=%s", item.kind, item.key, outcome)
        return left


def _outcomes(client: Client, items: Sequence[Item]) -> list[Outcome]:
    try:
        return client.send_batch(items)
    except RefusedError as error:
        if len(items) == 1:
            return [error.problem]
    # Halved until what a server or a proxy cannot take stands alone.
    half = len(items) // 2
    return _outcomes(client, items[:half]) + _outcomes(client, items[half:])


def _item(record: Json) -> Item:
    body = dict(record["body"])
    return Item(kind=record["kind"], key=body.pop("idempotency_key"), body=body)


def _call_in_child(method: weakref.WeakMethod[Callable[[], None]]) -> None:
    def call() -> None:
        if (alive := method()) is not None:
            alive()

    os.register_at_fork(after_in_child=call)
