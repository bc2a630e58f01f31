"""`perennial import`: a file of interactions and feedback into the store, with its progress."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import click
import httpx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as ProgressBar

from perennial.feedback.committer import GroupCommitter
from perennial.feedback.formats.reading import Reading
from perennial.feedback.sql_store import SqlFeedbackStore
from perennial.flows.import_run import (
    Checkpoint,
    Progress,
    RefusalFile,
    SourceFile,
    import_file,
)
from perennial.flows.import_sinks import ApiSink, DrySink, Prepare, Sink, StoreSink, make_prepare
from perennial.flows.wiring import choose_redaction
from perennial.infra.clock import utc_now
from perennial.infra.db import Database
from perennial.infra.errors import ConfigError, UnavailableError
from perennial.infra.migrate import upgrade
from perennial.infra.settings import Settings

_SHOWN_REFUSALS = 10
_TOLD_EVERY_LINES = 10_000
_TIMEOUT_S = 60.0


def read_key(variable: str) -> str:
    """The API key in an environment variable; raises ConfigError when there is none."""
    option = click.Option(["--key"], envvar=variable)
    key = option.resolve_envvar_value(click.get_current_context())
    if key is None:
        raise ConfigError(f"the variable {variable} is not set: put an API key into it")
    return key


def run_import(
    settings: Settings,
    path: Path,
    reading: Reading,
    *,
    tenant: str,
    url: str | None,
    key: str | None,
    is_dry: bool,
) -> bool:
    """Import `path` into the store, or into the service at `url`; whether every line was taken."""
    prepare = make_prepare(tenant, choose_redaction(settings.redaction), utc_now)
    if is_dry:
        return _run(path, reading, DrySink(prepare), None, None)
    destination = url or f"{tenant} {settings.resolved_database_url}"
    checkpoint = Checkpoint(_checkpoint_path(settings, path, reading, destination), path)
    refused = RefusalFile(path.with_name(f"{path.name}.rejected.jsonl"))
    with _api(url, key) if url else _store(settings, prepare) as sink:
        return _run(path, reading, sink, checkpoint, refused)


def _run(
    path: Path,
    reading: Reading,
    sink: Sink,
    checkpoint: Checkpoint | None,
    refused: RefusalFile | None,
) -> bool:
    progress = Progress(first_line=0, line=0)
    with SourceFile(path) as source, _Screen(path) as screen:
        try:
            for progress in import_file(source, reading, sink, checkpoint, refused):
                screen.show(progress)
        except KeyboardInterrupt:
            screen.say(f"stopped after line {progress.line}; the same command goes on from there")
            raise
        screen.say(_summary(progress, "stored" if refused else "to store"))
    if refused and refused.num_bytes:
        screen.say(f"refused lines, each with its reason, are in {refused.path}")
        return False
    return not progress.num_refused


def _summary(progress: Progress, verb: str) -> str:
    first = progress.first_line + 1
    lines = f"lines {first:,} to {progress.line:,}" if progress.line >= first else "no new line"
    return (
        f"{lines}: {progress.num_stored:,} rows {verb}, {progress.num_known:,} were there before, "
        f"{progress.num_empty:,} lines held nothing to store, {progress.num_refused:,} refused"
    )


@contextmanager
def _store(settings: Settings, prepare: Prepare) -> Iterator[Sink]:
    """The database, while no service takes writes on it."""
    database = Database(settings.resolved_database_url)
    with ExitStack() as stack:
        stack.callback(database.dispose)
        try:
            stack.enter_context(database.as_only_ingest())
        except UnavailableError as error:
            raise UnavailableError(
                f"a service takes writes on this database, so send to it: --url {settings.api_url}"
            ) from error
        upgrade(settings.resolved_database_url)
        committer = GroupCommitter(SqlFeedbackStore(database, utc_now).write)
        stack.callback(committer.close)
        yield StoreSink(committer, prepare)


@contextmanager
def _api(url: str, key: str | None) -> Iterator[Sink]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S) as http:
        yield ApiSink(http)


def _checkpoint_path(settings: Settings, path: Path, reading: Reading, destination: str) -> Path:
    # One for each way to read the file into each place.
    identity = hashlib.sha256(f"{path.resolve()} {reading} {destination}".encode()).hexdigest()
    return settings.home / "imports" / f"{path.name}-{identity[:16]}.json"


class _Screen:
    """A bar in a terminal, else a line every now and then; the first refusals on both."""

    def __init__(self, path: Path) -> None:
        self._console = Console()
        self._bar = ProgressBar(
            TextColumn(path.name, markup=False),
            BarColumn(),
            TaskProgressColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[rows]:,} rows"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=path.stat().st_size, rows=0)
        self._num_shown = 0
        self._told_line = 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, progress: Progress) -> None:
        """Where the import is."""
        rows = progress.num_stored + progress.num_known
        self._bar.update(self._task, completed=progress.position, rows=rows)
        for refusal in progress.refusals[: _SHOWN_REFUSALS - self._num_shown]:
            self._num_shown += 1
            self.say(f"line {refusal.line:,}: {refusal.reason}")
        if progress.line - self._told_line >= _TOLD_EVERY_LINES and not self._console.is_terminal:
            self._told_line = progress.line
            self.say(f"line {progress.line:,}, {rows:,} rows")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
