"""The process that trains or evaluates: `python -m perennial.training.run train job.json out/`.

It has memory and a crash of its own, so serving never shares either. Running it twice is safe: a
finished output is found, a killed one goes on from its checkpoint. Exit codes: 0 done, 2 bad job or
rows, 3 model or adapter missing, 4 training diverged, 5 damaged files, 1 anything else.
"""

import argparse
import dataclasses
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch.utils import deterministic

from perennial.infra import artifacts
from perennial.infra.errors import (
    InputError,
    IntegrityError,
    ModelMissingError,
    PerennialError,
    TrainingError,
)
from perennial.training import lora, modelfiles, trainer
from perennial.training.evaluate import Limits, SuiteSummary, base_top_k, evaluate
from perennial.training.examples import read_examples
from perennial.training.grading import read_suite
from perennial.training.job import EvalJob, TrainJob, read_eval_job, read_train_job
from perennial.training.machine import choose_threads, peak_rss_mb
from perennial.training.progress import ProgressLog
from perennial.training.tokens import TokenRow, encode_example
from perennial.training.trainer import Sources, Trained

_NICENESS = 10  # serving and ingestion go first where they share the cores
_EXIT_CODES: tuple[tuple[type[PerennialError], int], ...] = (
    (InputError, 2),
    (ModelMissingError, 3),
    (TrainingError, 4),
    (IntegrityError, 5),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code; errors go to standard error as one line."""
    parsed = _parser().parse_args(_with_command(arguments or sys.argv[1:]))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    console = Console(stderr=False)
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
        if parsed.command == "train":
            run_training(read_train_job(parsed.job), parsed.out, console)
        else:
            run_evaluation(read_eval_job(parsed.job), parsed.out, console)
    except PerennialError as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), 1)
    return 0


def run_training(job: TrainJob, out: Path, console: Console) -> None:
    """Fill `out` with adapter/, progress.jsonl and summary.json."""
    adapter, summary = out / "adapter", out / "summary.json"
    if summary.exists() and json.loads(summary.read_bytes())["job_digest"] == job.digest:
        artifacts.verify(adapter)
        console.print(f"already trained: {adapter}", highlight=False)
        return
    started = time.monotonic()
    num_threads = choose_threads(job.num_threads)
    torch.use_deterministic_algorithms(True)
    # It would fill every new tensor, 3% of a round; nothing reads memory before it is written.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
    folder = modelfiles.ensure_base_model(job.base_model, job.cache_dir)
    tokenizer = modelfiles.load_tokenizer(folder)
    sources = _sources(job, tokenizer)
    model = lora.attach(modelfiles.load_model(folder), job.config)
    if job.parent_adapter is not None and job.config.start == "parent":
        lora.load_into(model, job.parent_adapter)
    checkpoints = out / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    with ProgressLog(out / "progress.jsonl", console) as log:
        trained = trainer.train(
            model, sources, job.config, checkpoints=checkpoints, job=job.digest, on_step=log.step
        )
    if adapter.exists():
        shutil.rmtree(adapter)  # of another job, or of this one killed before its summary
    manifest = artifacts.publish(
        adapter, lambda inner: lora.save(model, inner, shrink=job.config.shrink)
    )
    seconds = time.monotonic() - started
    body = _summary(job, trained, sources, manifest.digest, num_threads, seconds)
    artifacts.write_atomic(summary, json.dumps(body, indent=1).encode())
    shutil.rmtree(checkpoints)
    console.print(f"adapter {adapter} · {seconds:.0f} s · peak {peak_rss_mb():.0f} MB")


def run_evaluation(job: EvalJob, out: Path, console: Console) -> None:
    """Fill `out` with <adapter>/<suite>.jsonl, one line a row, and summary.json."""
    started = time.monotonic()
    choose_threads(job.num_threads)
    suites = {name: read_suite(path) for name, path in job.suites.items()}
    folder = modelfiles.ensure_base_model(job.base_model, job.cache_dir)
    tokenizer = modelfiles.load_tokenizer(folder)
    model = modelfiles.load_model(folder)
    limits = Limits(max_new_tokens=job.max_new_tokens)
    base = {name: base_top_k(model, tokenizer, suites[name], limits) for name in job.kl_suites}
    table: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, adapter in job.adapters.items():
        kept = lora.merge(model, adapter) if adapter else {}
        table[name] = {}
        for suite, rows in suites.items():
            results, summary = evaluate(model, tokenizer, rows, limits, base.get(suite))
            lines = (json.dumps(dataclasses.asdict(row), ensure_ascii=False) for row in results)
            content = "".join(line + "\n" for line in lines).encode()
            artifacts.write_atomic(out / name / f"{suite}.jsonl", content)
            table[name][suite] = dataclasses.asdict(summary)
            console.print(_eval_line(name, suite, summary), highlight=False)
        lora.unmerge(model, kept)
    body = {"results": table, "wall_s": time.monotonic() - started, "peak_rss_mb": peak_rss_mb()}
    artifacts.write_atomic(out / "summary.json", json.dumps(body, indent=1).encode())


def _sources(job: TrainJob, tokenizer: object) -> Sources:
    def encoded(path: Path | None) -> tuple[TokenRow, ...]:
        rows = read_examples(path) if path else ()
        return tuple(encode_example(tokenizer, row, job.config.max_len) for row in rows)

    return Sources(
        new=encoded(job.train_rows),
        replay=encoded(job.replay_rows),
        general=encoded(job.general_rows),
    )


def _summary(
    job: TrainJob,
    trained: Trained,
    sources: Sources,
    digest: str,
    num_threads: int,
    seconds: float,
) -> dict[str, object]:
    new, replay, general = (len(part) for part in sources.parts)
    return {
        **dataclasses.asdict(trained),
        "job_digest": job.digest,
        "adapter_digest": digest,
        "base_model": job.base_model,
        "config": job.config.to_json(),
        "config_fingerprint": job.config.fingerprint,
        "num_rows": {"new": new, "replay": replay, "general": general},
        "num_threads": num_threads,
        "wall_s": seconds,
        "peak_rss_mb": peak_rss_mb(),
    }


def _eval_line(name: str, suite: str, summary: SuiteSummary) -> str:
    graded = (
        f"{summary.num_right}/{summary.num_graded} right · " if summary.accuracy is not None else ""
    )
    return f"{name} · {suite} · {graded}NLL {summary.nll:.3f} · {summary.seconds:.1f} s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perennial.training.run")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("train", "train an adapter"), ("evaluate", "score adapters on suites")):
        command = commands.add_parser(name, help=text)
        command.add_argument("job", type=Path, help="the job file (JSON)")
        command.add_argument("out", type=Path, help="the folder to fill")
    return parser


def _with_command(arguments: Sequence[str]) -> list[str]:
    """`run job.json out/` means `run train job.json out/`."""
    known = {"train", "evaluate", "-h", "--help"}
    return [*arguments] if arguments and arguments[0] in known else ["train", *arguments]


if __name__ == "__main__":
    os.nice(_NICENESS)
    sys.exit(main())
