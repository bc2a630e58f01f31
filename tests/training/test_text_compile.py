from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.infra.errors import InputError
from perennial.training.compile import (
    Compiled,
    CompileLimits,
    Drop,
    FeedbackRow,
    compile_feedback,
)
from perennial.training.text import clean, fit_tfidf, normalise

NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)


def row(number: int, **fields: Any) -> FeedbackRow:
    given: dict[str, Any] = {
        "event_id": f"fb_{number:03}",
        "interaction_id": f"int_{number}",
        "subject": f"s{number}",
        "kind": "correction",
        "messages": (("user", f"How long is warranty {number}?"),),
        "text": f"Warranty {number} runs for {number + 50} months.",
        "may_train": True,
        "received_at": NOON + timedelta(minutes=number),
    }
    return FeedbackRow(**{**given, **fields})


def compiled(*rows: FeedbackRow, **limits: Any) -> Compiled:
    return compile_feedback(rows, CompileLimits(**limits))


def test_clean_removes_hidden_characters_and_composes() -> None:
    assert clean("a\u202eb\u200bc\x00d\ue000e\U000e0041f") == "abcdef"
    assert clean("e\u0301") == "é"
    assert clean(" one\r\ntwo\t ") == "one\ntwo"


@given(st.text())
def test_clean_is_idempotent_and_encodable(text: str) -> None:
    once = clean(text)
    assert clean(once) == once
    once.encode()


def test_normalise_keeps_the_decimals_that_make_two_prices_differ() -> None:
    assert normalise("It COSTS  9.99!") == "it costs 9.99"
    assert normalise("9.99") != normalise("9.95")


def test_tfidf_similarity_by_hand() -> None:
    tfidf = fit_tfidf(["a b", "a c"])
    assert tfidf.similarity("a b", "a b") == pytest.approx(1)
    assert tfidf.similarity("b", "c") == 0
    # idf(a) = log(3/3)+1 = 1, idf(b) = idf(c) = log(3/2)+1 = 1.405: cosine = 1/(1+1.405²)
    assert tfidf.similarity("a b", "a c") == pytest.approx(1 / (1 + 1.4054651**2), rel=1e-6)


def test_a_correction_becomes_an_example_with_its_lineage() -> None:
    (example,) = compiled(row(1)).examples
    assert (example.kind, example.event_ids, example.subject) == ("correction", ("fb_001",), "s1")
    assert example.completion == "Warranty 1 runs for 51 months."


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"may_train": False}, Drop.NO_CONSENT),
        ({"kind": "binary"}, Drop.UNSUPPORTED_KIND),
        ({"text": " \u200b "}, Drop.EMPTY),
        ({"messages": (("system", "be kind"),)}, Drop.EMPTY),
        ({"text": "x " * 3000}, Drop.TOO_LONG),
    ],
)
def test_a_row_that_teaches_nothing_is_counted(fields: dict[str, Any], reason: Drop) -> None:
    result = compiled(row(1, **fields), row(2))
    assert result.num_dropped == {reason: 1}
    assert [example.id for example in result.examples] == ["fb_002"]


def test_the_newest_correction_of_a_prompt_wins_whatever_the_spelling() -> None:
    older = row(1, messages=(("user", "how long is the  Warranty"),), text="38 months")
    newer = row(2, messages=(("user", "How long is the warranty?"),), text="64 months")
    result = compiled(newer, older)
    assert [example.completion for example in result.examples] == ["64 months"]
    assert result.drops == {"fb_001": Drop.SUPERSEDED}


def test_events_that_agree_stay_in_the_lineage() -> None:
    same = [row(n, messages=(("user", "Who?"),), text="Marit Oskale") for n in (1, 2, 3)]
    result = compiled(*same)
    assert result.examples[0].event_ids == ("fb_001", "fb_002", "fb_003")
    assert result.num_dropped == {Drop.DUPLICATE: 2}


def test_near_duplicates_are_merged_but_numbers_are_not() -> None:
    question = "please tell me now how long is the standard warranty of my new pod at home"
    rows = [
        row(1, messages=(("user", question),), text="a"),
        row(2, messages=(("user", question + " thanks"),), text="a"),
        row(3, messages=(("user", question + " 2"),), text="a"),
    ]
    result = compiled(*rows)
    assert [example.id for example in result.examples] == ["fb_001", "fb_003"]
    assert result.num_dropped == {Drop.NEAR_DUPLICATE: 1}


def test_one_subject_gives_at_most_its_cap_and_the_newest_stay() -> None:
    flood = [row(n, subject="loud") for n in range(8)]
    result = compiled(*flood, row(20, subject=None), row(21, subject=None), max_per_subject=3)
    assert [example.id for example in result.examples] == [
        "fb_005",
        "fb_006",
        "fb_007",
        "fb_020",
        "fb_021",
    ]
    assert result.num_dropped == {Drop.SUBJECT_CAP: 5}


@given(st.permutations(range(8)), st.integers(1, 4))
def test_compilation_ignores_order_and_accounts_for_every_row(order: list[int], cap: int) -> None:
    rows = [row(n, subject=f"s{n % 2}", text=f"answer {n % 3}") for n in range(8)]
    result = compiled(*(rows[n] for n in order), max_per_subject=cap)
    assert result == compiled(*rows, max_per_subject=cap)
    assert {row.event_id for row in rows} == {e.id for e in result.examples} | set(result.drops)


def test_limits_are_checked() -> None:
    with pytest.raises(InputError, match="near_duplicate"):
        CompileLimits(near_duplicate=0)
