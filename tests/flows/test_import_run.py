import gzip
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from perennial.feedback.api import ApiDeps, create_app
from perennial.feedback.committer import GroupCommitter
from perennial.feedback.formats.reading import Item, Reading
from perennial.feedback.keys import open_access
from perennial.feedback.redact import redact_nothing
from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.feedback.store import Outcome, Stored
from perennial.flows.import_run import (
    Checkpoint,
    Progress,
    RefusalFile,
    SourceFile,
    import_file,
)
from perennial.flows.import_sinks import (
    MAX_ITEMS,
    RETRY_DELAYS_S,
    ApiSink,
    DrySink,
    Sink,
    StoreSink,
    make_prepare,
)
from perennial.infra.clock import utc_now
from perennial.infra.db import Database, create_all
from perennial.infra.errors import (
    AuthError,
    ConflictError,
    InputError,
    PerennialError,
    TooLargeError,
    UnavailableError,
)

READING = Reading(task="support")
PREPARE = make_prepare("default", redact_nothing, utc_now)


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@dataclass(kw_only=True)
class MemorySink:
    """A store in memory that dies at a write, before it or after it."""

    rows: dict[str, bytes] = field(default_factory=dict)
    dies_at: int = -1
    is_stored_before_death: bool = False
    sizes: list[int] = field(default_factory=list)

    def write(self, items: Sequence[Item]) -> tuple[Outcome, ...]:
        dies = len(self.sizes) == self.dies_at
        self.sizes.append(len(items))
        if dies and not self.is_stored_before_death:
            raise Killed
        outcomes = tuple(self._put(item) for item in items)
        if dies:
            raise Killed
        return outcomes

    def _put(self, item: Item) -> Outcome:
        try:
            PREPARE(item)
        except InputError as error:
            return error
        name = f"{item.kind} {item.key or item.body['id']}"
        content = msgspec.json.encode(item.body, order="deterministic")
        is_replay = name in self.rows
        if self.rows.setdefault(name, content) != content:
            return ConflictError("used before with another payload")
        return Stored(id=name, is_replay=is_replay, status="joined")


def interaction(id: str, **changes: Any) -> Item:
    body = {
        "id": id,
        "task": "support",
        "messages": [{"role": "user", "content": "Warranty?"}],
        "completion": "Two years.",
        "model_version": "m",
        **changes,
    }
    return Item(kind="interaction", body=body, key=None)


def thumbs(id: str, key: str | None = None, value: object = True) -> Item:
    signal = {"kind": "binary", "value": value}
    return Item(
        kind="feedback", body={"target": {"interaction_id": id}, "signal": signal}, key=key or id
    )


@pytest.fixture(params=["memory", "store", "api"])
def sink(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sink]:
    if request.param == "memory":
        yield MemorySink()
        return
    with ExitStack() as stack:
        database = Database(f"sqlite:///{tmp_path}/p.db")
        stack.callback(database.dispose)
        create_all(database)
        store = SqlFeedbackStore(database, utc_now)
        committer = GroupCommitter(store.write)
        stack.callback(committer.close)
        if request.param == "store":
            yield StoreSink(committer, PREPARE)
        else:
            deps = ApiDeps(store=store, committer=committer, authenticate=open_access())
            yield ApiSink(TestClient(create_app(deps)))


def replays(outcomes: Sequence[Outcome]) -> list[bool | type[PerennialError]]:
    return [each.is_replay if isinstance(each, Stored) else type(each) for each in outcomes]


def test_what_is_written_again_is_known(sink: Sink) -> None:
    items = [thumbs("i1"), interaction("i1"), thumbs("i2")]

    assert replays(sink.write(items)) == [False, False, False]
    assert replays(sink.write([*items, thumbs("i3")])) == [True, True, True, False]


def test_a_bad_item_costs_itself_only(sink: Sink) -> None:
    sink.write([interaction("i1"), thumbs("i1")])
    outcomes = sink.write(
        [
            thumbs("i2", value="yes"),
            interaction("i1", completion="Three."),
            interaction("i2", completion="a\0b"),
            thumbs("i1", value=False),
            thumbs("i3"),
        ]
    )

    assert [isinstance(each, PerennialError) for each in outcomes] == [True] * 4 + [False]


def test_nothing_to_write_is_no_error(sink: Sink) -> None:
    assert sink.write([]) == ()


def test_both_ways_into_a_store_know_the_same_items(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/p.db")
    create_all(database)
    store = SqlFeedbackStore(database, utc_now)
    committer = GroupCommitter(store.write)
    deps = ApiDeps(store=store, committer=committer, authenticate=open_access())
    items = [interaction("i1"), thumbs("i1")]

    StoreSink(committer, PREPARE).write(items)

    assert replays(ApiSink(TestClient(create_app(deps))).write(items)) == [True, True]
    committer.close()
    database.dispose()


def test_checking_stores_nothing() -> None:
    items = [interaction("i1"), thumbs("i1", value=7)]

    assert replays(DrySink(PREPARE).write(items)) == [False, InputError]


@dataclass(kw_only=True)
class Service:
    """An API that answers what it is told to, then takes everything."""

    answers: list[httpx.Response | Exception]
    bodies: list[list[dict[str, Any]]] = field(default_factory=list)
    slept_s: list[float] = field(default_factory=list)

    def sink(self) -> ApiSink:
        http = httpx.Client(transport=httpx.MockTransport(self._answer), base_url="http://api")
        return ApiSink(http, self.slept_s.append)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        items = json.loads(request.content)["items"]
        self.bodies.append(items)
        answer = self.answers.pop(0) if self.answers else taken(*[201] * len(items))
        if isinstance(answer, Exception):
            raise answer
        return answer


def taken(*statuses: int) -> httpx.Response:
    items = [
        {
            "index": index,
            "status": status,
            "feedback": {"id": "fb"} if status < 300 else None,
            "problem": {"detail": "no"} if status >= 300 else None,
        }
        for index, status in enumerate(statuses)
    ]
    return httpx.Response(200, json={"items": items})


@pytest.mark.parametrize(
    "refusal",
    [
        httpx.Response(503, headers={"retry-after": "3"}),
        httpx.Response(429, headers={"retry-after": "3"}),
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
    ],
)
def test_a_service_that_is_away_for_a_while_is_asked_again(
    refusal: httpx.Response | Exception,
) -> None:
    service = Service(answers=[refusal, refusal])

    assert replays(service.sink().write([thumbs("i1")])) == [False]
    assert service.bodies[0] == service.bodies[2]
    assert service.bodies[0][0]["idempotency_key"] == "i1"
    is_told_when = isinstance(refusal, httpx.Response)
    assert service.slept_s == ([3, 3] if is_told_when else list(RETRY_DELAYS_S[:2]))


def test_only_items_that_were_refused_for_now_are_sent_again() -> None:
    service = Service(answers=[taken(201, 429, 422, 503), taken(429, 200)])
    outcomes = service.sink().write([thumbs(f"i{n}") for n in range(4)])

    assert replays(outcomes) == [False, False, InputError, True]
    assert [[b["idempotency_key"] for b in body] for body in service.bodies] == [
        ["i0", "i1", "i2", "i3"],
        ["i1", "i3"],
        ["i1"],
    ]


def test_a_service_that_stays_away_is_an_error_that_says_so() -> None:
    service = Service(answers=[httpx.Response(503)] * 99)

    with pytest.raises(UnavailableError, match="status 503"):
        service.sink().write([thumbs("i1")])
    assert service.slept_s == list(RETRY_DELAYS_S)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (httpx.Response(401), AuthError),
        (httpx.Response(404, text="no such page"), InputError),
        (httpx.Response(200, text="<html>"), UnavailableError),
        (httpx.Response(200, json={"items": []}), UnavailableError),
    ],
)
def test_what_will_not_help_is_not_tried_again(
    answer: httpx.Response, error: type[PerennialError]
) -> None:
    service = Service(answers=[answer])

    with pytest.raises(error):
        service.sink().write([thumbs("i1")])
    assert len(service.bodies) == 1


def test_requests_stay_below_what_the_api_takes() -> None:
    service = Service(answers=[])
    large = [interaction(f"i{n}", completion="x" * 900_000) for n in range(6)]
    outcomes = service.sink().write([*large, interaction("i6", completion="x" * (5 << 20))])

    assert replays(outcomes) == [False] * 6 + [TooLargeError]
    assert [len(body) for body in service.bodies] == [4, 2]


def lines_of(*items: Item) -> bytes:
    return b"".join(
        msgspec.json.encode(
            {item.kind: item.body, **({"idempotency_key": item.key} if item.key else {})}
        )
        + b"\n"
        for item in items
    )


@dataclass(kw_only=True)
class Desk:
    """A file with its checkpoint and its list of refusals."""

    path: Path

    @property
    def refused(self) -> RefusalFile:
        return RefusalFile(self.path.with_suffix(".rejected"))

    def run(self, sink: Sink, reading: Reading = READING) -> Progress:
        checkpoint = Checkpoint(self.path.with_suffix(".mark"), self.path)
        with SourceFile(self.path) as source:
            return list(import_file(source, reading, sink, checkpoint, self.refused))[-1]

    def refusals(self) -> list[tuple[int, str]]:
        path = self.refused.path
        rows = map(json.loads, path.read_text().splitlines() if path.exists() else ())
        return [(row["line"], row["text"]) for row in rows]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(path=tmp_path / "rows.jsonl")


MANY = [thumbs(f"i{n}") for n in range(1_200)]


def test_a_file_is_stored_line_by_line(desk: Desk) -> None:
    desk.path.write_bytes(b"\n" + lines_of(interaction("i1"), thumbs("i1"), thumbs("i1")) + b"bad")
    sink = MemorySink()
    progress = desk.run(sink)

    assert (progress.line, progress.num_stored, progress.num_known) == (5, 2, 1)
    assert (progress.num_empty, progress.num_refused) == (1, 1)
    assert desk.refusals() == [(5, "bad")]


def test_a_second_run_reads_the_last_group_only(desk: Desk) -> None:
    desk.path.write_bytes(lines_of(*MANY))
    sink = MemorySink()
    first = desk.run(sink)
    second = desk.run(sink)

    assert (first.num_stored, second.num_stored) == (1_200, 0)
    assert (second.first_line, second.line) == (1_000, 1_200)
    assert sink.sizes == [500, 500, 200, 200, 200]


def test_a_store_that_forgot_gets_everything_again(desk: Desk) -> None:
    desk.path.write_bytes(lines_of(*MANY))
    desk.run(MemorySink())
    sink = MemorySink()

    assert desk.run(sink).line == 1_200
    assert len(sink.rows) == 1_200


def test_a_changed_file_is_read_from_the_start(desk: Desk) -> None:
    desk.path.write_bytes(b"bad\n" + lines_of(*MANY))
    sink = MemorySink()
    desk.run(sink)
    desk.path.write_bytes(lines_of(thumbs("mended"), *MANY))
    progress = desk.run(sink)

    assert (progress.first_line, progress.num_stored, progress.num_known) == (0, 1, 1_200)
    assert desk.refusals() == []


@pytest.mark.parametrize("spoil", [b"", b"{", b'{"source": 1}', b"[]"])
def test_an_unreadable_checkpoint_costs_time_only(desk: Desk, spoil: bytes) -> None:
    desk.path.write_bytes(lines_of(*MANY))
    sink = MemorySink()
    desk.run(sink)
    desk.path.with_suffix(".mark").write_bytes(spoil)
    progress = desk.run(sink)

    assert (progress.first_line, progress.num_stored, progress.num_known) == (0, 0, 1_200)


def test_a_lost_list_of_refusals_is_made_again(desk: Desk) -> None:
    desk.path.write_bytes(b"bad\n" + lines_of(*MANY))
    sink = MemorySink()
    desk.run(sink)
    desk.refused.path.unlink()
    desk.run(sink)

    assert desk.refusals() == [(1, "bad")]


def test_gzip_is_read_as_what_it_holds(tmp_path: Path) -> None:
    packed = Desk(path=tmp_path / "rows.jsonl.gz")
    packed.path.write_bytes(gzip.compress(lines_of(*MANY)))
    sink = MemorySink()

    assert packed.run(sink).num_stored == 1_200
    assert packed.run(sink).first_line == 1_000
    assert len(sink.rows) == 1_200


def test_a_damaged_gzip_says_where_and_keeps_what_was_read(tmp_path: Path) -> None:
    packed = Desk(path=tmp_path / "rows.jsonl.gz")
    packed.path.write_bytes(gzip.compress(lines_of(*MANY))[:-600])
    sink = MemorySink()

    with pytest.raises(InputError, match=r"cannot be read after line \d+"):
        packed.run(sink)
    assert len(sink.rows) >= MAX_ITEMS


def test_groups_are_bounded_and_never_part_a_line(desk: Desk) -> None:
    score = {"data_type": "BOOLEAN", "source": "API", "trace_id": "t", "value": 1}
    scores = [{"id": f"s{n}", **score} for n in range(MAX_ITEMS + 100)]
    trace = {"id": "t", "timestamp": "2026-05-01T12:00:00Z", "observations": [], "scores": scores}
    desk.path.write_bytes(
        lines_of(*MANY[:300]) + json.dumps(trace).encode() + b"\n" + lines_of(*MANY[300:])
    )
    sink = MemorySink()
    desk.run(sink)

    assert sink.sizes == [300, MAX_ITEMS + 100, 500, 400]


ITEMS = st.one_of(
    st.integers(0, 900).map(lambda n: lines_of(thumbs(f"i{n}"))),
    st.integers(0, 9).map(lambda n: lines_of(thumbs(f"i{n}", value="odd"))),
    st.sampled_from([b"\n", b"bad\n", b'{"hello": 1}\n']),
)


@settings(max_examples=25, deadline=None)
@given(
    lines=st.lists(ITEMS, min_size=1, max_size=40),
    repeats=st.integers(1, 40),
    deaths=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=4),
)
def test_killed_anywhere_any_number_of_times_the_result_is_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    repeats: int,
    deaths: list[tuple[int, bool]],
) -> None:
    content = b"".join(lines * repeats)
    calm, harried = (Desk(path=tmp_path_factory.mktemp("run") / "rows.jsonl") for _ in range(2))
    calm.path.write_bytes(content)
    harried.path.write_bytes(content)
    expected = MemorySink()
    calm.run(expected)

    rows: dict[str, bytes] = {}
    for at, is_stored in deaths:
        with suppress(Killed):
            harried.run(MemorySink(rows=rows, dies_at=at, is_stored_before_death=is_stored))
    harried.run(MemorySink(rows=rows))

    assert rows == expected.rows
    assert harried.refusals() == calm.refusals()
