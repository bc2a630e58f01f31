"""What a request body may be: JSON in UTF-8 of a bounded size, matching its struct.

The size is counted while reading, so an oversize body costs at most its limit in memory; depth is
bounded by the parser.
"""

import re
from typing import TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request

from perennial.infra.errors import InputError, MalformedError, TooLargeError

MAX_BODY_BYTES = 1 << 20
MAX_BATCH_BYTES = 5 << 20

BodyT = TypeVar("BodyT")

# msgspec's own words for these repeat what was sent.
_OWN_REASONS = {
    "Invalid value": "the kind is not one of those documented",
    "Invalid enum value": "it is not one of the values documented",
}
_MAX_FIELD_CHARS = 120


async def read_json(request: Request, max_bytes: int) -> bytes:
    """The whole body of a request that says it is JSON.

    Raises:
        HTTPException: 415, it says it is something else.
        TooLargeError: as soon as it is known to exceed `max_bytes`.
    """
    _check_content_type(request)
    return await read_body(request, max_bytes)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body; raises TooLargeError as soon as it is known to exceed `max_bytes`."""
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    chunks, num_bytes, has_more = [], 0, True
    while has_more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise MalformedError("the connection ended before the body did")
        chunk = message.get("body", b"")
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
        has_more = message.get("more_body", False)
    return b"".join(chunks)


def parse_json(decoder: msgspec.json.Decoder[BodyT], content: bytes) -> BodyT:
    """`content` as the decoder's struct.

    Raises:
        MalformedError: it is not JSON in UTF-8.
        InputError: it is JSON, but not of this struct; `field` and `reason` say where and why.
    """
    try:
        return decoder.decode(content)
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from error
    except UnicodeDecodeError as error:
        raise MalformedError("the body is not UTF-8") from error
    except msgspec.DecodeError as error:
        raise MalformedError(f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise MalformedError("the body is nested too deeply") from error


def _field_error(said: str) -> InputError:
    """The error of `REASON - at `$.path``, without any value that was sent."""
    reason, _, path = said.partition(" - at `$")
    if unknown := re.match(r"Object contains unknown field `(.*)`", reason, re.DOTALL):
        path, reason = f"{path.rstrip('`')}.{unknown[1][:40]}", "this field is not known"
    else:
        words = next((own for start, own in _OWN_REASONS.items() if reason.startswith(start)), None)
        reason = words or reason
    field = path.rstrip("`").lstrip(".")[:_MAX_FIELD_CHARS] or "body"
    return InputError("a field cannot be accepted; see errors", field=field, reason=reason)


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(f"the body may have at most {max_bytes} bytes", max_bytes=max_bytes)


def _check_content_type(request: Request) -> None:
    headers = request.headers
    if headers.get("content-type") == "application/json" and "content-encoding" not in headers:
        return
    kind, _, parameters = headers.get("content-type", "").lower().partition(";")
    is_json = kind.strip() == "application/json"
    is_utf8 = parameters.strip().replace('"', "") in ("", "charset=utf-8")
    if not (is_json and is_utf8) or "content-encoding" in headers:
        raise HTTPException(415, "send application/json in UTF-8, not compressed")
