"""How near two texts are by their words, for tests of rows that must not repeat each other."""

import re
from typing import TypeVar

T = TypeVar("T")
STOPWORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about all am an and any are as at be been by can could did do does down for from get had
        has have how i if in is it its me must my of on or out please should so tell that the their
        them there they this to up us was we what when where which who whom whose why will with
        would you your
        """,
    )
)


def words(text: str) -> list[str]:
    """Letters and digits, in lower case."""
    return re.findall(r"[a-z0-9]+", text.casefold())


def normal(text: str) -> str:
    """The words with one space between them."""
    return " ".join(words(text))


def content_words(text: str) -> frozenset[str]:
    """The words less those that any question has."""
    return frozenset(words(text)) - STOPWORDS


def trigrams(text: str) -> frozenset[tuple[str, ...]]:
    """All runs of three words."""
    found = words(text)
    return frozenset(zip(found, found[1:], found[2:], strict=False))


def jaccard(left: frozenset[T], right: frozenset[T]) -> float:
    """Shared members of all members, in [0, 1]; 0 for two empty sets."""
    return len(left & right) / len(left | right) if left | right else 0.0
