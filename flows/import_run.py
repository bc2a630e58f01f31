"""Imports a file so that it can be killed at any moment and run again.

Every item is known by an id or key that is made of its content, so writing it again stores nothing
twice; the checkpoint only saves time. It marks the last group that the store confirmed. The next
run writes that group again: if the store does not know it any more, all is read from the start.
"""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, Self

from perennial.feedback.formats.reading import Item, Line, Reading, read_items, read_lines
from perennial.feedback.store import Outcome, Stored
from perennial.flows.import_sinks import MAX_ITEMS, Sink
from perennial.infra.artifacts import write_atomic
from perennial.infra.errors import InputError, PerennialError

_GROUP_BYTES = 4 << 20
_HEAD_BYTES = 64 << 10
_SHOWN_CHARS = 1_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """Up to here everything is stored: lines, bytes (unpacked), bytes of the list of refusals."""

    line: int = 0
    offset: int = 0
    refusal_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A line that could not be stored, wholly or in part, and why."""

    line: int
    reason: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run has come.

    Attributes:
        first_line: where this run began to read, from 0.
        line: lines that are done, those of earlier runs too.
        position: bytes of the file as it lies on disk that were read.
        num_stored: new rows.
        num_known: rows that were there before.
        num_empty: lines that held nothing to store.
        num_refused: lines in the list of refusals.
        refusals: those of the last group.
    """

    first_line: int
    line: int
    position: int = 0
    num_stored: int = 0
    num_known: int = 0
    num_empty: int = 0
    num_refused: int = 0
    refusals: tuple[Refusal, ...] = ()


class Checkpoint:
    """The mark of one file for one destination, in a small file of its own."""

    def __init__(self, path: Path, source: Path) -> None:
        """A mark that was left for other content of `source` does not count."""
        self._path = path
        self._source = _fingerprint(source)

    def load(self) -> Mark:
        """The mark, or the start of the file where there is none."""
        try:
            found = json.loads(self._path.read_bytes())
            return Mark(**found["mark"]) if found["source"] == self._source else Mark()
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return Mark()

    def save(self, mark: Mark) -> None:
        """Replace the mark."""
        content = {"source": self._source, "mark": asdict(mark)}
        write_atomic(self._path, json.dumps(content).encode())


class RefusalFile:
    """The list of refused lines beside the imported file; made when the first one comes."""

    def __init__(self, path: Path) -> None:
        """Nothing is opened before the first refusal."""
        self.path = path
        self._num_bytes = 0

    def cut(self, num_bytes: int) -> bool:
        """Keep the first `num_bytes`; False when there are not as many, and then none are kept."""
        has_them = num_bytes == 0 or (self.path.exists() and self.path.stat().st_size >= num_bytes)
        self._num_bytes = num_bytes if has_them else 0
        if self._num_bytes:
            os.truncate(self.path, self._num_bytes)
        else:
            self.path.unlink(missing_ok=True)
        return has_them

    def add(self, refusals: Sequence[Refusal]) -> None:
        """Append."""
        if not refusals:
            return
        lines = "".join(json.dumps(asdict(each)) + "\n" for each in refusals).encode()
        try:
            with self.path.open("ab") as file:
                self._num_bytes += file.write(lines)
        except OSError as error:
            raise InputError(f"refused lines cannot be written to {self.path}: {error}") from error

    @property
    def num_bytes(self) -> int:
        """How long it is."""
        return self._num_bytes


class SourceFile:
    """A file of lines, gzip by its suffix `.gz`."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when it cannot be opened."""
        self._path = path
        self._raw = path.open("rb")
        self._file: BinaryIO = self._raw
        if path.suffix == ".gz":
            self._file = gzip.GzipFile(fileobj=self._raw, mode="rb")  # type: ignore[assignment]  # reads as one

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._raw.close()

    @property
    def position(self) -> int:
        """Bytes on disk that were read."""
        return self._raw.tell()

    def lines(self, mark: Mark) -> Iterator[Line]:
        """The lines after `mark`; raises InputError where the file cannot be read on."""
        number = mark.line
        try:
            self._file.seek(mark.offset)
            for line in read_lines(self._file, number=mark.line, start=mark.offset):
                number = line.number
                yield line
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{self._path} cannot be read after line {number}: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    line: Line
    items: tuple[Item, ...] = ()
    problem: str | None = None


def import_file(
    source: SourceFile,
    reading: Reading,
    sink: Sink,
    checkpoint: Checkpoint | None = None,
    refused: RefusalFile | None = None,
) -> Iterator[Progress]:
    """Write what `source` holds to `sink`, group by group, from where the last run stopped.

    Without a checkpoint from the start; without `refused` the refusals are only told.
    """
    mark = checkpoint.load() if checkpoint else Mark()
    if refused and not (refused.cut(mark.refusal_bytes) and _is_known(source, reading, sink, mark)):
        mark = Mark()
        refused.cut(0)
    progress = Progress(first_line=mark.line, line=mark.line)
    for group in _groups(source.lines(mark), reading):
        outcomes = sink.write([item for read in group for item in read.items])
        progress = replace(_after(progress, group, outcomes), position=source.position)
        if refused:
            refused.add(progress.refusals)
        if checkpoint and any(isinstance(each, Stored) for each in outcomes):
            checkpoint.save(mark)
        mark = _mark_after(group, refused)
        yield progress


def _is_known(source: SourceFile, reading: Reading, sink: Sink, mark: Mark) -> bool:
    """Whether the store still has the group at `mark`, which it confirmed in an earlier run."""
    if mark == Mark():
        return True
    group = next(_groups(source.lines(mark), reading), ())
    outcomes = sink.write([item for read in group for item in read.items])
    return not any(isinstance(each, Stored) and not each.is_replay for each in outcomes)


def _groups(lines: Iterator[Line], reading: Reading) -> Iterator[tuple[_Read, ...]]:
    """Lines with their items, as many at a time as one write may take; a line is never parted."""
    group: list[_Read] = []
    num_items = num_bytes = 0
    for line in lines:
        read = _read(line, reading)
        weight, length = max(1, len(read.items)), len(line.content)
        if group and (num_items + weight > MAX_ITEMS or num_bytes + length > _GROUP_BYTES):
            yield tuple(group)
            group, num_items, num_bytes = [], 0, 0
        group.append(read)
        num_items += weight
        num_bytes += length
    if group:
        yield tuple(group)


def _read(line: Line, reading: Reading) -> _Read:
    try:
        found = read_items(line, reading)
    except InputError as error:
        found = (error,)
    errors = [each for each in found if isinstance(each, InputError)]
    return _Read(
        line=line,
        items=tuple(each for each in found if isinstance(each, Item)),
        problem=str(errors[0]) if errors else None,
    )


def _after(progress: Progress, group: Sequence[_Read], outcomes: Sequence[Outcome]) -> Progress:
    remaining = iter(outcomes)
    refusals = []
    for read in group:
        errors = [e for _ in read.items if isinstance(e := next(remaining), PerennialError)]
        reason = read.problem or (str(errors[0]) if errors else None)
        if reason is not None:
            refusals.append(_refusal(read.line, reason))
    stored = [each for each in outcomes if isinstance(each, Stored)]
    num_known = sum(each.is_replay for each in stored)
    return replace(
        progress,
        line=group[-1].line.number,
        num_stored=progress.num_stored + len(stored) - num_known,
        num_known=progress.num_known + num_known,
        num_empty=progress.num_empty + sum(not (r.items or r.problem) for r in group),
        num_refused=progress.num_refused + len(refusals),
        refusals=tuple(refusals),
    )


def _refusal(line: Line, reason: str) -> Refusal:
    text = line.content.decode(errors="backslashreplace").rstrip("\r\n")
    return Refusal(
        line=line.number, reason=reason, text=text[:_SHOWN_CHARS] if line.is_too_long else text
    )


def _mark_after(group: Sequence[_Read], refused: RefusalFile | None) -> Mark:
    last = group[-1].line
    return Mark(
        line=last.number, offset=last.end, refusal_bytes=refused.num_bytes if refused else 0
    )


def _fingerprint(path: Path) -> str:
    """Digest of the file's beginning, its length and when it was last written."""
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_HEAD_BYTES))
        stat = os.fstat(file.fileno())
    digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()
