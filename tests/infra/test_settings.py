from pathlib import Path

import pytest

from perennial.infra.errors import ConfigError
from perennial.infra.settings import (
    Settings,
    child_environment,
    load_settings,
    setting_keys,
)


def test_environment_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "perennial.toml"
    file.write_text('task = "support"\n[api]\nport = 8001\n')

    settings = load_settings({"PERENNIAL_API__PORT": "8002"}, file)

    assert (settings.task, settings.api.port) == ("support", 8002)


def test_unknown_key_names_the_key_its_source_and_what_is_allowed() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({"PERENNIAL_API__PROT": "1"})

    message = str(caught.value)
    assert "PERENNIAL_API__PROT" in message
    assert "'api.prot'" in message
    assert "access_log, auth, host, max_per_s, max_per_s_subject, min_free_mb, port" in message


def test_wrong_type_in_the_file_names_file_and_key(tmp_path: Path) -> None:
    file = tmp_path / "perennial.toml"
    file.write_text("[check]\nlevel = 'often'\n")

    with pytest.raises(ConfigError, match=r"perennial\.toml: check\.level = 'often'"):
        load_settings({}, file)


@pytest.mark.parametrize("text", ["[api", "\xff"])
def test_unreadable_file_is_a_clear_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "perennial.toml"
    file.write_bytes(text.encode("latin-1"))

    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings({}, file)


def test_missing_named_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no settings file"):
        load_settings({}, tmp_path / "nowhere.toml")


def test_child_sees_exactly_the_settings_of_its_parent() -> None:
    settings = load_settings(
        {
            "PERENNIAL_TASK": "support",
            "PERENNIAL_TRAINING__OVERRIDES": '{ epochs = 3, targets = ["a"], lr = 1e-3 }',
        }
    )

    again = load_settings(child_environment(settings, {}))

    assert again == settings


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8790"),
        ("localhost", "http://localhost:8790"),
        ("::1", "http://[::1]:8790"),
    ],
)
def test_an_address_stands_in_urls_as_they_spell_it(host: str, url: str) -> None:
    assert load_settings({"PERENNIAL_API__HOST": host}).api_url == url


def test_what_is_not_set_is_not_read_from_the_folder_that_a_child_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = "[training]\ngeneral_file = 'a.jsonl'\nprobe_file = 'b.jsonl'\n"
    (tmp_path / "perennial.toml").write_text(other)
    (tmp_path / "ours.toml").touch()
    settings = load_settings({}, tmp_path / "ours.toml")

    assert load_settings(child_environment(settings, {})) == settings


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().task = "other"


def test_every_setting_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()

    missing = [key for key in setting_keys() if f"`{key}`" not in text]

    assert missing == []
