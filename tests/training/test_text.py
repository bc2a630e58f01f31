import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.training.text import clean, cosine, fit_tfidf, normalise, particulars, tokens, words


def test_clean_removes_hidden_characters_and_composes() -> None:
    assert clean("a\u202eb\u200bc\x00d\ue000e\U000e0041f") == "abcdef"
    assert clean("e\u0301") == clean("e\u200b\u0301") == "é"
    assert clean("a\ufe0f\ufe0eb\ufe01\U000e0141\u034f") == "ab"
    assert clean("❤\ufe0f\ufe0e") == "❤\ufe0f"
    assert clean(" one\r\ntwo\t ") == "one\ntwo"


@pytest.mark.parametrize("end", ["\r\n", "\r", "\x85", "\u2028", "\u2029"])
def test_every_line_of_a_clean_text_ends_in_a_line_feed(end: str) -> None:
    assert clean(f"one{end}two{end}{end}") == "one\ntwo"


@given(st.text())
def test_clean_is_idempotent_and_encodable(text: str) -> None:
    once = clean(text)
    assert clean(once) == once
    once.encode()


def test_normalise_keeps_the_decimals_that_make_two_prices_differ() -> None:
    assert normalise("It COSTS  9.99!") == "it costs 9.99"
    assert normalise("9.99") != normalise("9.95")


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("दिन", "दान"),
        ("வடை", "வடி"),
        ("a list in C++?", "a list in C#?"),
        ("3 - 4", "3 + 4"),
        ("8 / 4", "8 * 4"),
        ("x >= 3", "x < 3"),
        ("-5 €", "5 €"),
        ("-$5", "$5"),
        ("x != 3", "x = 3"),
        ("a / b", "a * b"),
        ("温度是-5度", "温度是5度"),
        ("5 $", "5 €"),
        ("👍", "👎"),
    ],
)
def test_what_differs_in_a_mark_or_a_sign_is_not_the_same(left: str, right: str) -> None:
    assert normalise(left) != normalise(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("**Open** 9 – 17 (daily).", "open 9-17, daily"),
        ("\u22125", "-5"),
        ("> quoted", "quoted"),
        ("| a | b |", "* a b"),
        ("葛\U000e0100", "葛"),
        ("می‌خواهم", "میخواهم"),
        ("❤️", "❤"),
        ("`pip`", "pip"),
    ],
)
def test_how_a_text_is_set_makes_no_difference(left: str, right: str) -> None:
    assert normalise(left) == normalise(right)


def test_words_are_whole_in_every_script() -> None:
    assert words("हिन्दी में, -5 °C") == ["हिन्दी", "में", "-5", "c"]
    assert tokens("共5天, サーバー๑๕") == ["共", "5", "天", "サ", "ー", "バ", "ー", "๑๕"]
    assert particulars("C++ in box 14 > -5") == ("c++", "14", ">", "-5")


@pytest.mark.parametrize("char", "a1+-ー天\u0301 .*/>@$#")
def test_a_long_text_takes_no_longer_for_what_it_repeats(char: str) -> None:
    # A quadratic pattern takes minutes here, and the test its time limit.
    assert len(normalise(char * 300_000)) <= 600_000


def test_cosine_of_tfidf_by_hand() -> None:
    tfidf = fit_tfidf(["a b", "a c"])

    def similarity(left: str, right: str) -> float:
        return cosine(tfidf.vector(left), tfidf.vector(right))

    assert similarity("a b", "a b") == pytest.approx(1)
    assert similarity("b", "c") == 0
    # idf(a) = log(3/3)+1 = 1, idf(b) = idf(c) = log(3/2)+1 = 1.405: cosine = 1/(1+1.405²)
    assert similarity("a b", "a c") == pytest.approx(1 / (1 + 1.4054651**2), rel=1e-6)
