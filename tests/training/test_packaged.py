"""Facts about the packaged general rows: short to train on, measured on other questions."""

from collections.abc import Sequence
from itertools import combinations, product

from perennial.training.general import PACKAGED_PROBE, PACKAGED_REPLAY, load_general
from tests.wording import content_words, jaccard, trigrams

REPLAY = load_general(PACKAGED_REPLAY)
PROBE = load_general(PACKAGED_PROBE)


def _words_of(texts: Sequence[str]) -> list[int]:
    return sorted(len(text.split()) for text in texts)


def test_rows_to_train_on_are_many_and_short() -> None:
    assert len(REPLAY) >= 250
    assert _words_of([answer for _, answer in REPLAY])[-1] <= 60
    assert _words_of([prompt for prompt, _ in REPLAY])[-1] <= 60


def test_rows_to_measure_on_also_hold_answers_longer_than_any_that_is_trained_on() -> None:
    longest = _words_of([answer for _, answer in REPLAY])[-1]

    assert sum(len(answer.split()) > longest for _, answer in PROBE) >= 20


def test_no_row_is_empty() -> None:
    assert _words_of([text for row in (*REPLAY, *PROBE) for text in row])[0] >= 1


def test_no_two_prompts_ask_the_same() -> None:
    prompts = [prompt for prompt, _ in (*REPLAY, *PROBE)]
    near = [
        (left, right)
        for left, right in combinations(prompts, 2)
        if jaccard(content_words(left), content_words(right)) > 0.4
    ]
    assert near == []


def test_probe_repeats_no_row_that_is_trained_on() -> None:
    near = [
        (probe[part], replay[part])
        for part in (0, 1)
        for probe, replay in product(PROBE, REPLAY)
        if jaccard(trigrams(probe[part]), trigrams(replay[part])) > 0.2
    ]
    assert near == []
