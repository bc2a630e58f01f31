"""How what others export is said in lines of our own import format.

Pure: `{"interaction": …}` and `{"feedback": …}` objects, known by the ids that the export gives
them, so that overlapping exports store nothing twice. Whether they obey our rules is checked by
whoever stores them.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec

from perennial.feedback.formats.chat import Json
from perennial.feedback.records import ID_PATTERN, IMPORTED, MAX_NAME_CHARS, SourceKind
from perennial.infra.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What an export does not say of itself.

    Attributes:
        task: the task that its conversations belong to.
        digest: hex of the object and the task, the identity of what has no id of its own.
        scale: lowest and highest value of its numeric scores.
    """

    task: str
    digest: str
    scale: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Who judged what, under which name, when; `key` is its identity."""

    key: str
    target: Json
    kind: SourceKind
    source_id: str | None = None
    name: str | None = None
    occurred_at: str | None = None


Lines = Sequence[Json | InputError]
"""Lines of our own format; an error is for one that could not be said in it."""


def each_alone(convert: Callable[[T], Lines], values: Iterable[T]) -> Lines:
    """What `convert` makes of all, where a value that it refuses costs no other one."""
    lines: list[Json | InputError] = []
    for value in values:
        try:
            lines += convert(value)
        except InputError as error:
            lines.append(error)
    return lines


def interaction_line(id: str, about: About, **fields: object) -> Json:
    """An interaction; fields that are None or empty are left out."""
    known = {name: value for name, value in fields.items() if value not in (None, "")}
    body = {"model_version": "unknown", "completion": "", **known}
    return {"interaction": {"id": id, "task": about.task, "route_role": IMPORTED, **body}}


def feedback_lines(verdict: Verdict, signal: Json, comment: str | None = None) -> list[Json]:
    """A feedback and, as a second one, the words that came with it."""
    lines = [_feedback(verdict, signal, verdict.key)]
    if comment:
        words = {"kind": "comment", "text": comment}
        lines.append(_feedback(verdict, words, f"{verdict.key}:comment"))
    return lines


def signal_of(value: object, kind: SourceKind, about: About) -> Json:
    """A verdict as a signal. Thumbs are people's: the true of a judge may mean `is_toxic`."""
    match value:
        case bool() if kind in ("annotator", "end_user"):
            return {"kind": "binary", "value": value}
        case bool():
            return {"kind": "label", "value": str(value).lower()}
        case int() | float() if about.scale is not None:
            return {"kind": "score", "value": value, "min": about.scale[0], "max": about.scale[1]}
        case int() | float():
            raise InputError("a number says nothing without its scale, and none was given")
        case str() if len(value) <= MAX_NAME_CHARS:
            return {"kind": "label", "value": value}
        case str():
            return {"kind": "comment", "text": value}
    raise InputError("a verdict must be true or false, a number or a text")


def own_id(tool: str, id: str) -> str:
    """`id` where it can be one of ours, else a digest of it."""
    if re.fullmatch(ID_PATTERN, id):
        return id
    return f"{tool}_{hashlib.sha256(id.encode()).hexdigest()[:32]}"


def as_json(value: object) -> Any:  # Any: JSON
    """The object, list or text that a text says in JSON; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = msgspec.json.decode(value)
    except msgspec.DecodeError:
        return value
    return found if isinstance(found, dict | list | str) else value


def utc(text: str | None) -> str | None:
    """A time with its offset; one without is in UTC."""
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"{text!r} is not a time") from error
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).isoformat()


def _feedback(verdict: Verdict, signal: Json, key: str) -> Json:
    source = {"kind": verdict.kind, "id": verdict.source_id}
    body: Json = {
        "target": verdict.target,
        "signal": signal,
        "source": {name: value for name, value in source.items() if value},
    }
    if verdict.name:
        body["tags"] = {"name": verdict.name}
    if verdict.occurred_at:
        body["occurred_at"] = verdict.occurred_at
    return {"feedback": body, "idempotency_key": own_id("imp", key)}
