"""The routes that write, in front of all that a framework does for a route.

Middleware, routing and dependency machinery take longer than to parse and check an event. Every
other request goes on to the app.
"""

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from perennial.feedback.problems import answer_http_error, answer_perennial_error, answer_unexpected
from perennial.infra.errors import PerennialError


class Direct:
    """ASGI middleware that answers POSTs to the paths of `routes` itself."""

    def __init__(self, app: ASGIApp, routes: Sequence[Route]) -> None:
        """`routes` have no parameters in their paths."""
        self._app = app
        self._routes = {route.path: route for route in routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or hand it on."""
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        route = self._routes.get(scope["path"]) if is_post else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        request = _Post(scope, receive)
        try:
            response = await route.endpoint(request)
        except PerennialError as error:
            response = await answer_perennial_error(request, error)
        except HTTPException as error:
            response = await answer_http_error(request, error)
        except Exception as error:
            await (await answer_unexpected(request, error))(scope, receive, send)
            raise
        await response(scope, receive, send)


class _Post(Request):
    """A request whose headers are looked up, not searched for: each post reads seven of them."""

    @property
    def headers(self) -> Headers:
        """The first of each name, as Starlette's."""
        if not hasattr(self, "_headers"):
            self._headers = _Headers(scope=self.scope)
        return self._headers


class _Headers(Headers):
    def __init__(self, scope: Scope) -> None:
        super().__init__(scope=scope)
        self._first = dict(reversed(self._list))

    def __getitem__(self, key: str) -> str:
        return self._first[key.lower().encode("latin-1")].decode("latin-1")

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key.lower().encode("latin-1") in self._first
