"""Items → requests and answers → values; nothing here waits or sends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from perennial_client.errors import ApiError, Problem, error_for
from perennial_client.items import KINDS, Item, Json, encode


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """The item is on the server's disk; `is_replay` when it was there before.

    `is_pending` when the target of a feedback is not known yet: the server joins them later.
    """

    id: str
    is_replay: bool
    is_pending: bool


Outcome = Receipt | Problem
"""What became of one item of a batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The items of one kind among those of a call, by their index there."""

    path: str
    indexes: tuple[int, ...]
    content: bytes


def batches(items: Sequence[Item]) -> Iterator[Batch]:
    """One batch for each kind that occurs, interactions first."""
    for kind in KINDS:
        indexes = tuple(index for index, item in enumerate(items) if item.kind == kind)
        bodies = [items[index].keyed_body for index in indexes]
        if bodies:
            content = encode({"items": bodies})
            yield Batch(path=f"/v1/{kind}/batch", indexes=indexes, content=content)


def headers(api_key: str | None) -> dict[str, str]:
    """What every request says of its sender and its content."""
    always = {"User-Agent": "perennial-client", "Content-Type": "application/json"}
    return always if api_key is None else {**always, "Authorization": f"Bearer {api_key}"}


def accepted(response: httpx.Response) -> httpx.Response:
    """The response itself when it is a 200 or 201; else raises what it stands for."""
    if response.status_code in (200, 201):
        return response
    is_problem = response.headers.get("Content-Type", "").startswith("application/problem+json")
    body = _object(response) if is_problem else {}  # a proxy's own answer says nothing more
    wait_s = _retry_after_s(response.headers.get("Retry-After"))
    raise error_for(_problem(response.status_code, body, wait_s))


def read_receipt(response: httpx.Response) -> Receipt:
    """The answer to a single item."""
    return _receipt(_object(response), is_replay=response.status_code == 200)


def read_outcomes(response: httpx.Response, num_items: int) -> list[Outcome]:
    """The answers to the items of a batch, in their order."""
    entries = _object(response).get("items")
    if not isinstance(entries, list) or len(entries) != num_items:
        raise _unexpected()
    return [_outcome(entry) for entry in entries]


def _outcome(entry: Json) -> Outcome:
    status = entry["status"]
    if status in (200, 201):
        stored = entry.get("feedback") or entry.get("interaction") or {}
        return _receipt(stored, is_replay=status == 200)
    return _problem(status, entry.get("problem") or {})


def _receipt(stored: Json, *, is_replay: bool) -> Receipt:
    if "id" not in stored:
        raise _unexpected()
    is_pending = stored.get("status") == "pending"
    return Receipt(id=stored["id"], is_replay=is_replay, is_pending=is_pending)


def _problem(status: int, body: Json, retry_after_s: float | None = None) -> Problem:
    reasons = (f"{found['field']}: {found['reason']}" for found in body.get("errors", ()))
    return Problem(
        status=status,
        code=body.get("code", "unknown"),
        detail=body.get("detail", ""),
        errors=tuple(reasons),
        request_id=body.get("request_id"),
        retry_after_s=retry_after_s,
    )


def _retry_after_s(value: str | None) -> float | None:
    if value is None:
        return None
    if value.isdecimal():
        return float(value)
    try:
        until = parsedate_to_datetime(value).replace(tzinfo=timezone.utc)
    except ValueError:
        return None
    return max(0.0, (until - datetime.now(timezone.utc)).total_seconds())


def _object(response: httpx.Response) -> Json:
    try:
        body: Any = response.json()  # Any: JSON
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _unexpected() -> ApiError:
    detail = "this is not the answer of a Perennial server; check base_url"
    return ApiError(Problem(status=200, code="unexpected_answer", detail=detail))
