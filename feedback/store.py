"""What the API and the flows need from a store of interactions and feedback.

The seam for faster stores: whatever implements it passes `tests/feedback/test_store.py`. A method
that adds returns only when the row is on disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, Protocol, TypeVar

from perennial.feedback.records import Feedback, Interaction, Judged, Status
from perennial.infra.errors import ConflictError

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class IdempotencyKey:
    """A client's key for one request and the SHA-256 of the payload it first came with."""

    value: str
    payload_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A row that is on disk; `is_replay` when it was there before this call."""

    id: str
    is_replay: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFeedback:
    """A feedback that is on disk, and whether its target is known."""

    id: str
    is_replay: bool
    status: Status


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A feedback to add, with its idempotency key if it has one."""

    feedback: Feedback
    key: IdempotencyKey | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Page(Generic[T_co]):
    """Rows in the order they became visible; pass `next_after` as `after` to go on from here."""

    items: tuple[T_co, ...]
    next_after: int


class FeedbackStore(Protocol):
    """Interactions and feedback, walled by tenant on every method that an app can reach."""

    def add_interaction(self, item: Interaction, key: IdempotencyKey | None = None) -> Stored:
        """Store `item` once by its id and by `key`, and join the feedback that waited for it.

        Raises ConflictError when the id or the key was used before for something else.
        """

    def add_feedback(self, item: Feedback, key: IdempotencyKey | None = None) -> StoredFeedback:
        """Store `item` once by `key`; raises ConflictError when `key` had another payload."""

    def add_feedback_batch(
        self, submissions: Sequence[Submission]
    ) -> tuple[StoredFeedback | ConflictError, ...]:
        """Store all in one transaction; a reused key costs its own submission only."""

    def get_interaction(self, tenant: str, id: str) -> Interaction:
        """Raises NotFoundError when there is none, or it is another tenant's."""

    def get_feedback(self, tenant: str, id: str) -> Feedback:
        """Raises NotFoundError when there is none, or it is another tenant's."""

    def list_interactions(
        self, tenant: str, after: int, limit: int, task: str | None = None
    ) -> Page[Interaction]:
        """Up to `limit` rows after the cursor `after` (0 for the start), oldest first."""

    def list_feedback(self, tenant: str, after: int, limit: int) -> Page[Feedback]:
        """Up to `limit` rows after the cursor `after` (0 for the start), oldest first."""

    def interactions_between(
        self, task: str, since: datetime, until: datetime, limit: int
    ) -> tuple[Interaction, ...]:
        """The latest `limit` with since <= received_at < until, oldest first, of all tenants."""

    def feedback_between(self, task: str, since: datetime, until: datetime) -> tuple[Judged, ...]:
        """Joined feedback with since <= joined_at < until, oldest first, of all tenants.

        By the time of joining, so that a late join falls into the next window and into one only.
        """

    def count_interactions_since(self, task: str, since: datetime) -> int:
        """How many interactions were received at `since` or later."""

    def count_feedback_since(self, task: str, since: datetime) -> int:
        """How many feedback were joined at `since` or later."""

    def newest_interaction_at(self, task: str) -> datetime | None:
        """When the last interaction was received."""

    def newest_feedback_at(self, task: str) -> datetime | None:
        """When the last feedback was joined."""

    def join_pending(self) -> int:
        """Join what an import or a restore left pending; how many were joined."""

    def horizon(self) -> datetime:
        """A moment before which no further row will appear: a safe `until` for a window."""

    def ping(self) -> None:
        """Raises UnavailableError when the store cannot be reached."""
