"""How fast events become durable, beside what the disk can do, a control, and other systems.

    python tests/bench/ingest.py [--short] [--only single] [--seed 1] [--overload-s 60]

Real servers and a load generator share this machine's cores. The control is a plain service that
commits once per request (`rig/plain.py`), a second one our own with groups of one row; they and the
fast path take turns in the same run, and ratios are of medians. After each scenario the
database is compared with what was acknowledged, event by event: a lost or doubled one ends the run.
`yardstick` says how fast Python was around each scenario, and how much of the cores others took.
Prints a table and, as the last line, `RESULT {json}`; progress goes to standard error.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from rig import events, peers
from rig.disk import FsyncRate, fsync_rate
from rig.load import Phase
from rig.neighbours import Neighbours
from rig.postgres import postgres
from rig.processes import Generator, Served, Watch, serve, temporary_folder
from rig.proof import prove
from rig.table import table
from rig.yardstick import yardstick

NUM_CLIENTS = 64
NUM_BATCH_CLIENTS = 16
NUM_TARGETS = 64

Numbers = dict[str, Any]  # Any: numbers, lists of numbers and None, as JSON


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """How long things are measured."""

    round_s: float = 8.0
    warmup_s: float = 1.0
    num_rounds: int = 3
    overload_s: float = 60.0
    calm_s: float = 15.0  # after the overload, and half as long before it


SHORT = Times(round_s=2.0, warmup_s=0.5, num_rounds=1, overload_s=4.0, calm_s=6.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What every scenario stands on."""

    folder: Path
    times: Times
    seed: int
    max_connections: int
    phoenix_python: Path | None
    statuses: Counter[str] = field(default_factory=Counter)  # all that our servers answered


@dataclass(frozen=True, kw_only=True, slots=True)
class UnderTest:
    """A server of ours with interactions to give feedback on, and what sends to it."""

    served: Served
    generator: Generator
    targets: tuple[str, ...]
    times: Times
    seed: int

    def closed(self, templates: Sequence[str], num_clients: int = NUM_CLIENTS) -> Numbers:
        """One round of a closed loop."""
        return self.generator.closed(
            self.served.port, templates, num_clients, self.times.round_s, self.times.warmup_s
        )

    def singles(self) -> tuple[str, ...]:
        """Single feedback, 1 KB."""
        return events.feedback(
            self.served.port, self.targets, self.served.key, random.Random(self.seed)
        )


def main() -> int:
    """Run the scenarios, print the table and the result."""
    args = parser().parse_args()
    times = SHORT if args.short else Times()
    if args.overload_s is not None:
        times = replace(times, overload_s=args.overload_s)
    folder = temporary_folder(args.folder)
    bench = Bench(
        folder=folder,
        times=times,
        seed=args.seed,
        max_connections=args.connections,
        phoenix_python=args.phoenix_python,
    )
    results: Numbers = {"seed": args.seed, "load_average": os.getloadavg()[0]}
    yardsticks: dict[str, dict[str, float]] = {}
    started = time.monotonic()
    try:
        for name, scenario in SCENARIOS.items():
            if args.only in (None, name):
                tell(f"{time.monotonic() - started:5.0f} s  {name}")
                with yardstick() as yardsticks[name]:
                    results |= scenario(bench)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results["yardstick"] = yardsticks
    results["stolen_max"] = max(each["stolen"] for each in yardsticks.values())
    results["statuses"] = dict(bench.statuses)
    print(table(results))
    print("RESULT " + json.dumps(results))
    return 0


def disk(bench: Bench) -> Numbers:
    """Fsyncs of one page, nothing else running."""
    rounds = [fsync_rate(bench.folder, bench.times.round_s / 2) for _ in range(3)]
    return fsyncs(rounds)


def single(bench: Bench) -> Numbers:
    """64 clients, 1 KB, SQLite; by turns with one commit per request, and with bare fsyncs."""
    fast_rounds, control_rounds, alone_rounds, fsync_rounds = [], [], [], []
    with (
        under_test(bench, "fast") as fast,
        under_test(bench, "control", script="plain.py") as control,
        under_test(bench, "alone", "--max-group-rows", "1") as alone,
    ):
        with Watch(fast.served.pid) as watch:
            for _ in range(bench.times.num_rounds):
                fast_rounds.append(fast.closed(fast.singles()))
                control_rounds.append(control.closed(control.singles()))
                alone_rounds.append(alone.closed(alone.singles()))
                fsync_rounds.append(fsync_rate(bench.folder, bench.times.round_s / 2))
        interactions = fast.closed(
            events.interactions(fast.served.port, fast.served.key, random.Random(bench.seed))
        )
        generator_us = statistics.median(fast.generator.cpu_us)
    fast_per_s, control_per_s = median(fast_rounds, "per_s"), median(control_rounds, "per_s")
    alone_per_s = median(alone_rounds, "per_s")
    return {
        **fsyncs(fsync_rounds),
        "single_per_s": fast_per_s,
        "single_p50_ms": median(fast_rounds, "p50_ms"),
        "single_p99_ms": median(fast_rounds, "p99_ms"),
        "single_server_cpu_us": 1e6 * watch.cpu_s / sum(each["num_sent"] for each in fast_rounds),
        "control_per_s": control_per_s,
        "control_p99_ms": median(control_rounds, "p99_ms"),
        "vs_per_request_commit": fast_per_s / control_per_s,
        "groups_of_one_per_s": alone_per_s,
        "vs_groups_of_one": fast_per_s / alone_per_s,
        "interaction_per_s": interactions["per_s"],
        "interaction_p99_ms": interactions["p99_ms"],
        "load_cpu_us": generator_us,
    }


def on_postgres(bench: Bench) -> Numbers:
    """The same on PostgreSQL with fsync on."""
    with postgres(bench.folder) as url, under_test(bench, "postgres", url=url) as ours:
        rounds = [ours.closed(ours.singles()) for _ in range(bench.times.num_rounds)]
    return {
        "postgres_per_s": median(rounds, "per_s"),
        "postgres_p99_ms": median(rounds, "p99_ms"),
    }


def batch(bench: Bench) -> Numbers:
    """100 events a request: corrections of 1 KB, and votes."""
    rng = random.Random(bench.seed)
    with under_test(bench, "batch") as ours:
        large = events.batches(ours.served.port, ours.targets, ours.served.key, rng)
        small = events.thumbs(ours.served.port, ours.targets, ours.served.key)
        rounds: dict[str, list[Numbers]] = {"large": [], "small": []}
        for _ in range(bench.times.num_rounds):
            rounds["large"].append(ours.closed(large, NUM_BATCH_CLIENTS))
            rounds["small"].append(ours.closed(small, NUM_BATCH_CLIENTS))
    return {
        "batch_events_per_s": events.BATCH_ITEMS * median(rounds["large"], "per_s"),
        "batch_p99_ms": median(rounds["large"], "p99_ms"),
        "batch_votes_per_s": events.BATCH_ITEMS * median(rounds["small"], "per_s"),
    }


def idle(bench: Bench) -> Numbers:
    """One client, one request at a time, by turns with fsyncs of the same disk."""
    acks, fsync_rounds = [], []
    with under_test(bench, "idle") as ours:
        for _ in range(bench.times.num_rounds):
            fsync_rounds.append(fsync_rate(bench.folder, bench.times.round_s / 2).p50_ms)
            acks.append(ours.closed(ours.singles(), 1)["p50_ms"])
    return {
        "idle_ack_ms": statistics.median(acks),
        "idle_fsync_p50_ms": statistics.median(fsync_rounds),
    }


def overload(bench: Bench) -> Numbers:
    """Three times the peak for a minute, between two quiet stretches at half the peak."""
    times = bench.times
    with under_test(bench, "overload") as ours:
        peak = max(ours.closed(ours.singles())["per_s"] for _ in range(times.num_rounds))
        phases = [
            Phase(seconds=times.calm_s / 2, rate=peak / 2, warmup_s=times.warmup_s),
            Phase(seconds=times.overload_s, rate=3 * peak),
            Phase(seconds=times.calm_s, rate=peak / 2),
        ]
        with Watch(ours.served.pid) as watch:
            seen = ours.generator.run(
                ours.served.port, ours.singles(), phases, NUM_CLIENTS, bench.max_connections
            )
    before, during, after = seen["phases"]
    refusals = sum(seen["statuses"].get(code, 0) for code in ("429", "503"))
    return {
        "overload_peak_per_s": peak,
        "overload_offered_share": during["offered_per_s"] / peak,
        "overload_goodput_share": during["per_s"] / peak,
        "overload_p99_ms": during["p99_ms"],
        "overload_statuses": during["statuses"],
        "overload_unsent": during["num_unsent"],
        "overload_refused_p99_ms": during["refused_p99_ms"],
        "overload_refusals_with_retry_after": seen["num_retry_after"] / refusals
        if refusals
        else None,
        "overload_rss_mib": watch.max_rss_mib - watch.start_rss_mib,
        "overload_recovery_s": recovery_s(after["p99_ms_by_second"], 2 * before["p99_ms"]),
    }


def training(bench: Bench) -> Numbers:
    """64 clients, and half the peak rate, with and without a training and reports beside them."""
    times = bench.times
    rounds: dict[tuple[str, bool], list[Numbers]] = {}
    with Neighbours(bench.folder) as neighbours, under_test(bench, "training") as ours:
        neighbours.wait_until_busy()
        with neighbours.asleep():
            peak = ours.closed(ours.singles())["per_s"]
        half = Phase(seconds=times.round_s + times.warmup_s, rate=peak / 2, warmup_s=times.warmup_s)
        for _ in range(times.num_rounds):
            for is_busy in (False, True):
                with neighbours.awake() if is_busy else neighbours.asleep():
                    full = ours.closed(ours.singles())
                    seen = ours.generator.run(ours.served.port, ours.singles(), [half], NUM_CLIENTS)
                rounds.setdefault(("full", is_busy), []).append(full)
                rounds.setdefault(("half", is_busy), []).append(seen["phases"][0])

    def ratio(load: str, key: str) -> float:
        return median(rounds[load, True], key) / median(rounds[load, False], key)

    return {
        "training_p99_ratio": ratio("full", "p99_ms"),
        "training_p99_ms": median(rounds["full", True], "p99_ms"),
        "training_per_s": median(rounds["full", True], "per_s"),
        "training_per_s_ratio": ratio("full", "per_s"),
        "training_half_load_p99_ratio": ratio("half", "p99_ms"),
        "training_half_load_p99_ms": median(rounds["half", True], "p99_ms"),
        "training_neighbour_cores": neighbours.cores_used,
    }


def on_mlflow(bench: Bench) -> Numbers:
    """The same events through MLflow's `log_feedback` route."""
    with peers.mlflow(bench.folder / "mlflow") as peer:
        templates = events.mlflow_feedback(peer.port, peer.targets, random.Random(bench.seed))
        return beside(bench, "mlflow", peer, templates)


def on_phoenix(bench: Bench) -> Numbers:
    """The same events through Phoenix's span annotations, where it is installed."""
    if bench.phoenix_python is None:
        return {"phoenix_per_s": None}
    with peers.phoenix(bench.folder / "phoenix", bench.phoenix_python) as peer:
        templates = events.phoenix_annotation(peer.port, peer.targets, random.Random(bench.seed))
        return beside(bench, "phoenix", peer, templates)


SCENARIOS: dict[str, Callable[[Bench], Numbers]] = {
    "disk": disk,
    "single": single,
    "postgres": on_postgres,
    "batch": batch,
    "idle": idle,
    "overload": overload,
    "training": training,
    "mlflow": on_mlflow,
    "phoenix": on_phoenix,
}


def beside(bench: Bench, name: str, peer: peers.Peer, templates: Sequence[str]) -> Numbers:
    """What a peer does with the same load; rows it acknowledged and does not have are counted."""
    folder = bench.folder / f"{name}-load"
    folder.mkdir()
    generator, times = Generator(folder), bench.times
    rounds = [
        generator.closed(peer.port, templates, NUM_CLIENTS, times.round_s, times.warmup_s)
        for _ in range(times.num_rounds)
    ]
    return {
        f"{name}_per_s": median(rounds, "per_s"),
        f"{name}_p99_ms": median(rounds, "p99_ms"),
        f"{name}_statuses": rounds[-1]["statuses"],
        f"{name}_missing": max(0, generator.num_acked - peer.num_stored()),
    }


@contextmanager
def under_test(
    bench: Bench, name: str, *arguments: str, url: str = "", script: str = "server.py"
) -> Iterator[UnderTest]:
    """A server over a new database; when the block ends, its promises are proven."""
    folder = bench.folder / name
    folder.mkdir()
    url = url or f"sqlite:///{folder / 'perennial.db'}"
    generator = Generator(folder)
    with serve(url, *arguments, script=script) as served:
        yield UnderTest(
            served=served,
            generator=generator,
            targets=tuple(make_target(served) for _ in range(NUM_TARGETS)),
            times=bench.times,
            seed=bench.seed,
        )
    bench.statuses.update(generator.statuses)
    proof = prove(url, generator.ledgers)
    tell(f"         {name}: {proof.num_acked} acknowledged, each stored once")


def make_target(served: Served) -> str:
    """The id of a new interaction."""
    body = {
        "task": "assistant",
        "messages": [{"role": "user", "content": "How long is the warranty?"}],
        "completion": "One year.",
        "model_version": "assistant-v1-0a1b2c3d",
    }
    answer = httpx.post(
        f"http://127.0.0.1:{served.port}/v1/interactions",
        json=body,
        headers={"Authorization": f"Bearer {served.key}"},
        timeout=30,
    )
    return str(answer.raise_for_status().json()["id"])


def fsyncs(rounds: Sequence[FsyncRate]) -> Numbers:
    """The medians of fsync rates over rounds."""
    return {
        f"fsync_{name}": statistics.median(getattr(each, name) for each in rounds)
        for name in ("per_s", "p50_ms", "p99_ms")
    }


def recovery_s(p99_ms_by_second: Sequence[float | None], bound_ms: float) -> int:
    """Seconds until p99 is within the bound for two seconds on end; all of them if it never is."""
    good = [p99 is not None and p99 <= bound_ms for p99 in p99_ms_by_second]
    found = (second for second, both in enumerate(pairwise(good)) if all(both))
    return next(found, len(good))


def median(rounds: Sequence[Numbers], key: str) -> float:
    """The median of a number over rounds."""
    return float(statistics.median(each[key] for each in rounds))


def tell(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    found.add_argument("--short", action="store_true", help="everything in about 90 seconds")
    found.add_argument("--only", choices=tuple(SCENARIOS), help="one scenario")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--overload-s", type=float, help="seconds of overload, 60 if not short")
    found.add_argument(
        "--connections", type=int, default=2048, help="most that an overload may open"
    )
    found.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where databases are made: the disk that is measured",
    )
    found.add_argument(
        "--phoenix-python", type=Path, help="an interpreter that has arize-phoenix installed"
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
