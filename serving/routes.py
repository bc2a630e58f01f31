"""Which version answers which task: immutable tables, no effects.

Following the champion and loading adapters is `watcher`'s; HTTP is `gateway`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from perennial.serving.engine import BASE, AdapterRef

RouteRole = Literal["base", "champion"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """A task's live version."""

    task: str
    adapter: AdapterRef

    @property
    def version(self) -> str:
        """The name that answers carry."""
        return self.adapter.name

    @property
    def role(self) -> RouteRole:
        """`base` until something was promoted."""
        return "base" if self.adapter.name == BASE.name else "champion"


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteTable:
    """Every task's route; replaced as a whole, so a reader never sees half a change."""

    routes: Mapping[str, Route] = field(default_factory=lambda: MappingProxyType({}))

    def with_route(self, route: Route) -> "RouteTable":
        """A table in which `route` replaces that of its task."""
        return RouteTable(routes=MappingProxyType({**self.routes, route.task: route}))

    def find(self, task: str) -> Route | None:
        """The route of `task`, or None while it has none."""
        return self.routes.get(task)
