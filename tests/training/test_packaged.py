"""Facts about the packaged general rows: short to train on, measured on other questions."""

import re
from collections.abc import Sequence
from itertools import combinations, product

from perennial.training.general import PACKAGED_PROBE, PACKAGED_REPLAY, load_general

REPLAY = load_general(PACKAGED_REPLAY)
PROBE = load_general(PACKAGED_PROBE)
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
Words = frozenset[str] | frozenset[tuple[str, ...]]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.casefold())


def _subjects(text: str) -> frozenset[str]:
    return frozenset(_words(text)) - STOPWORDS


def _trigrams(text: str) -> frozenset[tuple[str, ...]]:
    words = _words(text)
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def _jaccard(left: Words, right: Words) -> float:
    return len(left & right) / len(left | right) if left | right else 0.0


def _words_of(texts: Sequence[str]) -> list[int]:
    return sorted(len(text.split()) for text in texts)


def test_rows_to_train_on_are_many_and_short() -> None:
    assert len(REPLAY) >= 250
    assert _words_of([answer for _, answer in REPLAY])[-1] <= 60
    assert _words_of([prompt for prompt, _ in REPLAY])[-1] <= 60


def test_rows_to_measure_on_also_hold_answers_longer_than_any_that_is_trained_on() -> None:
    longest = _words_of([answer for _, answer in REPLAY])[-1]

    assert sum(len(answer.split()) > longest for _, answer in PROBE) >= 20


def test_no_two_prompts_ask_the_same() -> None:
    prompts = [prompt for prompt, _ in (*REPLAY, *PROBE)]
    near = [
        (left, right)
        for left, right in combinations(prompts, 2)
        if _jaccard(_subjects(left), _subjects(right)) > 0.4
    ]
    assert near == []


def test_probe_repeats_no_row_that_is_trained_on() -> None:
    near = [
        (probe[part], replay[part])
        for part in (0, 1)
        for probe, replay in product(PROBE, REPLAY)
        if _jaccard(_trigrams(probe[part]), _trigrams(replay[part])) > 0.2
    ]
    assert near == []
