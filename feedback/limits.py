"""What a request body may be: JSON in UTF-8 of a bounded size, matching its model.

The size is counted while reading, so an oversize body costs at most its limit in memory; depth is
bounded by the parser.
"""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from perennial.infra.errors import TooLargeError

MAX_BODY_BYTES = 1 << 20
MAX_BATCH_BYTES = 5 << 20

BodyT = TypeVar("BodyT", bound=BaseModel)


def json_body(
    model: type[BodyT], max_bytes: int = MAX_BODY_BYTES
) -> Callable[[Request], Awaitable[BodyT]]:
    """A FastAPI dependency that reads, bounds and checks the request's body."""

    async def read(request: Request) -> BodyT:
        _check_content_type(request)
        return parse_body(model, await read_body(request, max_bytes))

    return read


def parse_body(model: type[BodyT], content: bytes) -> BodyT:
    """`content` as a `model`.

    Raises:
        HTTPException: 400, not UTF-8 or not JSON.
        RequestValidationError: JSON, but not of this model.
    """
    try:
        content.decode()
        return model.model_validate_json(content)
    except UnicodeDecodeError as error:
        raise HTTPException(400, "the body is not UTF-8") from error
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        if any(detail["type"] == "json_invalid" for detail in details):
            raise HTTPException(400, f"the body is not JSON: {details[0]['msg']}") from error
        raise RequestValidationError(details) from error


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body, or TooLargeError as soon as it is known to exceed `max_bytes`."""
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(content)


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(f"the body may have at most {max_bytes} bytes", max_bytes=max_bytes)


def _check_content_type(request: Request) -> None:
    kind, _, parameters = request.headers.get("content-type", "").lower().partition(";")
    is_json = kind.strip() == "application/json"
    is_utf8 = parameters.strip().replace('"', "") in ("", "charset=utf-8")
    if not (is_json and is_utf8) or "content-encoding" in request.headers:
        raise HTTPException(415, "send application/json in UTF-8, not compressed")
