"""Writes one record, as tests like it: the outcome, or the error raised."""

from perennial.feedback.records import Feedback, Interaction
from perennial.feedback.rows import submission_of
from perennial.feedback.store import FeedbackStore, Stored, Submission

PAYLOAD, OTHER_PAYLOAD = "a" * 64, "b" * 64


def put(store: FeedbackStore, item: Interaction | Feedback) -> Stored:
    return _written(store, submission_of(item))


def put_keyed(
    store: FeedbackStore, item: Interaction | Feedback, key: str, payload: str = PAYLOAD
) -> Stored:
    return _written(store, Submission(item=item, key=key, payload_sha256=payload))


def _written(store: FeedbackStore, submission: Submission) -> Stored:
    (outcome,) = store.write((submission,))
    if isinstance(outcome, Stored):
        return outcome
    raise outcome
