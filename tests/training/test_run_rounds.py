"""Rounds after rounds through the process's own entry, with a tiny model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from perennial.infra.errors import (
    ConfigError,
    DivergedError,
    InputError,
    IntegrityError,
    TrainingError,
)
from perennial.training import checkpoint, lora
from perennial.training.evaluate import reference_nlls
from perennial.training.examples import Judgement, Label, Pair, write_examples
from perennial.training.fit import run_training
from perennial.training.job import read_train_job
from perennial.training.modelfiles import load_model, load_tokenizer
from perennial.training.tokens import encode_answer
from tests.training.builders import example, write_job

SECOND = {"parent_adapter": "one/adapter", "replay_rows": "old.jsonl"}
RECIPE = {
    "rank": 4,
    "epochs": 2,
    "batch_tokens": 200,
    "lr": 5e-3,
    "top_layers": 1,
    "shrink": 1.0,
}


@pytest.fixture(autouse=True)
def as_before() -> Any:
    yield
    torch.use_deterministic_algorithms(False)


def trained(folder: Path, name: str, **fields: Any) -> dict[str, Any]:
    config = {**RECIPE, **fields.pop("config", {})}
    job = read_train_job(write_job(folder, config=config, **fields))
    (folder / name).mkdir(exist_ok=True)
    run_training(job, folder / name, Console(quiet=True))
    summary: dict[str, Any] = json.loads((folder / name / "summary.json").read_bytes())
    return summary


def second(folder: Path, **fields: Any) -> dict[str, Any]:
    """A round on the adapter of the first, which replays two of its rows."""
    write_examples(folder / "old.jsonl", [example(i) for i in (1, 2)])
    return trained(folder, "two", **SECOND, **fields)


def counted(**fields: int) -> dict[str, int]:
    none = dict.fromkeys(("new", "replay", "general", "pairs", "judgements"), 0)
    return {**none, **fields}


def product(folder: Path) -> torch.Tensor:
    state = lora.read_state(folder)
    name = next(name for name in state if "lora_A" in name)
    return state[name.replace("lora_A", "lora_B")] @ state[name]


def test_a_round_goes_on_from_its_parent_and_counts_itself(tmp_path: Path) -> None:
    first = trained(tmp_path, "one")
    assert first["start"] == {"start": "base", "reason": None}
    found = second(tmp_path)
    assert found["start"]["start"] == "parent"
    assert (first["lineage"]["num_rounds"], found["lineage"]["num_rounds"]) == (1, 2)
    assert found["lineage"]["kl_to_base"] > 0
    assert found["num_rows"] == counted(new=10, replay=2, general=4)
    assert any((tmp_path / "models" / "trunk").iterdir())


def test_a_rebuilt_round_learns_the_buffer_as_new(tmp_path: Path) -> None:
    trained(tmp_path, "one")
    found = second(tmp_path, config={"rebuild_every": 1})
    assert found["start"] == {"start": "base", "reason": "rebuilt after 1 rounds"}
    assert found["lineage"]["num_rounds"] == 1
    assert found["num_rows"] == counted(new=12, general=4)


@pytest.mark.parametrize("start", ["parent", "slow-fast"])
def test_a_round_that_a_far_parent_takes_over_the_kl_budget_is_rebuilt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, start: str
) -> None:
    trained(tmp_path, "one", config={"recipe": "replay", "epochs": 8, "lr": 2e-2})
    near = {"kl_budget": 0.01, "lr": 1e-4, "checkpoint_steps": 2, "start": start}
    found = second(tmp_path, config=near)
    reason = found["start"]["reason"]
    assert "at step 2, over kl_budget 0.01, before the first checkpoint" in reason
    assert f"{reason.removeprefix('rebuilt: ')}: the round begins from the base" in caplog.text
    assert found["start"]["start"] == "base"
    assert found["lineage"]["num_rounds"] == 1
    assert found["num_rows"] == counted(new=12, general=4)
    rebuilt = lora.read_state(tmp_path / "two" / "adapter")
    second(tmp_path, config={**near, "start": "base"})
    for name, weight in lora.read_state(tmp_path / "two" / "adapter").items():
        assert torch.equal(rebuilt[name], weight)


def test_a_round_from_the_base_over_its_kl_budget_at_once_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="of a round from the base; lower lr"):
        trained(tmp_path, "one", config={"kl_budget": 1e-9, "checkpoint_steps": 2})


def test_a_killed_round_knows_that_its_parent_is_too_far(tmp_path: Path) -> None:
    trained(tmp_path, "one", config={"recipe": "replay"})
    near = {"kl_budget": 9.0}
    write_examples(tmp_path / "old.jsonl", [example(i) for i in (1, 2)])
    job = read_train_job(write_job(tmp_path, config={**RECIPE, **near}, **SECOND))
    checkpoint.note_spent(tmp_path / "two" / "checkpoints", job.digest, "too far")
    assert second(tmp_path, config=near)["start"] == {"start": "base", "reason": "rebuilt: too far"}
    other = {**near, "kl_budget": 8.0}
    checkpoint.note_spent(tmp_path / "two" / "checkpoints", job.digest, "too far")
    assert second(tmp_path, config=other)["start"]["start"] == "parent"


@pytest.mark.parametrize(("method", "factor"), [("lora", 0.5), ("dora", 1.0)])
def test_the_change_is_shrunk_at_the_end_but_not_doras(
    tmp_path: Path, method: str, factor: float
) -> None:
    trained(tmp_path, "whole", config={"method": method})
    shrunk = trained(tmp_path, "shrunk", config={"method": method, "shrink": 0.5})
    assert shrunk["lineage"]["shrink"] == factor
    assert torch.equal(
        product(tmp_path / "shrunk" / "adapter"), factor * product(tmp_path / "whole" / "adapter")
    )


@pytest.mark.parametrize("start", ["parent", "slow-fast", "blend"])
def test_a_round_goes_on_from_the_change_before_it_was_shrunk(tmp_path: Path, start: str) -> None:
    found = []
    for shrink in (1.0, 0.5):
        folder = tmp_path / str(shrink)
        folder.mkdir()
        trained(folder, "one", config={"shrink": shrink})
        write_examples(folder / "dev.jsonl", [example(3)])
        second(folder, config={"start": start}, dev_rows="dev.jsonl")
        found.append(lora.read_state(folder / "two" / "adapter"))
    whole, shrunk = found
    assert all(torch.equal(shrunk[name], weight) for name, weight in whole.items())


def test_a_slow_round_keeps_the_fast_adapter_for_the_next(tmp_path: Path) -> None:
    config = {"start": "slow-fast"}
    trained(tmp_path, "one", config=config)
    fast = tmp_path / "one" / "fast"
    assert torch.equal(product(fast), product(tmp_path / "one" / "adapter"))
    second(tmp_path, config=config, fast_adapter="one/fast")
    old, served, new = (
        lora.read_state(tmp_path / name) for name in ("one/adapter", "two/adapter", "two/fast")
    )
    for name in (name for name in old if "lora_B" in name):
        torch.testing.assert_close(served[name], torch.lerp(old[name], new[name], 2**-0.5))


def test_a_blend_is_chosen_on_dev_rows(tmp_path: Path) -> None:
    trained(tmp_path, "one")
    with pytest.raises(ConfigError, match="needs dev_rows"):
        second(tmp_path, config={"start": "blend"})
    write_examples(tmp_path / "dev.jsonl", [example(i) for i in (1, 2, 3)])
    found = second(tmp_path, config={"start": "blend"}, dev_rows="dev.jsonl")
    losses = {float(alpha): loss for alpha, loss in found["dev_loss_by_alpha"].items()}
    assert list(losses) == [0.25, 0.5, 0.75, 1.0]
    assert len(set(losses.values())) == 4
    answers = [(row.messages, row.completion) for row in map(example, (1, 2, 3))]
    served = nlls(tmp_path, tmp_path / "two" / "adapter", answers)
    assert sum(served) / 3 == pytest.approx(min(losses.values()), rel=1e-4)


@pytest.mark.parametrize("start", ["parent", "blend", "slow-fast"])
@pytest.mark.parametrize("other", [{"alpha": 64}, {"scaling": "rslora"}])
def test_a_parent_of_another_scale_is_refused(tmp_path: Path, start: str, other: Any) -> None:
    trained(tmp_path, "one")
    write_examples(tmp_path / "dev.jsonl", [example(3)])
    with pytest.raises(TrainingError, match=r"ΔW is .*·B·A there, .* its rank, alpha"):
        second(tmp_path, config={"start": start, **other}, dev_rows="dev.jsonl")


def test_a_parent_of_another_method_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, "one", config={"method": "dora"})
    with pytest.raises(TrainingError, match="alpha, scaling and method"):
        second(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[]", "no"])
def test_a_parent_with_a_damaged_config_is_refused(tmp_path: Path, content: str) -> None:
    trained(tmp_path, "one")
    (tmp_path / "one" / "adapter" / "adapter_config.json").write_text(content)
    with pytest.raises(IntegrityError, match="not an adapter's config"):
        second(tmp_path)


def test_a_run_that_goes_on_takes_the_threads_that_it_began_with(tmp_path: Path) -> None:
    num_before = torch.get_num_threads()
    (tmp_path / "one" / "checkpoints").mkdir(parents=True)
    (tmp_path / "one" / "checkpoints" / "num_threads").write_text("3")
    try:
        assert trained(tmp_path, "one", num_threads=None)["num_threads"] == 3
    finally:
        torch.set_num_threads(num_before)


def test_what_a_round_learned_teaches_its_replay(tmp_path: Path) -> None:
    config = {"recipe": "replay-kd", "replay_share": 0.4}
    assert trained(tmp_path, "one", config=config)["num_taught"] == 0
    found = second(tmp_path, config=config, teachers="one/teachers")
    assert found["num_taught"] == 2
    index = json.loads((tmp_path / "two" / "teachers" / "index.json").read_bytes())
    assert len(index) == 10  # the two replayed rows are among the ten new ones
    assert np.load(tmp_path / "two" / "teachers" / "tokens.npy").shape[1] == 20
    on_disk = [path.stat().st_size for path in (tmp_path / "two" / "teachers").iterdir()]
    assert found["teachers_mb"] == sum(on_disk) / 1e6 > 0


def test_a_round_with_another_top_k_has_no_teacher_of_before(tmp_path: Path) -> None:
    config = {"recipe": "replay-kd-anchor", "replay_share": 0.4}
    trained(tmp_path, "one", config=config)
    found = second(tmp_path, config={**config, "kl_top_k": 8}, teachers="one/teachers")
    assert found["num_taught"] == 0
    assert np.load(tmp_path / "two" / "teachers" / "tokens.npy").shape[1] == 8


def preferences(folder: Path) -> tuple[tuple[Pair, ...], tuple[Judgement, ...]]:
    """Files of answers that users preferred, liked and disliked, beside the job."""
    asked = [(("user", f"where is shelf {n}?"),) for n in range(12)]
    pairs = tuple(
        Pair(id=f"e{n}", messages=asked[n], chosen=f"hall {n}", rejected="no idea")
        for n in range(2)
    )
    labels: tuple[Label, ...] = ("desirable", "undesirable")
    judged = tuple(
        Judgement(id=f"t{n}", messages=asked[n], completion=f"room {n}", label=labels[n % 2])
        for n in range(2, 12)
    )
    folder.mkdir(exist_ok=True)
    write_examples(folder / "pairs.jsonl", pairs)
    write_examples(folder / "judged.jsonl", judged)
    return pairs, judged


def nlls(folder: Path, adapter: Path | None, answers: Any) -> list[float]:
    tokenizer, model = load_tokenizer(folder / "tiny"), load_model(folder / "tiny")
    if adapter:
        lora.merge(model, adapter)
    rows = [encode_answer(tokenizer, "row", messages, text, 512) for messages, text in answers]
    return reference_nlls(model, rows)


def test_a_round_learns_what_users_preferred_liked_and_disliked(tmp_path: Path) -> None:
    pairs, judged = preferences(tmp_path)
    files = {"pair_rows": "pairs.jsonl", "judgement_rows": "judged.jsonl"}
    found = trained(tmp_path, "one", **files, config={"epochs": 8, "dpo_sft_weight": 0.0})
    assert found["num_rows"] == counted(new=10, general=4, pairs=2, judgements=10)
    answers = [
        *((pair.messages, pair.chosen) for pair in pairs),
        *((pair.messages, pair.rejected) for pair in pairs),
        *((row.messages, row.completion) for row in judged if row.label == "desirable"),
        *((row.messages, row.completion) for row in judged if row.label == "undesirable"),
    ]
    before = nlls(tmp_path, None, answers)
    after = nlls(tmp_path, tmp_path / "one" / "adapter", answers)
    gained = [old - new for old, new in zip(before, after, strict=True)]
    assert min(gained[:2]) > max(gained[2:4])
    assert sum(gained[4:9]) > sum(gained[9:])


def test_a_round_of_judgements_alone_is_trained(tmp_path: Path) -> None:
    preferences(tmp_path)
    write_examples(tmp_path / "none.jsonl", ())
    found = trained(tmp_path, "one", train_rows="none.jsonl", judgement_rows="judged.jsonl")
    assert found["num_rows"] == counted(general=4, judgements=10)


def test_judgements_of_one_label_are_left_out(tmp_path: Path) -> None:
    _, judged = preferences(tmp_path)
    liked = [row for row in judged if row.label == "desirable"]
    long = replace(judged[1], completion="far " * 200)
    write_examples(tmp_path / "liked.jsonl", [*liked, long])
    found = trained(tmp_path, "one", judgement_rows="liked.jsonl")
    assert found["num_rows"] == counted(new=10, general=4)
    assert [row["id"] for row in found["left_out"]] == [long.id]


@pytest.mark.parametrize("max_len", [512, 100_000])
def test_a_row_longer_than_the_context_is_reported_and_the_others_are_learned(
    tmp_path: Path, max_len: int
) -> None:
    long = example(99, completion="far " * 200)
    rows = [example(0), long, example(1)]
    path = write_job_with_rows(tmp_path, "new2.jsonl", rows, max_len=max_len)
    run_training(read_train_job(path), made(tmp_path / "out"), Console(quiet=True))
    summary = json.loads((tmp_path / "out" / "summary.json").read_bytes())
    (left_out,) = summary["left_out"]
    assert left_out["id"] == long.id
    assert left_out["num_tokens"] > 512
    assert summary["num_rows"]["new"] == 2


def test_a_round_whose_rows_are_all_too_long_is_refused(tmp_path: Path) -> None:
    path = write_job_with_rows(tmp_path, "new2.jsonl", [example(9, completion="far " * 200)])
    with pytest.raises(InputError, match="fits in 512 tokens"):
        run_training(read_train_job(path), made(tmp_path / "out"), Console(quiet=True))


def test_a_round_without_a_new_row_is_refused_for_that(tmp_path: Path) -> None:
    path = write_job_with_rows(tmp_path, "new2.jsonl", [])
    with pytest.raises(
        InputError, match=r"new2\.jsonl is empty, and no pair or judgement is given"
    ):
        run_training(read_train_job(path), made(tmp_path / "out"), Console(quiet=True))


def write_job_with_rows(folder: Path, name: str, rows: Any, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_examples(folder / name, rows)
    return write_job(folder, train_rows=name, config={**RECIPE, **config})


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder
