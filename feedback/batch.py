"""A batch of feedback: each item checked alone, so that a bad one does not cost its neighbours."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pydantic import ValidationError

from perennial.feedback.problems import problem_of, validation_problem
from perennial.feedback.replies import BatchItemReply, BatchReply, FeedbackCreated, Problem
from perennial.feedback.schemas import BatchBody, BatchItemBody, payload_sha256
from perennial.feedback.store import IdempotencyKey, StoredFeedback, Submission
from perennial.infra.clock import new_id
from perennial.infra.errors import ConflictError, InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """What can be stored, in order, and what cannot, by its index."""

    num_items: int
    submissions: tuple[Submission, ...]
    problems: Mapping[int, Problem]


def to_submissions(body: BatchBody, tenant: str, batch_key: str | None, now: datetime) -> Checked:
    """Every item as a submission or a problem."""
    submissions, problems = [], {}
    for index, item in enumerate(body.items):
        try:
            submissions.append(_to_submission(item, index, tenant, batch_key, now))
        except ValidationError as error:
            problems[index] = validation_problem(error)
        except InputError as error:
            problems[index] = problem_of(error)
    return Checked(num_items=len(body.items), submissions=tuple(submissions), problems=problems)


def to_replies(checked: Checked, results: Sequence[StoredFeedback | ConflictError]) -> BatchReply:
    """One reply per item, in their order."""
    remaining = iter(results)
    replies = []
    for index in range(checked.num_items):
        problem = checked.problems.get(index)
        result = problem or next(remaining)
        replies.append(_reply(index, result))
    return BatchReply(items=replies)


def _to_submission(
    item: dict[str, object], index: int, tenant: str, batch_key: str | None, now: datetime
) -> Submission:
    # Strictness in JSON is not strictness in Python (a time is a text there): check it as JSON.
    body = BatchItemBody.model_validate_json(json.dumps(item))
    value = body.idempotency_key
    if value is None and batch_key is not None:
        # A client's key holds no space, so a derived key cannot collide with one.
        value = f"{batch_key} {index}"
    key = value and IdempotencyKey(value=value, payload_sha256=payload_sha256(body))
    record = body.to_record(id=new_id("fb"), tenant=tenant, received_at=now)
    return Submission(feedback=record, key=key or None)


def _reply(index: int, result: StoredFeedback | ConflictError | Problem) -> BatchItemReply:
    if isinstance(result, ConflictError):
        result = problem_of(result)
    if isinstance(result, Problem):
        return BatchItemReply(index=index, status=result.status, problem=result)
    created = FeedbackCreated(id=result.id, status=result.status)
    return BatchItemReply(index=index, status=200 if result.is_replay else 201, feedback=created)
