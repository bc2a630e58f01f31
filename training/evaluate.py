"""Per-row results of a model with or without an adapter: likelihood, greedy answer, grade.

Every row that fits gives a result; an error is a wrong answer, never a smaller denominator. A row
that is too long is left out for every adapter alike, and named. The verdict over the rows is left
to the registry.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perennial.infra.errors import TooLargeError
from perennial.training.batching import Packed, cut, pack
from perennial.training.examples import Example
from perennial.training.generate import generate
from perennial.training.grading import EvalRow, is_right
from perennial.training.loss import TopK, forward_kl, top_k
from perennial.training.modelfiles import context_length
from perennial.training.rows import LeftOut
from perennial.training.tokens import TokenRow, encode_example
from perennial.training.trunk import SplitModel

_NLL_TOKENS = 1024
_KL_TOP_K = 20
# The compiler admits 12,000 characters: 3,000 tokens of English, more of other scripts. Such rows
# are scored by SmolLM2-135M within 2 GB.
_MAX_LEN = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class RowResult:
    """What one model did with one row.

    `nll` and `kl`, of the base model to this one, are in nats a token of the reference answer.
    """

    id: str
    cluster: str
    nll: float
    num_reference_tokens: int
    answer: str | None = None
    is_right: bool | None = None
    kl: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteSummary:
    """Counts and means over a suite; `accuracy` is None where no row is graded."""

    num_rows: int
    num_graded: int
    num_right: int
    accuracy: float | None
    nll: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteRow:
    """A row of a suite, and its tokens: the prompt, then the reference."""

    asked: EvalRow
    tokens: TokenRow


def longest_row(model_folder: Path) -> int:
    """Tokens that a row may have to be scored: no more than the model's context holds."""
    return min(_MAX_LEN, context_length(model_folder))


def leave_out_long(
    tokenizer: Any,  # Any: transformers
    rows: Sequence[EvalRow],
    max_len: int,
) -> tuple[tuple[SuiteRow, ...], tuple[LeftOut, ...]]:
    """The rows that fit, and the others. No adapter changes it, so that pairs stay pairs."""
    fitting, left_out = [], []
    for row in rows:
        try:
            fitting.append(SuiteRow(asked=row, tokens=_encoded(tokenizer, row, max_len)))
        except TooLargeError as error:
            left_out.append(LeftOut(id=row.id, num_tokens=int(error.fields["num_tokens"] or 0)))
    return tuple(fitting), tuple(left_out)


def evaluate(
    model: Any,  # Any: transformers
    tokenizer: Any,
    rows: Sequence[SuiteRow],
    max_new_tokens: int,
    base: Sequence[TopK] | None = None,
) -> tuple[tuple[RowResult, ...], SuiteSummary]:
    """Results in the order of `rows`, and their summary (NLL is the mean over all tokens).

    With the base model's `base_top_k` of the same rows, results carry the KL to it.
    """
    started = time.monotonic()
    references = _references(model, [row.tokens for row in rows], base)
    graded = [index for index, row in enumerate(rows) if row.asked.rule != "none"]
    prompts = [rows[index].tokens.prompt for index in graded]
    answers = dict(zip(graded, generate(model, tokenizer, prompts, max_new_tokens), strict=True))
    results = tuple(
        RowResult(
            id=given.asked.id,
            cluster=given.asked.cluster or given.asked.id,
            nll=nll,
            num_reference_tokens=given.tokens.num_tokens - given.tokens.num_prompt,
            answer=answers.get(index),
            is_right=is_right(given.asked, answers[index]) if index in answers else None,
            kl=kl,
        )
        for index, (given, (nll, kl)) in enumerate(zip(rows, references, strict=True))
    )
    return results, summarise(results, time.monotonic() - started)


def summarise(results: Sequence[RowResult], seconds: float) -> SuiteSummary:
    """Totals over the rows; the NLL is weighted by reference tokens."""
    graded = [row for row in results if row.is_right is not None]
    num_right = sum(row.is_right is True for row in graded)
    num_tokens = sum(row.num_reference_tokens for row in results)
    total = sum(row.nll * row.num_reference_tokens for row in results)
    return SuiteSummary(
        num_rows=len(results),
        num_graded=len(graded),
        num_right=num_right,
        accuracy=num_right / len(graded) if graded else None,
        nll=total / max(1, num_tokens),
        seconds=seconds,
    )


def reference_nlls(model: Any, rows: Sequence[TokenRow]) -> list[float]:  # Any: transformers
    """Mean negative log-likelihood of each row's completion, nats a token."""
    return [nll for nll, _ in _references(model, rows, None)]


def base_top_k(model: Any, rows: Sequence[SuiteRow]) -> list[TopK]:  # Any: transformers
    """The model's likeliest tokens at each position that predicts a reference, for each row."""
    found = []
    for _, packed, logits_MV in _logits(model, [row.tokens for row in rows]):
        parts = torch.split(logits_MV, packed.num_labels)
        found += [top_k(part_MV, _KL_TOP_K) for part_MV in parts]
    return found


def _references(
    model: Any,  # Any: transformers
    rows: Sequence[TokenRow],
    base: Sequence[TopK] | None,
) -> list[tuple[float, float | None]]:
    """Of each row's completion the mean negative log-likelihood, and KL of the base to the model.

    In nats a token; no KL without the base's likeliest tokens.
    """
    found: list[tuple[float, float | None]] = []
    for span, packed, logits_MV in _logits(model, rows):
        log_probs = torch.log_softmax(logits_MV.float(), dim=-1)
        label_M = torch.from_numpy(packed.label_M).to(logits_MV.device)
        losses_M = -log_probs.gather(-1, label_M[:, None])[:, 0]
        nlls = _means(torch.split(losses_M, packed.num_labels))
        kls: list[float] | list[None] = [None] * len(span)
        if base:
            parts = zip(span, torch.split(logits_MV, packed.num_labels), strict=True)
            kls = _means([forward_kl(part_MV, base[index]) for index, part_MV in parts])
        found += zip(nlls, kls, strict=True)
    return found


def _means(parts: Sequence[Tensor]) -> list[float]:
    means: list[float] = torch.stack([part.mean() for part in parts]).tolist()
    return means


def _logits(
    model: Any,  # Any: transformers
    rows: Sequence[TokenRow],
) -> Iterator[tuple[range, Packed, Tensor]]:
    """Which rows run together, how they are packed, and logits that predict their completions."""
    split = SplitModel(model, 0)
    for span in cut([row.num_tokens for row in rows], _NLL_TOKENS):
        packed = pack([rows[index] for index in span], labels=["completion"] * len(span))
        with torch.no_grad():
            yield span, packed, split.logits(packed, None)


def _encoded(tokenizer: Any, row: EvalRow, max_len: int) -> TokenRow:  # Any: transformers
    example = Example(id=row.id, messages=row.messages, completion=row.reference, kind="general")
    return encode_example(tokenizer, example, max_len)
