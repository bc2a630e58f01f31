"""The loss of one batch: cross-entropy on new and replayed rows, KL to the base on general rows.

Task replay keeps tasks, only distillation keeps the language.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True, slots=True)
class TopK:
    """A teacher's log-probabilities of its K likeliest tokens at each position of a row."""

    tokens_TK: Tensor
    log_probs_TK: Tensor


def top_k(logits_TV: Tensor, k: int) -> TopK:
    """The `k` largest log-probabilities and their tokens."""
    log_probs = torch.log_softmax(logits_TV.float(), dim=-1)
    values, tokens = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
    return TopK(tokens_TK=tokens, log_probs_TK=values)


def cross_entropy(logits_MV: Tensor, labels_M: Tensor) -> Tensor:
    """Mean negative log-likelihood of the labels, in nats a token."""
    return functional.cross_entropy(logits_MV.float(), labels_M)


def forward_kl(logits_MV: Tensor, teacher: TopK) -> Tensor:
    """Mean KL(teacher || model) over K tokens and one bucket for all others, in nats a token.

    A lower bound of the KL over the whole vocabulary (data-processing inequality).
    """
    ours = torch.log_softmax(logits_MV.float(), dim=-1)
    ours_MK = ours.gather(-1, teacher.tokens_TK)
    theirs_MK = teacher.log_probs_TK
    head = (theirs_MK.exp() * (theirs_MK - ours_MK)).sum(-1)
    rest_theirs, rest_ours = _log_rest(theirs_MK), _log_rest(ours_MK)
    return (head + rest_theirs.exp() * (rest_theirs - rest_ours)).mean()


def _log_rest(log_probs_MK: Tensor) -> Tensor:
    # Float rounding can push the sum over one; its logarithm would be NaN.
    return torch.log((1 - log_probs_MK.exp().sum(-1)).clamp_min(1e-6))
