"""One training: from a job file to the adapter that a round serves, and what it took.

Killed, it goes on from its checkpoint. What is learned from which rows is left to `trainer`.
"""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from perennial.infra import artifacts
from perennial.infra.errors import DivergedError
from perennial.training import checkpoint, lora, modelfiles, rounds, trainer
from perennial.training.cache import FrozenCache, folder_digest, model_digest
from perennial.training.config import Start, TrainConfig
from perennial.training.evaluate import reference_nlls
from perennial.training.job import TrainJob
from perennial.training.machine import (
    Place,
    be_deterministic,
    choose_place,
    choose_threads_once,
    peak_rss_mb,
    peaks_mb,
    telling_out_of_memory,
)
from perennial.training.prepared import COMPUTED, Frozen, Sources, split_model, teach
from perennial.training.progress import ProgressLog
from perennial.training.recipes import RECIPES
from perennial.training.rounds import Beginning, Lineage
from perennial.training.rows import Rows, rows_of_job
from perennial.training.teachers import size_mb, write_teachers
from perennial.training.tokens import TokenRow
from perennial.training.trainer import Trained

_LOG = logging.getLogger(__name__)


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
    be_deterministic()
    parent = rounds.read_lineage(job.parent_adapter) if job.parent_adapter else None
    model = lora.attach(modelfiles.load_model(base, place), job.config)
    frozen = _frozen(job, base)
    learned = _learn(model, job, base, parent, frozen, out, console)
    for old in (adapter, out / "fast", out / "teachers"):
        shutil.rmtree(old, ignore_errors=True)  # of another job, or of this one killed at the end
    alphas = _finish(model, job, learned.beginning.start, parent, learned.rows.dev, out)
    _keep_teachers(model, job.config, learned.rows.sources, frozen, out / "teachers")
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
    frozen: Frozen,
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
    tokenizer, context = modelfiles.load_tokenizer(base), modelfiles.context_length(base)
    rows = rows_of_job(job, tokenizer, context, is_rebuild=is_rebuild)
    _load_start(model, job, beginning.start)
    trained = _train(model, rows.sources, job, checkpoints, frozen, console)
    if trained.num_steps:
        lineage = rounds.after(job.config, None if is_rebuild else parent, trained.kl_to_base)
        return _Learned(beginning=beginning, rows=rows, trained=trained, lineage=lineage)
    said = f"{trained.stopped_because}, before the first checkpoint"
    if beginning.start == "base":
        raise DivergedError(f"{said}, of a round from the base; lower lr or raise kl_weight")
    _LOG.warning("%s: the round begins from the base", said)
    checkpoint.note_spent(checkpoints, job.digest, said)
    lora.set_state(model, fresh, out)
    return _learn(model, job, base, parent, frozen, out, console)


def _train(
    model: Any,  # Any: peft
    sources: Sources,
    job: TrainJob,
    checkpoints: Path,
    frozen: Frozen,
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
            frozen=frozen,
        )


def _load_start(model: Any, job: TrainJob, start: Start) -> None:  # Any: peft
    """Set the attached adapter to what the round starts from."""
    if job.parent_adapter is None or start == "base":
        return
    if start == "slow-fast":
        fast_adapter = job.fast_adapter or job.parent_adapter
        for folder in (job.parent_adapter, fast_adapter):
            lora.check_scale(model, folder)
        lora.set_state(model, rounds.orthogonal(_as_trained(fast_adapter)), job.parent_adapter)
    else:
        lora.check_scale(model, job.parent_adapter)
        lora.set_state(model, _as_trained(job.parent_adapter), job.parent_adapter)


def _as_trained(adapter: Path) -> rounds.State:
    """The tensors of an adapter before its ΔW was shrunk."""
    return lora.scaled(lora.read_state(adapter), 1 / rounds.read_lineage(adapter).shrink)


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
    old, new = _as_trained(job.parent_adapter), lora.state(model)
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


@telling_out_of_memory()
def _keep_teachers(
    model: Any,  # Any: peft
    config: TrainConfig,
    sources: Sources,
    frozen: Frozen,
    folder: Path,
) -> None:
    """What the replayed rows were told, and what the model says now about its new ones."""
    if not RECIPES[config.recipe].replay_blend:
        return
    replayed = [row for row in sources.replay if row.id in sources.teachers]
    if not replayed and not sources.new:
        return
    split, new = split_model(model, config), sources.new
    trunks = frozen.trunk(split, new, config.batch_tokens) if split.num_frozen else None
    taught = [sources.teachers[row.id] for row in replayed]
    taught += teach(split, new, trunks, "completion", config)
    write_teachers(folder, [*replayed, *sources.new], taught)


def _write_adapter(model: Any, job: TrainJob, lineage: rounds.Lineage, folder: Path) -> None:
    lora.save(model, folder, shrink=lineage.shrink)
    rounds.write_lineage(folder, lineage)


def _frozen(job: TrainJob, model_folder: Path) -> Frozen:
    """What the base makes of rows, through the cache beside it if one is wanted."""
    if not job.config.cache_mb:
        return COMPUTED
    cache = FrozenCache(
        folder=job.cache_dir / "trunk",
        base=model_digest(model_folder),
        tokenizer=folder_digest(model_folder, "token*"),
        max_bytes=job.config.cache_mb * 10**6,
    )
    return Frozen(trunk=cache.trunk, teach=cache.teach)


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
        **peaks_mb(),
    }


def _num_rows(sources: Sources) -> dict[str, int]:
    return {
        "new": len(sources.new),
        "replay": len(sources.replay),
        "general": len(sources.general),
        "pairs": len(sources.pairs),
        "judgements": sum(len(group.judged) for group in sources.judgements),
    }
