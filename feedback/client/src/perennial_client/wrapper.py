"""`wrap(openai_client, sender)`: chat completions of any OpenAI-compatible server, recorded.

The app gets the response that it would have got without. Nothing here imports the vendor's package:
its objects are read by the names that it documents, and by `_iterator`, through which its streams
have been read since its version 1. What cannot be read is not recorded.
"""

from __future__ import annotations

import inspect
import logging
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, TypeVar, cast

from perennial_client.errors import ClientError
from perennial_client.items import InteractionFields, Json, Message, interaction, new_interaction_id
from perennial_client.sender import BackgroundSender

logger = logging.getLogger(__name__)

OpenAIT = TypeVar("OpenAIT")
Vendor = Any  # an object of the vendor's package, or of another server's making

_ID_ATTRIBUTE = "_perennial_interaction_id"
_GATEWAY_HEADER = "x-interaction-id"
_ROLES = {"system", "developer", "user", "assistant", "tool"}


def wrap(client: OpenAIT, sender: BackgroundSender, *, task: str | None = None) -> OpenAIT:
    """The same client; from now on its chat completions are recorded under `task`.

    Without `task` it is the name of the model that the app asks for. What Perennial's own gateway
    answers is not recorded again. A failure to record is logged and never reaches the app.
    """
    completions = cast(Vendor, client).chat.completions
    raw = completions.with_raw_response
    for name in ("create", "parse"):
        if hasattr(raw, name):
            setattr(completions, name, _recorded(getattr(raw, name), sender, task))
    return client


def interaction_id(response: object) -> str | None:
    """The id under which a response or a stream of a wrapped client is, or will be, recorded."""
    return getattr(response, _ID_ATTRIBUTE, None)


def _recorded(
    ask: Callable[..., Vendor], sender: BackgroundSender, task: str | None
) -> Callable[..., Vendor]:
    def recorded(**request: Vendor) -> Vendor:
        if isinstance(request.get("messages"), Iterator):
            request["messages"] = list(request["messages"])  # it is read twice
        recording = _Recording(sender, task, request)
        raw = ask(**request)
        return _awaited(raw, recording) if inspect.isawaitable(raw) else _observed(raw, recording)

    return recorded


async def _awaited(raw: Awaitable[Vendor], recording: _Recording) -> Vendor:
    return _observed(await raw, recording)


def _observed(raw: Vendor, recording: _Recording) -> Vendor:
    response = raw.parse()
    gateways_id = raw.headers.get(_GATEWAY_HEADER)
    with _quietly():
        setattr(response, _ID_ATTRIBUTE, gateways_id or recording.id)
        if gateways_id is None and hasattr(response, "choices"):
            recording.hear(response)
            recording.end()
        elif gateways_id is None:
            _tap(response, recording)
    return response


def _tap(stream: Vendor, recording: _Recording) -> None:
    """Let `recording` hear the chunks of `stream` and learn of its end, however it ends."""
    chunks, close = stream._iterator, stream.close

    def closed() -> Vendor:
        recording.end()
        return close()

    is_async = isinstance(chunks, AsyncIterator)
    stream._iterator = _heard_async(chunks, recording) if is_async else _heard(chunks, recording)
    stream.close = closed
    weakref.finalize(stream, recording.end)  # an abandoned one is collected, or the process exits


def _heard(chunks: Iterator[Vendor], recording: _Recording) -> Iterator[Vendor]:
    try:
        for chunk in chunks:
            recording.hear(chunk)
            yield chunk
    finally:
        recording.end()


async def _heard_async(
    chunks: AsyncIterator[Vendor], recording: _Recording
) -> AsyncIterator[Vendor]:
    try:
        async for chunk in chunks:
            recording.hear(chunk)
            yield chunk
    finally:
        recording.end()


class _Recording:
    """One completion, from the request until it is enqueued, once."""

    def __init__(self, sender: BackgroundSender, task: str | None, request: Json) -> None:
        self.id = new_interaction_id()
        self._sender = sender
        self._pieces: list[str] = []
        self._is_over = False
        self._fields: Json = {}
        self._started_s = time.monotonic()
        with _quietly():
            self._fields = _request_fields(request, task)

    def hear(self, part: Vendor) -> None:
        """Keep what a whole response, or a chunk of it, says."""
        with _quietly():
            self._fields["model_version"] = part.model or self._fields["model_version"]
            if (usage := getattr(part, "usage", None)) is not None:
                self._fields["num_prompt_tokens"] = usage.prompt_tokens
                self._fields["num_completion_tokens"] = usage.completion_tokens
            for choice in part.choices:
                if choice.index == 0:
                    said = choice.delta if hasattr(choice, "delta") else choice.message
                    self._pieces.append(said.content or "")
                    self._fields["finish_reason"] = choice.finish_reason or "cancelled"

    def end(self) -> None:
        """Enqueue what was heard, if anything was."""
        if self._is_over or not self._pieces:
            return
        self._is_over = True
        latency_ms = round(1000 * (time.monotonic() - self._started_s), 3)
        with _quietly():
            said = {"id": self.id, "completion": "".join(self._pieces), "latency_ms": latency_ms}
            self._sender.enqueue(interaction(**cast(InteractionFields, {**self._fields, **said})))


def _request_fields(request: Json, task: str | None) -> Json:
    tags = dict(request.get("metadata") or {})
    return {
        "task": task or request["model"],
        "model_version": request["model"],
        "messages": [_message(message) for message in request["messages"]],
        "subject": request.get("user") or None,
        "session": tags.pop("session", None) or None,
        "trace_id": tags.pop("trace_id", None) or None,
        "tags": tags,
        "occurred_at": datetime.now(timezone.utc),
    }


def _message(message: Vendor) -> Message:
    # An answer that the app appended to its conversation is an object, not a dict.
    said = message if isinstance(message, Mapping) else vars(message)
    role = said["role"]
    return {"role": role if role in _ROLES else "tool", "content": _text(said.get("content"))}


def _text(content: Vendor) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text", "") for part in content)


@contextmanager
def _quietly() -> Iterator[None]:
    # What a full spool, a failing disk and an unknown shape of the vendor's objects raise.
    try:
        yield
    except (ClientError, OSError, AttributeError, LookupError, TypeError, ValueError) as error:
        logger.warning("completion not recorded error=%s: %s", type(error).__name__, error)
