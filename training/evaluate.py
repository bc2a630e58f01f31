"""Per-row results of a model with or without an adapter: likelihood, greedy answer, grade.

Every row that fits gives a result; an error is a wrong answer, never a smaller denominator. A row
that is too long is left out for every adapter alike, and named. The verdict over the rows is left
to the registry.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perennial.infra.errors import TooLargeError
from perennial.training.batching import Packed, cut, length_sorted, pack
from perennial.training.examples import Example
from perennial.training.grading import EvalRow, is_right
from perennial.training.loss import TopK, forward_kl, top_k
from perennial.training.rows import LeftOut
from perennial.training.tokens import TokenRow, encode_example, encode_prompt
from perennial.training.trunk import SplitModel

_NLL_TOKENS = 1024
_KL_TOP_K = 20
# The compiler admits 12,000 characters: 3,000 tokens of English, more of other scripts. Such rows
# are scored by SmolLM2-135M within 2 GB.
_MAX_LEN = 4096
_FULL_BATCH_LEN = 1024  # tokens of a prompt up to which `max_rows` of them are answered together

Choose = Callable[[Tensor], Tensor]  # logits (B, V) to the next ids (B,)


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
class Limits:
    """Bounds of an evaluation."""

    max_new_tokens: int = 32
    max_rows: int = 32
    max_len: int = _MAX_LEN


def longest_row(model_folder: Path) -> int:
    """Tokens that a row may have to be scored: no more than the model's context holds."""
    config = json.loads((model_folder / "config.json").read_bytes())
    return min(_MAX_LEN, int(config.get("max_position_embeddings") or _MAX_LEN))


def leave_out_long(
    tokenizer: Any,  # Any: transformers
    rows: Sequence[EvalRow],
    max_len: int,
) -> tuple[tuple[EvalRow, ...], tuple[LeftOut, ...]]:
    """The rows that fit, and the others. No adapter changes it, so that pairs stay pairs."""
    fitting, left_out = [], []
    for row in rows:
        try:
            _encoded(tokenizer, row, max_len)
        except TooLargeError as error:
            left_out.append(LeftOut(id=row.id, num_tokens=int(error.fields["num_tokens"] or 0)))
        else:
            fitting.append(row)
    return tuple(fitting), tuple(left_out)


def evaluate(
    model: Any,  # Any: transformers
    tokenizer: Any,
    rows: Sequence[EvalRow],
    limits: Limits,
    base: Sequence[TopK] | None = None,
) -> tuple[tuple[RowResult, ...], SuiteSummary]:
    """Results in the order of `rows`, and their summary (NLL is the mean over all tokens).

    With the base model's `base_top_k` of the same rows, results carry the KL to it.

    Raises:
        TooLargeError: a row is too long; see `leave_out_long`.
    """
    started = time.monotonic()
    encoded = [_encoded(tokenizer, row, limits.max_len) for row in rows]
    references = _references(model, encoded, base)
    graded = [index for index, row in enumerate(rows) if row.rule != "none"]
    prompts = [encode_prompt(tokenizer, rows[index].messages) for index in graded]
    answers = dict(zip(graded, generate(model, tokenizer, prompts, limits), strict=True))
    results = tuple(
        RowResult(
            id=row.id,
            cluster=row.cluster or row.id,
            nll=nll,
            num_reference_tokens=tokens.num_tokens - tokens.num_prompt,
            answer=answers.get(index),
            is_right=is_right(row, answers[index]) if index in answers else None,
            kl=kl,
        )
        for index, (row, (nll, kl), tokens) in enumerate(
            zip(rows, references, encoded, strict=True)
        )
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


def base_top_k(
    model: Any,  # Any: transformers
    tokenizer: Any,
    rows: Sequence[EvalRow],
    limits: Limits,
) -> list[TopK]:
    """The model's likeliest tokens at each position that predicts a reference, for each row."""
    encoded = [_encoded(tokenizer, row, limits.max_len) for row in rows]
    found = []
    for _, packed, logits_MV in _logits(model, encoded):
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


def generate(
    model: Any,  # Any: transformers
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
) -> list[str]:
    """Greedy answers; equal prompts are generated once, prompts of like length together."""
    distinct = list({tuple(prompt): None for prompt in prompts})
    said: dict[tuple[int, ...], str] = {}
    for indices in _batches([len(prompt) for prompt in distinct], limits.max_rows):
        part = [distinct[index] for index in indices]
        new = generate_ids(model, part, limits, int(tokenizer.eos_token_id), likeliest)
        for prompt, ids in zip(part, new, strict=True):
            said[prompt] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return [said[tuple(prompt)] for prompt in prompts]


def _batches(num_tokens: Sequence[int], max_rows: int) -> Iterator[list[int]]:
    """Indices of prompts of like length; of long ones fewer, as attention grows with the square.

    >>> list(_batches([10, 2048, 2048, 20], max_rows=4))
    [[1], [2], [3], [0]]
    """
    for indices in length_sorted(num_tokens, max_rows):
        longest = max(_FULL_BATCH_LEN, num_tokens[indices[0]])
        size = max(1, max_rows * _FULL_BATCH_LEN**2 // longest**2)
        yield from (indices[at : at + size] for at in range(0, len(indices), size))


def likeliest(logits_BV: Tensor) -> Tensor:
    """The likeliest id of each row."""
    return logits_BV.argmax(-1)


def generate_ids(
    model: Any,  # Any: transformers
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    end: int,
    choose: Choose,
) -> list[list[int]]:
    """New ids of each prompt up to `end`; a batch shrinks as its rows end.

    A row that has `max_new_tokens` of them was cut off. What all prompts begin with is computed
    once.
    """
    num_shared = _num_shared(prompts)
    cache = _prefix_cache(model, prompts[0][:num_shared], len(prompts))
    padded = _left_padded([prompt[num_shared:] for prompt in prompts], end)
    ids_BT, mask_BT = (part.to(model.device) for part in padded)
    mask_BT = torch.cat([mask_BT.new_ones(len(prompts), num_shared), mask_BT], dim=-1)
    position_B = mask_BT.sum(-1)
    new: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)[:, num_shared:]
    for _ in range(limits.max_new_tokens):
        with torch.no_grad():
            out = model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        cache = out.past_key_values
        next_B = choose(out.logits[:, -1])
        tokens = next_B.tolist()
        going = [index for index, token in enumerate(tokens) if token != end]
        for index in going:
            new[rows[index]].append(tokens[index])
        if not going:
            break
        if len(going) < len(rows):
            rows, kept = [rows[index] for index in going], next_B.new_tensor(going)
            cache.batch_select_indices(kept)
            next_B, mask_BT, position_B = next_B[kept], mask_BT[kept], position_B[kept]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=-1)
        ids_BT, positions_BT = next_B[:, None], position_B[:, None]
        position_B = position_B + 1
    return new


def _num_shared(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with, short of the last of the shortest."""
    limit = min(len(prompt) for prompt in prompts) - 1
    stacked = np.array([prompt[:limit] for prompt in prompts])
    differs = (stacked != stacked[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else limit


def _prefix_cache(model: Any, ids: Sequence[int], num_rows: int) -> Any:  # Any: transformers
    """Keys and values of a prefix, once for each row; None for an empty one."""
    if not ids:
        return None
    with torch.no_grad():
        ids_1T = torch.tensor([ids], device=model.device)
        cache = model(input_ids=ids_1T, use_cache=True, logits_to_keep=1)
    cache.past_key_values.batch_repeat_interleave(num_rows)
    return cache.past_key_values


def _left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, (B, T). Padding is known by the mask alone: the pad id may equal the end id."""
    width = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), width), pad)
    mask_BT = torch.zeros((len(prompts), width), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    return ids_BT, mask_BT


def _encoded(tokenizer: Any, row: EvalRow, max_len: int) -> TokenRow:  # Any: transformers
    example = Example(id=row.id, messages=row.messages, completion=row.reference, kind="general")
    return encode_example(tokenizer, example, max_len)
