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

import regex  # Unicode's classes, which `re` lacks

_KEPT_CONTROLS = frozenset("\n\t")
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn"})
_LINE_ENDS = re.compile("\r\n|[\r\x85\u2028\u2029]")
# Variants of a letter can carry hidden bytes; what makes a sign an emoji, or not, may stay once.
_VARIANTS = regex.compile(
    r"(?<!\p{Emoji})[\ufe0e\ufe0f]|[\p{Variation_Selector}\u034f--\ufe0e\ufe0f]", regex.V1
)
_INVISIBLE = regex.compile(r"\p{Cf}|\p{Variation_Selector}|\u034f")
# Scripts without spaces between words; the prolonged sound mark is of two of them.
_UNSPACED = regex.compile(
    r"[[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー]--\p{Nd}]\p{M}*",
    regex.V1,
)
_WORD = r"\w+(?:[.,:]\d+)*|(?<!\w)-\.?\d\w*(?:[.,:]\d+)*"
_NAME = r"\w+(?:\+{1,2}|\#)(?!\w)"
# A | and a > that begins a line only set text; * and / are signs between words or digits.
_SIGN = (
    r"[\p{Sm}\p{Sc}\p{So}%\&@\^--|>]|(?<!^[ \t]*)>|!(?==)|(?<!\w)-(?=\p{Sc}\d)"
    r"|(?<=\d\s?)[*/](?=\s?\d)|(?<=\w )[*/](?= \w)"
)
_WORDS = regex.compile(_WORD)
_TOKENS = regex.compile(f"{_NAME}|{_WORD}|{_SIGN}", regex.V1 | regex.MULTILINE)
_PARTICULAR = regex.compile(r".*\d.*|\w*\W+")


def clean(text: str) -> str:
    r"""NFC text without control, format (bidi, zero-width, tag), surrogate or private characters.

    Every line ends in a line feed: who shows or splits the text sees the lines that a person does.

    >>> clean("pay\u202e 5\u200b €\r\n ")
    'pay 5 €'
    """
    kept = "".join(
        char
        for char in _LINE_ENDS.sub("\n", text)
        if char in _KEPT_CONTROLS or unicodedata.category(char) not in _HIDDEN_CATEGORIES
    )
    return unicodedata.normalize("NFC", _VARIANTS.sub("", kept)).strip()


def normalise(text: str) -> str:
    """What two spellings of one text share: case-folded words and signs with single spaces.

    Signs are what mathematics, money, emoji and names like C# are told apart by; a bracket, a quote
    or a full stop is none. In scripts without spaces between words each letter is one.

    >>> normalise("How long  is the Warranty in C++?!")
    'how long is the warranty in c++'
    """
    return " ".join(tokens(text))


def tokens(text: str) -> list[str]:
    """The words and signs of `normalise`, in their order."""
    return list(_TOKENS.findall(_UNSPACED.sub(r" \g<0> ", _folded(text))))


def words(text: str) -> list[str]:
    """Case-folded words; a number keeps its sign and separators ("-5", "9.99", "18:30")."""
    return list(_WORDS.findall(_folded(text)))


def particulars(text: str) -> tuple[str, ...]:
    """Signs and words with a digit: what tells "box 3" from "box 14" and "C++" from "C#"."""
    return tuple(token for token in tokens(text) if _PARTICULAR.fullmatch(token))


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


def _folded(text: str) -> str:
    """One case, one minus, nothing invisible."""
    seen = _INVISIBLE.sub("", text)
    return unicodedata.normalize("NFKC", seen).casefold().replace("\u2212", "-")
