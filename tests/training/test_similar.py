import math

from hypothesis import given
from hypothesis import strategies as st

from perennial.training.similar import Said, near_duplicates, shingles, similarity

_TEXTS = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12).map(" ".join)


def said(asked: str, told: str = "yes", context: str = "") -> Said:
    return Said(context=context, asked=asked, told=told)


def one(_: str) -> float:
    return 1.0


def test_similarity_by_hand() -> None:
    # {a, b, c, "a b", "b c"} and {a, b, d, "a b", "b d"} share three of seven.
    assert similarity(shingles("a b c"), shingles("A b d?"), one) == 3 / 7
    assert similarity(shingles(""), shingles("?!"), one) == 1


def test_the_order_of_words_counts() -> None:
    there, back = said("train from Lund to Oslo"), said("train from Oslo to Lund")
    assert near_duplicates([there, there, back], 0.9) == [False, True, False]


def test_another_number_context_or_answer_is_no_duplicate() -> None:
    long = "how many days do I have to send my order back to the shop when I do not like it"
    rows = [
        said(long, "you have 30 days"),
        said(long, "you have 14 days"),
        said(long, "ask the shop"),
        said(long, "you have 30 days", "system: be brief"),
        said(f"{long} please", "you have 30 days"),
    ]
    assert near_duplicates(rows, 0.85) == [False, False, False, False, True]


def test_other_signs_or_another_order_of_them_is_no_duplicate() -> None:
    rows = [
        said("reply with 👍 or 👎 to this", "👍"),
        said("reply with 👍 or 👎 to this", "👎"),
        said("Is 5 - 3 + 2 above zero?"),
        said("Is 5 + 3 * 2 above zero?"),
    ]
    assert near_duplicates(rows, 0.85) == [False] * 4


def test_instructions_that_all_questions_share_do_not_make_them_alike() -> None:
    task = " ".join(f"instruction{chr(97 + n)}" for n in range(20))
    names = ("maple", "tulip", "basil", "clover", "thyme", "fern", "moss", "reed")
    rows = [said(f"{task} is {name} tall", "no") for name in names]
    words_alone = similarity(shingles(rows[0].asked), shingles(rows[1].asked), one)
    assert words_alone > 0.85
    assert not any(near_duplicates(rows, 0.85))


@given(st.lists(_TEXTS, max_size=12), st.sampled_from([0.3, 0.5, 0.7, 0.8, 0.9, 1.0]))
def test_the_index_finds_what_comparing_all_would(texts: list[str], threshold: float) -> None:
    sets = [shingles(text) for text in [*texts, *(["yes"] * len(texts))]]
    num = len(sets)

    def rarity(shingle: str) -> float:
        return math.log((1 + num) / (1 + sum(shingle in found for found in sets))) + 1

    kept: list[str] = []
    expected = []
    for text in texts:
        expected.append(
            any(similarity(shingles(text), shingles(k), rarity) >= threshold for k in kept)
        )
        if not expected[-1]:
            kept.append(text)
    assert near_duplicates([said(text) for text in texts], threshold) == expected
