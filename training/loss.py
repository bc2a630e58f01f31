"""The losses: cross-entropy and distillation at positions, DPO and KTO over whole completions.

Which rows get which is `recipes`' table; how a batch adds them up is `objective`'s. The head of the
model is part of the loss here, because logits of a large vocabulary are most of its cost.

Shapes: M predicted positions, D width, V vocabulary, K tokens of a teacher, P pairs, R rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from perennial.training.products import times

_CHUNK = 64  # positions whose logits are held at once: 12 MB at a vocabulary of 49,152
_LEAST = 1e-6  # float rounding can push a sum of probabilities over one


@dataclass(frozen=True, kw_only=True, slots=True)
class TopK:
    """A teacher's log-probabilities of its K likeliest tokens at each position of a row."""

    tokens_TK: Tensor
    log_probs_TK: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What each position should predict: (1 - blend) of its label and blend of the teacher."""

    label_M: Tensor
    blend_M: Tensor
    tokens_MK: Tensor
    probs_MK: Tensor

    def to(self, device: torch.device) -> "Targets":
        """The same on another device."""
        return Targets(
            label_M=self.label_M.to(device),
            blend_M=self.blend_M.to(device),
            tokens_MK=self.tokens_MK.to(device),
            probs_MK=self.probs_MK.to(device),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionLosses:
    """loss_M has a gradient; its two parts, in nats, are for reports."""

    loss_M: Tensor
    ce_M: Tensor
    kl_M: Tensor


def top_k(logits_TV: Tensor, k: int) -> TopK:
    """The `k` largest log-probabilities and their tokens."""
    log_probs = torch.log_softmax(logits_TV.float(), dim=-1)
    values, tokens = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
    return TopK(tokens_TK=tokens, log_probs_TK=values)


def plain_losses(logits_MV: Tensor, targets: Targets) -> PositionLosses:
    """(1 - b)·CE + b·KL(teacher || model) at each position, by automatic differentiation.

    The KL is over K tokens and one bucket for all others: a lower bound of the KL over the whole
    vocabulary (data-processing inequality).
    """
    ours_MV = torch.log_softmax(logits_MV.float(), dim=-1)
    ce_M = -ours_MV.gather(-1, targets.label_M[:, None])[:, 0]
    kl_M = _kl(ours_MV.gather(-1, targets.tokens_MK), targets.probs_MK)
    loss_M = (1 - targets.blend_M) * ce_M + targets.blend_M * kl_M
    return PositionLosses(loss_M=loss_M, ce_M=ce_M.detach(), kl_M=kl_M.detach())


def forward_kl(logits_TV: Tensor, teacher: TopK) -> Tensor:
    """KL(teacher || model) at each position, in nats, bounded below as in `plain_losses`."""
    ours_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    return _kl(ours_TV.gather(-1, teacher.tokens_TK), teacher.log_probs_TK.exp())


def head_losses(hidden_MD: Tensor, head: nn.Linear, targets: Targets) -> PositionLosses:
    """`plain_losses` of the frozen head's logits, of which only a few rows exist at a time."""
    loss_M, ce_M, kl_M = _HeadLoss.apply(  # type: ignore[no-untyped-call]  # torch
        hidden_MD, head.weight, targets
    )
    return PositionLosses(loss_M=loss_M, ce_M=ce_M, kl_M=kl_M)


def dpo(
    chosen_P: Tensor, rejected_P: Tensor, reference_P: Tensor, *, beta: float
) -> Tensor:  # fmt: skip
    """-log σ(β·(margin - reference margin)) of each pair; a margin is log p(chosen) - log p(other).

    Rafailov et al. 2023, "Direct Preference Optimization", eq. 7.
    """
    return -functional.logsigmoid(beta * (chosen_P - rejected_P - reference_P))


def kto(
    ratio_R: Tensor, mismatched_R: Tensor, is_desirable_R: Tensor, *, beta: float
) -> Tensor:  # fmt: skip
    """1 - σ(±β·(ratio - z₀)) of each row; a ratio is log p(completion) over the reference's.

    z₀ = max(0, mean ratio of completions under prompts of other rows), without gradient: an
    estimate of the KL to the reference. Ethayarajh et al. 2024, "KTO", eq. 8; the class weights λ
    are the caller's.
    """
    zero = mismatched_R.detach().mean().clamp_min(0)
    sign_R = is_desirable_R.to(ratio_R.dtype) * 2 - 1
    return 1 - torch.sigmoid(beta * sign_R * (ratio_R - zero))


class _HeadLoss(torch.autograd.Function):
    """Logits, loss and the gradient by the hidden state, chunk by chunk, in one pass.

    With q the model and p̃ the teacher, whose rest is spread as q spreads its own, the gradient by
    the logits is q - (1 - b)·onehot - b·p̃. The head is frozen, so only M x D numbers are kept.
    Products are in the head's dtype, the loss and its gradient by the logits in fp32.
    """

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, targets: Targets) -> Any:
        num = len(hidden_MD)
        found_3M = hidden_MD.new_empty(3, num, dtype=torch.float32)
        grad_MD = torch.empty_like(hidden_MD)
        for start in range(0, num, _CHUNK):
            part = slice(start, start + _CHUNK)
            logits_MV = times(hidden_MD[part], weight_VD).float()
            found_3M[:, part] = _losses_and_gradient_(logits_MV, _sliced(targets, part))
            grad_MD[part] = times(logits_MV, weight_VD.T)
        loss_M, ce_M, kl_M = found_3M.unbind()
        ctx.save_for_backward(grad_MD)
        ctx.mark_non_differentiable(ce_M, kl_M)
        return loss_M.clone(), ce_M, kl_M

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # Any: torch
        (grad_MD,) = ctx.saved_tensors
        return (grad_MD * grads[0][:, None]).to(grad_MD.dtype), None, None


def _losses_and_gradient_(logits_MV: Tensor, targets: Targets) -> Tensor:
    """Loss, CE and KL, (3, M); `logits_MV` becomes the gradient by the logits."""
    blend_M, label_M1 = targets.blend_M, targets.label_M[:, None]
    log_total = torch.logsumexp(logits_MV, dim=-1, keepdim=True)
    ce_M = (log_total - logits_MV.gather(-1, label_M1))[:, 0]
    ours_MK = logits_MV.gather(-1, targets.tokens_MK) - log_total
    kl_M = _kl(ours_MK, targets.probs_MK)
    q_MV = logits_MV.sub_(log_total).exp_()
    # Of another device than the CPU the numbers are not asked for: that would wait for it.
    if targets.tokens_MK.shape[1] and (not blend_M.is_cpu or bool(blend_M.any())):
        rest = _rest(targets.probs_MK) / _rest(ours_MK.exp())
        kept_MK = ours_MK.exp() - blend_M[:, None] * targets.probs_MK
        is_taught = blend_M[:, None] > 0
        q_MV *= (1 - blend_M * rest)[:, None]
        q_MV.scatter_(-1, targets.tokens_MK, kept_MK.where(is_taught, ours_MK.exp()))
    q_MV.scatter_add_(-1, label_M1, (blend_M - 1)[:, None])
    return torch.stack([(1 - blend_M) * ce_M + blend_M * kl_M, ce_M, kl_M])


def _kl(ours_MK: Tensor, probs_MK: Tensor) -> Tensor:
    head = (torch.xlogy(probs_MK, probs_MK) - probs_MK * ours_MK).sum(-1)
    rest, ours = _rest(probs_MK), _rest(ours_MK.exp())
    return head + rest * (rest / ours).log()


def _rest(probs_MK: Tensor) -> Tensor:
    return (1 - probs_MK.sum(-1)).clamp_min(_LEAST)


def _sliced(targets: Targets, part: slice) -> Targets:
    return Targets(
        label_M=targets.label_M[part],
        blend_M=targets.blend_M[part],
        tokens_MK=targets.tokens_MK[part],
        probs_MK=targets.probs_MK[part],
    )
