import json
import random
import time
from collections import defaultdict
from math import comb, sqrt
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.infra.errors import InputError
from perennial.monitoring.drift import text_drift, tfidf, vector_drift, word_shifts
from tests.monitoring.builders import OTHER_WORDS, sentences

BANKING = Path(__file__).parents[3] / "shared" / "data" / "banking77"
LEVEL = 0.01


def test_distance_and_p_by_hand() -> None:
    # Means 0 and 5 apart; of the C(4, 2) = 6 deals, the observed one and its mirror are as far.
    reference, current = np.array([[0.0, 0.0], [0.0, 0.0]]), np.array([[3.0, 4.0], [3.0, 4.0]])
    score = vector_drift(reference, current, num_permutations=5_999, seed=1)
    assert score.distance == pytest.approx(5.0, rel=1e-5)
    assert score.p_value == pytest.approx(2 / comb(4, 2), abs=0.02)


def test_tfidf_by_hand() -> None:
    # "a" is in 3 of 3 texts: idf 1 + ln(4/4); "b" in 2: 1 + ln(4/3); "c" in one: left out.
    idf_b = 1 + np.log(4 / 3)
    tf_b = 1 + np.log(2)
    vectors = tfidf(["a", "a b c", "a b b"], max_features=10)
    assert vectors[0] == pytest.approx([1, 0])
    assert vectors[1] == pytest.approx(np.array([1, idf_b]) / np.hypot(1, idf_b), rel=1e-6)
    assert vectors[2] == pytest.approx(
        np.array([1, tf_b * idf_b]) / np.hypot(1, tf_b * idf_b), rel=1e-6
    )


def test_disjoint_texts_get_the_smallest_p() -> None:
    score = text_drift(["a b"] * 30, ["c d"] * 30, num_permutations=999, seed=0)
    assert score.p_value == 1 / 1000
    assert score.distance == pytest.approx(sqrt(2), rel=1e-4)


@pytest.mark.parametrize("texts", [["same words"] * 20, [""] * 20, ["?!"] * 20])
def test_equal_texts_get_one(texts: list[str]) -> None:
    assert text_drift(texts, texts[:7], num_permutations=99, seed=0).p_value == 1.0


def test_a_result_is_pinned() -> None:
    score = text_drift(sentences(1, 60), sentences(2, 60), num_permutations=199, seed=7)
    again = text_drift(sentences(1, 60), sentences(2, 60), num_permutations=199, seed=7)
    assert score == again
    assert score.distance == pytest.approx(0.158316, rel=1e-4)
    assert score.p_value == pytest.approx(0.8, abs=0.006)


TEXTS = st.lists(st.text("abc ", max_size=8), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS, st.integers(0, 1000), st.randoms(use_true_random=False))
def test_p_is_in_bounds_and_blind_to_order(
    reference: list[str], current: list[str], seed: int, rng: random.Random
) -> None:
    score = text_drift(reference, current, num_permutations=49, seed=seed)
    assert 1 / 50 <= score.p_value <= 1
    mixed = rng.sample(reference, len(reference)), rng.sample(current, len(current))
    assert text_drift(*mixed, num_permutations=49, seed=seed) == score


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_embeddings_are_blind_to_order_and_origin(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(20, 4)), rng.normal(0.3, size=(15, 4))
    score = vector_drift(a, b, num_permutations=99, seed=seed)
    assert vector_drift(rng.permutation(a), b[::-1], num_permutations=99, seed=seed) == score
    moved = vector_drift(a + 3, b + 3, num_permutations=99, seed=seed)
    assert moved.distance == pytest.approx(score.distance, rel=1e-3)


def test_no_effect_alarms_no_oftener_than_the_level() -> None:
    runs, level = 400, 0.05
    alarms = sum(
        text_drift(
            sentences(2 * run, 40), sentences(2 * run + 1, 40), num_permutations=99, seed=run
        ).p_value
        <= level
        for run in range(runs)
    )
    assert alarms / runs <= level + 2 * sqrt(level * (1 - level) / runs)
    assert alarms > 0


def test_a_new_topic_is_seen() -> None:
    current = sentences(2, 150) + sentences(3, 50, OTHER_WORDS)
    assert text_drift(sentences(1, 200), current, num_permutations=999, seed=0).p_value <= LEVEL


def test_500_against_500_texts_takes_less_than_two_seconds() -> None:
    words = [f"w{n}" for n in range(3000)]
    texts = sentences(1, 1000, words)
    began = time.perf_counter()
    text_drift(texts[:500], texts[500:], num_permutations=999, seed=0)
    assert time.perf_counter() - began < 2


def test_word_shifts_name_what_changed() -> None:
    shifts = word_shifts(["card lost", "card new"], ["router new", "router off"], limit=2)
    assert [(s.word, s.reference_share, s.current_share) for s in shifts] == [
        ("card", 1.0, 0.0),
        ("router", 0.0, 1.0),
    ]


def test_an_empty_side_is_refused() -> None:
    with pytest.raises(InputError, match="0 current"):
        text_drift(["a"], [], num_permutations=9, seed=0)


@pytest.mark.parametrize(
    "current", [np.zeros((2, 3)), np.array([[np.nan, 0.0]]), np.array([[np.inf, 0.0]])]
)
def test_senseless_embeddings_are_refused(current: np.ndarray) -> None:
    with pytest.raises(InputError):
        vector_drift(np.zeros((2, 2)), current, num_permutations=9, seed=0)


@pytest.fixture(scope="module")
def intents() -> dict[str, list[str]]:
    if not BANKING.exists():
        pytest.skip(f"{BANKING} is absent")
    texts = defaultdict(list)
    with (BANKING / "train.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            item = json.loads(line)
            texts[item["intent"]].append(item["text"])
    return texts


def banking_p_values(intents: dict[str, list[str]], *, num_new: int, runs: int) -> list[float]:
    """500 against 500 prompts; five intents, other ones each run, are in the current only."""
    found = []
    for seed in range(runs):
        rng = random.Random(seed)
        names = rng.sample(sorted(intents), len(intents))
        new = [text for name in names[:5] for text in intents[name]]
        old = rng.sample([text for name in names[5:] for text in intents[name]], 1000 - num_new)
        current = old[500:] + rng.sample(new, num_new)
        found.append(text_drift(old[:500], current, num_permutations=199, seed=seed).p_value)
    return found


def test_a_quarter_of_new_intents_is_seen_in_real_messages(intents: dict[str, list[str]]) -> None:
    p_values = banking_p_values(intents, num_new=125, runs=12)
    assert sum(p <= LEVEL for p in p_values) >= 11


def test_real_messages_without_change_do_not_alarm(intents: dict[str, list[str]]) -> None:
    runs = 25
    alarms = sum(p <= LEVEL for p in banking_p_values(intents, num_new=0, runs=runs))
    assert alarms / runs <= LEVEL + 2 * sqrt(LEVEL * (1 - LEVEL) / runs)
