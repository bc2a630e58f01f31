from hypothesis import given
from hypothesis import strategies as st

from perennial.training.topics import topics

DESK = (
    "when is my refund paid",
    "is a refund paid in cash",
    "how do I water basil",
    "may basil stand in the sun",
)


def test_questions_about_one_thing_share_a_topic() -> None:
    asked = [f"{question} {chr(97 + n)}" for question in DESK for n in range(10)]
    named = topics(asked)
    assert len({*named}) == 4
    assert all(len({*named[at : at + 10]}) == 1 for at in (0, 10, 20, 30))


def test_there_are_at_most_sixteen_topics() -> None:
    asked = [f"about {chr(97 + n) * 3} again" for n in range(24) for _ in range(3)]
    assert len({*topics([f"{text} {n}" for n, text in enumerate(asked)])}) == 16


def test_a_text_that_shares_no_word_with_two_others_has_no_topic() -> None:
    assert topics(["refund now", "a refund", "hello there", "?"]) == ["", "", "", ""]


@given(st.lists(st.sampled_from([*DESK, "", "?", "hello"]), max_size=9))
def test_topics_do_not_depend_on_the_order(texts: list[str]) -> None:
    named = dict(zip(texts, topics(texts), strict=True))
    assert dict(zip(texts[::-1], topics(texts[::-1]), strict=True)) == named
