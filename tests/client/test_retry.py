import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from perennial_client import AccessError, BusyError, ConflictError, Problem, RefusedError, Retry
from perennial_client.errors import ApiError, ClientError, UnreachableError, error_for
from perennial_client.retry import Attempts

DOWN = UnreachableError("no answer")


def busy(retry_after_s: float | None) -> BusyError:
    return BusyError(
        Problem(status=503, code="unavailable", detail="", retry_after_s=retry_after_s)
    )


@given(num_failed=st.integers(1, 10_000), jitter=st.floats(0, 1), asked_s=st.floats(0, 100))
def test_wait_is_what_was_asked_and_a_bounded_part(
    num_failed: int, jitter: float, asked_s: float
) -> None:
    wait_s = Retry(base_wait_s=0.25, max_wait_s=10).wait_s(num_failed, busy(asked_s), jitter)

    assert asked_s <= wait_s <= asked_s + min(10, 0.25 * 2.0 ** min(num_failed - 1, 30))


def test_interval_doubles_up_to_its_limit() -> None:
    retry = Retry(base_wait_s=1, max_wait_s=5)

    assert [retry.wait_s(n, DOWN, 1.0) for n in (1, 2, 3, 4)] == [1, 2, 4, 5]


def test_last_attempt_raises_its_failure() -> None:
    attempts = Attempts(Retry(max_attempts=3))

    waits = [attempts.wait_s_after(DOWN) for _ in range(2)]

    assert len(waits) == 2
    with pytest.raises(UnreachableError):
        attempts.wait_s_after(DOWN)


def test_no_attempt_begins_after_the_total_time() -> None:
    with pytest.raises(BusyError):
        Attempts(Retry(max_total_s=5)).wait_s_after(busy(6.0))


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "malformed", RefusedError),
        (413, "too_large", RefusedError),
        (422, "input_invalid", RefusedError),
        (422, "conflict", ConflictError),
        (401, "unauthenticated", AccessError),
        (403, "forbidden", AccessError),
        (404, "not_found", ApiError),
        (429, "rate_limited", BusyError),
        (500, "internal_server_error", ApiError),
        (502, "unknown", BusyError),
        (503, "overloaded", BusyError),
        (504, "unknown", BusyError),
    ],
)
def test_each_status_has_its_error_and_errors_pickle(
    status: int, code: str, kind: type[ClientError]
) -> None:
    error = error_for(Problem(status=status, code=code, detail="why", errors=("a: b",)))

    assert type(error) is kind
    assert str(pickle.loads(pickle.dumps(error))) == f"{status} {code}: why; a: b"
