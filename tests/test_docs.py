"""The docs say what there is: settings, commands, routes, error codes, links."""

import re
from collections.abc import Iterator
from pathlib import Path

import click

from perennial.feedback.api import ApiDeps, create_app
from perennial.feedback.committer import GroupCommitter
from perennial.feedback.keys import open_access
from perennial.flows.cli import main
from perennial.flows.cli_settings import settings_table
from perennial.infra import errors
from perennial.training.arms import ARMS
from perennial.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_configuration_holds_the_generated_table() -> None:
    assert settings_table() in (DOCS / "configuration.md").read_text()


def test_every_command_is_documented_and_has_help() -> None:
    text = (DOCS / "operations.md").read_text()

    assert [name for name in main.commands if f"`perennial {name}`" not in text] == []
    assert [name for name, command in every_command() if not command.help] == []


def test_every_option_has_help() -> None:
    silent = [
        f"{name} {option.name}"
        for name, command in every_command()
        for option in command.params
        if isinstance(option, click.Option) and not option.help
    ]

    assert silent == []


def every_command(
    group: click.Group = main, before: str = ""
) -> Iterator[tuple[str, click.Command]]:
    """Commands with their whole names, those of groups as well."""
    for name, command in group.commands.items():
        yield f"{before}{name}", command
        if isinstance(command, click.Group):
            yield from every_command(command, f"{before}{name} ")


def test_every_route_is_documented() -> None:
    text = (DOCS / "api.md").read_text()
    committer = GroupCommitter(lambda _: ())
    app = create_app(ApiDeps(store=None, committer=committer, authenticate=open_access()))  # type: ignore[arg-type]  # never called
    paths = app.openapi()["paths"]
    routes = [f"`{method.upper()} {path}`" for path, methods in paths.items() for method in methods]

    assert len(routes) > 8
    assert [route for route in routes if route not in text] == []


def test_every_error_code_is_documented() -> None:
    text = (DOCS / "api.md").read_text()
    kinds = (k for k in vars(errors).values() if isinstance(k, type))
    codes = {k.code for k in kinds if issubclass(k, errors.PerennialError)}

    assert [code for code in sorted(codes) if f"`{code}`" not in text] == []


def test_every_field_of_the_recipe_is_documented() -> None:
    text = (DOCS / "rounds.md").read_text()

    assert [name for name in TrainConfig().to_json() if f"`{name}`" not in text] == []


def test_every_option_of_the_search_is_documented() -> None:
    text = (DOCS / "rounds.md").read_text()
    options = [name for option in main.commands["tune"].params for name in option.opts]

    assert len(options) > 5
    assert [name for name in options if f"`{name}`" not in text] == []


def test_every_option_and_arm_of_the_continual_benchmark_is_documented() -> None:
    text = (DOCS / "benchmarks.md").read_text()
    continual = dict(every_command())["bench continual"]
    options = [option.opts[0] for option in continual.params]

    assert len(options) > 8
    assert [name for name in (*options, *ARMS) if f"`{name}`" not in text] == []


def test_links_between_pages_resolve() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text())
        if not (page.parent / target).exists()
    ]

    assert broken == []
