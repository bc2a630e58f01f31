"""Steps of a round, each done once: the shell between a flow and the work.

A step is keyed by the round, its name and the digest of its inputs. A second run finds the first
one's result; a worker that lost its lease cannot write one. Retries live here and nowhere else.
"""

import hashlib
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

from perennial.flows.processes import Json
from perennial.infra.errors import LeaseLostError, UnavailableError
from perennial.infra.locks import hold
from perennial.registry.rounds import Lease, Ledger

log = logging.getLogger(__name__)

LEASE_S = 60.0
RETRY_DELAYS_S = (2, 5, 15, 30, 60, 60, 60, 60)


P = ParamSpec("P")
R = TypeVar("R")


def transient_task(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A Prefect task that is tried again while a store or server is away; nothing is cached."""

    def decorate(work: Callable[P, R]) -> Callable[P, R]:
        return task(
            name=name,
            retries=len(RETRY_DELAYS_S),
            retry_delay_seconds=list(RETRY_DELAYS_S),
            retry_condition_fn=is_transient,
            cache_policy=NO_CACHE,
            persist_result=False,
        )(work)

    return decorate


def is_transient(_task: object, _run: object, state: Any) -> bool:  # Any: Prefect's state
    """Whether a failed task is worth another try: only what a store or server not there causes."""
    error = state.data if isinstance(state.data, BaseException) else None
    return error is None or isinstance(error, UnavailableError)


def digest(inputs: Mapping[str, Any]) -> str:  # Any: JSON
    """SHA-256 of the inputs of a step, in hex."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """The steps of one round, under one lease."""

    ledger: Ledger
    lease: Lease

    def once(self, name: str, inputs: Mapping[str, Any], work: Callable[[], Json]) -> Json:
        """The result of `work`, done now or by an earlier run with the same inputs.

        Raises:
            LeaseLostError: another worker owns the round now.
        """
        key = digest(inputs)
        found = self.ledger.step_result(self.lease.round_id, name, key)
        if found is not None:
            log.info("step found round=%s step=%s", self.lease.round_id, name)
            return found
        log.info("step begins round=%s step=%s", self.lease.round_id, name)
        result = work()
        self.ledger.finish_step(self.lease, name, key, result)
        log.info("step done round=%s step=%s", self.lease.round_id, name)
        return result


@contextmanager
def leased(ledger: Ledger, round_id: str, home: Path) -> Iterator[Steps]:
    """The steps of a round that this process owns until the block ends or it dies.

    On one machine a lock tells whether the worker before is dead; then its lease is taken over at
    once. A worker elsewhere waits until it runs out.

    Raises:
        LeaseLostError: a live worker, here or on another machine, owns the round.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(home / "run" / "round.lock", timeout_s=0))
        except UnavailableError as error:
            raise LeaseLostError(f"round {round_id} is being worked on: {error}") from error
        yield from _leased(ledger, round_id, f"{socket.gethostname()}:{home}")


def _leased(ledger: Ledger, round_id: str, owner: str) -> Iterator[Steps]:
    lease = ledger.claim(round_id, owner, ttl_s=LEASE_S)
    is_over = threading.Event()
    keeper = threading.Thread(target=_keep, args=(ledger, lease, is_over), daemon=True)
    keeper.start()
    try:
        yield Steps(ledger=ledger, lease=lease)
    finally:
        is_over.set()
        keeper.join()
        ledger.release(lease)


def _keep(ledger: Ledger, lease: Lease, is_over: threading.Event) -> None:
    while not is_over.wait(LEASE_S / 4):
        try:
            ledger.renew(lease, ttl_s=LEASE_S)
        except LeaseLostError:
            log.warning("lease lost round=%s", lease.round_id)
            return
        except UnavailableError as error:
            log.warning("lease not renewed round=%s error=%s", lease.round_id, error)
