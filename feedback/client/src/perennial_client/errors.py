"""The error tree. Every error that the client raises on purpose is one of these.

    ClientError
    ├── ApiError                            the server answered with a problem (RFC 9457)
    │   ├── RefusedError (ValueError)       400, 413, 415, 422: this will never be accepted
    │   │   └── ConflictError               the key or the id was used before for something else
    │   ├── AccessError (PermissionError)   401, 403: no valid API key, or it lacks the scope
    │   └── BusyError (ConnectionError)     429, 502, 503, 504, at the last attempt
    ├── UnreachableError (ConnectionError)  no answer, at the last attempt
    ├── ItemTooLargeError (ValueError)      no server would take an item of this size
    ├── SpoolFullError (RuntimeError)       the server has been away for too long
    └── SenderClosedError (RuntimeError)    `close()` was called before

After BusyError and UnreachableError it is unknown whether the server has stored what was sent: send
it again with the same key.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What the server had against a request, or against one item of a batch."""

    status: int
    code: str
    detail: str
    errors: tuple[str, ...] = ()
    request_id: str | None = None
    retry_after_s: float | None = None

    @property
    def is_passing(self) -> bool:
        """Whether the same may be accepted later."""
        return self.status in (429, 502, 503, 504)

    def __str__(self) -> str:
        return "; ".join([f"{self.status} {self.code}: {self.detail}", *self.errors])


class ClientError(Exception):
    """Base of the tree."""


class ApiError(ClientError):
    """The server answered with a problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem


class RefusedError(ApiError, ValueError):
    """This payload will never be accepted."""


class ConflictError(RefusedError):
    """The key or the id was used before for something else."""


class AccessError(ApiError, PermissionError):
    """No valid API key, or one that lacks the scope."""


class BusyError(ApiError, ConnectionError):
    """The server, or what stands before it, asks to try again later."""


class UnreachableError(ClientError, ConnectionError):
    """No answer."""


class ItemTooLargeError(ClientError, ValueError):
    """No server would take an item of this size."""


class SpoolFullError(ClientError, RuntimeError):
    """Nothing more fits into the spool until the server is back."""


class SenderClosedError(ClientError, RuntimeError):
    """The sender was closed."""


def error_for(problem: Problem) -> ApiError:
    """The error of the tree that stands for `problem`."""
    if problem.code == "conflict":
        return ConflictError(problem)
    if problem.status in (400, 413, 415, 422):
        return RefusedError(problem)
    if problem.status in (401, 403):
        return AccessError(problem)
    if problem.is_passing:
        return BusyError(problem)
    return ApiError(problem)
