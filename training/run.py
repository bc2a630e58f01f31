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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils import deterministic

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
from perennial.infra.settings import fix_cublas_workspace
from perennial.training import checkpoint, lora, modelfiles, rounds, trainer
from perennial.training.cache import TrunkCache, folder_digest, model_digest
from perennial.training.config import Start, TrainConfig
from perennial.training.drafting import write_drafts
from perennial.training.evaluate import (
    SuiteRow,
    SuiteSummary,
    base_top_k,
    evaluate,
    leave_out_long,
    longest_row,
    reference_nlls,
)
from perennial.training.general import write_general
from perennial.training.grading import read_suite
from perennial.training.job import (
    DraftJob,
    EvalJob,
    TrainJob,
    read_draft_job,
    read_eval_job,
    read_train_job,
)
from perennial.training.machine import (
    Place,
    choose_place,
    choose_threads,
    choose_threads_once,
    peak_gpu_mb,
    peak_rss_mb,
    yield_cores,
)
from perennial.training.prepared import Sources, TrunkOf, teach
from perennial.training.progress import Meter, ProgressLog
from perennial.training.recipes import RECIPES
from perennial.training.rounds import Beginning, Lineage
from perennial.training.rows import Rows, rows_of_job
from perennial.training.teachers import size_mb, write_teachers
from perennial.training.tokens import TokenRow
from perennial.training.trainer import Trained
from perennial.training.trunk import SplitModel

_LOG = logging.getLogger(__name__)
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


def run_training(job: TrainJob, out: Path, console: Console) -> None:
    """Fill `out` with adapter/, progress.jsonl and summary.json."""
    adapter, summary = out / "adapter", out / "summary.json"
    if summary.exists() and json.loads(summary.read_bytes())["job_digest"] == job.digest:
        artifacts.verify(adapter)
        console.print(f"already trained: {adapter}", highlight=False)
        return
    started = time.monotonic()
    base = modelfiles.ensure_base_model(job.base_model, job.cache_dir)
    num_threads = choose_threads_once(out / "checkpoints" / "num_threads", job.num_threads)
    place = choose_place(job.device, job.dtype)
    _be_deterministic()
    # It would fill every new tensor, 3% of a round; nothing reads memory before it is written.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
    parent = rounds.read_lineage(job.parent_adapter) if job.parent_adapter else None
    model = lora.attach(modelfiles.load_model(base, place), job.config)
    learned = _learn(model, job, base, parent, out, console)
    for old in (adapter, out / "fast", out / "teachers"):
        shutil.rmtree(old, ignore_errors=True)  # of another job, or of this one killed at the end
    alphas = _finish(model, job, learned.beginning.start, parent, learned.rows.dev, out)
    _keep_teachers(model, job.config, learned.rows.sources, out / "teachers")
    manifest = artifacts.publish(
        adapter, lambda inner: _write_adapter(model, job, learned.lineage, inner)
    )
    body = {
        **_summary(job, learned, manifest.digest, num_threads, place),
        "dev_loss_by_alpha": alphas,
        "teachers_mb": size_mb(out / "teachers"),
        "wall_s": time.monotonic() - started,
    }
    artifacts.write_atomic(summary, json.dumps(body, indent=1).encode())
    shutil.rmtree(out / "checkpoints")
    sizes = f"peak {peak_rss_mb():.0f} MB · teachers {body['teachers_mb']:.1f} MB on disk"
    console.print(f"adapter {adapter} · {body['wall_s']:.0f} s · {sizes}", highlight=False)


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
    body = {**found, **asdict(place), **_peaks()}
    artifacts.write_atomic(out / "summary.json", json.dumps(body, indent=1).encode())


def run_drafting(job: DraftJob, out: Path, console: Console) -> None:
    """Fill `out` with <key>/general.jsonl, once for a model, seed and number, and summary.json."""
    started = time.monotonic()
    base = modelfiles.ensure_base_model(job.base_model, job.cache_dir)
    files = [folder_digest(base, pattern) for pattern in (modelfiles.weights_pattern(base), "*.j*")]
    key = _key(*files, job.seed, job.num_rows)
    batches = out / f"{_key(*files, job.seed)}-batches"  # the same for any number of rows
    if not (out / key).exists():
        _be_deterministic()
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


def _be_deterministic() -> None:
    fix_cublas_workspace()
    torch.use_deterministic_algorithms(True)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Learned:
    """How a round began, on which rows, what came of it, and what its adapter now is."""

    beginning: Beginning
    rows: Rows
    trained: Trained
    lineage: Lineage


def _learn(
    model: Any,  # Any: peft
    job: TrainJob,
    base: Path,
    parent: Lineage | None,
    out: Path,
    console: Console,
) -> _Learned:
    """The attached adapter trained; from the base, where going on from the parent keeps nothing.

    Raises:
        DivergedError: a round from the base has spent its KL budget before the first checkpoint.
    """
    fresh, checkpoints = lora.state(model), out / "checkpoints"
    beginning = rounds.begin(job.config, parent, checkpoint.read_spent(checkpoints, job.digest))
    is_rebuild = parent is not None and beginning.start == "base"
    rows = rows_of_job(job, modelfiles.load_tokenizer(base), is_rebuild=is_rebuild)
    _load_start(model, job, beginning.start)
    trained = _train(model, rows.sources, job, checkpoints, _trunk_of(job, base), console)
    if trained.num_steps:
        lineage = rounds.after(None if is_rebuild else parent, trained.kl_to_base)
        return _Learned(beginning=beginning, rows=rows, trained=trained, lineage=lineage)
    said = f"{trained.stopped_because}, before the first checkpoint"
    if beginning.start == "base":
        raise DivergedError(f"{said}, of a round from the base; lower lr or raise kl_weight")
    _LOG.warning("%s: the round begins from the base", said)
    checkpoint.note_spent(checkpoints, job.digest, said)
    lora.set_state(model, fresh, out)
    return _learn(model, job, base, parent, out, console)


def _train(
    model: Any,  # Any: peft
    sources: Sources,
    job: TrainJob,
    checkpoints: Path,
    trunk_of: TrunkOf,
    console: Console,
) -> Trained:
    with ProgressLog(checkpoints.parent / "progress.jsonl", console) as log:
        return trainer.train(
            model,
            sources,
            job.config,
            checkpoints=checkpoints,
            job=job.digest,
            on_step=log.step,
            trunk_of=trunk_of,
        )


def _load_start(model: Any, job: TrainJob, start: Start) -> None:  # Any: peft
    """Set the attached adapter to what the round starts from."""
    if job.parent_adapter is None or start == "base":
        return
    if start == "slow-fast":
        fast_adapter = job.fast_adapter or job.parent_adapter
        for folder in (job.parent_adapter, fast_adapter):
            lora.check_scale(model, folder)
        fast = lora.read_state(fast_adapter)
        lora.set_state(model, rounds.orthogonal(fast), job.parent_adapter)
    else:
        lora.load_into(model, job.parent_adapter)


def _finish(
    model: Any,  # Any: peft
    job: TrainJob,
    start: Start,
    parent: Lineage | None,
    dev: Sequence[TokenRow],
    out: Path,
) -> dict[float, float]:
    """Set the adapter to the one to serve: the slow average, or the blend that is best on dev."""
    if start == "slow-fast" or (start == "base" and job.config.start == "slow-fast"):
        artifacts.publish(out / "fast", lambda inner: lora.save(model, inner))
    if job.parent_adapter is None or parent is None or start not in ("slow-fast", "blend"):
        return {}
    old, new = lora.read_state(job.parent_adapter), lora.state(model)
    if start == "slow-fast":
        lora.set_state(model, rounds.slow(old, new, parent.num_rounds + 1), job.parent_adapter)
        return {}

    def dev_loss(state: rounds.State) -> float:
        lora.set_state(model, state, out)
        nlls = reference_nlls(model.get_base_model(), dev)
        return sum(nlls) / len(nlls)

    losses = rounds.sweep(old, new, dev_loss)
    lora.set_state(model, rounds.blend(old, new, rounds.best(losses)), out)
    return losses


def _keep_teachers(model: Any, config: TrainConfig, sources: Sources, folder: Path) -> None:
    """What the replayed rows were told, and what the model says now about its new ones."""
    if not RECIPES[config.recipe].replay_blend:
        return
    replayed = [row for row in sources.replay if row.id in sources.teachers]
    if not replayed and not sources.new:
        return
    split = SplitModel(model.get_base_model(), 0, config.kernels)
    taught = [sources.teachers[row.id] for row in replayed]
    taught += teach(split, sources.new, None, "completion", config)
    write_teachers(folder, [*replayed, *sources.new], taught)


def _write_adapter(model: Any, job: TrainJob, lineage: rounds.Lineage, folder: Path) -> None:
    lora.save(model, folder, shrink=job.config.shrink)
    rounds.write_lineage(folder, lineage)


def _trunk_of(job: TrainJob, model_folder: Path) -> TrunkOf:
    """The frozen trunk through the cache beside the base model, if one is wanted."""
    if not job.config.cache_mb:
        return SplitModel.trunk
    cache = TrunkCache(
        folder=job.cache_dir / "trunk",
        base=model_digest(model_folder),
        tokenizer=folder_digest(model_folder, "token*"),
        max_bytes=job.config.cache_mb * 10**6,
    )
    return cache.trunk


def _summary(
    job: TrainJob, learned: _Learned, digest: str, num_threads: int, place: Place
) -> dict[str, object]:
    rows = learned.rows
    return {
        **asdict(learned.trained),
        "start": asdict(learned.beginning),
        "lineage": asdict(learned.lineage),
        "job_digest": job.digest,
        "adapter_digest": digest,
        "base_model": job.base_model,
        "config": job.config.to_json(),
        "num_rows": _num_rows(rows.sources),
        "num_taught": len(rows.sources.teachers),
        "left_out": [asdict(row) for row in rows.left_out],
        "num_threads": num_threads,
        **asdict(place),
        **_peaks(),
    }


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _peaks() -> dict[str, float]:
    return {"peak_rss_mb": peak_rss_mb(), "peak_gpu_mb": peak_gpu_mb()}


def _num_rows(sources: Sources) -> dict[str, int]:
    return {
        "new": len(sources.new),
        "replay": len(sources.replay),
        "general": len(sources.general),
        "pairs": len(sources.pairs),
        "judgements": sum(len(group.judged) for group in sources.judgements),
    }


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
