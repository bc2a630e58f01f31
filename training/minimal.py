"""The training loop without speed: read it to know what `trainer` computes.

Each row runs alone through the whole model, nothing is packed, shared or cached. A test holds both
to equal losses. It knows no preferences and no checkpoint, and question dropout as it is where
every layer is trained: it keeps nothing of frozen ones.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from perennial.training.config import TrainConfig
from perennial.training.loss import TopK
from perennial.training.mix import Source, steps
from perennial.training.objective import dropped_positions
from perennial.training.prepared import Sources
from perennial.training.recipes import RECIPES
from perennial.training.tokens import TokenRow
from perennial.training.trainer import learning_rate, mix_of

Gone = frozenset[int]


def train_plainly(model: Any, sources: Sources, config: TrainConfig) -> list[float]:  # Any: peft
    """The loss of each step; `model` holds the trained adapter afterwards."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay)
    losses: list[float] = []
    seen: list[list[float]] = []
    for planned in steps(mix_of(sources, config), seen):
        optimizer.param_groups[0]["lr"] = learning_rate(planned, config)
        labelled, distilled = [], []
        seen.append([])
        for pick in planned.batch:
            row = sources.unit(pick)
            assert isinstance(row, TokenRow)
            if pick.source == Source.GENERAL:
                anchor, blend = kl_to_base(model, row, config.kl_top_k), config.general_blend
                distilled.append(blend * anchor + (1 - blend) * completion_losses(model, row))
                seen[-1].append(distilled[-1].mean().item())
                continue
            blend = RECIPES[config.recipe].replay_blend or 0.0
            teacher = sources.teachers.get(row.id) if pick.source == Source.REPLAY else None
            gone = dropped_positions(row, pick, config, planned.step)
            of_row = completion_losses(model, row, gone)
            if blend and teacher is not None:
                of_row = (1 - blend) * of_row + blend * kl(model, row, teacher, gone)
            labelled.append(of_row)
            seen[-1].append(of_row.mean().item())
        loss = torch.zeros(())
        if labelled:
            loss = loss + torch.cat(labelled).mean()
        if distilled:
            loss = loss + config.kl_weight * torch.cat(distilled).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch
        torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    assert all(math.isfinite(loss) for loss in losses)
    return losses


def completion_losses(model: Any, row: TokenRow, gone: Gone = frozenset()) -> Tensor:  # Any: peft
    """Negative log-likelihood of each completion token."""
    return functional.cross_entropy(
        completion_logits(model, row, gone),
        torch.from_numpy(row.ids_T[row.num_prompt :]),
        reduction="none",
    )


def kl_to_base(model: Any, row: TokenRow, k: int) -> Tensor:  # Any: peft
    """KL to the base, which is the model with its adapter off, at each completion token."""
    with torch.no_grad(), model.disable_adapter():
        base = torch.log_softmax(completion_logits(model, row), dim=-1)
    log_probs, tokens = base.topk(min(k, base.shape[-1]), dim=-1)
    return kl(model, row, TopK(tokens_TK=tokens, log_probs_TK=log_probs))


def kl(model: Any, row: TokenRow, teacher: TopK, gone: Gone = frozenset()) -> Tensor:  # Any: peft
    """KL of the teacher's top tokens and one bucket for the rest, at each completion token."""
    ours = torch.log_softmax(completion_logits(model, row, gone), dim=-1)
    p, q = teacher.log_probs_TK, ours.gather(-1, teacher.tokens_TK)
    p_rest = (1 - p.exp().sum(-1)).clamp_min(1e-6)
    q_rest = (1 - q.exp().sum(-1)).clamp_min(1e-6)
    return (p.exp() * (p - q)).sum(-1) + p_rest * (p_rest / q_rest).log()


def completion_logits(model: Any, row: TokenRow, gone: Gone = frozenset()) -> Tensor:  # Any: peft
    """Logits at the positions that predict the completion, of a row without its tokens `gone`."""
    kept = [at for at in range(row.num_tokens) if at not in gone]
    ids_1T, at_1T = torch.from_numpy(row.ids_T[kept])[None], torch.tensor(kept)[None]
    # With a mask: transformers takes a gap between positions for the start of another row.
    out = model(input_ids=ids_1T, position_ids=at_1T, attention_mask=torch.ones_like(ids_1T))
    logits: Tensor = out.logits[0]
    return logits[row.num_prompt - row.num_tokens - 1 : -1]
