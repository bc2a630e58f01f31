"""What the API and the flows need from a store of interactions and feedback.

Whatever implements it passes `tests/feedback/test_store.py`. A write returns only when its rows are
on disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, Protocol, TypeVar

from perennial.feedback.records import Feedback, Interaction, Judged, Status
from perennial.infra.errors import PerennialError

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A record to store, once by its id and, if it has one, by its idempotency `key`.

    `payload_sha256` is of what the client sent, as `rows.payload_sha256` computes it; `num_bytes`
    is about what it holds in memory. `is_new_id` when the id was made for this record, so that no
    row can have it yet.
    """

    item: Interaction | Feedback
    payload_sha256: str
    key: str | None = None
    num_bytes: int = 0
    is_new_id: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A row that is on disk; `is_replay` when it was there before this call.

    `status` says whether the target of a feedback is known; an interaction is always joined.
    """

    id: str
    is_replay: bool
    status: Status


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """The interaction that a feedback is about."""

    id: str
    task: str


Outcome = Stored | PerennialError
"""What became of one submission: ConflictError when its id or key was used for something else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page(Generic[T_co]):
    """Rows in the order they became visible; pass `next_after` as `after` to go on from here."""

    items: tuple[T_co, ...]
    next_after: int


class FeedbackStore(Protocol):
    """Interactions and feedback, walled by tenant on every method that an app can reach."""

    def write(self, submissions: Sequence[Submission]) -> tuple[Outcome, ...]:
        """Store all in one transaction and join feedback with interactions, both ways.

        Raises InputError when the database refuses one of several rows, UnavailableError when it is
        not known whether they were stored.
        """

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
        """The latest `limit` with since <= received_at < until, oldest first, of all tenants.

        This and what follows on interactions leaves out what was imported: it is not traffic.
        """

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

    def erase_subject(self, tenant: str, subject: str) -> int:
        """Empty the interactions of `subject`, what was said of them, and what it said itself.

        Returns how many rows were emptied now. Ids, keys and digests stay: a retry of what was
        erased finds it stored, and does not store it again.
        """

    def erased_feedback(self) -> frozenset[str]:
        """Ids of the feedback that was emptied, of all tenants."""

    def last_erased_at(self) -> datetime | None:
        """When a row of any tenant was last emptied; on the clock of `horizon`."""

    def ping(self) -> None:
        """Raises UnavailableError when the store cannot be reached."""
