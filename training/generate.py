"""Answers of a model to many prompts at once, token by token; batches shrink as rows end.

Which token follows is the caller's to choose. Whether an answer is right is `grading`'s business.

Shapes: B rows of a batch, T tokens of the longest, V the vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perennial.training.batching import of_like_length

_MAX_ROWS = 32  # prompts that are answered together

Choose = Callable[[Tensor], Tensor]  # logits (B, V) to the next ids (B,)


def generate(
    model: Any,  # Any: transformers
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers; equal prompts are generated once, prompts of like length together."""
    distinct = list({tuple(prompt): None for prompt in prompts})
    said: dict[tuple[int, ...], str] = {}
    for indices in of_like_length([len(prompt) for prompt in distinct], _MAX_ROWS):
        part = [distinct[index] for index in indices]
        new = generate_ids(model, part, max_new_tokens, int(tokenizer.eos_token_id), likeliest)
        for prompt, ids in zip(part, new, strict=True):
            said[prompt] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return [said[tuple(prompt)] for prompt in prompts]


def likeliest(logits_BV: Tensor) -> Tensor:
    """The likeliest id of each row."""
    return logits_BV.argmax(-1)


def generate_ids(
    model: Any,  # Any: transformers
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
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
    new: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        logits_BV, cache = _next_logits(model, ids_BT, mask_BT, cache)
        next_B = choose(logits_BV)
        tokens = next_B.tolist()
        going = [index for index, token in enumerate(tokens) if token != end]
        for index in going:
            new[rows[index]].append(tokens[index])
        if not going:
            break
        if len(going) < len(rows):
            rows, kept = [rows[index] for index in going], next_B.new_tensor(going)
            cache.batch_select_indices(kept)
            next_B, mask_BT = next_B[kept], mask_BT[kept]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=-1)
        ids_BT = next_B[:, None]
    return new


def _next_logits(
    model: Any,  # Any: transformers
    ids_BT: Tensor,
    mask_BT: Tensor,
    cache: Any,
) -> tuple[Tensor, Any]:
    """Logits after the ids, the last of what the mask covers; and the cache, which has them now."""
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        out = model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=positions_BT[:, -ids_BT.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return out.logits[:, -1], out.past_key_values


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
