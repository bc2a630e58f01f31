"""The route of OpenTelemetry exporters, `POST /v1/traces`: answers and evaluations in spans.

What a span means is `otlp`'s; a collector needs no other set-up than our address and a key.
"""

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from perennial.feedback.formats.chat import Json
from perennial.feedback.formats.otlp import JSON, PROTOBUF, gunzip, reply, traces_to_items
from perennial.feedback.intake import (
    FEEDBACK,
    INTERACTION,
    Checked,
    Intake,
    admit_rows,
    admitted,
    check_items,
    store,
    subject_at_once,
)
from perennial.feedback.keys import Principal
from perennial.feedback.limits import MAX_BATCH_BYTES, read_body
from perennial.infra.errors import ConflictError, PerennialError, RateLimitedError, UnavailableError


def trace_routes(intake: Intake) -> list[Route]:
    """The route, for an app that makes problems of errors."""

    async def post(request: Request) -> Response:
        caller = await admitted(intake, request)
        kind = _content_type(request)
        found = await run_in_threadpool(
            traces_to_items, await _content(request), kind, task=intake.task
        )
        admit_rows(intake, caller, len(found.interactions) + len(found.feedback))
        checked = await _checked(intake, found.interactions, found.feedback, caller)
        outcomes = await store(intake, checked)
        # A conflict is an answer that somebody else reported already.
        errors = [e for e in outcomes if isinstance(e, PerennialError) and not _is_known(e)]
        _retry_all(errors)
        reasons = [*found.rejected, *found.warnings, *(error.message for error in errors)]
        content = reply(len(found.rejected) + len(errors), reasons, kind)
        return Response(content, media_type=kind)

    return [Route("/v1/traces", post, methods=["POST"])]


async def _checked(
    intake: Intake,
    interactions: tuple[Json, ...],
    feedback: tuple[Json, ...],
    caller: Principal,
) -> list[Checked]:
    subjects = (item.get("subject") for item in (*interactions, *feedback))
    # What is no text is refused with its row.
    admit = subject_at_once(intake, caller, (each for each in subjects if isinstance(each, str)))
    asked = [msgspec.json.encode(item) for item in interactions]
    said = [msgspec.json.encode(item) for item in feedback]
    return [
        *await check_items(intake, INTERACTION, asked, caller, None, admit),
        *await check_items(intake, FEEDBACK, said, caller, None, admit),
    ]


def _is_known(error: PerennialError) -> bool:
    return isinstance(error, ConflictError)


def _retry_all(errors: list[PerennialError]) -> None:
    """Raise what time will mend: an exporter sends all again, and each row is stored once."""
    for error in errors:
        if isinstance(error, RateLimitedError | UnavailableError):
            raise error


def _content_type(request: Request) -> str:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (PROTOBUF, JSON):
        raise HTTPException(415, f"send {PROTOBUF} or {JSON}")
    return kind


async def _content(request: Request) -> bytes:
    content = await read_body(request, MAX_BATCH_BYTES)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding == "gzip":
        return await run_in_threadpool(gunzip, content, MAX_BATCH_BYTES)
    if encoding != "identity":
        raise HTTPException(415, "send it as it is or with gzip")
    return content
