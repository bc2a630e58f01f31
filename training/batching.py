"""Which rows share a step, and how they lie in it without padding.

Training: the rows of a batch become one sequence, first the prefix that all of them share, then
each row's rest; a row sees the prefix and itself. Generation: rows of like length together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perennial.training.tokens import TokenRow

_FULL_BATCH_LEN = 1024  # tokens of a prompt up to which a batch has as many rows as it may


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """N packed tokens of B rows.

    row_N: index of the row in the batch, -1 for the shared prefix. source_N: position inside that
    row (the prefix is read from row 0). predict_M: packed positions whose next token is trained;
    label_M: that token; owner_M: the row it belongs to; at_M: its position inside that row.
    """

    ids_N: NDArray[np.int64]
    row_N: NDArray[np.int64]
    source_N: NDArray[np.int64]
    predict_M: NDArray[np.int64]
    label_M: NDArray[np.int64]
    owner_M: NDArray[np.int64]
    at_M: NDArray[np.int64]

    @property
    def sizes(self) -> tuple[int, list[int]]:
        """Tokens of the shared prefix, and of each row's rest."""
        counts = np.bincount(self.row_N + 1)
        return int(counts[0]), [int(size) for size in counts[1:]]

    @property
    def num_labels(self) -> list[int]:
        """Predicting positions of each row; they lie in the order of the rows."""
        num_rows = len(self.sizes[1])
        return [int(num) for num in np.bincount(self.owner_M, minlength=num_rows)]

    @property
    def visible_NN(self) -> NDArray[np.bool_]:
        """True where the first token may attend to the second."""
        same = self.row_N[:, None] == self.row_N[None, :]
        prefix = self.row_N[None, :] == -1
        causal = self.source_N[:, None] >= self.source_N[None, :]
        visible: NDArray[np.bool_] = (same | prefix) & causal
        return visible


def pack(
    rows: Sequence[TokenRow],
    *,
    labels: Sequence[str],
    dropped: Sequence[frozenset[int]] | None = None,
) -> Packed:
    """The rows as one sequence; `labels[b]` says what row b trains on.

    "completion": its completion. "all": every token after the first. What predicts a token of the
    shared prefix counts for each row, so that a row has the same labels in any batch. `dropped[b]`
    are positions of row b's prompt to leave out; the others keep their positions, so this is a
    masked token and not another text.
    """
    gone = _without_last(rows, dropped) if dropped else [frozenset[int]()] * len(rows)
    shared = min([shared_prefix(rows), *(min(part) for part in gone if part)])
    parts = [np.stack([np.full(shared, -1), np.arange(shared), rows[0].ids_T[:shared]])]
    predict, label, owner, at = [], [], [], []
    offset = shared
    for index, (row, scope) in enumerate(zip(rows, labels, strict=True)):
        source = np.array([i for i in range(shared, row.num_tokens) if i not in gone[index]])
        size = len(source)
        parts.append(np.stack([np.full(size, index), source, row.ids_T[source]]))
        first = row.num_prompt if scope == "completion" else 1
        before = np.arange(first - 1, row.num_tokens - 1)
        own = np.searchsorted(source, before) + offset
        predict.append(np.where(before < shared, before, own))
        label.append(row.ids_T[first:])
        owner.append(np.full(row.num_tokens - first, index))
        at.append(np.arange(first, row.num_tokens))
        offset += size
    row_N, source_N, ids_N = np.concatenate(parts, axis=1)
    return Packed(
        ids_N=ids_N,
        row_N=row_N,
        source_N=source_N,
        predict_M=np.concatenate(predict),
        label_M=np.concatenate(label),
        owner_M=np.concatenate(owner),
        at_M=np.concatenate(at),
    )


def _without_last(
    rows: Sequence[TokenRow], dropped: Sequence[frozenset[int]]
) -> list[frozenset[int]]:
    # Without the prompt's last token the first label would be predicted from itself.
    return [part - {row.num_prompt - 1} for row, part in zip(rows, dropped, strict=True)]


def shared_prefix(rows: Sequence[TokenRow]) -> int:
    """Tokens that all rows begin with, short of the first that predicts a completion."""
    if len(rows) < 2:
        return 0
    limit = min(row.num_prompt - 1 for row in rows)
    stacked = np.stack([row.ids_T[:limit] for row in rows])
    differs = (stacked != stacked[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else limit


def cut(num_tokens: Sequence[int], budget: int) -> list[range]:
    """Consecutive batches of at most `budget` tokens; a larger row is a batch of its own."""
    batches, start, filled = [], 0, 0
    for index, size in enumerate(num_tokens):
        if filled and filled + size > budget:
            batches.append(range(start, index))
            start, filled = index, 0
        filled += size
    if start < len(num_tokens):
        batches.append(range(start, len(num_tokens)))
    return batches


def length_sorted(num_tokens: Sequence[int], max_rows: int) -> list[list[int]]:
    """Indices in batches of like length, longest first, so that little is padded."""
    order = sorted(range(len(num_tokens)), key=lambda index: (-num_tokens[index], index))
    return [order[i : i + max_rows] for i in range(0, len(order), max_rows)]


def of_like_length(num_tokens: Sequence[int], max_rows: int) -> Iterator[list[int]]:
    """Indices of prompts of like length; of long ones fewer, as attention grows with the square.

    >>> list(of_like_length([10, 2048, 2048, 20], max_rows=4))
    [[1], [2], [3], [0]]
    """
    for indices in length_sorted(num_tokens, max_rows):
        longest = max(_FULL_BATCH_LEN, num_tokens[indices[0]])
        size = max(1, max_rows * _FULL_BATCH_LEN**2 // longest**2)
        yield from (indices[at : at + size] for at in range(0, len(indices), size))
