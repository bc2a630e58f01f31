import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import uvicorn
from click.testing import CliRunner

from perennial.feedback.api import ApiDeps, create_app
from perennial.feedback.committer import GroupCommitter
from perennial.feedback.key_cache import KeyCache
from perennial.feedback.keys import KeyStore, Scope, open_access
from perennial.feedback.redact import redact_for
from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.flows.cli import main
from perennial.infra.clock import utc_now
from perennial.infra.db import Database
from perennial.infra.migrate import upgrade

CHAT = {
    "messages": [
        {"role": "user", "content": "Warranty?"},
        {"role": "assistant", "content": "Two years; ask robin@example.com."},
    ]
}


def chats(num: int) -> str:
    messages = CHAT["messages"]
    return "".join(
        json.dumps({"messages": [{"role": "user", "content": f"Question {n}?"}, *messages]}) + "\n"
        for n in range(num)
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(CHAT) + "\n")
    return path


def _import(file: Path, *arguments: str) -> tuple[int, str]:
    env = {"PERENNIAL_HOME": str(file.parent / "home")}
    result = CliRunner(env=env).invoke(main, ["import", str(file), *arguments])
    return result.exit_code, result.output


def _database(file: Path) -> Path:
    return file.parent / "home" / "perennial.db"


def _rows(file: Path, query: str) -> list[tuple[object, ...]]:
    try:
        with closing(sqlite3.connect(f"file:{_database(file)}?mode=ro", uri=True)) as connection:
            return connection.execute(query).fetchall()
    except sqlite3.OperationalError:
        return [(0,)]  # not made yet


def _count(file: Path, table: str) -> int:
    return int(str(_rows(file, f"SELECT count(*) FROM {table}")[0][0]))


def test_a_file_is_imported_once(file: Path) -> None:
    first, second = _import(file), _import(file)

    assert (first[0], second[0]) == (0, 0)
    assert "2 rows stored" in first[1]
    assert "0 rows stored, 2 were there before" in second[1]
    assert (_count(file, "interactions"), _count(file, "feedback")) == (1, 1)


def test_an_import_names_task_and_tenant_and_is_redacted(file: Path) -> None:
    _import(file, "--task", "sales", "--tenant", "shop")

    ((tenant, task, completion),) = _rows(file, "SELECT tenant, task, completion FROM interactions")
    assert (tenant, task) == ("shop", "sales")
    assert "robin@example.com" not in str(completion)


def test_bad_lines_are_listed_and_make_status_1(file: Path) -> None:
    with file.open("a") as rows:
        rows.write("not json\n")
    code, output = _import(file)
    again, _ = _import(file)

    assert (code, again) == (1, 1)
    assert "line 2: the line is not JSON" in output
    listed = file.with_name("rows.jsonl.rejected.jsonl").read_text().splitlines()
    assert [(json.loads(row)["line"], json.loads(row)["text"]) for row in listed] == [
        (2, "not json")
    ]


def test_a_dry_run_writes_nothing(file: Path) -> None:
    with file.open("a") as rows:
        rows.write("not json\n")
    code, output = _import(file, "--dry-run")

    assert (code, "2 rows to store" in output, "line 2" in output) == (1, True, True)
    assert sorted(path.name for path in file.parent.iterdir()) == ["rows.jsonl"]


def test_a_file_of_another_format_than_said_is_refused(file: Path) -> None:
    code, output = _import(file, "--format", "langfuse")

    assert (code, "no trace, observation or score of Langfuse" in output) == (1, True)


def test_a_tenant_with_an_address_is_an_error(file: Path) -> None:
    code, output = _import(file, "--tenant", "shop", "--url", "http://127.0.0.1:1")

    assert (code, "the API key names the app" in output) == (2, True)


@contextmanager
def _service(file: Path, *, with_keys: bool = False) -> Iterator[str]:
    """The feedback API on this database, without the gateway's model."""
    upgrade(f"sqlite:///{_database(file)}")
    database = Database(f"sqlite:///{_database(file)}")
    store = SqlFeedbackStore(database, utc_now)
    keys = KeyCache(KeyStore(database, utc_now).find, utc_now)
    deps = ApiDeps(
        store=store,
        committer=GroupCommitter(store.write),
        authenticate=keys.authenticate if with_keys else open_access(),
        redact=redact_for(frozenset()),
    )
    server = uvicorn.Server(uvicorn.Config(create_app(deps), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    with database.as_only_ingest():
        thread.start()
        _wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join()
    database.dispose()


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_where_a_service_takes_writes_the_import_goes_through_it(file: Path) -> None:
    file.write_text(chats(700))
    with _service(file) as url:
        refused, how = _import(file)
        code, output = _import(file, "--url", url)
    after, known = _import(file)

    assert (refused, "--url http://" in how) == (2, True)
    assert (code, "1,400 rows stored" in output) == (0, True)
    assert (after, "0 rows stored, 1,400 were there before" in known) == (0, True)


def test_the_key_comes_from_a_variable_and_names_the_tenant(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _service(file, with_keys=True) as url:
        keys = KeyStore(Database(f"sqlite:///{_database(file)}"), utc_now)
        issued = keys.issue("shop", frozenset({Scope.INGEST}))
        without, why = _import(file, "--url", url)
        unset, how = _import(file, "--url", url, "--key-env", "SHOP_KEY")
        monkeypatch.setenv("SHOP_KEY", issued.text)
        code, _ = _import(file, "--url", url, "--key-env", "SHOP_KEY")

    assert (without, "--key-env" in why) == (2, True)
    assert (unset, "SHOP_KEY is not set" in how) == (2, True)
    assert (code, _rows(file, "SELECT tenant FROM feedback")) == (0, [("shop",)])


@contextmanager
def _running(file: Path) -> Iterator["subprocess.Popen[str]"]:
    argv = [sys.executable, "-m", "perennial.flows.cli", "import", str(file)]
    env = {**os.environ, "PERENNIAL_HOME": str(file.parent / "home")}
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


NUM_KILLS = 6


@pytest.mark.slow
def test_killed_at_random_moments_every_line_is_stored_once(file: Path) -> None:
    num_lines = 6_000
    file.write_text(chats(num_lines) + "not json\n")
    chance = random.Random(7)
    marks = sorted(chance.sample(range(num_lines // 2), NUM_KILLS))
    num_killed = 0
    for mark in marks:
        with _running(file) as process:
            _wait_until(
                lambda mark=mark, process=process: (  # type: ignore[misc]
                    _count(file, "interactions") > mark or process.poll() is not None
                )
            )
            num_killed += process.poll() is None
            process.kill()
    code, output = _import(file)

    assert num_killed == NUM_KILLS
    assert (code, "1 refused" in output) == (1, True)
    assert (_count(file, "interactions"), _count(file, "feedback")) == (num_lines, num_lines)
    assert _rows(file, "SELECT count(DISTINCT idempotency_key) FROM feedback") == [(num_lines,)]
    assert _rows(file, "SELECT count(*) FROM feedback WHERE status = 'joined'") == [(num_lines,)]
    assert len(file.with_name("rows.jsonl.rejected.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_ctrl_c_says_where_it_stopped_and_the_next_run_goes_on(file: Path) -> None:
    file.write_text(chats(24_000))
    with _running(file) as process:
        _wait_until(lambda: _count(file, "interactions") > 1_000)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        stopped_at = _count(file, "interactions")
        code, output = _import(file)

    assert process.returncode == 130
    assert "the same command goes on from there" in said
    assert 1_000 < stopped_at < 24_000
    assert (code, _count(file, "interactions")) == (0, 24_000)
    assert "lines 1 to" not in output
