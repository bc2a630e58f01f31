"""The background sender against the real API: what was kept is delivered, once."""

import shutil
import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from perennial_client import (
    BackgroundSender,
    Counts,
    ItemTooLargeError,
    SenderClosedError,
    Signal,
    SpoolFullError,
    comment,
    feedback,
    interaction,
)
from perennial_client.segment import Durability, Segment, adopt_segments, create_segment

from perennial.feedback.admission import Admission, Rate, TokenBuckets
from tests.client.site import Fault, Site, wait_until

MakeSender = Callable[..., BackgroundSender]


def said(*texts: str, **fields: Any) -> list[Any]:
    return [feedback("int_1", comment(text), **fields) for text in texts]


def enqueue(sender: BackgroundSender, *texts: str, **fields: Any) -> None:
    for item in said(*texts, **fields):
        sender.enqueue(item)


def names(num: int) -> list[str]:
    return [f"{index:04d}" for index in range(num)]


def test_items_go_in_batches_and_the_spool_is_empty_after(
    site: Site, make_sender: MakeSender, spool_dir: Path
) -> None:
    sender = make_sender(site, max_batch_items=100)

    enqueue(sender, *names(250))

    assert sender.flush()
    assert site.comments() == names(250)
    assert [seen.path for seen in site.seen] == ["/v1/feedback/batch"] * 3
    assert list(spool_dir.iterdir()) == []
    assert sender.counts() == Counts(num_delivered=250, num_refused=0, num_dropped=0)


def test_lone_item_goes_when_it_is_old_enough(site: Site, make_sender: MakeSender) -> None:
    sender = make_sender(site, max_batch_wait_s=0.05)

    enqueue(sender, "alone")

    wait_until(lambda: site.comments() == ["alone"])


def test_both_kinds_share_a_batch_and_meet(site: Site, make_sender: MakeSender) -> None:
    sender = make_sender(site)
    enqueue(sender, "about it")

    sender.enqueue(
        interaction(
            id="int_1",
            task="support",
            messages=[{"role": "user", "content": "?"}],
            completion="!",
            model_version="acme-1",
        )
    )

    assert sender.flush()
    assert [each.status for each in site.feedback()] == ["joined"]


def test_large_items_share_no_batch_beyond_the_servers_limit(
    site: Site, make_sender: MakeSender
) -> None:
    sender = make_sender(site)

    enqueue(sender, *(f"{index}{'x' * 900_000}" for index in range(7)))

    assert sender.flush()
    assert len(site.feedback()) == 7
    assert len(site.seen) == 2


def test_what_was_kept_while_the_server_was_down_is_delivered(
    down: Site, make_sender: MakeSender
) -> None:
    sender = make_sender(down)
    enqueue(sender, "early")
    assert not sender.flush(0.2)

    down.start()
    try:
        assert sender.flush()
    finally:
        down.stop()

    assert down.comments() == ["early"]


def test_lost_answers_are_replayed(site: Site, make_sender: MakeSender) -> None:
    sender = make_sender(site)
    site.faults += [Fault(status=503, headers={"Retry-After": "1"}, is_late=True)] * 2

    enqueue(sender, *names(20))

    assert sender.flush()
    assert site.comments() == names(20)
    assert site.seen[1].at_s - site.seen[0].at_s >= 1.0


def test_restarts_between_and_under_batches_lose_and_double_nothing(
    site: Site, make_sender: MakeSender
) -> None:
    sender = make_sender(site, max_batch_items=5)
    writers = [
        threading.Thread(target=enqueue, args=[sender, *names(400)[start::4]]) for start in range(4)
    ]
    for writer in writers:
        writer.start()
    for goal in (40, 120, 240):
        wait_until(lambda goal=goal: len(site.feedback()) >= goal)
        site.stop()
        site.start()
    for writer in writers:
        writer.join()

    assert sender.flush()
    assert site.comments() == names(400)


def test_refused_item_costs_itself_only(site: Site, make_sender: MakeSender) -> None:
    sender = make_sender(site)
    enqueue(sender, "a")
    sender.enqueue(feedback("int_1", Signal({"kind": "label", "value": ""})))
    enqueue(sender, "b")

    assert sender.flush()
    assert site.comments() == ["a", "b"]
    assert sender.counts() == Counts(num_delivered=2, num_refused=1, num_dropped=0)


def test_batch_that_a_proxy_refuses_is_halved(site: Site, make_sender: MakeSender) -> None:
    sender = make_sender(site)
    site.faults += [Fault(status=413)] * 4  # 8 items, 4, 2 and then one of them

    enqueue(sender, *names(8))

    assert sender.flush()
    assert site.comments() == names(8)[1:]
    assert sender.counts().num_refused == 1


def test_items_of_one_busy_subject_are_sent_until_they_are_taken(
    down: Site, make_sender: MakeSender
) -> None:
    no_limit, slow = Rate(per_s=0, burst=0), Rate(per_s=20, burst=2)
    down.admission = Admission(keys=TokenBuckets(no_limit), subjects=TokenBuckets(slow), disk=None)
    down.start()
    try:
        sender = make_sender(down)
        enqueue(sender, *names(8), subject="eager")
        assert sender.flush()
    finally:
        down.stop()

    assert down.comments() == names(8)
    assert sender.counts() == Counts(num_delivered=8, num_refused=0, num_dropped=0)


@pytest.mark.parametrize("status", [401, 404, 500])
def test_what_an_operator_must_mend_keeps_the_items(
    site: Site, make_sender: MakeSender, status: int
) -> None:
    sender = make_sender(site)
    site.faults += [Fault(status=status)] * 3

    enqueue(sender, "kept")

    assert sender.flush()
    assert site.comments() == ["kept"]


def test_full_spool_raises(down: Site, make_sender: MakeSender) -> None:
    sender = make_sender(down, max_bytes=1_000)

    with pytest.raises(SpoolFullError, match="bytes wait"):
        enqueue(sender, *names(10))


def test_full_spool_drops_and_counts_where_that_was_chosen(
    down: Site, make_sender: MakeSender, spool_dir: Path
) -> None:
    sender = make_sender(down, max_bytes=1_000, when_full="drop")

    enqueue(sender, *names(10))

    kept = sum(path.stat().st_size for path in spool_dir.iterdir())
    assert 0 < sender.counts().num_dropped < 10
    assert kept <= 1_000


def test_what_a_dead_process_left_counts_too(down: Site, make_sender: MakeSender) -> None:
    first = make_sender(down, max_bytes=1_000, when_full="drop")
    enqueue(first, *names(10))
    first.close()

    with pytest.raises(SpoolFullError):
        enqueue(make_sender(down, max_bytes=1_000), "more")


def test_room_comes_back_with_the_server(site: Site, make_sender: MakeSender) -> None:
    sender = make_sender(site, max_bytes=1_000)

    for text in names(20):
        enqueue(sender, text)
        assert sender.flush()

    assert site.comments() == names(20)


def test_item_that_no_server_takes_is_refused_at_once(down: Site, make_sender: MakeSender) -> None:
    with pytest.raises(ItemTooLargeError, match="1048576"):
        enqueue(make_sender(down), "x" * (1 << 20))


def test_closed_sender_says_so(site: Site, make_sender: MakeSender) -> None:
    sender = make_sender(site)
    enqueue(sender, "before")

    sender.close()

    assert site.comments() == ["before"]
    with pytest.raises(SenderClosedError):
        enqueue(sender, "after")


def test_sender_closed_in_vain_leaves_its_items_to_the_next(
    down: Site, make_sender: MakeSender
) -> None:
    first = make_sender(down)
    enqueue(first, "left")
    first.close()

    down.start()
    try:
        assert make_sender(down).flush()
    finally:
        down.stop()

    assert down.comments() == ["left"]


def test_batch_that_was_sent_but_not_deleted_is_sent_again_and_stored_once(
    site: Site, make_sender: MakeSender, spool_dir: Path, tmp_path: Path
) -> None:
    sender = make_sender(site)
    enqueue(sender, *names(10))
    (segment,) = spool_dir.iterdir()
    shutil.copy(segment, tmp_path / segment.name)
    assert sender.flush()
    shutil.copy(tmp_path / segment.name, segment)

    assert make_sender(site).flush()

    assert site.comments() == names(10)
    assert len(site.seen) == 2


def test_line_that_was_cut_off_or_spoilt_costs_itself_only(
    site: Site, make_sender: MakeSender, spool_dir: Path, down: Site
) -> None:
    sender = make_sender(site)
    enqueue(sender, "a", "b", "c")
    (segment,) = spool_dir.iterdir()
    first, second, third = segment.read_bytes().splitlines(keepends=True)
    sender.flush()
    damaged = feedback_line("d", first), b"\0" * len(second) + b"\n", third[:-9]
    segment.write_bytes(b"".join(damaged))

    assert make_sender(site).flush()

    assert site.comments() == ["a", "b", "c", "d"]


def feedback_line(text: str, like: bytes) -> bytes:
    (item,) = said(text)
    old_key = like.split(b'"idempotency_key":"')[1].split(b'"')[0]
    return like.replace(b'"a"', f'"{text}"'.encode()).replace(old_key, item.key.encode())


def test_segment_of_a_living_process_is_not_adopted(tmp_path: Path) -> None:
    held = create_segment(tmp_path, "disk")
    held.append(b"{}\n", "disk")

    assert adopt_segments(tmp_path) == []
    held.release()
    (adopted,) = adopt_segments(tmp_path)
    assert (adopted.path, adopted.num_bytes) == (held.path, 3)
    assert adopted.path.stat().st_mode & 0o077 == 0
    adopted.discard()


class Noted(FileIO):
    """A file that remembers what was asked of it; a sync asks for its number."""

    asked: tuple[str, ...] = ()

    def write(self, content: Any) -> int:
        self.asked += ("write",)
        return super().write(content)

    def fileno(self) -> int:
        self.asked += ("fileno",)
        return super().fileno()


@pytest.mark.parametrize(
    ("durability", "asked"), [("disk", ("write", "fileno")), ("process", ("write",))]
)
def test_disk_durability_syncs_what_was_written(
    tmp_path: Path, durability: Durability, asked: tuple[str, ...]
) -> None:
    with Noted(tmp_path / "noted", "x") as file:
        Segment(path=tmp_path / "noted", file=file).append(b"{}\n", durability)

        assert file.asked == asked
