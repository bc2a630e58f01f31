"""Cuts traffic into a reference and a current window of rows that may be compared.

The tests downstream assume exchangeable rows, and raw traffic is not: sessions of five turns on one
subject turn a 1% false-alarm rate into 93%. So duplicates and retries are dropped and one row per
session (or per subject and day) stands for all of them, carrying the worst feedback that any of
them received. Fetching rows and judging window sizes are left to others.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

from perennial.infra.errors import InputError

Thumbs = Literal[1, -1]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrafficRow:
    """One answered request, with what users thought of it so far.

    Attributes:
        thumbs: 1 up, -1 down, None when nobody voted.
    """

    interaction_id: str
    prompt: str
    answer: str
    model_version: str
    received_at: datetime
    subject: str | None = None
    session: str | None = None
    thumbs: Thumbs | None = None
    has_correction: bool = False

    def __post_init__(self) -> None:
        if self.received_at.tzinfo is None:
            raise InputError(f"received_at must be aware, got {self.received_at!r}")


class Dropped(StrEnum):
    """Why a row is in no window."""

    OUTSIDE = "outside"
    DUPLICATE = "duplicate"
    RETRY = "retry"
    SAME_GROUP = "same_group"
    OVER_LIMIT = "over_limit"


class OnePer(StrEnum):
    """What one row of a window stands for. A row without the field stands for itself."""

    INTERACTION = "interaction"
    SESSION = "session"
    SUBJECT_DAY = "subject_day"


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowRules:
    """How traffic is thinned to rows that can be compared.

    Attributes:
        one_per: the unit of which a window holds at most one row.
        retry_within_s: the same person asking the same again within this time is a retry.
        max_rows: a longer window is thinned evenly over time to this many rows.
    """

    one_per: OnePer = OnePer.SESSION
    retry_within_s: float = 600.0
    max_rows: int = 2_000

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise InputError(f"max_rows must be positive, got {self.max_rows}")
        if self.retry_within_s < 0:
            raise InputError(f"retry_within_s must not be negative, got {self.retry_within_s}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The rows received in [since, until), oldest first, and how many were left out and why."""

    since: datetime
    until: datetime
    rows: tuple[TrafficRow, ...]
    dropped: Mapping[Dropped, int] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, oldest first."""
        return tuple(row.prompt for row in self.rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Two windows side by side; `reference` is None while there is nothing to compare with."""

    reference: Window | None
    current: Window

    @property
    def digest(self) -> str:
        """SHA-256 of the rows that a check sees; the same rows give the same check."""
        sha = hashlib.sha256()
        for window in (self.reference, self.current):
            sha.update(b"window\n")
            for row in window.rows if window else ():
                sha.update(f"{row.interaction_id} {row.thumbs} {row.has_correction}\n".encode())
        return sha.hexdigest()


def split(
    rows: Iterable[TrafficRow],
    *,
    since: datetime,
    reference_until: datetime,
    until: datetime,
    rules: WindowRules,
) -> Split:
    """The reference window [since, reference_until) and the current one [reference_until, until).

    A session that spans the border belongs to the reference only: in both it would make the two
    windows dependent.

    Raises:
        InputError: the three times are not in order, or one of them is naive.
    """
    _check_order(since, reference_until, until)
    kept, dropped = _thin(rows, since, until, rules)
    old = [row for row in kept if row.received_at < reference_until]
    new = [row for row in kept if row.received_at >= reference_until]
    reference = _window(old, since, reference_until, Counter(), rules.max_rows) if old else None
    return Split(
        reference=reference,
        current=_window(new, reference_until, until, dropped, rules.max_rows),
    )


def _check_order(*times: datetime) -> None:
    if any(time.tzinfo is None for time in times):
        raise InputError(f"window borders must be aware, got {times!r}")
    if any(early > late for early, late in pairwise(times)):
        named = ", ".join(time.isoformat() for time in times)
        raise InputError(f"window borders must be in order, got {named}")


def _thin(
    rows: Iterable[TrafficRow], since: datetime, until: datetime, rules: WindowRules
) -> tuple[list[TrafficRow], Counter[Dropped]]:
    """Representatives, oldest first, each carrying the feedback of the rows it stands for."""
    dropped: Counter[Dropped] = Counter()
    kept = _Kept(rules=rules)
    seen: set[str] = set()
    for row in sorted(rows, key=lambda row: (row.received_at, row.interaction_id)):
        if not since <= row.received_at < until:
            dropped[Dropped.OUTSIDE] += 1
        elif row.interaction_id in seen:
            dropped[Dropped.DUPLICATE] += 1
        elif reason := kept.add(row):
            dropped[reason] += 1
        seen.add(row.interaction_id)
    return list(kept.rows.values()), dropped


@dataclass(kw_only=True, slots=True)
class _Kept:
    """Rows kept so far, by id, and which of them stands for a group or a question."""

    rules: WindowRules
    rows: dict[str, TrafficRow] = field(default_factory=dict)
    by_group: dict[str, str] = field(default_factory=dict)
    last_asked: dict[str, tuple[datetime, str]] = field(default_factory=dict)

    def add(self, row: TrafficRow) -> Dropped | None:
        """Keep `row`, or fold its feedback into the row that stands for it and say why."""
        group, question = _group(row, self.rules.one_per), _question(row)
        reason, place = self._stands_for(row, group, question)
        self.rows[place] = row if reason is None else _with_feedback_of(self.rows[place], row)
        self.by_group.setdefault(group, place)
        self.last_asked[question] = (row.received_at, place)
        return reason

    def _stands_for(self, row: TrafficRow, group: str, question: str) -> tuple[Dropped | None, str]:
        asked = self.last_asked.get(question)
        patience = timedelta(seconds=self.rules.retry_within_s)
        if asked and row.received_at - asked[0] <= patience:
            return Dropped.RETRY, asked[1]
        if place := self.by_group.get(group):
            return Dropped.SAME_GROUP, place
        return None, row.interaction_id


def _group(row: TrafficRow, one_per: OnePer) -> str:
    if one_per is OnePer.SESSION and row.session:
        return f"session {row.session}"
    if one_per is OnePer.SUBJECT_DAY and row.subject:
        return f"subject {row.received_at.date()} {row.subject}"
    return f"interaction {row.interaction_id}"


def _question(row: TrafficRow) -> str:
    """Who asks what; a row without session and subject can be nobody's retry."""
    who = row.subject or row.session or row.interaction_id
    text = " ".join(unicodedata.normalize("NFKC", row.prompt).casefold().split())
    return f"{who}\n{text}"


def _with_feedback_of(kept: TrafficRow, other: TrafficRow) -> TrafficRow:
    votes = [thumbs for thumbs in (kept.thumbs, other.thumbs) if thumbs is not None]
    return replace(
        kept,
        thumbs=min(votes) if votes else None,
        has_correction=kept.has_correction or other.has_correction,
    )


def _window(
    rows: Sequence[TrafficRow],
    since: datetime,
    until: datetime,
    dropped: Counter[Dropped],
    max_rows: int,
) -> Window:
    over = len(rows) - max_rows
    if over > 0:
        dropped[Dropped.OVER_LIMIT] += over
        rows = [rows[i * len(rows) // max_rows] for i in range(max_rows)]
    return Window(
        since=since, until=until, rows=tuple(rows), dropped=MappingProxyType(dict(dropped))
    )
