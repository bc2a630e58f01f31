"""The load generator: a process of its own that costs the machine as little as it can.

    python tests/bench/rig/load.py < plan.json > answers.json

The plan is a list of phases. In a closed phase each of `num_clients` connections sends its next
request when the last one is answered; an open phase sends `rate` requests a second whatever the
server does, and a request whose turn comes while every connection waits is counted as unsent.
Latency in an open phase counts from the time a request was due, so a stalled server cannot hide
behind a generator that stalls with it.

Every request is one of `templates` with PLACE replaced by a marker that no other request has. What
was acknowledged goes to `ledger`, a JSON array per line: marker, body of the answer. Judging the
ledger is left to `proof`.
"""

import asyncio
import gc
import json
import sys
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import uvloop

PLACE = "@@@@@@@@"
# Letters only: digits could look like a telephone number to a server that redacts.
_LETTERS = bytes.maketrans(b"0123456789abcdef", b"abcdefghijklmnop")
_TICK_S = 0.002
_LAST_ANSWERS_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """How requests are sent for a while; `rate` None is closed-loop over `num_clients`."""

    seconds: float
    rate: float | None = None
    num_clients: int = 0
    warmup_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One run: `first` is the number of the first marker, so that runs never share one.

    `num_connections` are open before the first phase; an open phase opens more, up to
    `max_connections`, as new users do when the old ones are still waiting.
    """

    port: int
    templates: tuple[str, ...]
    phases: tuple[Phase, ...]
    num_connections: int
    max_connections: int
    first: int
    ledger: str | None = None


class Run:
    """All requests of a run, by number: when due, when answered, with what."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.templates = [text.encode().split(PLACE.encode()) for text in plan.templates]
        self.due_at = array("d")
        self.done_at = array("d")
        self.status = array("H")  # 0: no answer
        self.acks: list[tuple[int, bytes]] = []
        self.idle: deque[Connection] = deque()
        self.due: deque[float] = deque()  # requests that wait for their connection to open
        self.num_opened = 0
        self.num_waiting = 0
        self.num_retry_after = 0
        self.num_unsent = 0
        self.is_closed_loop = False
        self.stop_at = 0.0

    def send(self, connection: "Connection", due_at: float) -> None:
        """Write the next request on an idle connection."""
        number = len(self.due_at)
        self.due_at.append(due_at)
        self.done_at.append(0.0)
        self.status.append(0)
        self.num_waiting += 1
        connection.number = number
        parts = self.templates[number % len(self.templates)]
        connection.transport.write(_marker(self.plan.first + number).join(parts))

    def answered(self, connection: "Connection", status: int, head: bytes, body: bytes) -> None:
        """Note the answer and give the connection its next request."""
        now, number = time.perf_counter(), connection.number
        connection.number = -1
        self.num_waiting -= 1
        self.done_at[number] = now
        self.status[number] = status
        if 200 <= status < 300:
            self.acks.append((number, body))
        elif status in (429, 503) and b"\r\nretry-after:" in head:
            self.num_retry_after += 1
        self.free(connection)

    def free(self, connection: "Connection") -> None:
        """Use a connection that waits for nothing."""
        now = time.perf_counter()
        if self.due:
            self.send(connection, self.due.popleft())
        elif self.is_closed_loop and now < self.stop_at:
            self.send(connection, now)
        else:
            self.idle.append(connection)

    def send_or_wait(self, due_at: float) -> None:
        """Send on an idle connection, else on a new one, else not at all."""
        if self.idle:
            self.send(self.idle.popleft(), due_at)
        elif self.num_opened < self.plan.max_connections:
            self.due.append(due_at)
            asyncio.get_running_loop().create_task(_connect(self))
        else:
            self.num_unsent += 1

    def lost(self, connection: "Connection") -> None:
        """Forget a connection; a request on it stays without an answer."""
        self.num_opened -= 1
        if connection.number >= 0:
            self.num_waiting -= 1
        elif connection in self.idle:
            self.idle.remove(connection)


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request in flight."""

    transport: asyncio.Transport

    def __init__(self, run: Run) -> None:
        self.run = run
        self.number = -1
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.run.free(self)

    def data_received(self, data: bytes) -> None:
        self.received += data
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.received[:end].lower()
        body = self.received[end + 4 :]
        if _is_whole(head, body):
            self.received = b""
            self.run.answered(self, int(head[9:12]), head, body)

    def connection_lost(self, exc: Exception | None) -> None:
        self.run.lost(self)
        if self.run.is_closed_loop and time.perf_counter() < self.run.stop_at:
            asyncio.get_running_loop().create_task(_connect(self.run))


def _is_whole(head: bytes, body: bytes) -> bool:
    at = head.find(b"content-length: ") + 16
    if at < 16:
        return body.endswith(b"0\r\n\r\n")  # chunked
    stop = head.find(b"\r", at)
    return len(body) >= int(head[at:] if stop < 0 else head[at:stop])


async def _connect(run: Run) -> None:
    run.num_opened += 1
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: Connection(run), "127.0.0.1", run.plan.port)


async def perform(plan: Plan) -> dict[str, Any]:
    """What each phase saw; seconds are counted from the beginning of its phase."""
    run = Run(plan)
    run.stop_at = time.perf_counter() + sum(phase.seconds for phase in plan.phases)
    await asyncio.gather(*(_connect(run) for _ in range(plan.num_connections)))
    gc.collect()
    gc.disable()
    started_cpu_s = time.process_time()
    spans = []
    for phase in plan.phases:
        first, unsent = len(run.due_at), run.num_unsent
        started = time.perf_counter()
        run.stop_at = started + phase.seconds
        await (_closed(run, phase) if phase.rate is None else _open(run, phase, started))
        spans.append((phase, first, len(run.due_at), started, run.num_unsent - unsent))
    deadline = time.perf_counter() + _LAST_ANSWERS_S
    while run.num_waiting and time.perf_counter() < deadline:
        await asyncio.sleep(0.01)
    cpu_s = time.process_time() - started_cpu_s
    if plan.ledger:
        _write_ledger(run, Path(plan.ledger))
    return {
        "phases": [_summary(run, *span) for span in spans],
        "num_sent": len(run.due_at),
        "num_acked": len(run.acks),
        "num_retry_after": run.num_retry_after,
        "statuses": dict(Counter(map(str, run.status))),
        "cpu_us": 1e6 * cpu_s / max(len(run.due_at), 1),
    }


async def _closed(run: Run, phase: Phase) -> None:
    run.is_closed_loop = True
    for _ in range(min(phase.num_clients, len(run.idle))):
        run.send(run.idle.popleft(), time.perf_counter())
    while time.perf_counter() < run.stop_at:
        await asyncio.sleep(0.05)
    run.is_closed_loop = False
    deadline = time.perf_counter() + _LAST_ANSWERS_S
    while run.num_waiting and time.perf_counter() < deadline:
        await asyncio.sleep(0.002)


async def _open(run: Run, phase: Phase, started: float) -> None:
    assert phase.rate is not None
    num_due, num_total = 0, int(phase.rate * phase.seconds)
    while num_due < num_total:
        now = time.perf_counter()
        due_now = min(int((now - started) * phase.rate) + 1, num_total)
        while num_due < due_now:
            run.send_or_wait(started + num_due / phase.rate)
            num_due += 1
        await asyncio.sleep(_TICK_S)


def _summary(
    run: Run, phase: Phase, first: int, last: int, started: float, num_unsent: int
) -> dict[str, Any]:
    since, until = started + phase.warmup_s, started + phase.seconds
    numbers = range(first, last)
    good_ms = _latencies_ms(run, (n for n in numbers if _is_good(run.status[n])), since)
    refused_ms = _latencies_ms(run, (n for n in numbers if run.status[n] in (429, 503)), since)
    # Goodput counts answers that came inside the window, whenever their request was sent.
    num_done = sum(
        1 for n in range(last) if _is_good(run.status[n]) and since <= run.done_at[n] < until
    )
    return {
        "num_sent": last - first,
        "num_unsent": num_unsent,
        "offered_per_s": (last - first) / phase.seconds,
        "per_s": num_done / (until - since),
        "statuses": dict(Counter(map(str, run.status[first:last]))),
        "p50_ms": _quantile(good_ms, 0.50),
        "p95_ms": _quantile(good_ms, 0.95),
        "p99_ms": _quantile(good_ms, 0.99),
        "max_ms": _quantile(good_ms, 1.0),
        "refused_p99_ms": _quantile(refused_ms, 0.99),
        "p99_ms_by_second": _by_second(run, numbers, started, phase.seconds),
    }


def _is_good(status: int) -> bool:
    return 200 <= status < 300


def _latencies_ms(run: Run, numbers: Iterable[int], since: float) -> list[float]:
    return sorted(1e3 * (run.done_at[n] - run.due_at[n]) for n in numbers if run.due_at[n] >= since)


def _by_second(run: Run, numbers: range, started: float, seconds: float) -> list[float | None]:
    found: list[list[float]] = [[] for _ in range(max(1, int(seconds)))]
    for n in numbers:
        second = int(run.due_at[n] - started)
        if _is_good(run.status[n]) and second < len(found):
            found[second].append(1e3 * (run.done_at[n] - run.due_at[n]))
    return [_quantile(sorted(values), 0.99) for values in found]


def _quantile(ordered: list[float], share: float) -> float | None:
    if not ordered:
        return None
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _write_ledger(run: Run, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number, body in run.acks:
            marker = _marker(run.plan.first + number).decode()
            file.write(json.dumps([marker, body.decode()]) + "\n")


def _marker(number: int) -> bytes:
    return (b"%08x" % number).translate(_LETTERS)


def main() -> int:
    """Read a plan, perform it, write what was seen."""
    raw = json.load(sys.stdin)
    phases = tuple(Phase(**phase) for phase in raw.pop("phases"))
    plan = Plan(**{**raw, "templates": tuple(raw["templates"]), "phases": phases})
    json.dump(uvloop.run(perform(plan)), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
