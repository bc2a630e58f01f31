"""What becomes of the parent adapter: go on from it, start afresh, or keep a slow average of it.

An adapter that thirty rounds have changed drifts; one that is trained anew forgets what the buffer
no longer holds. Which of these serves best is measured, not assumed. All of it is arithmetic on the
adapter's tensors, named as in PEFT's file; ΔW of a layer is scale·B·A.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from perennial.infra.errors import IntegrityError
from perennial.training.config import Start, TrainConfig

LINEAGE = "lineage.json"
ALPHAS = (0.25, 0.5, 0.75, 1.0)  # parts of the new adapter that "blend" tries

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """How many rounds an adapter has been through since the base, and how far from it it is.

    kl_to_base: before ΔW was multiplied by `shrink`; the next round goes on from there.
    """

    num_rounds: int
    kl_to_base: float | None
    shrink: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Beginning:
    """How a round begins, and why when that is not what the config says."""

    start: Start
    reason: str | None = None


def read_lineage(folder: Path) -> Lineage:
    """The lineage in an adapter's folder; an adapter from elsewhere counts as one round.

    Raises:
        IntegrityError: the file is damaged.
    """
    path = folder / LINEAGE
    if not path.exists():
        return Lineage(num_rounds=1, kl_to_base=None)
    try:
        return Lineage(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise IntegrityError(f"{path} is not a lineage: {error}", path=str(path)) from error


def write_lineage(folder: Path, lineage: Lineage) -> None:
    """Beside the adapter's weights."""
    (folder / LINEAGE).write_text(json.dumps(asdict(lineage)))


def begin(config: TrainConfig, parent: Lineage | None, spent: str | None = None) -> Beginning:
    """The start of a round: the config's, unless it is time to rebuild from the base.

    spent: why it left nothing to keep to go on from the parent, where that was tried.
    """
    if parent is None:
        return Beginning(start="base")
    if spent:
        return Beginning(start="base", reason=f"rebuilt: {spent}")
    if config.rebuild_every and parent.num_rounds >= config.rebuild_every:
        return Beginning(start="base", reason=f"rebuilt after {parent.num_rounds} rounds")
    if config.kl_budget and (parent.kl_to_base or 0) > config.kl_budget:
        said = f"rebuilt: the parent's KL {parent.kl_to_base:.3g} is over {config.kl_budget:g}"
        return Beginning(start="base", reason=said)
    return Beginning(start=config.start)


def after(config: TrainConfig, parent: Lineage | None, kl_to_base: float | None) -> Lineage:
    """The lineage of an adapter that was trained on from `parent`, or from the base."""
    return Lineage(
        num_rounds=parent.num_rounds + 1 if parent else 1,
        kl_to_base=kl_to_base,
        shrink=config.shrink if config.method == "lora" else 1.0,  # DoRA has no plain ΔW
    )


def orthogonal(state: State) -> dict[str, Tensor]:
    """The fast adapter's start: A with the orthonormal rows of its space, B as it was.

    Qiao & Mahdavi 2025 (SLAO, arXiv:2512.23017), the initialisation: A ← Qᵀ with QR = Aᵀ.
    """
    return {
        name: torch.linalg.qr(weight.T).Q.T.contiguous() if "lora_A" in name else weight
        for name, weight in state.items()
    }


def slow(parent: State, fast: State, num_rounds: int) -> dict[str, Tensor]:
    """The served adapter: A of the fast one, B moved towards it by 1/√i in round i.

    Qiao & Mahdavi 2025 (SLAO), the merge: B ← B + λ(i)·(B_fast - B), λ(i) = 1/√i.
    """
    share = num_rounds**-0.5
    return {
        name: torch.lerp(parent[name], weight, share) if "lora_B" in name else weight
        for name, weight in fast.items()
    }


def blend(parent: State, new: State, alpha: float) -> dict[str, Tensor]:
    """The adapter nearest to (1 - α)·ΔW of the parent + α·ΔW of the new one.

    Both must have one rank and scale. The sum is exact at twice the rank ([B₀ B₁]·[A₀; A₁]); it is
    cut to the rank by the SVD of the small core, the best such cut (Eckart & Young 1936). Blending
    A and B apart would give products that neither had.
    """
    found: dict[str, Tensor] = {}
    for a_name in (name for name in new if "lora_A" in name):
        b_name = a_name.replace("lora_A", "lora_B")
        left = torch.cat([(1 - alpha) * parent[b_name], alpha * new[b_name]], dim=1)
        right = torch.cat([parent[a_name], new[a_name]])
        found |= dict(zip((b_name, a_name), truncated(left, right, len(new[a_name])), strict=True))
    return {name: found[name] for name in new}


def truncated(left_OS: Tensor, right_SD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (O, rank) and A (rank, D) whose product is nearest to left·right, in fp64 inside."""
    q_left, r_left = torch.linalg.qr(left_OS.double())
    q_right, r_right = torch.linalg.qr(right_SD.double().T)
    u, values, vh = torch.linalg.svd(r_left @ r_right.T)
    root = values[:rank].sqrt()
    b = (q_left @ u[:, :rank]) * root
    a = root[:, None] * (vh[:rank] @ q_right.T)
    return b.to(left_OS.dtype), a.to(right_SD.dtype).contiguous()


def sweep(parent: State, new: State, loss_of: Callable[[State], float]) -> dict[float, float]:
    """The dev loss of each α; the smallest wins, and of equals the largest α."""
    return {alpha: loss_of(blend(parent, new, alpha)) for alpha in ALPHAS}


def best(losses: Mapping[float, float]) -> float:
    """The α of the smallest loss; of equals the largest, which has learned most."""
    return min(losses, key=lambda alpha: (losses[alpha], -alpha))
