import os
import signal
import subprocess
import sys
import textwrap
import time
from datetime import UTC, datetime

import pytest

from perennial.infra.clock import new_id
from perennial.infra.errors import InputError, TooLargeError, UnavailableError
from perennial.serving.engine import ChatMessage
from perennial.serving.recorder import Outcome, RecordedAnswer, SpoolingRecorder
from perennial.serving.spool import Spool, read_segment
from tests.serving.builders import DOWN, FakeSink, wait_until


def answer(id=None):
    return RecordedAnswer(
        id=id or new_id("int"),
        tenant="default",
        task="support",
        messages=(ChatMessage(role="user", content="Wie geht's? 🎉\u2028"),),
        completion="gut\n",
        model_version="base",
        route_role="base",
        subject=None,
        session="s",
        trace_id=None,
        num_prompt_tokens=3,
        num_completion_tokens=2,
        latency_ms=12.5,
        finish_reason="stop",
        received_at=datetime(2026, 1, 1, tzinfo=UTC),
        tags={"a": "b"},
    )


@pytest.fixture
def sink():
    return FakeSink()


@pytest.fixture
def opened(tmp_path, sink):
    made = []

    def open_recorder(**options):
        made.append(SpoolingRecorder(sink, tmp_path / "spool", **{"retry_s": 0.02, **options}))
        return made[-1]

    yield open_recorder
    sink.gate.set()
    for recorder in made:
        recorder.close()


def test_an_answer_is_stored_at_once_while_the_store_is_up(opened, sink):
    recorder = opened()
    assert recorder.record(answer("int_1")) is Outcome.STORED
    assert sink.ids == ["int_1"]
    assert recorder.health().num_bytes_waiting == 0


def test_a_store_that_is_down_gets_everything_later_in_order(opened, sink):
    recorder, ids = opened(), [f"int_{i}" for i in range(20)]
    sink.error = DOWN
    assert {recorder.record(answer(i)) for i in ids[:10]} == {Outcome.SPOOLED}
    assert recorder.health().is_degraded
    sink.error = None
    for i in ids[10:]:
        recorder.record(answer(i))
    wait_until(lambda: not recorder.health().is_degraded)
    assert sink.ids == ids
    assert recorder.health().num_bytes_waiting == 0
    assert recorder.record(answer("int_x")) is Outcome.STORED


def test_a_slow_store_delays_one_answer_by_the_budget_and_the_next_not_at_all(opened, sink):
    recorder = opened(budget_s=0.2)
    sink.gate.clear()
    started = time.monotonic()
    assert recorder.record(answer("int_0")) is Outcome.SPOOLED
    first = time.monotonic() - started
    for i in range(1, 6):
        assert recorder.record(answer(f"int_{i}")) is Outcome.SPOOLED
    assert first < 1
    assert time.monotonic() - started - first < 0.5
    sink.gate.set()
    wait_until(lambda: not recorder.health().is_degraded)
    assert sink.ids == [f"int_{i}" for i in range(6)]


def test_a_full_spool_refuses_loudly_and_never_raises(opened, sink, caplog):
    recorder = opened(max_bytes=1500)
    sink.error = DOWN
    outcomes = [recorder.record(answer(f"int_{i}")) for i in range(10)]
    kept = outcomes.count(Outcome.SPOOLED)
    assert 1 <= kept < 10
    assert recorder.health().num_refused == 10 - kept
    assert "ANSWER NOT RECORDED id=int_9" in caplog.text
    sink.error = None
    wait_until(lambda: not recorder.health().is_degraded)
    assert sink.ids == [f"int_{i}" for i in range(kept)]


def test_a_record_that_the_store_refuses_does_not_hold_up_the_others(opened, sink, tmp_path):
    recorder = opened()
    sink.error = DOWN
    recorder.record(answer("int_0"))
    sink.error = InputError("wrong")
    wait_until(lambda: not recorder.health().is_degraded)
    assert recorder.record(answer("int_1")) is Outcome.REFUSED
    sink.error = RuntimeError("a bug in the store")
    assert recorder.record(answer("int_2")) is Outcome.SPOOLED
    wait_until(lambda: not recorder.health().is_degraded)
    sink.error = None
    assert recorder.record(answer("int_3")) is Outcome.STORED
    aside = (tmp_path / "spool" / "refused.jsonl").read_text()
    assert "int_0" in aside
    assert "int_2" in aside


def test_a_second_process_on_the_spool_is_refused(opened, sink, tmp_path):
    opened()
    with pytest.raises(UnavailableError, match="held by another"):
        SpoolingRecorder(sink, tmp_path / "spool")


KILLED = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {root!r})
    from perennial.infra.errors import UnavailableError
    from perennial.serving.recorder import SpoolingRecorder
    from tests.serving.test_recorder import answer

    def down(_answer):
        raise UnavailableError("down")

    recorder = SpoolingRecorder(down, Path({folder!r}), retry_s=0.01)
    for i in range(100_000):
        recorder.record(answer(f"int_{{i:06d}}"))
        print(f"int_{{i:06d}}", flush=True)
"""


def test_kill_9_loses_nothing_that_was_spooled(opened, sink, tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    code = textwrap.dedent(KILLED).format(root=root, folder=str(tmp_path / "spool"))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    seen = [child.stdout.readline().strip() for _ in range(50)]
    child.send_signal(signal.SIGKILL)
    seen += child.stdout.read().split()
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL
    recorder = opened()
    wait_until(lambda: not recorder.health().is_degraded)
    assert len(seen) >= 50
    assert sink.ids[: len(seen)] == seen
    assert len(sink.ids) <= len(seen) + 1


def test_a_torn_or_damaged_line_is_skipped(tmp_path):
    spool = Spool(tmp_path, max_bytes=1000)
    for body in (b"one", b"two", b"three"):
        spool.append(body)
    spool.close()
    (segment,) = tmp_path.glob("*.spool")
    whole = segment.read_bytes()
    segment.write_bytes(whole.replace(b"two", b"TWO")[:-3])
    assert list(read_segment(segment)) == [b"one"]
    again = Spool(tmp_path, max_bytes=1000)
    again.append(b"four")
    assert [b for s in again.segments() for b in read_segment(s)] == [b"one", b"four"]
    with pytest.raises(TooLargeError):
        again.append(b"x" * 1000)
    again.close()


def test_a_disk_without_room_refuses_and_recovers(opened, sink, monkeypatch):
    recorder = opened()
    sink.error = DOWN
    recorder.record(answer("int_0"))

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("perennial.serving.spool.os.fsync", full)
        assert recorder.record(answer("int_1")) is Outcome.REFUSED
    assert recorder.record(answer("int_2")) is Outcome.SPOOLED
    sink.error = None
    wait_until(lambda: not recorder.health().is_degraded)
    assert sink.ids == ["int_0", "int_2"]
