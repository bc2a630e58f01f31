"""An exact two-sample test of whether current texts come from where the reference came from.

The statistic is the distance between the two mean vectors; its null distribution is that of the
same rows dealt again at random, so that p ≤ α happens with probability ≤ α for exchangeable rows
whatever the vectors are (Phipson & Smyth 2010: p = (1 + #) / (B + 1)). Making rows exchangeable is
the work of `windows`; what to do about a small p is that of `policy`.

A text is the TF-IDF vector x of its words, lifted to the products of every two of them, x ⊗ x: the
distance of means is then the MMD with kernel (x · y)² (Gretton et al. 2012, biased estimate). Words
that occur together weigh more than apart: where a quarter of 500 prompts takes new intents, 17 of
BANKING77's 77, level .01 sees it in 58% of windows, against 17% with the means of x alone.

Shapes: N reference rows, M current rows, T = N + M, D features, B permutations. Memory: 4 T² bytes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perennial.infra.errors import InputError
from perennial.monitoring.descriptors import document_counts, tokens

Matrix = NDArray[np.float32]

_CHUNK_B = 128
# Sums of float32 differ in the last digits; a tie must count as "at least as far".
_TIE = 1e-5
_ROUNDING = 1e-7


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftScore:
    """How far apart two windows are, and how often chance alone puts them that far apart.

    Attributes:
        distance: Euclidean distance between the mean vectors (of x ⊗ x for texts).
        null_distance: the mean distance over the permutations, i.e. what no drift looks like.
        p_value: in [1/(B+1), 1].
    """

    distance: float
    null_distance: float
    p_value: float
    num_reference: int
    num_current: int
    num_permutations: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WordShift:
    """A word and the share of prompts that hold it, before and now."""

    word: str
    reference_share: float
    current_share: float


def text_drift(
    reference: Sequence[str],
    current: Sequence[str],
    *,
    num_permutations: int,
    seed: int,
    max_features: int = 5_000,
) -> DriftScore:
    """The drift between two sets of texts, over TF-IDF vectors of their pooled words.

    Deterministic in the texts and the seed; the order of the texts does not matter.

    Raises:
        InputError: a side is empty, or `num_permutations` is not positive.
    """
    _check_sizes(len(reference), len(current), num_permutations)
    texts = sorted(reference) + sorted(current)
    vectors_TD = tfidf(texts, max_features=max_features)
    kernel_TT = vectors_TD @ vectors_TD.T
    kernel_TT *= kernel_TT
    return _permute(kernel_TT, len(reference), num_permutations, seed)


def vector_drift(
    reference_ND: NDArray[np.floating],
    current_MD: NDArray[np.floating],
    *,
    num_permutations: int,
    seed: int,
) -> DriftScore:
    """The drift between the means of two sets of embeddings, one row each.

    Deterministic in the rows and the seed; their order does not matter.

    Raises:
        InputError: a side is empty, the widths differ, a value is not finite.
    """
    _check_sizes(len(reference_ND), len(current_MD), num_permutations)
    if reference_ND.ndim != 2 or reference_ND.shape[1:] != current_MD.shape[1:]:
        raise InputError(
            f"embeddings must be rows of one width, got {reference_ND.shape}, {current_MD.shape}"
        )
    both_TD = np.concatenate([_in_order(reference_ND), _in_order(current_MD)])
    if not np.isfinite(both_TD).all():
        raise InputError("embeddings must be finite")
    both_TD -= both_TD.mean(axis=0)
    return _permute(both_TD @ both_TD.T, len(reference_ND), num_permutations, seed)


def tfidf(texts: Sequence[str], *, max_features: int) -> Matrix:
    """Unit rows of (1 + ln tf) · (1 + ln((1 + T) / (1 + df))) over words of at least two texts.

    Words are chosen from all texts together, blind to which window a text is from: choosing them
    by window would make the permutation test inexact.
    """
    counts = [Counter(tokens(text)) for text in texts]
    df = Counter(word for count in counts for word in count)
    words = [word for word, num in df.items() if num >= 2] or list(df)
    words = sorted(words, key=lambda word: (-df[word], word))[:max_features]
    place = {word: d for d, word in enumerate(words)}
    vectors_TD = np.zeros((len(texts), max(1, len(words))), dtype=np.float32)
    for row_D, count in zip(vectors_TD, counts, strict=True):
        for word, num in count.items():
            if (d := place.get(word)) is not None:
                row_D[d] = 1.0 + np.log(num)
    idf_D = np.array([1.0 + np.log((1 + len(texts)) / (1 + df[word])) for word in words])
    vectors_TD *= idf_D.astype(np.float32) if words else 1.0
    norms_T = np.linalg.norm(vectors_TD, axis=1, keepdims=True)
    vectors_TD /= np.where(norms_T > 0, norms_T, 1.0)
    return vectors_TD


def word_shifts(
    reference: Sequence[str], current: Sequence[str], *, limit: int
) -> tuple[WordShift, ...]:
    """The words whose share of texts changed most, largest change first."""
    before, now = document_counts(reference), document_counts(current)
    shifts = [
        WordShift(
            word=word,
            reference_share=before[word] / max(1, len(reference)),
            current_share=now[word] / max(1, len(current)),
        )
        for word in before.keys() | now.keys()
    ]
    shifts.sort(key=lambda s: (-abs(s.current_share - s.reference_share), s.word))
    return tuple(shifts[:limit])


def _check_sizes(num_reference: int, num_current: int, num_permutations: int) -> None:
    if not num_reference or not num_current:
        raise InputError(
            f"drift needs rows on both sides, got {num_reference} reference, {num_current} current"
        )
    if num_permutations < 1:
        raise InputError(f"num_permutations must be positive, got {num_permutations}")


def _in_order(rows_ND: NDArray[np.floating]) -> Matrix:
    """Rows sorted by content, so that the order in which they came cannot move p."""
    rows_ND = np.ascontiguousarray(rows_ND, dtype=np.float32)
    return rows_ND[sorted(range(len(rows_ND)), key=lambda n: rows_ND[n].tobytes())]


def _permute(kernel_TT: Matrix, num_reference: int, num_permutations: int, seed: int) -> DriftScore:
    num_rows = len(kernel_TT)
    num_current = num_rows - num_reference
    rounding = _ROUNDING * float(np.abs(kernel_TT).max()) * num_reference * num_rows
    _centre(kernel_TT)
    dealt_T = np.zeros((1, num_rows), dtype=np.float32)
    dealt_T[0, :num_reference] = 1.0
    observed = float(_squares(dealt_T, kernel_TT)[0])
    rng = np.random.default_rng(seed)
    null_B = np.concatenate(
        [
            _squares(_deal(rng, size, num_rows, num_reference), kernel_TT)
            for size in _chunks(num_permutations)
        ]
    )
    num_as_far = int((null_B >= observed * (1 - _TIE) - rounding).sum())
    # Of centred rows, mean(reference) - mean(current) = sum(reference) · (1/N + 1/M).
    scale = 1 / num_reference + 1 / num_current
    return DriftScore(
        distance=float(np.sqrt(max(observed, 0.0))) * scale,
        null_distance=float(np.sqrt(null_B.clip(min=0.0)).mean()) * scale,
        p_value=(1 + num_as_far) / (num_permutations + 1),
        num_reference=num_reference,
        num_current=num_current,
        num_permutations=num_permutations,
    )


def _centre(kernel_TT: Matrix) -> None:
    """Move the origin of the feature space to the mean of all rows, in place."""
    means_T = kernel_TT.mean(axis=0, dtype=np.float64)
    kernel_TT -= means_T.astype(np.float32)
    kernel_TT -= (means_T - means_T.mean()).astype(np.float32)[:, None]


def _squares(dealt_BT: Matrix, kernel_TT: Matrix) -> NDArray[np.float64]:
    """The squared length of the sum of the rows that each deal picks."""
    squares_B: NDArray[np.float64] = np.einsum(
        "bt,bt->b", dealt_BT @ kernel_TT, dealt_BT, dtype=np.float64
    )
    return squares_B


def _deal(rng: np.random.Generator, size: int, num_rows: int, num_reference: int) -> Matrix:
    """`size` random choices of which rows are called reference, as 0/1 rows."""
    chosen = np.argpartition(rng.random((size, num_rows)), num_reference - 1, axis=1)
    dealt_BT = np.zeros((size, num_rows), dtype=np.float32)
    np.put_along_axis(dealt_BT, chosen[:, :num_reference], 1.0, axis=1)
    return dealt_BT


def _chunks(total: int) -> list[int]:
    whole, rest = divmod(total, _CHUNK_B)
    return [_CHUNK_B] * whole + ([rest] if rest else [])
