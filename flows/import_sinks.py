"""Where an import is written: the store itself, or the API of a running service.

Both answer once their rows are on disk and can be asked again for the same items. Which one, and
what is read, is left to the caller.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import httpx
import msgspec

from perennial.feedback.bodies import FeedbackBody, InteractionBody
from perennial.feedback.committer import GroupCommitter
from perennial.feedback.formats.reading import Item, Kind
from perennial.feedback.redact import Redact
from perennial.feedback.rows import payload_sha256
from perennial.feedback.store import Outcome, Stored, Submission
from perennial.infra.clock import Clock, new_id
from perennial.infra.errors import (
    AuthError,
    ForbiddenError,
    InputError,
    TooLargeError,
    UnavailableError,
)

MAX_ITEMS = 500
RETRY_DELAYS_S = (0.5, 1, 2, 5, 10, 20, 30)
_MAX_WAIT_S = 60.0
_REQUEST_BYTES = 4 << 20  # the API takes 5 MiB
_RETRIED = (408, 429, 502, 503, 504)


class Sink(Protocol):
    """Takes items; the fake in the tests and the real ones pass the same suite."""

    def write(self, items: Sequence[Item]) -> tuple[Outcome, ...]:
        """What became of each, once it is on disk.

        Raises UnavailableError when that is not known; the same items may be written again.
        """


Prepare = Callable[[Item], Submission]
"""From an item to what the store takes; raises InputError for a body that is not acceptable."""


def make_prepare(tenant: str, redact: Redact, clock: Clock) -> Prepare:
    """Checks and redacts bodies as the API does, for `tenant`."""

    def prepare(item: Item) -> Submission:
        try:
            body = msgspec.convert(item.body, _BODIES[item.kind])
        except msgspec.ValidationError as error:
            raise InputError(f"{item.kind}: {error}") from error
        own_id = new_id("int" if item.kind == "interaction" else "fb")
        sent = body.to_record(id=own_id, tenant=tenant, received_at=clock())
        record = redact(sent).record
        return Submission(item=record, payload_sha256=payload_sha256(record, body.id), key=item.key)

    return prepare


_BODIES: Mapping[Kind, type[InteractionBody] | type[FeedbackBody]] = {
    "interaction": InteractionBody,
    "feedback": FeedbackBody,
}


class DrySink:
    """Checks and stores nothing."""

    def __init__(self, prepare: Prepare) -> None:
        """`prepare` says what is acceptable."""
        self._prepare = prepare

    def write(self, items: Sequence[Item]) -> tuple[Outcome, ...]:
        """What would become of each in an empty store."""
        return tuple(_checked(item, self._prepare) for item in items)


class StoreSink:
    """Writes to the database, in groups of one transaction each."""

    def __init__(self, committer: GroupCommitter, prepare: Prepare) -> None:
        """`committer` stores what `prepare` accepts."""
        self._committer = committer
        self._prepare = prepare

    def write(self, items: Sequence[Item]) -> tuple[Outcome, ...]:
        """What became of each, after the commit."""
        checked = [_prepared(item, self._prepare) for item in items]
        submissions = [each for each in checked if isinstance(each, Submission)]
        stored = iter(self._committer.submit(submissions) if submissions else ())
        return tuple(next(stored) if isinstance(each, Submission) else each for each in checked)


class ApiSink:
    """Writes to a running service, over HTTP."""

    def __init__(self, http: httpx.Client, sleep: Callable[[float], None] = time.sleep) -> None:
        """`http` knows the address and the key."""
        self._http = http
        self._sleep = sleep

    def write(self, items: Sequence[Item]) -> tuple[Outcome, ...]:
        """What became of each, as the service answered: interactions first, then feedback."""
        outcomes: dict[int, Outcome] = {}
        for kind, path in _PATHS.items():
            bodies = {i: _encoded(item) for i, item in enumerate(items) if item.kind == kind}
            for index, body in bodies.items():
                if len(body) > _REQUEST_BYTES:
                    outcomes[index] = TooLargeError(f"the {kind} has {len(body)} bytes of JSON")
            for chunk in _chunks({i: b for i, b in bodies.items() if i not in outcomes}):
                outcomes |= self._deliver(path, chunk)
        return tuple(outcomes[index] for index in range(len(items)))

    def _deliver(self, path: str, bodies: Mapping[int, bytes]) -> dict[int, Outcome]:
        """What became of each; what is refused only for now is sent again, with the same key."""
        outcomes: dict[int, Outcome] = {}
        delays_s = iter(RETRY_DELAYS_S)
        while left := {i: body for i, body in bodies.items() if i not in outcomes}:
            answer = self._send(path, left)
            outcomes |= answer.outcomes
            if len(answer.outcomes) == len(left):
                break
            # As long as something is taken, patience begins anew.
            delays_s = iter(RETRY_DELAYS_S) if answer.outcomes else delays_s
            delay_s = next(delays_s, None)
            if delay_s is None:
                raise UnavailableError(f"{self._http.base_url} takes no writes: {answer.why}")
            self._sleep(max(delay_s, answer.wait_s))
        return outcomes

    def _send(self, path: str, bodies: Mapping[int, bytes]) -> "_Answer":
        content = b'{"items":[%b]}' % b",".join(bodies.values())
        try:
            response = self._http.post(
                path, content=content, headers={"content-type": "application/json"}
            )
        except httpx.TransportError as error:
            return _Answer(why=f"{type(error).__name__}: {error}")
        if response.status_code in _RETRIED:
            why = f"status {response.status_code}"
            return _Answer(why=why, wait_s=_retry_after_s(response))
        if response.status_code != httpx.codes.OK:
            raise _refusal(response)
        replies = zip(bodies, _replies(response, len(bodies)), strict=True)
        done = {i: _outcome(reply) for i, reply in replies if reply.status not in _RETRIED}
        return _Answer(outcomes=done, why="it refuses some items for now")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """What became of the items that were taken; of the others `why` not, and for how long."""

    outcomes: Mapping[int, Outcome] = field(default_factory=dict)
    why: str
    wait_s: float = 0.0


def _replies(response: httpx.Response, num_items: int) -> list["_Reply"]:
    try:
        replies = msgspec.json.decode(response.content, type=_Batch).items
    except msgspec.DecodeError as error:
        raise UnavailableError(f"{response.url} is not a feedback API: {error}") from error
    if [reply.index for reply in replies] != list(range(num_items)):
        raise UnavailableError(f"{response.url} did not answer every item")
    return replies


_PATHS: Mapping[Kind, str] = {
    "interaction": "/v1/interactions/batch",
    "feedback": "/v1/feedback/batch",
}


class _Told(msgspec.Struct):
    id: str | None = None
    detail: str | None = None


class _Reply(msgspec.Struct):
    index: int
    status: int
    interaction: _Told | None = None
    feedback: _Told | None = None
    problem: _Told | None = None


class _Batch(msgspec.Struct):
    items: list[_Reply]


def _outcome(reply: _Reply) -> Outcome:
    created = reply.interaction or reply.feedback
    if created is None:
        return InputError((reply.problem and reply.problem.detail) or f"status {reply.status}")
    is_replay = reply.status == httpx.codes.OK
    return Stored(id=created.id or "", is_replay=is_replay, status="pending")


def _prepared(item: Item, prepare: Prepare) -> Submission | InputError:
    try:
        return prepare(item)
    except InputError as error:
        return error


def _checked(item: Item, prepare: Prepare) -> Outcome:
    found = _prepared(item, prepare)
    if isinstance(found, InputError):
        return found
    return Stored(id=found.item.id, is_replay=False, status="pending")


def _encoded(item: Item) -> bytes:
    key = {"idempotency_key": item.key} if item.key else {}
    return msgspec.json.encode({**item.body, **key})


def _chunks(bodies: Mapping[int, bytes]) -> Iterator[dict[int, bytes]]:
    """Bodies by their index, as many at a time as one request may hold."""
    chunk: dict[int, bytes] = {}
    num_bytes = 0
    for index, body in bodies.items():
        num_bytes += len(body) + 1
        if chunk and (num_bytes > _REQUEST_BYTES or len(chunk) == MAX_ITEMS):
            yield chunk
            chunk, num_bytes = {}, len(body) + 1
        chunk[index] = body
    if chunk:
        yield chunk


def _retry_after_s(response: httpx.Response) -> float:
    said = response.headers.get("retry-after", "")
    return min(float(said), _MAX_WAIT_S) if said.isdecimal() else 0.0


def _refusal(response: httpx.Response) -> InputError | AuthError | ForbiddenError:
    said = f"{response.url} answered {response.status_code}: {response.text[:200]}"
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return AuthError(f"{said}; name the variable that holds a key with --key-env")
    if response.status_code == httpx.codes.FORBIDDEN:
        return ForbiddenError(said)
    return InputError(said)
