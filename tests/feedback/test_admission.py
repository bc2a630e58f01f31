"""Buckets fill with time, not with requests; a low disk refuses before it is full."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.feedback import admission
from perennial.feedback.admission import Admission, DiskWatermark, Rate, TokenBuckets
from perennial.infra.errors import OverloadedError, RateLimitedError


class Time:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def test_bucket_allows_the_burst_then_the_rate() -> None:
    time = Time()
    buckets = TokenBuckets(Rate(per_s=2, burst=4), time)

    assert [buckets.take("k", 1) for _ in range(5)] == [0, 0, 0, 0, 0.5]
    time.now += 0.5
    assert [buckets.take("k", 1), buckets.take("k", 1)] == [0, 0.5]


def test_names_have_buckets_of_their_own() -> None:
    buckets = TokenBuckets(Rate(per_s=1, burst=1), Time())

    assert [buckets.take(name, 1) for name in ("a", "b", "a")] == [0, 0, 1]


def test_request_above_the_burst_waits_for_a_full_bucket() -> None:
    time = Time()
    buckets = TokenBuckets(Rate(per_s=10, burst=50), time)

    assert buckets.take("k", 1000) == 0
    assert buckets.take("k", 1000) == pytest.approx(5)
    time.now += 5
    assert buckets.take("k", 1000) == 0


def test_rate_of_zero_is_no_limit() -> None:
    buckets = TokenBuckets(Rate(per_s=0, burst=0), Time())

    assert {buckets.take("k", 1000) for _ in range(1000)} == {0}


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 5)), max_size=60))
def test_never_more_than_burst_and_rate_together(steps: list[tuple[float, int]]) -> None:
    time = Time()
    buckets = TokenBuckets(Rate(per_s=2, burst=6), time)
    taken, start = 0, time.now
    for pause, num in steps:
        time.now += pause
        taken += num if buckets.take("k", num) == 0 else 0

        assert taken <= 6 + 2 * (time.now - start) + 1e-6


def test_buckets_of_unused_names_are_forgotten() -> None:
    buckets = TokenBuckets(Rate(per_s=1, burst=1), Time())
    for number in range(admission._MAX_BUCKETS + 10):
        buckets.take(str(number), 1)

    assert len(buckets._left) == admission._MAX_BUCKETS


def test_low_disk_refuses_until_there_is_room() -> None:
    time, free = Time(), [10]
    disk = DiskWatermark(Path("/data"), 100, time, lambda _: free[0])

    with pytest.raises(OverloadedError, match="almost full") as caught:
        disk.check()
    assert caught.value.fields["retry_after_s"] == 30
    free[0] = 1000
    time.now += 1
    disk.check()


def test_disk_is_asked_once_a_second_at_most() -> None:
    asked: list[Path] = []

    def free(path: Path) -> int:
        asked.append(path)
        return 1000

    disk = DiskWatermark(Path("/data"), 100, Time(), free)
    for _ in range(50):
        disk.check()

    assert asked == [Path("/data")]


def test_refusal_says_how_long_to_wait() -> None:
    time = Time()
    limits = Admission(
        keys=TokenBuckets(Rate(per_s=1, burst=1), time),
        subjects=TokenBuckets(Rate(per_s=0.5, burst=1), time),
        disk=None,
    )
    limits.admit("key", 1)
    limits.admit_subject("acme", "u1")
    limits.admit_subject("acme", None)
    limits.admit_subject("bolt", "u1")

    with pytest.raises(RateLimitedError, match="API key") as key:
        limits.admit("key", 1)
    with pytest.raises(RateLimitedError, match="subject") as subject:
        limits.admit_subject("acme", "u1")
    assert (key.value.fields["retry_after_s"], subject.value.fields["retry_after_s"]) == (1, 2)
