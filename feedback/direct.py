"""The routes that write, in front of all that a framework does for a route.

Middleware, routing and dependency machinery take longer than to parse and check an event. Every
other request goes on to the app.
"""

from collections.abc import Sequence

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
        request = Request(scope, receive)
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
