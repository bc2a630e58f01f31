"""What must never be stored, sent to a real server: a 4xx or a hang-up, and it still answers."""

import contextlib
import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from starlette.testclient import TestClient

from tests.faults.harness import Site, site, until
from tests.faults.wire import JSON, Answer, Wire, request
from tests.feedback import corpus

pytestmark = pytest.mark.slow

MAX_BYTES = 200 << 20  # of which the imports are 120
MAX_PROBLEM_BYTES = 8_000
LEAKS = ("Traceback", ".py", "sqlalchemy", "psycopg", "sqlite", corpus.SECRET)
BODIES = list(corpus.bodies())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One server for all: the last tests look at what the others have done to it."""
    with site(tmp_path_factory.mktemp("corpus")) as there:
        there.start()
        yield there


def test_corpus_has_at_least_60_classes() -> None:
    classes = {
        *corpus.NOT_JSON,
        *corpus.BAD_INTERACTIONS,
        *corpus.BAD_FEEDBACK,
        *corpus.BAD_BATCHES,
        *corpus.REQUESTS,
        *corpus.GARBAGE,
        *corpus.CUT_OFF,
    }

    assert len(classes) >= 60


@pytest.mark.parametrize(
    ("content", "statuses"), [case[1:] for case in BODIES], ids=[case[0] for case in BODIES]
)
def test_wrong_body_is_a_problem(server: Site, content: bytes, statuses: frozenset[int]) -> None:
    with _storing_nothing(server):
        _assert_problem(_ask(server, content), statuses)


@pytest.mark.parametrize(
    ("content", "statuses"), corpus.REQUESTS.values(), ids=corpus.REQUESTS.keys()
)
def test_wrong_request_is_a_problem(server: Site, content: bytes, statuses: frozenset[int]) -> None:
    with _storing_nothing(server):
        answer = _ask(server, content)

    assert answer is not None
    assert answer.status in statuses
    assert answer.status != 405 or "allow" in answer.headers
    if answer.headers["content-type"] != "text/plain; charset=utf-8":  # the parser's own
        _assert_problem(answer, statuses)


@pytest.mark.parametrize("content", corpus.GARBAGE.values(), ids=corpus.GARBAGE.keys())
def test_garbage_is_refused_or_hung_up_on(server: Site, content: bytes) -> None:
    with _storing_nothing(server):
        answer = _ask(server, content)

    assert answer is None or 400 <= answer.status < 500


@pytest.mark.parametrize("content", corpus.CUT_OFF.values(), ids=corpus.CUT_OFF.keys())
def test_request_that_is_cut_off_is_dropped(server: Site, content: bytes) -> None:
    with _storing_nothing(server):
        answer = _ask(server, content, is_cut_off=True)

    assert answer is None or 400 <= answer.status < 500


@pytest.mark.parametrize(
    ("path", "bad", "good"),
    [
        ("/v1/interactions/batch", corpus.BAD_INTERACTIONS, corpus.interaction()),
        ("/v1/feedback/batch", corpus.BAD_FEEDBACK, corpus.feedback()),
    ],
)
def test_wrong_items_of_a_batch_are_refused_alone(
    sqlite_client: TestClient, path: str, bad: Mapping[str, bytes], good: bytes
) -> None:
    items = [item for body in bad.values() for item in (body, good)]
    content = b'{"items": [%s]}' % b", ".join(items)

    answer = sqlite_client.post(path, content=content, headers=JSON)

    statuses = [item["status"] for item in answer.json()["items"]]
    assert dict(zip(bad, statuses[::2], strict=True)) == dict.fromkeys(bad, 422)
    assert set(statuses[1::2]) == {201}
    assert corpus.SECRET not in answer.text


@pytest.mark.parametrize("text", corpus.HARMLESS)
def test_hostile_text_is_only_text(client: TestClient, text: str) -> None:
    sent = {**corpus.INTERACTION, "completion": text, "tags": {text[:60]: text}}
    created = client.post("/v1/interactions", json=sent)

    found = client.get(f"/v1/interactions/{created.json()['id']}").json()
    assert found["completion"] == text
    assert found["tags"] == {text[:60]: text}


@pytest.mark.parametrize("kind", ["application/json", 'Application/JSON; Charset="UTF-8"'])
def test_json_by_any_spelling_is_accepted(sqlite_client: TestClient, kind: str) -> None:
    answer = sqlite_client.post(
        "/v1/interactions", content=corpus.interaction(), headers={"Content-Type": kind}
    )

    assert answer.status_code == 201


@pytest.mark.parametrize("number", ["-0", "-0.0", "0e0", "1e-400"])
def test_zero_by_any_spelling_is_zero(sqlite_client: TestClient, number: str) -> None:
    content = corpus.interaction(latency_ms=1).replace(b": 1", f": {number}".encode())
    created = sqlite_client.post("/v1/interactions", content=content, headers=JSON)

    found = sqlite_client.get(f"/v1/interactions/{created.json()['id']}").json()
    assert found["latency_ms"] == 0


def test_of_a_field_given_twice_one_is_stored(sqlite_client: TestClient) -> None:
    content = corpus.interaction().replace(b'"completion"', b'"completion": "b", "completion"')
    created = sqlite_client.post("/v1/interactions", content=content, headers=JSON)

    found = sqlite_client.get(f"/v1/interactions/{created.json()['id']}").json()
    assert found["completion"] == "a"


def test_body_of_100_mib_is_refused_before_it_is_read(server: Site) -> None:
    before = _peak_bytes(server)

    with _storing_nothing(server):
        answer = _ask(server, request("POST", "/v1/feedback", b" " * (100 << 20), JSON))

    # A client that goes on sending may be hung up on before it reads the answer.
    assert answer is None or answer.status == 413
    assert _peak_bytes(server) - before <= 16 << 20


def test_slow_clients_hold_up_nobody(server: Site) -> None:
    started = b"POST /v1/interactions HTTP/1.1\r\nContent-Type: application/json\r\n"
    drips = [started] * 100 + [started + b"Content-Length: 1000\r\n\r\n"] * 100
    before = _num_stored(server)
    num_files = psutil.Process(server.pid).num_fds()
    slow = [Wire(server.port, timeout_s=10) for _ in drips]

    for position in range(min(map(len, drips))):
        for wire, drip in zip(slow, drips, strict=True):
            wire.socket.sendall(drip[position : position + 1])
        if position % 10 == 0:
            with Wire(server.port, timeout_s=2) as quick:
                assert quick.get("/readyz").status == 200
    for wire in slow:
        wire.close()

    until(lambda: psutil.Process(server.pid).num_fds() <= num_files + 2)
    assert _num_stored(server) == before


def test_after_all_of_it_the_server_has_not_grown(server: Site) -> None:
    assert _peak_bytes(server) <= MAX_BYTES


def test_after_all_of_it_the_log_holds_no_stack(server: Site) -> None:
    assert "Traceback" not in server.log.read_text()


def _ask(server: Site, content: bytes, *, is_cut_off: bool = False) -> Answer | None:
    """The answer, or None when the server hung up; TimeoutError when it does neither."""
    with Wire(server.port, timeout_s=10) as wire:
        with contextlib.suppress(ConnectionError):
            wire.socket.sendall(content)
            if is_cut_off:
                wire.socket.shutdown(socket.SHUT_WR)
        try:
            return wire.receive()
        except ConnectionError:
            return None


def _assert_problem(answer: Answer | None, statuses: frozenset[int]) -> None:
    assert answer is not None
    assert answer.status in statuses, answer.body[:500]
    assert answer.headers["content-type"] == "application/problem+json"
    problem = json.loads(answer.body)
    assert problem["status"] == answer.status
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert len(answer.body) < MAX_PROBLEM_BYTES
    assert not [leak for leak in LEAKS if leak.encode() in answer.body]


@contextmanager
def _storing_nothing(server: Site) -> Iterator[None]:
    """And the server answers after it."""
    before = _num_stored(server)
    yield
    assert _num_stored(server) == before


def _num_stored(server: Site) -> int:
    with Wire(server.port, timeout_s=10) as wire:
        paths = ("/v1/interactions?limit=200", "/v1/feedback?limit=200")
        return sum(len(wire.get(path).json()["items"]) for path in paths)


def _peak_bytes(server: Site) -> int:
    """The most memory that the process has ever held."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024
