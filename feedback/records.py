"""Interactions and feedback as values.

Pure: every rule that a record must obey, whoever made it, is checked here on construction. What a
JSON body looks like is left to `bodies`, how a record is stored to `sql_store`. They are Structs
because a frozen dataclass takes fourteen times as long to make: a tenth of what an item costs.
"""

import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import ClassVar, Literal, get_args

from msgspec import Struct

from perennial.infra.errors import InputError

Role = Literal["system", "developer", "user", "assistant", "tool"]
SourceKind = Literal["end_user", "annotator", "llm_judge", "code"]
Action = Literal["copy", "regenerate", "accept", "edit", "abandon", "retry"]
Status = Literal["joined", "pending"]

ID_PATTERN = r"^[A-Za-z0-9._:\-]{1,128}$"
_ID = re.compile(ID_PATTERN)
_ROLES, _SOURCE_KINDS, _ACTIONS = get_args(Role), get_args(SourceKind), get_args(Action)
MAX_NAME_CHARS = 256
MAX_TEXT_CHARS = 1_000_000
MAX_MESSAGES = 1_000
MAX_TAGS = 16
MAX_TAG_KEY_CHARS = 64
MAX_TAG_VALUE_CHARS = 512
MAX_COUNT = 2**31 - 1
MIN_YEAR = 1970
MAX_YEAR = 2999

IMPORTED = "import"
"""The route role of what a file brought: it can be learned from, but it is not today's traffic."""


class Message(Struct, frozen=True, kw_only=True):
    """One turn of a conversation."""

    role: Role
    content: str

    def __post_init__(self) -> None:
        _check_choice("role", self.role, _ROLES)
        _check_text("content", self.content)


class Interaction(Struct, frozen=True, kw_only=True):
    """One answered request.

    `received_at` orders windows and is set by the store when it commits; what the maker of a record
    puts there is overwritten. `occurred_at` is the client's own clock, advisory only.
    """

    id: str
    tenant: str
    task: str
    messages: tuple[Message, ...]
    completion: str
    model_version: str
    route_role: str
    received_at: datetime
    subject: str | None = None
    session: str | None = None
    trace_id: str | None = None
    num_prompt_tokens: int | None = None
    num_completion_tokens: int | None = None
    latency_ms: float | None = None
    finish_reason: str | None = None
    occurred_at: datetime | None = None
    tags: Mapping[str, str] = {}

    def __post_init__(self) -> None:
        check_id("id", self.id)
        _check_name("tenant", self.tenant)
        _check_name("task", self.task)
        _check_name("model_version", self.model_version)
        _check_name("route_role", self.route_role)
        _check_optional_name("subject", self.subject)
        _check_optional_name("session", self.session)
        _check_optional_name("trace_id", self.trace_id)
        _check_optional_name("finish_reason", self.finish_reason)
        _check_messages(self.messages)
        _check_text("completion", self.completion)
        _check_count("num_prompt_tokens", self.num_prompt_tokens)
        _check_count("num_completion_tokens", self.num_completion_tokens)
        if self.latency_ms is not None and not 0 <= self.latency_ms < math.inf:
            raise InputError(f"latency_ms must be finite and >= 0, got {self.latency_ms}")
        _check_times(self.received_at, self.occurred_at)
        _check_tags(self.tags)


class Binary(Struct, frozen=True, kw_only=True):
    """Thumbs up (true) or down (false)."""

    kind: ClassVar[Literal["binary"]] = "binary"
    value: bool


class Score(Struct, frozen=True, kw_only=True):
    """A rating on a stated scale; `min` and `max` belong to it, so that scales never mix."""

    kind: ClassVar[Literal["score"]] = "score"
    value: float
    min: float
    max: float

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.value, self.min, self.max))):
            raise InputError("score value, min and max must be finite")
        if not self.min < self.max:
            raise InputError(f"score min must be below max, got {self.min} and {self.max}")
        if not self.min <= self.value <= self.max:
            raise InputError(f"score must lie in [{self.min}, {self.max}], got {self.value}")


class Label(Struct, frozen=True, kw_only=True):
    """A class name, such as `refusal` or `off_topic`."""

    kind: ClassVar[Literal["label"]] = "label"
    value: str

    def __post_init__(self) -> None:
        _check_name("label value", self.value)


class Correction(Struct, frozen=True, kw_only=True):
    """What the answer should have been."""

    kind: ClassVar[Literal["correction"]] = "correction"
    text: str

    def __post_init__(self) -> None:
        _check_filled_text("correction text", self.text)


class Preference(Struct, frozen=True, kw_only=True):
    """Of two answers to the same conversation, the better and the worse."""

    kind: ClassVar[Literal["preference"]] = "preference"
    chosen: str
    rejected: str

    def __post_init__(self) -> None:
        _check_filled_text("chosen", self.chosen)
        _check_filled_text("rejected", self.rejected)


class Demonstration(Struct, frozen=True, kw_only=True):
    """An answer written by an expert without regard to what the model said."""

    kind: ClassVar[Literal["demonstration"]] = "demonstration"
    text: str

    def __post_init__(self) -> None:
        _check_filled_text("demonstration text", self.text)


class Comment(Struct, frozen=True, kw_only=True):
    """Free text for people to read."""

    kind: ClassVar[Literal["comment"]] = "comment"
    text: str

    def __post_init__(self) -> None:
        _check_filled_text("comment text", self.text)


class Implicit(Struct, frozen=True, kw_only=True):
    """What a user did with the answer; never averaged with what users said.

    `text` is the edited answer and comes with `edit` only.
    """

    kind: ClassVar[Literal["implicit"]] = "implicit"
    action: Action
    text: str | None = None

    def __post_init__(self) -> None:
        _check_choice("action", self.action, _ACTIONS)
        if self.text is not None:
            if self.action != "edit":
                raise InputError(f"only the action edit carries a text, got {self.action}")
            _check_filled_text("edited text", self.text)


Signal = Binary | Score | Label | Correction | Preference | Demonstration | Comment | Implicit

SIGNALS: Mapping[str, type[Signal]] = {
    signal.kind: signal
    for signal in (
        Binary,
        Score,
        Label,
        Correction,
        Preference,
        Demonstration,
        Comment,
        Implicit,
    )
}


class Target(Struct, frozen=True, kw_only=True):
    """What a feedback is about: exactly one of an interaction, a trace, or inline messages.

    A trace stands for its latest interaction. Inline messages are for apps that do not report
    interactions; `completion` is then the answer that was judged, if there was one.
    """

    interaction_id: str | None = None
    trace_id: str | None = None
    messages: tuple[Message, ...] = ()
    completion: str | None = None

    def __post_init__(self) -> None:
        given = (self.interaction_id is not None, self.trace_id is not None, bool(self.messages))
        if sum(given) != 1:
            raise InputError("target must be one of interaction_id, trace_id or messages")
        if self.interaction_id is not None:
            check_id("interaction_id", self.interaction_id)
        _check_optional_name("trace_id", self.trace_id)
        if self.messages:
            _check_messages(self.messages)
        if self.completion is not None:
            if not self.messages:
                raise InputError("target.completion comes with target.messages only")
            _check_text("completion", self.completion)

    @property
    def is_inline(self) -> bool:
        """Whether the target carries its own conversation and waits for nothing."""
        return bool(self.messages)


class Feedback(Struct, frozen=True, kw_only=True):
    """One signal about one answer.

    The store sets `received_at`, and `status`, `interaction_id`, `joined_at` and `task` when the
    target is known: a pending feedback has no task yet, a joined one has that of its interaction.
    """

    id: str
    tenant: str
    target: Target
    signal: Signal
    source_kind: SourceKind
    received_at: datetime
    task: str | None = None
    source_id: str | None = None
    subject: str | None = None
    may_train: bool = True
    status: Status = "pending"
    interaction_id: str | None = None
    joined_at: datetime | None = None
    occurred_at: datetime | None = None
    tags: Mapping[str, str] = {}

    def __post_init__(self) -> None:
        check_id("id", self.id)
        _check_name("tenant", self.tenant)
        _check_choice("source kind", self.source_kind, _SOURCE_KINDS)
        _check_optional_name("task", self.task)
        _check_optional_name("source_id", self.source_id)
        _check_optional_name("subject", self.subject)
        if self.target.is_inline and self.task is None:
            raise InputError("feedback on inline messages must name its task")
        _check_times(self.received_at, self.occurred_at, self.joined_at)
        _check_tags(self.tags)


class Judged(Struct, frozen=True, kw_only=True):
    """A joined feedback with the interaction it is about; None when the target was inline."""

    feedback: Feedback
    interaction: Interaction | None


def check_id(name: str, value: str) -> None:
    """Raise InputError unless `value` is 1 to 128 letters, digits, dots, colons, `_` or `-`."""
    if not _ID.fullmatch(value):
        raise InputError(f"{name} must be 1 to 128 of the characters A-Z a-z 0-9 . _ : -")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}")


def _check_text(name: str, value: str) -> None:
    if len(value) > MAX_TEXT_CHARS:
        raise InputError(f"{name} must have at most {MAX_TEXT_CHARS} characters, got {len(value)}")
    if "\0" in value:
        raise InputError(f"{name} must not contain the NUL character")
    if value.isascii():
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} must not contain a lone surrogate") from error


def _check_filled_text(name: str, value: str) -> None:
    if not value:
        raise InputError(f"{name} must not be empty")
    _check_text(name, value)


def _check_name(name: str, value: str) -> None:
    if 0 < len(value) <= MAX_NAME_CHARS and value.isascii() and "\0" not in value:
        return  # most are, and each record has ten
    _check_filled_text(name, value)
    if len(value) > MAX_NAME_CHARS:
        raise InputError(f"{name} must have at most {MAX_NAME_CHARS} characters, got {len(value)}")


def _check_optional_name(name: str, value: str | None) -> None:
    if value is not None:
        _check_name(name, value)


def _check_count(name: str, value: int | None) -> None:
    if value is not None and not 0 <= value <= MAX_COUNT:
        raise InputError(f"{name} must lie in [0, {MAX_COUNT}]")


def _check_messages(messages: tuple[Message, ...]) -> None:
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise InputError(f"there must be 1 to {MAX_MESSAGES} messages, got {len(messages)}")


def _check_times(*times: datetime | None) -> None:
    for time in times:
        if time is None:
            continue
        if time.tzinfo is None:
            raise InputError("a time must carry its offset from UTC")
        # Outside these years the conversion to UTC can overflow.
        if not MIN_YEAR <= time.year <= MAX_YEAR:
            raise InputError(f"a time must lie in the years {MIN_YEAR} to {MAX_YEAR}")


def _check_tags(tags: Mapping[str, str]) -> None:
    if len(tags) > MAX_TAGS:
        raise InputError(f"there may be at most {MAX_TAGS} tags, got {len(tags)}")
    for key, value in tags.items():
        _check_filled_text("a tag's name", key)
        _check_text("a tag's value", value)
        if len(key) > MAX_TAG_KEY_CHARS or len(value) > MAX_TAG_VALUE_CHARS:
            raise InputError(
                f"a tag may have {MAX_TAG_KEY_CHARS} characters in its name "
                f"and {MAX_TAG_VALUE_CHARS} in its value"
            )
