"""Trains, evaluates or drafts in a process: `python -m perennial.training.run train job.json out/`.

It has memory and a crash of its own, so serving never shares either. Running it twice is safe: a
finished output is found, a killed one goes on from its checkpoint. Exit codes: 0 done, 2 bad job or
rows, 3 model or adapter missing, 4 training diverged, 5 damaged files, 6 the disk is full or cannot
be written, 7 one row alone does not fit in memory, 1 anything else.
"""

import argparse
import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from perennial.infra import artifacts
from perennial.infra.errors import (
    DivergedError,
    InputError,
    IntegrityError,
    ModelMissingError,
    OutOfMemoryError,
    PerennialError,
    UnavailableError,
)
from perennial.training import lora, modelfiles
from perennial.training.cache import folder_digest
from perennial.training.drafting import write_drafts
from perennial.training.evaluate import (
    SuiteRow,
    SuiteSummary,
    base_top_k,
    evaluate,
    leave_out_long,
    longest_row,
)
from perennial.training.fit import run_training
from perennial.training.general import write_general
from perennial.training.grading import read_suite
from perennial.training.job import (
    DraftJob,
    EvalJob,
    read_draft_job,
    read_eval_job,
    read_train_job,
)
from perennial.training.machine import (
    be_deterministic,
    choose_place,
    choose_threads,
    choose_threads_once,
    peak_rss_mb,
    peaks_mb,
    yield_cores,
)
from perennial.training.progress import Meter

_DISK = 6
_EXIT_CODES: tuple[tuple[type[PerennialError], int], ...] = (
    (InputError, 2),
    (ModelMissingError, 3),
    (DivergedError, 4),
    (IntegrityError, 5),
    (UnavailableError, _DISK),
    (OutOfMemoryError, 7),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code; errors go to standard error as one line."""
    parsed = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    console = Console(stderr=False)
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
        if parsed.command == "train":
            run_training(read_train_job(parsed.job), parsed.out, console)
        elif parsed.command == "draft":
            run_drafting(read_draft_job(parsed.job), parsed.out, console)
        else:
            run_evaluation(read_eval_job(parsed.job), parsed.out, console)
    except PerennialError as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), 1)
    except OSError as error:
        sys.stderr.write(f"cannot write under {parsed.out}: {error}; free space and run it again\n")
        return _DISK
    return 0


def run_evaluation(job: EvalJob, out: Path, console: Console) -> None:
    """Fill `out` with <adapter>/<suite>.jsonl, one line a row, and summary.json.

    Rows that are too long are left out for all adapters; the summary names them.
    """
    started = time.monotonic()
    choose_threads(job.num_threads)
    place = choose_place(job.device, job.dtype)
    folder = modelfiles.ensure_base_model(job.base_model, job.cache_dir)
    tokenizer = modelfiles.load_tokenizer(folder)
    model = modelfiles.load_model(folder, place)
    suites, left_out = _suites(job, tokenizer, longest_row(folder), console)
    base = {name: base_top_k(model, suites[name]) for name in job.kl_suites}
    table: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, adapter in job.adapters.items():
        kept = lora.merge(model, adapter) if adapter else {}
        table[name] = {}
        for suite, rows in suites.items():
            max_new = job.max_new_tokens
            results, summary = evaluate(model, tokenizer, rows, max_new, base.get(suite))
            lines = (json.dumps(asdict(row), ensure_ascii=False) for row in results)
            content = "".join(line + "\n" for line in lines).encode()
            artifacts.write_atomic(out / name / f"{suite}.jsonl", content)
            table[name][suite] = asdict(summary)
            console.print(_eval_line(name, suite, summary), highlight=False)
        lora.unmerge(model, kept)
    wall_s = time.monotonic() - started
    found = {"results": table, "left_out": left_out, "wall_s": wall_s}
    body = {**found, **asdict(place), **peaks_mb()}
    artifacts.write_atomic(out / "summary.json", json.dumps(body, indent=1).encode())


def run_drafting(job: DraftJob, out: Path, console: Console) -> None:
    """Fill `out` with <key>/general.jsonl, once for a model, seed and number, and summary.json."""
    started = time.monotonic()
    base = modelfiles.ensure_base_model(job.base_model, job.cache_dir)
    files = [folder_digest(base, pattern) for pattern in (modelfiles.weights_pattern(base), "*.j*")]
    key = _key(*files, job.seed, job.num_rows)
    batches = out / f"{_key(*files, job.seed)}-batches"  # the same for any number of rows
    if not (out / key).exists():
        be_deterministic()
        choose_threads_once(batches / "num_threads", job.num_threads)

    def write(folder: Path) -> None:
        place = choose_place(job.device, job.dtype)
        model, tokenizer = modelfiles.load_model(base, place), modelfiles.load_tokenizer(base)
        with Meter("draft", console) as meter:
            drafts = write_drafts(model, tokenizer, job.num_rows, job.seed, batches, meter)
        write_general(folder / "general.jsonl", drafts)

    artifacts.publish(out / key, write)
    shutil.rmtree(batches, ignore_errors=True)
    body = {"general": f"{key}/general.jsonl", "num_rows": job.num_rows, "seed": job.seed}
    artifacts.write_atomic(out / "summary.json", json.dumps(body, indent=1).encode())
    wall_s = time.monotonic() - started
    told = f"drafts {out / key} · {wall_s:.0f} s · peak {peak_rss_mb():.0f} MB"
    console.print(told, highlight=False, soft_wrap=True)


def _suites(
    job: EvalJob,
    tokenizer: Any,  # Any: transformers
    max_len: int,
    console: Console,
) -> tuple[dict[str, tuple[SuiteRow, ...]], list[dict[str, object]]]:
    """The rows to score by suite, and those that are too long, which the log counts."""
    suites, left_out = {}, []
    for name, path in job.suites.items():
        rows = read_suite(path)
        suites[name], long = leave_out_long(tokenizer, rows, max_len)
        left_out += [{"suite": name, "id": row.id, "num_tokens": row.num_tokens} for row in long]
        if long:
            told = f"{name} · {len(long)} of {len(rows)} rows left out, over {max_len} tokens"
            console.print(told, highlight=False)
    return suites, left_out


def _eval_line(name: str, suite: str, summary: SuiteSummary) -> str:
    graded = (
        f"{summary.num_right}/{summary.num_graded} right · " if summary.accuracy is not None else ""
    )
    return f"{name} · {suite} · {graded}NLL {summary.nll:.3f} · {summary.seconds:.1f} s"


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perennial.training.run")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("train", "train an adapter"),
        ("evaluate", "score adapters on suites"),
        ("draft", "have the base model write general rows"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("job", type=Path, help="the job file (JSON)")
        command.add_argument("out", type=Path, help="the folder to fill")
    return parser


if __name__ == "__main__":
    yield_cores()
    sys.exit(main())
