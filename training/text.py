"""Text as it may enter training: cleaned, and comparable.

User text is data. Control, bidirectional, zero-width and tag characters can hide an instruction
from the person who reviews it, so they never reach a row. What counts as the same question is
decided here too; what follows from it is left to `compile` and `replay`.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_KEPT_CONTROLS = frozenset("\n\t")
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn"})
_LINE_ENDS = re.compile("\r\n|[\r\x85\u2028\u2029]")
_WORD = re.compile(r"\w+(?:[.,:]\d+)*")
_SPACES = re.compile(r"[ \t]+")


def clean(text: str) -> str:
    r"""NFC text without control, format (bidi, zero-width, tag), surrogate or private characters.

    Every line ends in a line feed: who shows or splits the text sees the lines that a person does.

    >>> clean("pay\u202e 5\u200b €\r\n ")
    'pay 5 €'
    """
    composed = unicodedata.normalize("NFC", _LINE_ENDS.sub("\n", text))
    kept = (
        char
        for char in composed
        if char in _KEPT_CONTROLS or unicodedata.category(char) not in _HIDDEN_CATEGORIES
    )
    return "".join(kept).strip()


def normalise(text: str) -> str:
    """What two spellings of one question share: case-folded words with single spaces.

    >>> normalise("How long  is the Warranty?!")
    'how long is the warranty'
    """
    return " ".join(words(text))


def words(text: str) -> list[str]:
    """Case-folded words; a number keeps its decimal and time separators ("9.99", "18:30")."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def numbers(text: str) -> frozenset[str]:
    """The words with a digit in them: what tells "box 3" from "box 14"."""
    return frozenset(word for word in words(text) if any(char.isdigit() for char in word))


@dataclass(frozen=True, kw_only=True, slots=True)
class TfIdf:
    """Inverse document frequencies of one collection; see `fit_tfidf`."""

    idf: dict[str, float]
    unseen: float

    def vector(self, text: str) -> dict[str, float]:
        """Weights by term, of length 1; empty for a text without words."""
        counts = Counter(words(text))
        weights = {term: n * self.idf.get(term, self.unseen) for term, n in counts.items()}
        norm = math.sqrt(sum(weight * weight for weight in weights.values()))
        return {term: weight / norm for term, weight in weights.items()}


def cosine(left: Mapping[str, float], right: Mapping[str, float]) -> float:
    """The cosine of two vectors of length 1."""
    if len(left) > len(right):
        left, right = right, left
    return sum(weight * right[term] for term, weight in left.items() if term in right)


def fit_tfidf(texts: Sequence[str]) -> TfIdf:
    """Smoothed idf, log((1+n)/(1+df))+1, as in scikit-learn's TfidfTransformer."""
    frequency = Counter(term for text in texts for term in set(words(text)))
    num = len(texts)
    idf = {term: math.log((1 + num) / (1 + df)) + 1 for term, df in frequency.items()}
    return TfIdf(idf=idf, unseen=math.log(1 + num) + 1)
