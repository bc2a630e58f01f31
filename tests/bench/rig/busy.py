"""What else runs on the machine during a round: a LoRA training and Evidently reports, in loops.

    python tests/bench/rig/busy.py train|report FOLDER

Each runs until it is stopped, as the product runs it, and prints `running` when the work itself has
begun, not its imports.
"""

import json
import os
import random
import sys
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

from perennial.flows.cli import NICENESS
from perennial.flows.processes import run_training_process
from perennial.infra.settings import Settings
from perennial.monitoring.check import check
from perennial.monitoring.policy import Policy
from perennial.monitoring.windows import TrafficRow, WindowRules, split
from perennial.training.examples import Example, write_examples

_DESK = Path(__file__).parents[3] / "flows" / "desk"
_EXAMPLES = 64
_ROWS = 2000
_BORDER = datetime(2026, 5, 8, tzinfo=UTC)
_WORDS = [f"word{n}" for n in range(300)]


def train(folder: Path) -> None:
    """Rounds of the desk's facts on the default base model, one after the other."""
    settings = Settings(home=folder)
    facts = map(json.loads, (_DESK / "act1.jsonl").read_text(encoding="utf-8").splitlines())
    rows = [
        Example(
            id=f"{fact['id']}/{index}",
            messages=(("user", question),),
            completion=fact["answer"],
            kind="correction",
        )
        for fact in facts
        for index, question in enumerate(fact["questions"])
    ]
    write_examples(folder / "rows.jsonl", rows[:_EXAMPLES])
    body = {
        "base_model": settings.model.name,
        "cache_dir": str(settings.model.cache_dir),
        "train_rows": "rows.jsonl",
        "config": {"epochs": 100},
    }
    job = folder / "job.json"
    job.write_text(json.dumps(body))
    for number in count():
        run_training_process("train", job, folder / f"out{number}", settings, on_line=_say)


def report(folder: Path) -> None:
    """Checks of 2,000 against 2,000 interactions, each drawn by Evidently, as niced as a worker."""
    from perennial.monitoring.report import write_report  # Evidently: seconds to import

    os.nice(NICENESS)
    rng = random.Random(0)
    for number in count():
        rows = [_row(n, rng) for n in range(2 * _ROWS)]
        windows = split(
            rows,
            since=_BORDER - timedelta(days=7),
            reference_until=_BORDER,
            until=_BORDER + timedelta(days=7),
            rules=WindowRules(max_rows=_ROWS),
        )
        now = _BORDER + timedelta(days=7)
        result = check(windows, Policy(), num_new_examples=50, now=now, last_trained_at=None)
        print("running", flush=True)
        write_report(result, folder / f"check{number}")


def _row(number: int, rng: random.Random) -> TrafficRow:
    return TrafficRow(
        interaction_id=f"int_{number}",
        prompt=" ".join(rng.choices(_WORDS, k=12)),
        answer=" ".join(rng.choices(_WORDS, k=30)),
        model_version="assistant-v1-0a1b2c3d",
        received_at=_BORDER + timedelta(minutes=4 * (number - _ROWS)),
    )


def _say(line: str) -> None:
    if line.startswith("step"):  # of the optimiser: the model is loaded, the trunk is cached
        print("running", flush=True)


if __name__ == "__main__":
    mode, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    {"train": train, "report": report}[mode](folder)
