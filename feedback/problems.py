"""Every error as `application/problem+json` (RFC 9457), from one table of statuses.

A problem says what was wrong with which field and what to do. It repeats no value that was sent, no
message of a driver and no stack: those may hold secrets or be of any size.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from perennial.feedback.replies import FieldProblem, Problem
from perennial.infra.errors import (
    AuthError,
    ConflictError,
    ForbiddenError,
    InputError,
    MalformedError,
    NotFoundError,
    OverloadedError,
    PerennialError,
    RateLimitedError,
    TooLargeError,
    UnavailableError,
)

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
# ConflictError is a key or an id that came back with another payload: the request is at fault.
STATUSES: Mapping[type[PerennialError], HTTPStatus] = {
    AuthError: HTTPStatus.UNAUTHORIZED,
    ForbiddenError: HTTPStatus.FORBIDDEN,
    NotFoundError: HTTPStatus.NOT_FOUND,
    TooLargeError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    MalformedError: HTTPStatus.BAD_REQUEST,
    InputError: HTTPStatus.UNPROCESSABLE_ENTITY,
    ConflictError: HTTPStatus.UNPROCESSABLE_ENTITY,
    RateLimitedError: HTTPStatus.TOO_MANY_REQUESTS,
    UnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
}
HEADERS: Mapping[HTTPStatus, Mapping[str, str]] = {
    HTTPStatus.UNAUTHORIZED: {"WWW-Authenticate": "Bearer"},
    # The rest of the body is not read, so the connection cannot be used again.
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: {"Connection": "close"},
    HTTPStatus.SERVICE_UNAVAILABLE: {"Retry-After": "2"},
}
_MAX_FIELD_CHARS = 120
_MAX_REASON_CHARS = 200
_MAX_FIELDS = 20
# pydantic's own words for these repeat what was sent.
_OWN_REASONS = {
    "extra_forbidden": "this field is not known",
}


def handle_errors(app: FastAPI) -> None:
    """Make every error that leaves `app` a problem."""
    app.add_exception_handler(PerennialError, answer_perennial_error)
    app.add_exception_handler(RequestValidationError, _answer_invalid_request)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(Exception, answer_unexpected)


def problem_of(error: PerennialError) -> Problem:
    """The problem that says what `error` says, if it is the caller's business."""
    status = next((STATUSES[k] for k in type(error).__mro__ if k in STATUSES), None)
    if status is None:
        return _problem(HTTPStatus.INTERNAL_SERVER_ERROR, "something went wrong on the server")
    if status == HTTPStatus.SERVICE_UNAVAILABLE and not isinstance(error, OverloadedError):
        detail = (
            "the store cannot be reached; nothing is known to be stored, retry with the same key"
        )
        return _problem(status, detail, code=error.code)
    field = error.fields.get("field")
    errors = [FieldProblem(field=str(field), reason=str(error.fields["reason"]))] if field else []
    problem = _problem(status, error.message[:_MAX_REASON_CHARS], code=error.code, errors=errors)
    return problem.model_copy(update={"retry_after_s": error.fields.get("retry_after_s")})


def validation_problem(error: RequestValidationError) -> Problem:
    """The problem that names the parameters and the reasons."""
    found = list(_field_problems(error.errors()))
    detail = f"{len(found)} field(s) cannot be accepted; see errors"
    status = HTTPStatus.UNPROCESSABLE_ENTITY
    return _problem(status, detail, code=InputError.code, errors=found[:_MAX_FIELDS])


def _problem(
    status: HTTPStatus,
    detail: str,
    *,
    code: str | None = None,
    errors: Iterable[FieldProblem] = (),
) -> Problem:
    code = code or status.phrase.lower().replace(" ", "_").replace("-", "_")
    return Problem(
        type=f"urn:perennial:problem:{code}",
        title=status.phrase,
        status=status,
        detail=detail,
        code=code,
        errors=list(errors),
    )


# Any: pydantic's and FastAPI's error details are untyped dictionaries.
def _field_problems(details: Iterable[Any]) -> Iterable[FieldProblem]:
    for detail in details:
        path = ".".join(str(part)[:40] for part in detail["loc"])
        reason = _OWN_REASONS.get(detail["type"], str(detail["msg"]))
        yield FieldProblem(field=path[:_MAX_FIELD_CHARS], reason=reason[:_MAX_REASON_CHARS])


def _response(
    request: Request, problem: Problem, headers: Mapping[str, str] | None = None
) -> Response:
    request_id = getattr(request.state, "request_id", None)
    own = HEADERS.get(HTTPStatus(problem.status), {})
    return Response(
        problem.model_copy(update={"request_id": request_id}).model_dump_json(),
        status_code=problem.status,
        media_type=MEDIA_TYPE,
        headers={**own, **(headers or {})},
    )


async def answer_perennial_error(request: Request, error: Exception) -> Response:
    """The problem of one of our own errors."""
    assert isinstance(error, PerennialError)
    problem = problem_of(error)
    # A refusal under overload is an answer like any other: its number is in the metrics.
    if problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR and not isinstance(
        error, OverloadedError
    ):
        logger.error("request failed code=%s error=%s", error.code, error)
    return _response(request, problem, _retry_after(error))


def _retry_after(error: PerennialError) -> Mapping[str, str]:
    wait_s = error.fields.get("retry_after_s")
    return {} if wait_s is None else {"Retry-After": str(max(1, math.ceil(float(wait_s))))}


async def _answer_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _response(request, validation_problem(error))


async def answer_http_error(request: Request, error: Exception) -> Response:
    """The problem of an error that names its own status."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    return _response(request, _problem(status, error.detail), error.headers)


async def answer_unexpected(request: Request, error: Exception) -> Response:
    """The problem of a defect; whoever calls raises the error again, so its stack is logged."""
    logger.error("request failed error=%s", type(error).__name__)
    detail = "something went wrong on the server"
    return _response(request, _problem(HTTPStatus.INTERNAL_SERVER_ERROR, detail))
