import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.monitoring.descriptors import describe, document_counts, is_refusal, tokens


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Where's my CARD?", ["where", "s", "my", "card"]),
        ("ＰＩＮ 12", ["pin", "12"]),
        ("卡片丢了", ["卡", "片", "丢", "了"]),
        ("Straße", ["strasse"]),
        ("", []),
        ("?!…", []),
    ],
)
def test_tokens(text: str, expected: list[str]) -> None:
    assert tokens(text) == expected


def test_descriptors_by_hand() -> None:
    found = describe("pin 12", "no no no no no", reference={"pin": 3}, num_own=0)
    assert (found.num_prompt_chars, found.num_prompt_words) == (6, 2)
    assert (found.num_answer_chars, found.num_answer_words) == (14, 5)
    assert found.prompt_digit_share == pytest.approx(2 / 6)
    assert found.prompt_new_word_share == 0.5
    assert found.answer_repeat_share == pytest.approx(2 / 3)
    assert not found.is_refusal


def test_no_reference_leaves_new_words_unknown() -> None:
    assert describe("a", "b", reference=None).prompt_new_word_share is None


def test_a_reference_row_does_not_vouch_for_its_own_words() -> None:
    prompts = ["lost card", "new card"]
    known = document_counts(prompts)
    own = describe(prompts[0], "", reference=known, num_own=1)
    assert own.prompt_new_word_share == 0.5


@pytest.mark.parametrize(
    "answer",
    ["I'm sorry, but no.", "I’m unable to say", "As an AI, I have no card.", "I cannot help you."],
)
def test_refusals_are_seen(answer: str) -> None:
    assert is_refusal(answer)


@pytest.mark.parametrize("answer", ["Sorry to hear it. Open the app.", "You cannot go wrong.", ""])
def test_answers_are_not_refusals(answer: str) -> None:
    assert not is_refusal(answer)


@given(st.text(max_size=200), st.text(max_size=200))
def test_shares_stay_between_zero_and_one(prompt: str, answer: str) -> None:
    found = describe(prompt, answer, reference=document_counts(["some words"]))
    shares = (found.prompt_digit_share, found.prompt_new_word_share, found.answer_repeat_share)
    assert all(share is not None and 0 <= share <= 1 for share in shares)
