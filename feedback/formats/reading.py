"""Lines of a file as interactions and feedback, one bad line at its own cost.

Pure: bytes in, JSON objects shaped like the bodies of the API out. Memory is bounded by the longest
line that is accepted. Reading on at an offset, storing and reporting are left to the caller.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, BinaryIO, Literal

import msgspec

from perennial.feedback.bodies import KEY_PATTERN
from perennial.feedback.formats.chat import Json
from perennial.feedback.formats.langfuse import from_langfuse
from perennial.feedback.formats.lines import About, Lines
from perennial.feedback.formats.mlflow_export import from_mlflow
from perennial.feedback.formats.openai_chat import from_openai_chat
from perennial.infra.errors import InputError, TooLargeError

MAX_LINE_BYTES = 8 << 20
_BOM = b"\xef\xbb\xbf"

Kind = Literal["interaction", "feedback"]


class Format(StrEnum):
    """What a line may look like; `auto` decides for each line."""

    AUTO = "auto"
    PERENNIAL = "perennial"
    OPENAI_CHAT = "openai-chat"
    MLFLOW = "mlflow"
    LANGFUSE = "langfuse"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """How the lines of a file are read: their format, the task and the scale they do not name."""

    task: str
    format: Format = Format.AUTO
    scale: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and not self.scale[0] < self.scale[1]:
            raise InputError(f"a scale must have its lower end first, got {self.scale}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of a file by its number from 1 and the bytes [start, end) that it takes.

    `content` is cut where the line is too long.
    """

    number: int
    start: int
    end: int
    content: bytes

    @property
    def is_too_long(self) -> bool:
        """Whether there is more of it than is accepted."""
        return len(self.content) > MAX_LINE_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A body of the API; `key` is None where its own id is its identity."""

    kind: Kind
    body: Json
    key: str | None


def read_lines(file: BinaryIO, *, number: int = 0, start: int = 0) -> Iterator[Line]:
    """The lines after the first `number`, which end at `start`, where `file` stands."""
    while content := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        length = len(content)
        last = content
        while len(last) == MAX_LINE_BYTES + 1 and not last.endswith(b"\n"):
            last = file.readline(MAX_LINE_BYTES + 1)
            length += len(last)
        yield Line(number=number, start=start, end=start + length, content=content)
        start += length


def read_items(line: Line, reading: Reading) -> tuple[Item | InputError, ...]:
    """What a line holds; nothing where it is blank or holds nothing that we keep.

    An error among the items is for one of several things in the line.

    Raises:
        InputError: it is not JSON in UTF-8, of no known format, or not as its format says.
    """
    if line.is_too_long:
        raise TooLargeError(f"the line has more than {MAX_LINE_BYTES} bytes")
    content = line.content.removeprefix(_BOM).strip()
    if not content:
        return ()
    try:
        row = msgspec.json.decode(content)
        format = _format_of(row, reading.format)
        about = About(
            task=reading.task, digest=_digest(row, format, reading.task), scale=reading.scale
        )
        own = _READERS[format](row, about)
        return tuple(_item(each, f"imp:{about.digest}:{i}") for i, each in enumerate(own))
    except msgspec.ValidationError as error:
        raise InputError(f"the line is not as its format says: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(f"the line is not JSON in UTF-8: {error}") from error
    except RecursionError as error:
        raise InputError("the line is nested too deeply") from error


def _digest(row: Json, format: Format, task: str) -> str:
    # In one spelling, so that spaces and the order of fields do not matter. Our own lines name
    # their task, so they stay the same whatever task is configured.
    content = msgspec.json.encode(
        row if format is Format.PERENNIAL else [task, row], order="deterministic"
    )
    return hashlib.sha256(content).hexdigest()[:32]


def _format_of(row: object, said: Format) -> Format:
    if not isinstance(row, dict):
        raise InputError("the line is not a JSON object")
    if said is not Format.AUTO:
        return said
    for format, marks in _MARKS:
        if any(mark <= row.keys() for mark in marks):
            return format
    raise InputError("the line is of no known format; see docs/operations.md")


# An assessment of MLflow has a field `feedback`, so our own format is asked for after it.
_MARKS: Sequence[tuple[Format, Sequence[set[str]]]] = (
    (Format.MLFLOW, ({"info", "data"}, {"trace", "spans"}, {"assessment_name"})),
    (Format.PERENNIAL, ({"interaction"}, {"feedback"})),
    (Format.OPENAI_CHAT, ({"messages"}, {"preferred_output"})),
    (
        Format.LANGFUSE,
        (
            {"id", "trace_id", "type"},
            {"id", "traceId", "type"},
            {"id", "data_type"},
            {"id", "dataType"},
            {"id", "timestamp"},
        ),
    ),
)

_READERS: Mapping[Format, Callable[[Json, About], Lines]] = {
    Format.PERENNIAL: lambda row, _: [row],
    Format.OPENAI_CHAT: from_openai_chat,
    Format.MLFLOW: from_mlflow,
    Format.LANGFUSE: from_langfuse,
}


def _item(line: Json | InputError, otherwise: str) -> Item | InputError:
    """The item of a line in our own format, known by `otherwise` if it has neither id nor key."""
    if isinstance(line, InputError):
        return line
    own = msgspec.convert(line, _Own)
    kind: Kind = "feedback" if own.interaction is None else "interaction"
    body = own.interaction or own.feedback
    if body is None or (own.interaction and own.feedback):
        raise InputError("a line holds either an interaction or a feedback")
    key = own.idempotency_key or (None if body.get("id") else otherwise)
    return Item(kind=kind, body=body, key=key)


class _Own(msgspec.Struct, forbid_unknown_fields=True):
    interaction: Json | None = None
    feedback: Json | None = None
    idempotency_key: Annotated[str, msgspec.Meta(pattern=KEY_PATTERN)] | None = None
