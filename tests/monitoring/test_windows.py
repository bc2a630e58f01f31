from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.infra.errors import InputError
from perennial.monitoring.windows import Dropped, OnePer, Split, TrafficRow, WindowRules, split
from tests.monitoring.builders import BORDER, END, START, row


def cut(rows: list[TrafficRow], **rules: object) -> Split:
    return split(
        rows,
        since=START,
        reference_until=BORDER,
        until=END,
        rules=WindowRules(**rules),  # type: ignore[arg-type]  # named per test
    )


def ids(rows: tuple[TrafficRow, ...]) -> list[str]:
    return [r.interaction_id for r in rows]


def test_rows_fall_on_their_side_of_half_open_borders() -> None:
    times = [START, BORDER - timedelta(microseconds=1), BORDER, END - timedelta(microseconds=1)]
    result = cut([row(n, at=t) for n, t in enumerate(times)])
    assert result.reference is not None
    assert ids(result.reference.rows) == ["i00000", "i00001"]
    assert ids(result.current.rows) == ["i00002", "i00003"]


def test_rows_outside_both_windows_are_counted() -> None:
    result = cut([row(1, at=START - timedelta(seconds=1)), row(2, at=END), row(3, at=BORDER)])
    assert result.current.dropped == {Dropped.OUTSIDE: 2}


def test_no_earlier_row_means_no_reference() -> None:
    assert cut([row(at=BORDER)]).reference is None


def test_an_interaction_delivered_twice_counts_once() -> None:
    result = cut([row(1, at=BORDER), row(1, at=BORDER)])
    assert ids(result.current.rows) == ["i00001"]
    assert result.current.dropped == {Dropped.DUPLICATE: 1}


def test_a_session_is_one_row_with_its_worst_feedback() -> None:
    result = cut(
        [
            row(1, at=BORDER, session="s", thumbs=1),
            row(2, at=BORDER + timedelta(hours=1), session="s", thumbs=-1),
            row(3, at=BORDER + timedelta(hours=2), session="s", has_correction=True),
        ]
    )
    (kept,) = result.current.rows
    assert (kept.interaction_id, kept.thumbs, kept.has_correction) == ("i00001", -1, True)
    assert result.current.dropped == {Dropped.SAME_GROUP: 2}


def test_rows_without_a_session_stand_for_themselves() -> None:
    assert len(cut([row(n, at=BORDER) for n in range(3)]).current.rows) == 3


def test_a_session_across_the_border_is_in_the_reference_only() -> None:
    result = cut(
        [row(1, at=BORDER - timedelta(hours=1), session="s"), row(2, at=BORDER, session="s")]
    )
    assert result.reference is not None
    assert ids(result.reference.rows) == ["i00001"]
    assert result.current.rows == ()


def test_a_subject_counts_once_a_day() -> None:
    hours = (0, 1, 25)
    rows = [row(n, at=BORDER + timedelta(hours=n), subject="ann") for n in hours]
    result = cut(rows, one_per=OnePer.SUBJECT_DAY)
    assert ids(result.current.rows) == ["i00000", "i00025"]


def test_asking_again_within_ten_minutes_is_a_retry_and_later_is_not() -> None:
    asked = {"subject": "ann", "prompt": "Where is my card?"}
    rows = [
        row(1, at=BORDER, **asked),
        row(
            2,
            at=BORDER + timedelta(minutes=9),
            thumbs=-1,
            **asked | {"prompt": "where is MY card?"},
        ),
        row(3, at=BORDER + timedelta(minutes=60), **asked),
    ]
    result = cut(rows, one_per=OnePer.INTERACTION)
    assert ids(result.current.rows) == ["i00001", "i00003"]
    assert result.current.rows[0].thumbs == -1
    assert result.current.dropped == {Dropped.RETRY: 1}


def test_different_people_may_ask_the_same() -> None:
    rows = [row(n, at=BORDER, subject=f"s{n}", prompt="hello") for n in range(3)]
    assert len(cut(rows).current.rows) == 3


def test_a_long_window_is_thinned_evenly() -> None:
    result = cut([row(n, at=BORDER + timedelta(minutes=n)) for n in range(10)], max_rows=5)
    assert ids(result.current.rows) == ["i00000", "i00002", "i00004", "i00006", "i00008"]
    assert result.current.dropped == {Dropped.OVER_LIMIT: 5}


@given(st.permutations(range(12)))
def test_the_order_of_delivery_does_not_matter(order: list[int]) -> None:
    rows = [row(n, at=BORDER + timedelta(minutes=n // 2), session=f"s{n % 5}") for n in range(12)]
    assert cut([rows[n] for n in order]) == cut(rows)


@given(st.lists(st.integers(0, 30), max_size=40))
def test_every_row_is_kept_or_counted(nums: list[int]) -> None:
    rows = [row(n, at=BORDER + timedelta(minutes=n), session=f"s{n % 7}") for n in nums]
    current = cut(rows, max_rows=5).current
    assert len(current.rows) + sum(current.dropped.values()) == len(nums)


def test_the_digest_follows_rows_and_feedback() -> None:
    plain = cut([row(1, at=BORDER)])
    assert plain.digest == cut([row(1, at=BORDER)]).digest
    assert plain.digest != cut([row(2, at=BORDER)]).digest
    assert plain.digest != cut([row(1, at=BORDER, thumbs=-1)]).digest
    assert plain.digest != cut([row(1, at=START)]).digest


def test_borders_out_of_order_are_refused() -> None:
    with pytest.raises(InputError, match="in order"):
        split([], since=END, reference_until=BORDER, until=START, rules=WindowRules())


def test_naive_times_are_refused() -> None:
    with pytest.raises(InputError, match="aware"):
        row(at=datetime(2026, 1, 1))  # noqa: DTZ001  # the mistake under test


@pytest.mark.parametrize("rules", [{"max_rows": 0}, {"retry_within_s": -1.0}])
def test_senseless_rules_are_refused(rules: dict[str, float]) -> None:
    with pytest.raises(InputError):
        WindowRules(**rules)  # type: ignore[arg-type]  # named per test
