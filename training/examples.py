"""The training rows, and how they are stored.

An Example is one conversation and the answer the model should have given, a Pair a better and a
worse answer, a Judgement one answer that users liked or did not. Where they come from is
`compile`'s business; how often they are seen is `mix`'s.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from perennial.infra.artifacts import write_atomic
from perennial.infra.errors import InputError
from perennial.training.text import normalise

Kind = Literal["correction", "demonstration", "edit", "preference", "general", "replay"]
Label = Literal["desirable", "undesirable"]
Turn = tuple[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """An event that a row was made from, and whose it was."""

    event_id: str
    subject: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One conversation (role, content) and the wanted completion, with its lineage.

    `origins` are the events that agree on it, oldest first. `round_id` and `topic` are set when it
    enters replay.
    """

    id: str
    messages: tuple[Turn, ...]
    completion: str
    kind: Kind
    origins: tuple[Origin, ...] = ()
    round_id: str | None = None
    topic: str = ""

    def __post_init__(self) -> None:
        if not self.messages or not self.completion:
            raise InputError(f"example {self.id} needs messages and a completion", id=self.id)
        if self.kind not in get_args(Kind):
            raise InputError(f"example {self.id} has kind {self.kind!r}; allowed: {get_args(Kind)}")

    @property
    def prompt_key(self) -> str:
        """Equal for two examples that ask the same question in the same conversation."""
        return prompt_key(self.messages)

    @property
    def question(self) -> str:
        """The last user turn."""
        return question(self.messages)

    @property
    def event_ids(self) -> tuple[str, ...]:
        """The events that agree on it, oldest first."""
        return tuple(origin.event_id for origin in self.origins)

    @property
    def subject(self) -> str | None:
        """Who said it last; every other subject is in `origins`."""
        return self.origins[-1].subject if self.origins else None

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` reads it back to an equal value."""
        return {
            "id": self.id,
            "messages": [list(turn) for turn in self.messages],
            "completion": self.completion,
            "kind": self.kind,
            "origins": _origins_json(self.origins),
            "round_id": self.round_id,
            "topic": self.topic,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two answers to one conversation; what `chosen` says is in an Example too, its SFT term."""

    id: str
    messages: tuple[Turn, ...]
    chosen: str
    rejected: str
    origins: tuple[Origin, ...] = ()

    def __post_init__(self) -> None:
        if not self.messages or not self.chosen or not self.rejected:
            raise InputError(f"pair {self.id} needs messages and two answers", id=self.id)
        if self.chosen == self.rejected:
            raise InputError(f"pair {self.id} prefers an answer to itself", id=self.id)

    @property
    def prompt_key(self) -> str:
        """As of an Example."""
        return prompt_key(self.messages)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `read_pairs` reads it back to an equal value."""
        return {
            "id": self.id,
            "messages": [list(turn) for turn in self.messages],
            "chosen": self.chosen,
            "rejected": self.rejected,
            "origins": _origins_json(self.origins),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """One answer that the model gave, and whether it should give it again."""

    id: str
    messages: tuple[Turn, ...]
    completion: str
    label: Label
    origins: tuple[Origin, ...] = ()

    def __post_init__(self) -> None:
        if not self.messages or not self.completion:
            raise InputError(f"judgement {self.id} needs messages and a completion", id=self.id)
        if self.label not in get_args(Label):
            raise InputError(f"judgement {self.id}: {self.label!r} is not one of {get_args(Label)}")

    @property
    def prompt_key(self) -> str:
        """As of an Example."""
        return prompt_key(self.messages)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `read_judgements` reads it back to an equal value."""
        return {
            "id": self.id,
            "messages": [list(turn) for turn in self.messages],
            "completion": self.completion,
            "label": self.label,
            "origins": _origins_json(self.origins),
        }


Row = TypeVar("Row", Example, Pair, Judgement)


def prompt_key(messages: Sequence[Turn]) -> str:
    """The conversation with each turn normalised."""
    return "\n".join(f"{role}: {normalise(content)}" for role, content in messages)


def question(messages: Sequence[Turn]) -> str:
    """The last user turn, or the last turn if no user spoke."""
    users = [content for role, content in messages if role == "user"]
    return users[-1] if users else messages[-1][1]


def from_json(row: Any) -> Example:  # Any: the JSON edge
    """The example in a JSON object.

    Raises:
        InputError: a field is missing or of the wrong type.
    """
    return _checked(
        lambda: Example(
            **_lineage(row),
            completion=str(row["completion"]),
            kind=row["kind"],
            round_id=row.get("round_id"),
            topic=str(row.get("topic", "")),
        )
    )


def turns(raw: Any) -> tuple[Turn, ...]:  # Any: the JSON edge
    """Messages as (role, content) pairs, from pairs or from {"role", "content"} objects."""
    return tuple(
        (str(turn["role"]), str(turn["content"])) if isinstance(turn, dict) else _pair(turn)
        for turn in raw
    )


def read_examples(path: Path) -> tuple[Example, ...]:
    """The rows of a JSON Lines file.

    Raises:
        InputError: the file is missing or a line is not an example; names the line.
    """
    return tuple(from_json(row) for row in read_jsonl(path))


def read_pairs(path: Path) -> tuple[Pair, ...]:
    """The pairs of a JSON Lines file; errors as in `read_examples`."""
    return tuple(_pair_row(row) for row in read_jsonl(path))


def read_judgements(path: Path) -> tuple[Judgement, ...]:
    """The judgements of a JSON Lines file; errors as in `read_examples`."""
    return tuple(_judgement(row) for row in read_jsonl(path))


def write_examples(path: Path, rows: Iterable[Example | Pair | Judgement]) -> None:
    """One row a line, replaced as a whole."""
    lines = "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows)
    write_atomic(path, lines.encode())


def read_jsonl(path: Path) -> list[Any]:  # Any: the JSON edge
    """The objects of a JSON Lines file; blank lines are skipped.

    Raises:
        InputError: the file cannot be read, or a line is not JSON; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read rows from {path}: {error}", path=str(path)) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}:{number} is not JSON: {error}", line=number) from error
    return rows


def _pair_row(row: Any) -> Pair:  # Any: the JSON edge
    return _checked(
        lambda: Pair(**_lineage(row), chosen=str(row["chosen"]), rejected=str(row["rejected"]))
    )


def _judgement(row: Any) -> Judgement:  # Any: the JSON edge
    return _checked(
        lambda: Judgement(**_lineage(row), completion=str(row["completion"]), label=row["label"])
    )


def _checked(make: Callable[[], Row]) -> Row:
    try:
        return make()
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"a training row lacks or misspells a field: {error!r}") from error


def _lineage(row: Any) -> dict[str, Any]:  # Any: the JSON edge
    """What every kind of row has."""
    return {
        "id": str(row["id"]),
        "messages": turns(row["messages"]),
        "origins": tuple(
            Origin(event_id=str(event), subject=subject)
            for event, subject in row.get("origins", ())
        ),
    }


def _origins_json(origins: Sequence[Origin]) -> list[list[str | None]]:
    return [[origin.event_id, origin.subject] for origin in origins]


def _pair(turn: Any) -> Turn:  # Any: the JSON edge
    role, content = turn
    return str(role), str(content)
