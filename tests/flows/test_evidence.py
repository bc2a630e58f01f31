"""What is stored of a candidate and shown to who decides, over real stores and a real MLflow."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from perennial.flows.curate import data_folder
from perennial.flows.release import ask_approval
from perennial.flows.retrain import name_version
from perennial.flows.wiring import Deps, make_deps
from perennial.infra.artifacts import publish
from perennial.infra.clock import utc_now
from perennial.infra.db import Database, create_all
from perennial.infra.settings import load_settings
from perennial.registry.rounds import Round
from perennial.registry.versions import ModelVersion
from perennial.training.examples import Example, write_examples
from tests.registry.builders import write_adapter
from tests.training.builders import example

name_it: Any = name_version.fn  # type: ignore[attr-defined]  # without Prefect around it
ask: Any = ask_approval.fn  # type: ignore[attr-defined]  # as above
ROWS = ("train", "replay", "dev", "general", "pairs", "judgements")


@pytest.fixture
def deps(tmp_path: Path) -> Iterator[Deps]:
    (tmp_path / "perennial.toml").touch()
    model = tmp_path / "model"
    model.mkdir()
    settings = load_settings(
        {
            "PERENNIAL_HOME": str(tmp_path),
            "PERENNIAL_MODEL__NAME": str(model),
            "PERENNIAL_APPROVAL__MODE": "auto",
        },
        tmp_path / "perennial.toml",
    )
    database = Database(f"sqlite:///{tmp_path}/p.db")
    create_all(database)
    yield make_deps(settings, database, utc_now)
    database.dispose()


def begun(deps: Deps, number: int, champion: str | None, rows: Sequence[Example]) -> Round:
    """A round whose adapter is trained, on `rows`."""
    round_ = deps.ledger.open_round("support", "drift", str(number))
    lease = deps.ledger.claim(round_.id, "test", ttl_s=60)
    deps.ledger.finish_step(lease, "begin", "0", {"champion": champion})
    deps.ledger.release(lease)
    data = data_folder(deps, round_.id)
    for name in ROWS:
        write_examples(data / f"{name}.jsonl", rows if name == "train" else ())
    return round_


def candidate(deps: Deps, round_: Round, start: str, champion: ModelVersion | None) -> ModelVersion:
    """The version of the round, whose training says that it began from `start`."""
    folder = data_folder(deps, round_.id).parent / "train" / "adapter"
    manifest = publish(folder, lambda inner: write_adapter(inner, round_.number))
    trained = {"adapter_digest": manifest.digest, "start": {"start": start, "reason": None}}
    found: ModelVersion = name_it(deps, round_, {"digest": "d" * 64}, trained, champion)
    return found


@pytest.mark.parametrize(("start", "is_clean"), [("base", True), ("parent", False)])
def test_only_a_rebuilt_version_has_not_learned_from_what_was_erased(
    deps: Deps, start: str, is_clean: bool
) -> None:
    champion = candidate(deps, begun(deps, 1, None, [example(1)]), "base", None)
    later = begun(deps, 2, champion.name, [example(2)])

    version = candidate(deps, later, start, champion)

    tainted = deps.versions.versions_trained_on(event_id="fb_1")
    assert tainted == ((champion.name,) if is_clean else (champion.name, version.name))
    members = {member.event_id for member in deps.versions.members(version.name)}
    assert members == ({"fb_2"} if is_clean else {"fb_1", "fb_2"})
    assert version.parent == (None if is_clean else champion.name)


def test_a_rebuilt_version_replaces_the_champion_that_it_was_compared_with(deps: Deps) -> None:
    champion = candidate(deps, begun(deps, 1, None, [example(1)]), "base", None)
    later = begun(deps, 2, champion.name, [example(2)])
    version = candidate(deps, later, "base", champion)

    answer = ask(deps, later, version, {"verdict": "promote"}, deps.settings.approval)

    assert answer.expected == champion.name
