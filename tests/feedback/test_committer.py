"""Requests share commits; each is answered after its own rows, and a bad row fails alone."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from perennial.feedback.committer import GroupCommitter, GroupLimits
from perennial.feedback.records import Feedback
from perennial.feedback.store import Outcome, Stored, Submission
from perennial.infra.errors import InputError, OverloadedError, UnavailableError

MakeFeedback = Callable[..., Feedback]


class Disk:
    """A writer whose commits a test holds back, and which refuses rows named `bad`."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.may_commit = threading.Event()
        self.may_commit.set()
        self.is_writing = threading.Event()
        self.error: Exception | None = None

    def write(self, submissions: Sequence[Submission]) -> tuple[Outcome, ...]:
        self.is_writing.set()
        assert self.may_commit.wait(10)
        if self.error is not None:
            raise self.error
        ids = [each.item.id for each in submissions]
        if any(id.startswith("bad") for id in ids):
            raise InputError("the database refuses a row")
        self.groups.append(ids)
        return tuple(Stored(id=id, is_replay=False, status="pending") for id in ids)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def submission(make_feedback: MakeFeedback) -> Callable[..., Submission]:
    def make(id: str, num_bytes: int = 10) -> Submission:
        return Submission(item=make_feedback(id=id), payload_sha256="a" * 64, num_bytes=num_bytes)

    return make


def _committer(disk: Disk, **limits: int) -> GroupCommitter:
    return GroupCommitter(disk.write, GroupLimits(**limits))


def _hold(
    disk: Disk, pool: ThreadPoolExecutor, committer: GroupCommitter, first: Submission
) -> None:
    """Let one group wait for its commit, so that what comes now must gather."""
    disk.may_commit.clear()
    disk.is_writing.clear()
    pool.submit(committer.submit, [first])
    assert disk.is_writing.wait(10)


def _gathered(committer: GroupCommitter, num_rows: int) -> None:
    while committer.load().num_rows < num_rows:
        threading.Event().wait(0.001)


def test_what_gathers_during_a_commit_shares_the_next(
    disk: Disk, submission: Callable[..., Submission]
) -> None:
    committer = _committer(disk)
    with ThreadPoolExecutor(8) as pool:
        _hold(disk, pool, committer, submission("first"))
        waiting = [pool.submit(committer.submit, [submission(f"r{i}")]) for i in range(6)]
        _gathered(committer, 6)
        disk.may_commit.set()
        answers = [job.result(10) for job in waiting]

    assert [len(group) for group in disk.groups] == [1, 6]
    assert [stored.id for (stored,) in answers if isinstance(stored, Stored)] == [
        f"r{i}" for i in range(6)
    ]


def test_nobody_is_answered_before_the_commit(
    disk: Disk, submission: Callable[..., Submission]
) -> None:
    committer = _committer(disk)
    disk.may_commit.clear()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(committer.submit, [submission("a")])
        assert disk.is_writing.wait(10)
        assert not answer.done()
        disk.may_commit.set()
        assert answer.result(10)


@pytest.mark.parametrize("limits", [{"group_rows": 4}, {"group_bytes": 40}])
def test_groups_are_bounded_in_rows_and_bytes(
    disk: Disk, submission: Callable[..., Submission], limits: dict[str, int]
) -> None:
    outcomes = _committer(disk, **limits).submit([submission(f"r{i}") for i in range(10)])

    assert [len(group) for group in disk.groups] == [4, 4, 2]
    assert len(outcomes) == 10


def test_row_larger_than_a_group_is_a_group(
    disk: Disk, submission: Callable[..., Submission]
) -> None:
    _committer(disk, group_bytes=5).submit([submission("a", 100), submission("b", 100)])

    assert disk.groups == [["a"], ["b"]]


def test_bad_row_fails_alone_and_the_others_are_stored(
    disk: Disk, submission: Callable[..., Submission]
) -> None:
    ids = ["a", "b", "bad", "c", "d", "e"]

    outcomes = _committer(disk).submit([submission(id) for id in ids])

    assert [isinstance(outcome, Stored) for outcome in outcomes] == [id != "bad" for id in ids]
    assert isinstance(outcomes[2], InputError)
    assert sorted(id for group in disk.groups for id in group) == ["a", "b", "c", "d", "e"]


def test_failed_commit_fails_its_group_and_the_next_goes_on(
    disk: Disk, submission: Callable[..., Submission]
) -> None:
    committer = _committer(disk)
    disk.error = UnavailableError("disk I/O error")

    with pytest.raises(UnavailableError, match="disk I/O error"):
        committer.submit([submission("a")])
    disk.error = None

    assert committer.submit([submission("a")])


def test_bug_in_a_write_fails_its_group_is_logged_whole_and_the_next_goes_on(
    disk: Disk, submission: Callable[..., Submission], caplog: pytest.LogCaptureFixture
) -> None:
    committer = _committer(disk)
    disk.error = KeyError("a bug")

    with pytest.raises(UnavailableError, match="the log says why"):
        committer.submit([submission("a")])
    disk.error = None

    assert "KeyError: 'a bug'" in caplog.text
    assert committer.submit([submission("a")])


def test_nothing_is_answered_at_once(disk: Disk) -> None:
    committer = _committer(disk)
    assert committer.submit([]) == ()
    assert asyncio.run(committer.store([])) == ()
    assert disk.groups == []


def test_full_queue_refuses_and_takes_nothing(
    disk: Disk, submission: Callable[..., Submission]
) -> None:
    committer = _committer(disk, queue_rows=2)
    with ThreadPoolExecutor(4) as pool:
        _hold(disk, pool, committer, submission("first"))
        for id in ("a", "b"):
            pool.submit(committer.submit, [submission(id)])
        _gathered(committer, 2)
        with pytest.raises(OverloadedError) as caught:
            committer.submit([submission("c")])
        disk.may_commit.set()

    assert caught.value.fields["retry_after_s"] == 1
    assert disk.groups == [["first"], ["a", "b"]]


def test_close_commits_what_waits_and_refuses_the_rest(
    disk: Disk, submission: Callable[..., Submission]
) -> None:
    committer = _committer(disk)
    with ThreadPoolExecutor(4) as pool:
        _hold(disk, pool, committer, submission("first"))
        late = pool.submit(committer.submit, [submission("late")])
        _gathered(committer, 1)
        closing = pool.submit(committer.close)
        disk.may_commit.set()

        assert closing.result(10)
        assert late.result(10)
    with pytest.raises(UnavailableError, match="stopped"):
        committer.submit([submission("after")])
    assert disk.groups == [["first"], ["late"]]


def test_writer_that_dies_of_a_bug_leaves_nobody_waiting(
    submission: Callable[..., Submission],
) -> None:
    def broken(_: Sequence[Submission]) -> tuple[Outcome, ...]:
        return ()  # fewer outcomes than rows

    committer = GroupCommitter(broken)
    seen: list[threading.ExceptHookArgs] = []
    before, threading.excepthook = threading.excepthook, seen.append
    try:
        with pytest.raises(UnavailableError, match="stopped"):
            committer.submit([submission("a")])
        assert committer.close()
    finally:
        threading.excepthook = before

    assert [hook.exc_type for hook in seen] == [ValueError]
    assert not committer.is_running


def test_event_loop_is_answered_too_and_a_gone_client_harms_nobody(
    disk: Disk, submission: Callable[..., Submission]
) -> None:
    committer = _committer(disk)

    async def post() -> tuple[Outcome, ...]:
        disk.may_commit.clear()
        gone = asyncio.create_task(committer.store([submission("gone")]))
        stays = asyncio.create_task(committer.store([submission("stays")]))
        await asyncio.sleep(0)
        gone.cancel()
        disk.may_commit.set()
        return await stays

    (stored,) = asyncio.run(post())

    assert stored == Stored(id="stays", is_replay=False, status="pending")
    assert sorted(id for group in disk.groups for id in group) == ["gone", "stays"]
