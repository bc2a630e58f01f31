"""The training row, and how rows are stored.

An Example is one conversation and the answer the model should have given. Where it came from is
`compile`'s business; how often it is seen is `mix`'s.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from perennial.infra.artifacts import write_atomic
from perennial.infra.errors import InputError
from perennial.training.text import normalise

Kind = Literal["correction", "demonstration", "general", "replay"]
Turn = tuple[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One conversation (role, content) and the wanted completion, with its lineage."""

    id: str
    messages: tuple[Turn, ...]
    completion: str
    kind: Kind
    event_ids: tuple[str, ...] = ()
    subject: str | None = None
    round_id: str | None = None

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

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` reads it back to an equal value."""
        return {
            "id": self.id,
            "messages": [list(turn) for turn in self.messages],
            "completion": self.completion,
            "kind": self.kind,
            "event_ids": list(self.event_ids),
            "subject": self.subject,
            "round_id": self.round_id,
        }


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
    try:
        return Example(
            id=str(row["id"]),
            messages=turns(row["messages"]),
            completion=str(row["completion"]),
            kind=row["kind"],
            event_ids=tuple(str(event) for event in row.get("event_ids", ())),
            subject=row.get("subject"),
            round_id=row.get("round_id"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"a training row lacks or misspells a field: {error!r}") from error


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


def write_examples(path: Path, rows: Iterable[Example]) -> None:
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


def _pair(turn: Any) -> Turn:  # Any: the JSON edge
    role, content = turn
    return str(role), str(content)
