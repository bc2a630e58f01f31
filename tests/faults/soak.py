"""The long fault run: many kills under load, then one audit of every promise made.

Run as `python -m tests.faults.soak --kills 200 --acks 1000000`; a quarter of both goes to
PostgreSQL where one can be started. It ends with a line RESULT {json} and fails on any fault.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.faults.harness import Site, reason_not_to_trace, site, strace, until
from tests.faults.ledger import Ledger, audit, load, replay
from tests.faults.postgres import own_database, own_server

NUM_SINGLES = 12
NUM_BATCHERS = 2
BATCH = 25
STATEMENTS = ("BEGIN", "INSERT INTO interactions", "INSERT INTO feedback", "COMMIT")
# A file, a call on it, and how many of them a life may still see before its death.
CALLS = (
    ("-wal", "pwrite64", 300),
    ("-wal", "fdatasync", 100),
    ("", "pwrite64", 100),
    ("", "fdatasync", 1),
)
START_STATEMENTS = 100
MAX_LIFE_S = 20
REPORT_EVERY = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What one database went through, and what was wrong after it."""

    database: str
    kills: int
    acks: int
    lost: int
    repeated: int
    refused: int
    broken_off: int
    seconds: float
    faults: Sequence[str]


def main() -> int:
    """Soak each database; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--acks", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="perennial-soak-")))
        shares = {f"sqlite:///{folder}/p.db": 1.0}
        if (server := stack.enter_context(own_server())) is not None:
            shares = {next(iter(shares)): 0.75}
            shares[stack.enter_context(own_database(server)).url] = 0.25
        outcomes = []
        for url, share in shares.items():
            with site(folder, url) as there:
                goal = round(args.kills * share), round(args.acks * share)
                outcomes.append(soak(there, *goal, random.Random(args.seed)))
    totals = {
        name: sum(getattr(outcome, name) for outcome in outcomes)
        for name in ("kills", "acks", "lost", "repeated")
    }
    print("RESULT", json.dumps({**totals, "runs": [*map(asdict, outcomes)]}), flush=True)
    return int(any(outcome.faults for outcome in outcomes))


def soak(there: Site, kills: int, acks: int, rng: random.Random) -> Outcome:
    """Kill the server `kills` times over `acks` promises, then audit them all."""
    started = time.monotonic()
    ledger = Ledger()
    singles = load(there.port, ledger, "one", NUM_SINGLES)
    with singles, load(there.port, ledger, "many", NUM_BATCHERS, size=BATCH):
        for number in range(1, kills + 1):
            live_and_die(there, ledger, acks * number // kills, rng)
            if number % REPORT_EVERY == 0 or number == kills:
                print(_progress(ledger, number, kills, started), flush=True)
        there.start()
    faults = audit(ledger, there.url) + replay(ledger, there.port, rng, num=2000)
    return Outcome(
        database=there.url.partition(":")[0],
        kills=kills,
        acks=len(ledger.promised),
        lost=sum(fault.endswith("lost") for fault in faults),
        repeated=sum(fault.endswith("times") for fault in faults),
        refused=ledger.refused.total(),
        broken_off=ledger.num_broken,
        seconds=round(time.monotonic() - started, 1),
        faults=faults[:50],
    )


def live_and_die(there: Site, ledger: Ledger, enough: int, rng: random.Random) -> None:
    """One life of the server: until there are `enough` promises, or until its planned death."""
    kind, k = rng.choice(_deaths(there)), rng.randint(1, 300)
    point = {"ack": "ack", "statement": rng.choice(STATEMENTS)}.get(kind, "never")
    there.start("--die", f"{point}:{k + START_STATEMENTS}")
    until(lambda: len(ledger.promised) >= enough or there.has_ended(), 600)
    if kind == "call":
        suffix, call, most = rng.choice(CALLS)
        death = f"inject={call}:signal=SIGKILL:when={rng.randint(1, most)}"
        with strace(there, "-P", there.url.removeprefix("sqlite:///") + suffix, "-e", death):
            there.wait(MAX_LIFE_S)
    there.kill()


def _deaths(there: Site) -> Sequence[str]:
    """Ways to die that can be had on this database and this machine."""
    if not there.url.startswith("sqlite"):
        return ("moment", "ack")
    calls = () if reason_not_to_trace() else ("call",)
    return ("moment", "moment", "ack", "statement", *calls)


def _progress(ledger: Ledger, number: int, kills: int, started: float) -> str:
    return (
        f"kill {number}/{kills}: {len(ledger.promised)} promised, "
        f"{ledger.refused.total()} refused, {ledger.num_broken} broken off, "
        f"{len(ledger.faults)} faults, {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
