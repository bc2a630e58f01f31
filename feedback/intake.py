"""From a request to rows on disk: who may send, what is checked and redacted, what became of it.

Shared by the routes of `ingest` and `traces`; reading bodies and wording answers is theirs.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
from starlette.requests import Request

from perennial.feedback.access import caller_of
from perennial.feedback.admission import Admission
from perennial.feedback.bodies import (
    KEY_PATTERN,
    FeedbackBody,
    FeedbackItemBody,
    InteractionBody,
    InteractionItemBody,
)
from perennial.feedback.committer import GroupCommitter
from perennial.feedback.keys import Authenticate, Principal, Scope
from perennial.feedback.limits import parse_json
from perennial.feedback.metrics import Metrics
from perennial.feedback.records import Interaction
from perennial.feedback.redact import Redact
from perennial.feedback.rows import payload_sha256
from perennial.feedback.store import Outcome, Stored, Submission
from perennial.infra.clock import Clock, new_id
from perennial.infra.errors import InputError, OverloadedError, PerennialError, RateLimitedError

BodyT = TypeVar("BodyT", InteractionBody, FeedbackBody)
Checked = Submission | PerennialError
AdmitSubject = Callable[[str | None], None]
"""Raises RateLimitedError unless the row of this subject may be written now."""

_ITEMS_AT_ONCE = 100  # of a batch, before other requests get their turn


@dataclass(frozen=True, kw_only=True, slots=True)
class Intake:
    """What the routes that write stand on; `task` is for traces that name none."""

    committer: GroupCommitter
    authenticate: Authenticate
    admission: Admission
    redact: Redact
    clock: Clock
    metrics: Metrics
    task: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind(Generic[BodyT]):
    """What differs between interactions and feedback."""

    name: str
    id_prefix: str
    one: msgspec.json.Decoder[BodyT]
    item: msgspec.json.Decoder[BodyT]


INTERACTION: Kind[InteractionBody] = Kind(
    name="interaction",
    id_prefix="int",
    one=msgspec.json.Decoder(InteractionBody),
    item=msgspec.json.Decoder(InteractionItemBody),
)
FEEDBACK: Kind[FeedbackBody] = Kind(
    name="feedback",
    id_prefix="fb",
    one=msgspec.json.Decoder(FeedbackBody),
    item=msgspec.json.Decoder(FeedbackItemBody),
)


async def admitted(intake: Intake, request: Request) -> Principal:
    """The caller; refuses before the body is read what would be refused after."""
    caller = await caller_of(request, Scope.INGEST, intake.authenticate)
    if intake.committer.is_full:
        raise OverloadedError("too many writes are waiting", retry_after_s=1)
    return caller


def admit_rows(intake: Intake, caller: Principal, num_rows: int) -> None:
    """Raise RateLimitedError or OverloadedError unless `caller` may write so many rows now."""
    intake.admission.admit(caller.key_id or caller.tenant, num_rows)


def subject_by_row(intake: Intake, caller: Principal) -> AdmitSubject:
    """Each row of a subject by itself."""
    return lambda subject: intake.admission.admit_subject(caller.tenant, subject)


def subject_at_once(intake: Intake, caller: Principal, subjects: Iterable[str]) -> AdmitSubject:
    """All rows of a subject or none, `subjects` naming that of each row.

    For who sends all again when a row was refused: of more rows than the burst, one at a time, some
    would be refused for ever.
    """
    refused: dict[str | None, RateLimitedError] = {}
    for subject, num in Counter(subjects).items():
        try:
            intake.admission.admit_subject(caller.tenant, subject, num)
        except RateLimitedError as error:
            refused[subject] = error

    def admit(subject: str | None) -> None:
        if subject in refused:
            raise refused[subject].with_traceback(None)

    return admit


def check_one(
    intake: Intake, kind: Kind[BodyT], content: bytes, caller: Principal, key: str | None
) -> Submission:
    """The record of a body, redacted; raises a PerennialError for one that cannot be kept."""
    body = parse_json(kind.one, content)
    intake.admission.admit_subject(caller.tenant, body.subject)
    return _submission(intake, kind, body, caller, key, len(content))


async def check_items(
    intake: Intake,
    kind: Kind[BodyT],
    contents: Sequence[bytes],
    caller: Principal,
    batch_key: str | None,
    admit: AdmitSubject,
) -> list[Checked]:
    """Each item by itself, so that a bad one does not cost its neighbours."""
    checked: list[Checked] = []
    for index, content in enumerate(contents):
        key = batch_key and f"{batch_key} {index}"
        checked.append(_checked(intake, kind, content, caller, key, admit))
        if index % _ITEMS_AT_ONCE == _ITEMS_AT_ONCE - 1:
            await asyncio.sleep(0)
    return checked


async def store(intake: Intake, checked: Sequence[Checked]) -> list[Outcome]:
    """What became of each, once the good ones are on disk."""
    good = [each for each in checked if isinstance(each, Submission)]
    stored = await intake.committer.store(good)
    for submission, outcome in zip(good, stored, strict=True):
        if isinstance(outcome, Stored):
            _count(intake.metrics, submission, outcome)
    remaining = iter(stored)
    return [next(remaining) if isinstance(each, Submission) else each for each in checked]


def _checked(
    intake: Intake,
    kind: Kind[BodyT],
    content: bytes,
    caller: Principal,
    key: str | None,
    admit: AdmitSubject,
) -> Checked:
    try:
        body = parse_json(kind.item, content)
        admit(body.subject)
        # A client's own key holds no space, so one derived from the batch cannot collide with it.
        return _submission(intake, kind, body, caller, _own_key(body) or key, len(content))
    except PerennialError as error:
        return error


def _own_key(body: InteractionBody | FeedbackBody) -> str | None:
    key: str | None = getattr(body, "idempotency_key", None)  # a key of its own has an item only
    if key is not None and not re.fullmatch(KEY_PATTERN, key):
        raise InputError("idempotency_key must be 1 to 255 visible ASCII characters")
    return key


def _submission(
    intake: Intake,
    kind: Kind[BodyT],
    body: BodyT,
    caller: Principal,
    key: str | None,
    num_bytes: int,
) -> Submission:
    sent = body.to_record(
        id=new_id(kind.id_prefix), tenant=caller.tenant, received_at=intake.clock()
    )
    redacted = intake.redact(sent)
    intake.metrics.count_redacted(redacted.counts)
    digest = payload_sha256(redacted.record, body.id)
    return Submission(
        item=redacted.record,
        payload_sha256=digest,
        key=key,
        num_bytes=num_bytes,
        is_new_id=body.id is None,
    )


def _count(metrics: Metrics, submission: Submission, stored: Stored) -> None:
    if isinstance(submission.item, Interaction):
        metrics.count_interaction(stored)
    else:
        metrics.count_feedback(submission.item.signal.kind, stored)
