"""`perennial keys` as a person and as a script see it."""

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from perennial.feedback.keys import Scope, split_key
from perennial.flows.cli import create, main
from perennial.flows.cli_keys import parse_duration
from perennial.infra.errors import InputError


class Shell:
    """The command line of one installation."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def __call__(self, *arguments: str) -> Result:
        runner = CliRunner(env={"PERENNIAL_HOME": str(self._home), "COLUMNS": "120"})
        return runner.invoke(main, ["keys", *arguments])

    def json(self, *arguments: str) -> Any:
        result = self(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def test_created_key_is_alone_on_standard_output(shell: Shell) -> None:
    result = shell("create", "--tenant", "shop", "--scope", "ingest", "--expires-in", "90d")

    key_id = split_key(result.stdout.strip()).id
    assert f"id {key_id}, tenant shop, scopes ingest, expires" in result.stderr
    assert "cannot be shown again" in result.stderr


def test_list_shows_state_and_no_secret(shell: Shell) -> None:
    text = shell("create", "--tenant", "shop").stdout.strip()
    shell("revoke", split_key(text).id)

    listed = shell("list").stdout

    row = listed.splitlines()[1]
    assert row.split()[:5] == [split_key(text).id, "shop", "ingest", "read", "revoked"]
    assert split_key(text).secret not in listed


def test_rotated_key_replaces_the_old_one_after_the_overlap(shell: Shell) -> None:
    old = shell.json("create", "--tenant", "shop", "--scope", "read", "--expires-in", "90d")

    new = shell.json("rotate", old["id"], "--overlap", "2h")

    assert (new["tenant"], new["scopes"], new["state"]) == ("shop", ["read"], "active")
    assert _moment(new["expires_at"]) - _moment(new["created_at"]) == timedelta(days=90)
    assert new["replaces"]["id"] == old["id"] != new["id"]
    overlap = _moment(new["replaces"]["expires_at"]) - _moment(new["created_at"])
    assert overlap == timedelta(hours=2)


def test_rotation_says_how_long_the_old_key_works(shell: Shell) -> None:
    old = shell.json("create")["id"]

    result = shell("rotate", old)

    assert split_key(result.stdout.strip()).id != old
    assert f"{old} works until " in result.stderr


def test_rotation_without_overlap_ends_the_old_key_at_once(shell: Shell) -> None:
    old = shell.json("create")["id"]

    shell("rotate", old, "--overlap", "0s", "--expires-in", "1d")

    assert [key["state"] for key in shell.json("list")] == ["expired", "active"]


def test_json_of_every_command_describes_the_key(shell: Shell) -> None:
    created = shell.json("create", "--tenant", "shop")
    assert split_key(created.pop("key")).id == created["id"]

    assert shell.json("list") == [created]
    revoked = shell.json("revoke", created["id"])
    assert (revoked["state"], _moment(revoked["revoked_at"]).tzinfo is not None) == (
        "revoked",
        True,
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("revoke", "nope"), "not_found: there is no API key with the id 'nope'"),
        (("rotate", "nope"), "not_found: there is no API key with the id 'nope'"),
        (("rotate", "nope", "--overlap", "1 day"), "--overlap must be a number and one of s m h d"),
        (("create", "--expires-in", "-1d"), "--expires-in must be a number and one of s m h d"),
        (("create", "--tenant", "a b"), "tenant must be 1 to 128 of the characters"),
        (("create", "--scope", "root"), "'root' is not one of 'ingest', 'read', 'review'"),
    ],
)
def test_mistake_is_explained_and_changes_nothing(
    shell: Shell, arguments: tuple[str, ...], said: str
) -> None:
    result = shell(*arguments)

    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert shell.json("list") == []


def test_ended_key_is_not_rotated(shell: Shell) -> None:
    key_id = shell.json("create")["id"]
    shell("revoke", key_id)

    result = shell("rotate", key_id)

    assert (result.exit_code, "is revoked: create a new one" in result.stderr) == (2, True)


def test_every_scope_can_be_chosen() -> None:
    choices = next(p.type for p in create.params if p.name == "scopes")

    assert list(choices.choices) == [scope.value for scope in Scope]  # type: ignore[attr-defined]  # Choice


def test_duration_is_a_number_and_a_unit() -> None:
    assert parse_duration("x", "90s") == timedelta(seconds=90)
    assert parse_duration("x", "30m") == timedelta(minutes=30)
    assert parse_duration("x", "24h") == timedelta(days=1)
    assert parse_duration("x", "7d") == timedelta(days=7)
    for wrong in ("", "24", "h", "1w", "1.5h", "-1d", "999999d", "24H", "२h"):
        with pytest.raises(InputError):
            parse_duration("x", wrong)
