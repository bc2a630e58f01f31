"""An API that others can reach asks for keys, or does not start."""

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from perennial.flows.app import compose, run_app
from perennial.flows.doctor import Level, examine, is_loopback
from perennial.infra.db import Database
from perennial.infra.errors import ConfigError
from perennial.infra.migrate import upgrade
from perennial.infra.settings import Settings, load_settings
from tests.feedback.test_access import EchoEngine

EXPOSED = [
    "0.0.0.0",
    "::",
    "",
    "192.168.1.20",
    "10.0.0.5",
    "169.254.1.1",
    "fe80::1%eth0",
    "::ffff:192.168.1.20",
    "example.internal",
    "localhost.example.com",
    "127.example.com",
    "127.0.0.1.example.com",
]


def _settings(home: Path, host: str, auth: str = "open") -> Settings:
    return load_settings(
        {
            "PERENNIAL_HOME": str(home),
            "PERENNIAL_API__HOST": host,
            "PERENNIAL_API__AUTH": auth,
        }
    )


@pytest.mark.parametrize("host", EXPOSED)
def test_open_api_that_others_can_reach_does_not_start(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="reachable from other machines"):
        run_app(_settings(tmp_path, host))

    assert not (tmp_path / "perennial.db").exists()


@pytest.mark.parametrize("auth", ["open", "keys"])
def test_doctor_sees_the_exposure_that_has_no_keys(tmp_path: Path, auth: str) -> None:
    findings = examine(_settings(tmp_path, "0.0.0.0", auth))

    (found,) = (f.level for f in findings if f.name == "exposure")
    assert found is (Level.BAD if auth == "open" else Level.OK)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.10", "::1"])
def test_loopback_is_this_machine_alone(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["127.8.9.10", "::1", "0:0:0:0:0:0:0:1"])
def test_open_api_answers_at_its_own_url_and_to_no_other_name(tmp_path: Path, host: str) -> None:
    settings = _settings(tmp_path, host)
    upgrade(settings.resolved_database_url)
    app = compose(settings, Database(settings.resolved_database_url), EchoEngine())

    with TestClient(app) as client:
        own = client.get(f"{settings.api_url}/healthz")
        foreign = client.get("http://rebound.example.com/healthz")

    assert (own.status_code, foreign.status_code) == (200, 400)
