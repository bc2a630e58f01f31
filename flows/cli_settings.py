"""`perennial config`: every setting, for people and for docs/configuration.md."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Table

from perennial.infra.settings import PREFIX, Settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One setting as documented."""

    key: str
    variable: str
    kind: str
    default: str
    meaning: str


def all_settings() -> tuple[Setting, ...]:
    """Every setting in the order of its section."""
    return tuple(_walk(Settings, ""))


def settings_table() -> str:
    """The settings as a Markdown table."""
    rows = (
        f"| `{s.key}` | `{s.variable}` | {s.kind} | {f'`{s.default}`' if s.default else ''} "
        f"| {s.meaning} |"
        for s in all_settings()
    )
    return "\n".join(
        ("| key | variable | type | default | meaning |", "|---|---|---|---|---|", *rows)
    )


def show_settings(settings: Settings) -> None:
    """Print the settings in force; those that differ from their default stand out."""
    table = Table("key", "value", "meaning", box=None)
    for setting in all_settings():
        value = _show(_lookup(settings, setting.key))
        style = "" if value == setting.default or setting.key == "home" else "bold"
        table.add_row(setting.key, value, setting.meaning, style=style)
    Console().print(table)


def _walk(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _walk(kind, f"{prefix}{name}.")
            continue
        key = f"{prefix}{name}"
        yield Setting(
            key=key,
            variable=PREFIX + key.upper().replace(".", "__"),
            kind=_kind(kind, field),
            default=_show(field.get_default(call_default_factory=True)),
            meaning=field.description or "",
        )


def _kind(annotation: Any, field: FieldInfo) -> str:  # Any: a type expression
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in get_args(annotation))
    name = {"dict": "table", "str": "text", "Path": "path"}
    plain = getattr(annotation, "__name__", "path")
    bounds = ", ".join(
        f"{sign} {getattr(rule, attribute)}"
        for rule in field.metadata
        for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if hasattr(rule, attribute)
    )
    shown = name.get(plain, "path" if "Path" in str(annotation) else plain)
    return f"{shown} {bounds}".strip()


def _lookup(settings: Settings, key: str) -> Any:  # Any: a setting of any type
    value: Any = settings
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _show(value: Any) -> str:  # Any: a setting of any type
    if value is None or value == {} or value == "":
        return ""
    return str(value)
