"""The contract of `FeedbackStore`: every implementation passes this on every database."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from msgspec.structs import replace
from sqlalchemy import func, select, update

from perennial.feedback.records import (
    Binary,
    Correction,
    Feedback,
    Interaction,
    Message,
    Target,
)
from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.feedback.store import FeedbackStore, Stored, Submission
from perennial.feedback.tables import FeedbackRow, InteractionRow
from perennial.infra.clock import utc_now
from perennial.infra.db import Database
from perennial.infra.errors import ConflictError, NotFoundError, UnavailableError
from tests.feedback.writing import OTHER_PAYLOAD, PAYLOAD, put, put_keyed

MakeInteraction = Callable[..., Interaction]
MakeFeedback = Callable[..., Feedback]
LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
FAR_AHEAD = datetime(2100, 1, 1, tzinfo=UTC)


def _count(database: Database, table: type[FeedbackRow] | type[InteractionRow]) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def test_sql_store_is_a_feedback_store(store: SqlFeedbackStore) -> None:
    as_protocol: FeedbackStore = store

    as_protocol.ping()


def test_interaction_comes_back_as_sent_but_received_now(
    store: SqlFeedbackStore, make_interaction: MakeInteraction
) -> None:
    item = make_interaction(tags={"región": "北"}, latency_ms=12.5, subject="u1")

    put(store, item)

    found = store.get_interaction("acme", item.id)
    assert found == replace(item, received_at=found.received_at)
    assert found.received_at > item.received_at


def test_interaction_id_delivered_twice_is_one_row(
    store: SqlFeedbackStore, database: Database, make_interaction: MakeInteraction
) -> None:
    item = make_interaction()

    first, second = put(store, item), put(store, item)

    assert (first.is_replay, second.is_replay) == (False, True)
    assert _count(database, InteractionRow) == 1


def test_interaction_id_with_another_payload_conflicts(
    store: SqlFeedbackStore, make_interaction: MakeInteraction
) -> None:
    item = make_interaction()
    put(store, item)

    with pytest.raises(ConflictError, match="another payload"):
        put(store, replace(item, completion="Three years."))

    assert store.get_interaction("acme", item.id).completion == "Two years."


def test_two_tenants_may_choose_the_same_id(
    store: SqlFeedbackStore, make_interaction: MakeInteraction
) -> None:
    put(store, make_interaction(id="x", tenant="acme", completion="a"))
    put(store, make_interaction(id="x", tenant="bolt", completion="b"))

    assert store.get_interaction("acme", "x").completion == "a"
    assert store.get_interaction("bolt", "x").completion == "b"


def test_key_replays_the_first_id_and_refuses_another_payload(
    store: SqlFeedbackStore, make_feedback: MakeFeedback
) -> None:
    first = put_keyed(store, make_feedback(), "k")

    again = put_keyed(store, make_feedback(), "k")

    assert (again.id, again.is_replay) == (first.id, True)
    with pytest.raises(ConflictError, match="idempotency key"):
        put_keyed(store, make_feedback(), "k", OTHER_PAYLOAD)
    assert len(store.list_feedback("acme", 0, 10).items) == 1


def test_key_belongs_to_its_tenant(store: SqlFeedbackStore, make_feedback: MakeFeedback) -> None:
    put_keyed(store, make_feedback(tenant="acme"), "k")

    other = put_keyed(store, make_feedback(tenant="bolt"), "k", OTHER_PAYLOAD)

    assert not other.is_replay


def test_feedback_waits_for_its_interaction_and_joins_it(
    store: SqlFeedbackStore, make_interaction: MakeInteraction, make_feedback: MakeFeedback
) -> None:
    about = make_interaction()
    stored = put(store, make_feedback(target=Target(interaction_id=about.id)))
    assert stored.status == "pending"
    assert store.get_feedback("acme", stored.id).task is None

    put(store, about)

    joined = store.get_feedback("acme", stored.id)
    assert (joined.status, joined.interaction_id, joined.task) == ("joined", about.id, "support")
    assert joined.joined_at is not None
    assert joined.joined_at > joined.received_at


def test_feedback_on_a_known_interaction_is_joined_at_once(
    store: SqlFeedbackStore, make_interaction: MakeInteraction, make_feedback: MakeFeedback
) -> None:
    about = make_interaction()
    put(store, about)

    stored = put(store, make_feedback(target=Target(interaction_id=about.id)))

    found = store.get_feedback("acme", stored.id)
    assert (stored.status, found.status, found.task) == ("joined", "joined", "support")
    assert found.joined_at == found.received_at


def test_trace_joins_its_latest_interaction(
    store: SqlFeedbackStore, make_interaction: MakeInteraction, make_feedback: MakeFeedback
) -> None:
    early, late = make_interaction(trace_id="t"), make_interaction(trace_id="t")
    put(store, early)
    put(store, late)

    stored = put(store, make_feedback(target=Target(trace_id="t")))

    assert store.get_feedback("acme", stored.id).interaction_id == late.id


def test_pending_trace_joins_the_interaction_that_arrives(
    store: SqlFeedbackStore, make_interaction: MakeInteraction, make_feedback: MakeFeedback
) -> None:
    stored = put(store, make_feedback(target=Target(trace_id="t")))
    other = put(store, make_feedback(target=Target(trace_id="u")))
    about = make_interaction(trace_id="t")

    put(store, about)

    assert store.get_feedback("acme", stored.id).interaction_id == about.id
    assert store.get_feedback("acme", other.id).status == "pending"


def test_interaction_of_another_tenant_is_never_joined(
    store: SqlFeedbackStore, make_interaction: MakeInteraction, make_feedback: MakeFeedback
) -> None:
    about = make_interaction(tenant="bolt", trace_id="t")
    before = put(store, make_feedback(target=Target(interaction_id=about.id)))

    put(store, about)
    after = put(store, make_feedback(target=Target(trace_id="t")))

    assert store.get_feedback("acme", before.id).status == "pending"
    assert after.status == "pending"
    assert store.feedback_between("support", LONG_AGO, FAR_AHEAD) == ()


def test_inline_feedback_needs_no_interaction(
    store: SqlFeedbackStore, make_feedback: MakeFeedback
) -> None:
    target = Target(messages=(Message(role="user", content="q"),), completion="a")

    stored = put(store, make_feedback(target=target, task="support"))

    (judged,) = store.feedback_between("support", LONG_AGO, FAR_AHEAD)
    assert (stored.status, judged.interaction) == ("joined", None)
    assert judged.feedback.target == target


def test_rows_of_another_tenant_are_not_found(
    store: SqlFeedbackStore, make_interaction: MakeInteraction, make_feedback: MakeFeedback
) -> None:
    item, feedback = make_interaction(), make_feedback()
    put(store, item)
    put(store, feedback)

    with pytest.raises(NotFoundError):
        store.get_interaction("bolt", item.id)
    with pytest.raises(NotFoundError):
        store.get_feedback("bolt", feedback.id)
    assert store.list_interactions("bolt", 0, 10).items == ()
    assert store.list_feedback("bolt", 0, 10).items == ()


def test_batch_keeps_the_good_and_names_the_conflict(
    store: SqlFeedbackStore, make_feedback: MakeFeedback
) -> None:
    submissions = (
        Submission(item=make_feedback(), key="k", payload_sha256=PAYLOAD),
        Submission(item=make_feedback(), key="k", payload_sha256=OTHER_PAYLOAD),
        Submission(item=make_feedback(), key="k", payload_sha256=PAYLOAD),
        Submission(item=make_feedback(), payload_sha256=PAYLOAD),
    )

    first, conflict, replay, fresh = store.write(submissions)

    assert isinstance(first, Stored)
    assert isinstance(conflict, ConflictError)
    assert replay == Stored(id=first.id, is_replay=True, status=first.status)
    assert fresh.id == submissions[3].item.id
    assert len(store.list_feedback("acme", 0, 10).items) == 2


def test_pages_meet_every_row_once_even_at_one_instant(
    database: Database, make_interaction: MakeInteraction
) -> None:
    noon = datetime(2026, 5, 1, tzinfo=UTC)
    store = SqlFeedbackStore(database, lambda: noon)
    sent = [make_interaction(task="ab"[i % 2]) for i in range(7)]
    for item in sent:
        put(store, item)

    seen, after = [], 0
    while (page := store.list_interactions("acme", after, 3)).items:
        seen += [item.id for item in page.items]
        after = page.next_after

    assert seen == [item.id for item in sent]
    assert store.list_interactions("acme", after, 3).next_after == after
    of_task = store.list_interactions("acme", 0, 10, task="b").items
    assert [item.id for item in of_task] == [item.id for item in sent[1::2]]


def test_windows_are_half_open_and_keep_the_latest(
    store: SqlFeedbackStore, make_interaction: MakeInteraction
) -> None:
    for i in range(4):
        put(store, make_interaction(completion=str(i)))
    put(store, make_interaction(task="other"))
    times = [item.received_at for item in store.list_interactions("acme", 0, 10).items]

    window = store.interactions_between("support", times[0], times[3], limit=10)
    latest = store.interactions_between("support", times[0], times[3], limit=2)

    assert [item.completion for item in window] == ["0", "1", "2"]
    assert [item.completion for item in latest] == ["1", "2"]


def test_late_join_falls_into_the_window_of_the_join(
    store: SqlFeedbackStore, make_interaction: MakeInteraction, make_feedback: MakeFeedback
) -> None:
    about = make_interaction()
    sent = make_feedback(target=Target(interaction_id=about.id), signal=Correction(text="x"))
    put(store, sent)
    first_cut = store.horizon()
    put(store, about)
    second_cut = store.horizon()

    assert store.feedback_between("support", LONG_AGO, first_cut) == ()
    (judged,) = store.feedback_between("support", first_cut, second_cut)
    assert judged.feedback.signal == Correction(text="x")
    assert judged.interaction is not None
    assert judged.interaction.id == about.id


def test_counts_and_newest_times(
    store: SqlFeedbackStore, make_interaction: MakeInteraction, make_feedback: MakeFeedback
) -> None:
    assert store.newest_interaction_at("support") is None
    assert store.newest_feedback_at("support") is None
    about = make_interaction()
    put(store, about)
    cut = store.horizon()
    put(store, make_feedback(target=Target(interaction_id=about.id)))
    put(store, make_feedback())

    assert store.count_interactions_since("support", LONG_AGO) == 1
    assert store.count_interactions_since("support", cut) == 0
    assert store.count_feedback_since("support", cut) == 1
    assert store.newest_interaction_at("support") < cut
    assert store.newest_feedback_at("support") > cut


def test_join_pending_mends_what_a_restore_left(
    store: SqlFeedbackStore,
    database: Database,
    make_interaction: MakeInteraction,
    make_feedback: MakeFeedback,
) -> None:
    about = make_interaction()
    put(store, about)
    stored = put(store, make_feedback(target=Target(interaction_id=about.id)))
    put(store, make_feedback())
    lost = {"status": "pending", "task": None, "interaction_id": None, "joined_at": None}
    with database.write() as session:
        session.execute(update(FeedbackRow).where(FeedbackRow.id == stored.id).values(**lost))

    assert (store.join_pending(), store.join_pending()) == (1, 0)
    assert store.get_feedback("acme", stored.id).status == "joined"


def test_simultaneous_posts_with_one_key_make_one_row(
    store: SqlFeedbackStore, database: Database, make_feedback: MakeFeedback
) -> None:
    together = threading.Barrier(8)

    def post(_: int) -> Stored:
        together.wait()
        return put_keyed(store, make_feedback(), "k")

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(post, range(8)))

    assert len({result.id for result in results}) == 1
    assert sorted(result.is_replay for result in results) == [False] + [True] * 7
    assert _count(database, FeedbackRow) == 1


def test_feedback_and_its_interaction_at_once_are_always_joined(
    store: SqlFeedbackStore, make_interaction: MakeInteraction, make_feedback: MakeFeedback
) -> None:
    abouts = [make_interaction() for _ in range(20)]
    sent = [make_feedback(target=Target(interaction_id=about.id)) for about in abouts]

    with ThreadPoolExecutor(8) as pool:
        jobs = []
        for about, feedback in zip(abouts, sent, strict=True):
            jobs.append(pool.submit(put, store, feedback))
            jobs.append(pool.submit(put, store, about))
        for job in jobs:
            job.result()

    assert {store.get_feedback("acme", item.id).status for item in sent} == {"joined"}


def test_reader_of_pages_and_windows_misses_no_concurrent_writer(
    database: Database, make_interaction: MakeInteraction
) -> None:
    store = SqlFeedbackStore(database, utc_now)
    done = threading.Event()

    def write(_: int) -> None:
        for _ in range(25):
            put(store, make_interaction())

    by_page: list[str] = []
    by_window: list[str] = []

    def read() -> None:
        after, since, is_last = 0, LONG_AGO, False
        while not is_last:
            is_last = done.is_set()
            page = store.list_interactions("acme", after, 1000)
            by_page.extend(item.id for item in page.items)
            after, until = page.next_after, store.horizon()
            window = store.interactions_between("support", since, until, 1000)
            by_window.extend(item.id for item in window)
            since = until

    with ThreadPoolExecutor(5) as pool:
        reader = pool.submit(read)
        list(pool.map(write, range(4)))
        done.set()
        reader.result()

    everything = {item.id for item in store.list_interactions("acme", 0, 1000).items}
    assert len(everything) == 100
    assert set(by_page) == set(by_window) == everything
    assert len(by_page) == len(by_window) == 100


def test_unreachable_database_is_unavailable(make_feedback: MakeFeedback) -> None:
    store = SqlFeedbackStore(Database("postgresql+psycopg://nobody@127.0.0.1:1/none"), utc_now)

    with pytest.raises(UnavailableError):
        store.ping()
    with pytest.raises(UnavailableError):
        put(store, make_feedback())


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_node_that_takes_no_writes_is_unavailable(
    database: Database, make_feedback: MakeFeedback
) -> None:
    url = database.engine.url.update_query_dict({"options": "-c default_transaction_read_only=on"})
    standby = Database(url.render_as_string(hide_password=False))
    store = SqlFeedbackStore(standby, utc_now)

    with pytest.raises(UnavailableError, match="read-only transaction"):
        put(store, make_feedback())
    with pytest.raises(UnavailableError, match="read-only transaction"):
        store.erase_subject("acme", "ada")
    standby.dispose()


def test_binary_is_stored_as_its_own_kind(
    store: SqlFeedbackStore, database: Database, make_feedback: MakeFeedback
) -> None:
    put(store, make_feedback(signal=Binary(value=True)))

    with database.read() as session:
        row = session.scalars(select(FeedbackRow)).one()
        assert (row.kind, row.signal) == ("binary", {"value": True})


def test_clock_is_read_inside_the_writers_turn(
    database: Database, make_interaction: MakeInteraction
) -> None:
    store = SqlFeedbackStore(database, utc_now)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: put(store, make_interaction()), range(30)))

    times = [item.received_at for item in store.list_interactions("acme", 0, 100).items]
    assert times == sorted(times)
    assert times[-1] - times[0] < timedelta(minutes=5)
