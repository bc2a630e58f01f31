"""Which rows say almost the same, exactly and without comparing each with each.

A MinHash index answers this by chance and a sentence encoder by meaning, so one can miss a pair and
the other merges answers that differ in one number. Prefix filtering misses nothing and needs no
package. What is done with a near duplicate is `compile`'s business.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from perennial.training.text import particulars, words

Shingles = frozenset[str]
Weigh = Callable[[str], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """A question and its answer; only rows of one `context` can be near duplicates."""

    context: str
    asked: str
    told: str


def near_duplicates(rows: Sequence[Said], threshold: float) -> list[bool]:
    """True for each row that says almost what an earlier one that is no duplicate says.

    Question and answer must each have a weighted Jaccard similarity of `threshold` or more, and the
    same particulars in their order: "within 30 days" is never "within 14 days". Shingles are words
    and pairs of neighbours, so that order counts, and weigh by how rare they are, so that
    instructions that all questions share do not make them alike.
    """
    asked = [shingles(row.asked) for row in rows]
    told = [shingles(row.told) for row in rows]
    details = [particulars(f"{row.asked} {row.told}") for row in rows]
    weigh = _rarity((*asked, *told))
    kept_with: dict[tuple[str, str], list[int]] = defaultdict(list)
    flags: list[bool] = []
    for this, row in enumerate(rows):
        keys = [(row.context, shingle) for shingle in _prefix(asked[this], weigh, threshold)]
        flags.append(
            any(
                details[this] == details[other]
                and similarity(told[this], told[other], weigh) >= threshold
                and similarity(asked[this], asked[other], weigh) >= threshold
                for other in {other for key in keys for other in kept_with[key]}
            )
        )
        if not flags[-1]:
            for key in keys:
                kept_with[key].append(this)
    return flags


def shingles(text: str) -> Shingles:
    """The words of a text and its pairs of neighbouring words."""
    found = words(text)
    return frozenset(found) | {f"{a} {b}" for a, b in pairwise(found)}


def similarity(left: Shingles, right: Shingles, weigh: Weigh) -> float:
    """Weight of the shared over the weight of all shingles, in [0, 1]; two empty sets are equal."""
    # Sorted, because the last digit of a float sum depends on its order.
    union = sum(map(weigh, sorted(left | right)))
    return sum(map(weigh, sorted(left & right))) / union if union else 1.0


def _rarity(sets: Sequence[Shingles]) -> Weigh:
    """Smoothed idf, as in `text.fit_tfidf`: 1 for what every text has."""
    frequency = Counter(shingle for one in sets for shingle in one)
    num = len(sets)
    idf = {shingle: math.log((1 + num) / (1 + df)) + 1 for shingle, df in frequency.items()}
    return idf.__getitem__


def _prefix(one: Shingles, weigh: Weigh, threshold: float) -> list[str]:
    """Shingles of which two sets as similar as `threshold` share at least one.

    Rarest first, until the rest weighs less than `threshold` of the set: what two such sets share
    weighs more than that rest (Chaudhuri et al. 2006, "A primitive operator for similarity joins").
    """
    ordered = sorted(one, key=lambda shingle: (-weigh(shingle), shingle))
    rest = needed = sum(map(weigh, ordered))
    needed *= threshold * (1 - 1e-9)
    for size, shingle in enumerate(ordered):
        if rest < needed:
            return ordered[:size]
        rest -= weigh(shingle)
    return ordered
