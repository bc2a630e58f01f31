"""Writes a stream of SuperNI tasks from a folder with `<task>.train.jsonl` and `<task>.test.jsonl`.

    python tests/bench/streams/superni.py SOURCE DIR [--tasks a,b,…]

By default: choosing an answer, two kinds of labels, short science answers, generating an event.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

TASKS = (
    "task1687_sentiment140_classification",
    "task591_sciq_answer_generation",
    "task875_emotion_classification",
    "task073_commonsenseqa_answer_generation",
    "task748_glucose_reverse_cause_event_detection",
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a stream of SuperNI tasks.")
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", default=",".join(TASKS))
    arguments = parser.parse_args()
    try:
        write_stream(arguments.source, arguments.folder, arguments.tasks.split(","))
    except FileNotFoundError as error:
        print(f"{error.filename} is not there", file=sys.stderr)
        return 2
    return 0


def write_stream(source: Path, folder: Path, tasks: Sequence[str] = TASKS) -> None:
    """The tasks as `01-name`, … in `folder`, rows as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, task in enumerate(tasks, start=1):
        for part in ("train", "test"):
            name = f"{number:02}-{task.partition('_')[2] or task}"
            shutil.copyfile(source / f"{task}.{part}.jsonl", folder / f"{name}.{part}.jsonl")


if __name__ == "__main__":
    sys.exit(main())
