"""Who calls a route, and whether they may: the one place that reads `Authorization`."""

from starlette.requests import Request

from perennial.feedback.keys import Authenticate, Principal, Scope
from perennial.infra.errors import ForbiddenError


async def caller_of(request: Request, needed: Scope, authenticate: Authenticate) -> Principal:
    """The caller, whom the access log then names.

    Raises:
        AuthError: no valid key came as `Authorization: Bearer …`.
        ForbiddenError: its key lacks the scope `needed`.
        UnavailableError: keys cannot be checked now.
    """
    found = authenticate(bearer_token(request))
    caller = found if isinstance(found, Principal) else await found
    request.state.principal = caller
    if needed not in caller.scopes:
        raise ForbiddenError(f"this API key lacks the scope {needed}")
    return caller


def bearer_token(request: Request) -> str | None:
    """The token of `Authorization: Bearer …`, if there is one."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None
