import pytest

from perennial.infra.errors import ConfigError
from perennial.training import config as configs
from perennial.training.config import TrainConfig


def test_a_config_survives_json_and_changes_its_fingerprint() -> None:
    config = TrainConfig(rank=8, lr=5e-4)
    assert configs.from_json(config.to_json()) == config
    assert config.fingerprint != TrainConfig(rank=8, lr=6e-4).fingerprint


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"rnak": 4}, "unknown training setting 'rnak'"),
        ({"rank": "4"}, "rank must be int"),
        ({"rank": True}, "rank must be int"),
        ({"rank": 0}, "rank must be positive, got 0"),
        ({"targets": "everything"}, "targets must be one of"),
        ({"replay_share": 0.6, "general_share": 0.5}, "below 1 together"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"shrink": 0.0}, "shrink must be positive"),
    ],
)
def test_a_wrong_setting_is_named(raw: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configs.from_json(raw)
