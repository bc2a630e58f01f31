"""Checkpoints from which a killed run goes on to the same adapter.

A checkpoint holds adapter weights, optimiser moments, the generator's state and the cursor: what
each finished step found. Batches are not stored: they follow from the seed and the rows' losses.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from perennial.infra import artifacts
from perennial.infra.errors import IntegrityError, UnavailableError
from perennial.training.lora import write_tensors

_TENSORS = "tensors.safetensors"
_STATE = "state.json"
_SPENT = "spent.json"
_RNG = "rng"


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a finished step found: its loss, and those of its rows in the order of its batch.

    kl: nats a token of its general rows, None without any.
    """

    loss: float
    row_losses: tuple[float, ...]
    kl: float | None
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """Where a run of a job was."""

    job: str
    found: tuple[Found, ...] = ()

    @property
    def step(self) -> int:
        """How many steps are finished."""
        return len(self.found)


def save(
    folder: Path, cursor: Cursor, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Publish `folder/step-N` atomically and drop the older ones.

    Raises:
        UnavailableError: it cannot be written, the disk is full say; the older ones stay.
    """
    target = folder / f"step-{cursor.step:06d}"

    def write(inner: Path) -> None:
        tensors = {f"weight/{name}": weight.detach() for name, weight in weights.items()}
        for name, weight in weights.items():
            moments = optimizer.state[weight]
            tensors |= {f"{key}/{name}": value for key, value in moments.items()}
        tensors[_RNG] = torch.get_rng_state()
        copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        write_tensors(inner / _TENSORS, copies)
        (inner / _STATE).write_text(json.dumps(asdict(cursor)))

    try:
        artifacts.publish(target, write)
    except OSError as error:
        raise UnavailableError(
            f"no checkpoint of step {cursor.step}: {error}; once there is space, start again: the "
            "run goes on from the checkpoint before",
            step=cursor.step,
        ) from error
    for old in folder.iterdir():
        if old.is_dir() and old != target:
            shutil.rmtree(old, ignore_errors=True)


def restore(
    folder: Path, job: str, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> Cursor:
    """Set weights and optimiser to the newest whole checkpoint of this job; step 0 without one.

    What else lies there is deleted: it would stand where this job's checkpoints go. The weights may
    be on another device than those that were saved.
    """
    for found in sorted(folder.glob("step-*"), reverse=True):
        try:
            artifacts.verify(found)
        except IntegrityError:
            shutil.rmtree(found)  # half written by a run that died; the one before it is whole
            continue
        state = json.loads((found / _STATE).read_text())
        if state["job"] == job:
            _load(found / _TENSORS, weights, optimizer)
            return Cursor(job=job, found=tuple(_found(step) for step in state["found"]))
        shutil.rmtree(found)
    return Cursor(job=job)


def note_spent(folder: Path, job: str, reason: str) -> None:
    """Have later runs of the job know that going on from its parent left nothing to keep."""
    artifacts.write_atomic(folder / _SPENT, json.dumps({"job": job, "reason": reason}).encode())


def read_spent(folder: Path, job: str) -> str | None:
    """The reason that was noted for this job."""
    path = folder / _SPENT
    noted = json.loads(path.read_bytes()) if path.exists() else {"job": None}
    return str(noted["reason"]) if noted["job"] == job else None


def _found(step: dict[str, Any]) -> Found:  # Any: JSON
    return Found(**{**step, "row_losses": tuple(step["row_losses"])})


def _load(path: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    tensors = safetensors.torch.load_file(path)
    torch.set_rng_state(tensors.pop(_RNG))
    keys = {name.partition("/")[0] for name in tensors} - {"weight"}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[f"weight/{name}"])
            moments = {key: tensors[f"{key}/{name}"].to(weight.device) for key in keys}
            optimizer.state[weight] = moments
