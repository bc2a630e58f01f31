"""Runs that go wrong for real: memory refused, a disk that is full, a loss that explodes."""

import copy
import json
import logging
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from perennial.infra import artifacts
from perennial.infra.errors import DivergedError, InputError, OutOfMemoryError
from perennial.training import lora, trainer
from perennial.training.config import TrainConfig
from perennial.training.machine import is_out_of_memory
from perennial.training.mix import Pick, Planned, Source
from perennial.training.objective import BatchLoss
from perennial.training.prepared import Sources, log_probs_of, prepare, teach
from perennial.training.progress import StepRecord
from perennial.training.tokens import TokenRow, encode_example
from perennial.training.trainer import Trained, check_loss
from perennial.training.trunk import SplitModel
from tests.training.builders import example, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
CONFIG = TrainConfig(
    rank=4,
    alpha=8,
    top_layers=2,
    lr=1e-2,
    epochs=6,
    batch_tokens=150,
    question_dropout=0,
    checkpoint_steps=3,
)


def encoded(start: int, num: int, kind: Any = "correction") -> tuple[TokenRow, ...]:
    return tuple(
        encode_example(tiny_tokenizer(), example(n, kind), 512) for n in range(start, start + num)
    )


def with_fields(**fields: Any) -> TrainConfig:
    return TrainConfig(**{**CONFIG.to_json(), **fields})


def trained(
    config: TrainConfig, folder: Path, sources: Sources
) -> tuple[Any, Trained, list[StepRecord]]:
    model = lora.attach(tiny_model(), config)
    steps: list[StepRecord] = []
    found = trainer.train(model, sources, config, checkpoints=folder, job="j", on_step=steps.append)
    return model, found, steps


def in_child(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


OUT_OF_MEMORY = """
    import json, resource, sys, logging
    from pathlib import Path
    import torch
    from tests.training import test_robust as t
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    sources = t.Sources(new=t.encoded(0, 400))
    config = t.with_fields(epochs=1, batch_tokens=100_000, lr=1e-3, kernels="plain")
    def train(name):
        (folder / name).mkdir()
        model, found, steps = t.trained(config, folder / name, sources)
        return t.lora.state(model), found, [s.loss for s in steps]
    t.trained(t.with_fields(epochs=1), folder, t.Sources(new=t.encoded(0, 3)))  # libraries loaded
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 600_000_000, -1))
    tight, found, losses = train("tight")
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    free, whole, wanted = train("free")
    gap = max(float((tight[n] - free[n]).abs().max()) for n in free)
    print(json.dumps([found.num_parts, whole.num_parts, gap, losses, wanted]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux")
def test_refused_memory_halves_the_batch_says_so_and_learns_the_same(tmp_path: Path) -> None:
    """To 2e-3 in the weights after one step of 400 rows at lr 1e-3: Adam's first step is a sign."""
    child = in_child(OUT_OF_MEMORY, tmp_path)
    assert child.returncode == 0, child.stderr
    *said, last = child.stdout.strip().splitlines()
    num_parts, num_whole, gap, losses, wanted = json.loads(last)
    assert num_parts > 1 == num_whole
    assert any("out of memory: the batch is halved" in line for line in said)
    assert losses == pytest.approx(wanted, rel=1e-4)
    assert gap <= 2e-3


def test_what_counts_as_refused_memory() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    import torch
    from perennial.infra.errors import UnavailableError
    from tests.training import test_robust as t
    torch.set_num_threads(1)
    def on_step(record):
        if record.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    model = t.lora.attach(t.tiny_model(), t.CONFIG)
    try:
        t.trainer.train(model, t.Sources(new=t.encoded(0, 10)), t.CONFIG,
                        checkpoints=Path(sys.argv[1]), job="j", on_step=on_step)
    except UnavailableError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_leaves_the_last_good_checkpoint_and_the_run_goes_on_from_it(
    tmp_path: Path,
) -> None:
    child = in_child(FULL_DISK, tmp_path)
    assert "goes on from the checkpoint before" in child.stdout, child.stderr
    assert child.stdout.count("cannot write") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]
    artifacts.verify(tmp_path / "step-000003")
    sources = Sources(new=encoded(0, 10))
    resumed, found, _ = trained(CONFIG, tmp_path, sources)
    assert found.resumed_from == 3
    whole, _, _ = trained(CONFIG, tmp_path / "whole", sources)
    for name, weight in lora.state(whole).items():
        torch.testing.assert_close(lora.state(resumed)[name], weight, atol=1e-5, rtol=0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_an_adapter_that_the_disk_has_no_room_for_is_said_to_be_so(tmp_path: Path) -> None:
    model = lora.attach(tiny_model(), CONFIG)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*model\.safetensors"):
            lora.save(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_one_row_that_does_not_fit_is_an_error_with_its_step() -> None:
    class Refusing:
        device = torch.device("cpu")

        def losses(self, *_: Any) -> Any:
            raise MemoryError

    config = CONFIG
    sources = Sources(new=encoded(0, 3))
    model = lora.attach(tiny_model(), config)
    prepared = prepare(model, sources, config, sources.picks)
    broken = trainer.replace(prepared, split=Refusing())
    optimizer = trainer.make_optimizer(lora.trainable(model), config)
    batch = (Pick(source=Source.NEW, index=0),)
    planned = Planned(step=7, num_steps=9, batch=batch)
    with pytest.raises(OutOfMemoryError, match="one row at a time") as told:
        trainer.gradients(broken, planned, config, optimizer, 1)
    assert told.value.fields["step"] == 7


class Tight(SplitModel):
    """Has memory for so many rows at once."""

    max_rows = 99

    def _run(self, hidden_ND: Any, packed: Any, part: Any, is_final: Any) -> Any:
        if len(packed.sizes[1]) > self.max_rows:
            raise MemoryError
        return super()._run(hidden_ND, packed, part, is_final)


def test_refused_memory_before_the_first_step_halves_what_runs_at_once() -> None:
    split, rows = Tight(tiny_model(), 1), encoded(0, 7)
    found = []
    for split.max_rows in (99, 2):
        taught = teach(split, rows, None, "completion", CONFIG)
        scored = log_probs_of(split, rows, None)
        found.append([*split.trunk(rows, 10**6), *(t.log_probs_TK for t in taught), scored])
    for whole, halved in zip(*found, strict=True):
        torch.testing.assert_close(halved, whole, atol=1e-4, rtol=1e-5)


def test_memory_that_is_refused_for_one_row_is_an_error_that_says_what_to_do() -> None:
    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = lora.attach(tiny_model(), CONFIG)
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(refuse)
    sources = Sources(new=encoded(0, 3))
    with pytest.raises(OutOfMemoryError, match="outside a step; lower max_len"):
        prepare(model, sources, CONFIG, sources.picks)


def found_with(losses: dict[str, float]) -> BatchLoss:
    return BatchLoss(
        total=torch.tensor(1.0),
        cross_entropy=None,
        kl=None,
        preference=None,
        num_tokens=1,
        row_losses=losses,
    )


def test_a_loss_that_is_not_a_number_names_the_rows_to_look_at() -> None:
    found = found_with({"good": 1.0, "odd": float("nan"), "high": 9.0, "low": 0.1})
    with pytest.raises(DivergedError, match=r"step 4; .*: odd \(nan\), high \(9\), good \(1\);"):
        check_loss([2.0, float("nan")], 1.0, found, 4, 100)
    with pytest.raises(DivergedError, match="gradient's norm inf"):
        check_loss([2.0], float("inf"), found, 1, 100)


def test_a_loss_that_climbs_over_a_uniform_guess_has_diverged() -> None:
    found = found_with({"a": 9.0})
    check_loss([2.0] * 5 + [4.5] * 5, 1.0, found, 10, 100)  # ln 100 = 4.6
    check_loss([5.0] * 5 + [9.9] * 5, 1.0, found, 10, 100)
    with pytest.raises(DivergedError, match=r"diverges: 2 at first, now 4\.8"):
        check_loss([2.0] * 5 + [4.8] * 5, 1.0, found, 10, 100)


def test_a_poisoned_row_is_named_by_a_real_run(tmp_path: Path) -> None:
    model = lora.attach(tiny_model(), CONFIG)
    decoder = model.get_base_model().model
    decoder.embed_tokens = copy.deepcopy(decoder.embed_tokens)  # apart from the head
    row = encoded(0, 1)[0]
    odd = TokenRow(id="odd", ids_T=row.ids_T.copy(), num_prompt=row.num_prompt)
    odd.ids_T[-3] = 250  # a token that no other row has
    with torch.no_grad():
        decoder.embed_tokens.weight[250] = torch.nan
    sources = Sources(new=(*encoded(1, 9), odd))
    with pytest.raises(DivergedError, match=r"highest loss: odd \(nan\)"):
        trainer.train(model, sources, CONFIG, checkpoints=tmp_path, job="j", on_step=lambda _: None)


def test_a_run_over_its_kl_budget_keeps_the_last_good_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = Sources(new=encoded(0, 10), general=encoded(40, 4, "general"))
    free = with_fields(kl_weight=0.0, general_share=0.3, epochs=10)
    _, whole, steps = trained(free, tmp_path / "a", sources)
    ends = range(3, len(steps), 3)
    looks = [mean_of_last_three([s.kl for s in steps[:end]]) for end in ends]
    over = next(i for i, kl in enumerate(looks) if i > 1 and kl > max(looks[:i]))
    held = trainer.replace(free, kl_budget=(max(looks[:over]) + looks[over]) / 2)
    with caplog.at_level(logging.WARNING):
        model, found, _ = trained(held, tmp_path / "b", sources)
    assert found.num_steps == ends[over - 1] < whole.num_steps
    assert found.kl_to_base == pytest.approx(looks[over - 1])  # of what is kept
    assert found.stopped_because is not None
    assert "over kl_budget" in caplog.text
    good = tmp_path / "b" / f"step-{found.num_steps:06d}" / "tensors.safetensors"
    kept = safetensors.torch.load_file(good)
    for name, weight in lora.trainable(model).items():
        assert torch.equal(weight, kept[f"weight/{name}"])
    _, again, _ = trained(held, tmp_path / "b", sources)
    assert trainer.replace(again, resumed_from=0) == found


def mean_of_last_three(kls: list[float | None]) -> float:
    last = [kl for kl in kls if kl is not None][-3:]
    return sum(last) / len(last)


def test_a_kl_budget_without_general_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="draws no general rows"):
        trained(with_fields(kl_budget=0.1), tmp_path, Sources(new=encoded(0, 10)))


def test_the_kl_of_a_run_is_of_its_newest_steps_with_general_rows(tmp_path: Path) -> None:
    sources = Sources(new=encoded(0, 10), general=encoded(40, 4, "general"))
    config = with_fields(general_share=0.1, checkpoint_steps=2)
    _, found, steps = trained(config, tmp_path, sources)
    kls = [step.kl for step in steps]
    assert None in kls[-2:], "a tail that holds a step without general rows"
    wanted = [kl for kl in kls if kl is not None][-2:]
    assert found.kl_to_base == pytest.approx(sum(wanted) / 2)


class Killed(Exception):
    pass


def killed_after(step: int, config: TrainConfig, folder: Path, job: str, sources: Sources) -> None:
    def on_step(record: StepRecord) -> None:
        if record.step == step:
            raise Killed

    model = lora.attach(tiny_model(), config)
    with pytest.raises(Killed):
        trainer.train(model, sources, config, checkpoints=folder, job=job, on_step=on_step)


def test_checkpoints_of_another_job_are_not_in_the_way(tmp_path: Path) -> None:
    sources = Sources(new=encoded(0, 10))
    killed_after(5, CONFIG, tmp_path, "another", sources)
    killed_after(5, CONFIG, tmp_path, "j", sources)
    model, found, _ = trained(CONFIG, tmp_path, sources)
    assert found.resumed_from == 3
    whole, _, _ = trained(CONFIG, tmp_path / "whole", sources)
    for name, weight in lora.state(whole).items():
        torch.testing.assert_close(lora.state(model)[name], weight, atol=1e-5, rtol=0)


def test_a_resumed_run_reports_what_the_whole_one_does(tmp_path: Path) -> None:
    sources = Sources(new=encoded(0, 10), general=encoded(40, 4, "general"))
    killed_after(5, CONFIG, tmp_path, "j", sources)
    _, found, _ = trained(CONFIG, tmp_path, sources)
    _, whole, _ = trained(CONFIG, tmp_path / "whole", sources)
    assert (found.resumed_from, whole.resumed_from) == (3, 0)
    assert found.num_tokens == whole.num_tokens
    assert found.kl_to_base == pytest.approx(whole.kl_to_base, rel=1e-3)


def test_a_resumed_run_still_knows_how_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, known = Sources(new=encoded(0, 10)), []
    killed_after(5, CONFIG, tmp_path, "j", sources)

    def look(losses: Any, *rest: Any) -> None:
        known.append(list(losses))
        check_loss(losses, *rest)

    monkeypatch.setattr(trainer, "check_loss", look)
    _, _, steps = trained(CONFIG, tmp_path, sources)
    _, _, whole = trained(CONFIG, tmp_path / "whole", sources)
    assert known[0] == pytest.approx([step.loss for step in whole[:4]], rel=1e-4)
    assert len(steps) == len(whole) - 3


def test_a_kl_budget_spent_before_the_first_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    sources = Sources(new=encoded(0, 10), general=encoded(40, 4, "general"))
    config = with_fields(kl_budget=1e-9, general_share=0.3)
    _, found, _ = trained(config, tmp_path, sources)
    assert found.num_steps == 0
    assert "at step 3, over kl_budget 1e-09" in str(found.stopped_because)


def test_b_learns_faster_than_a_by_its_ratio() -> None:
    model = lora.attach(tiny_model(), CONFIG)
    weights = lora.trainable(model)
    optimizer = trainer.make_optimizer(weights, with_fields(b_lr_ratio=16.0))
    trainer.set_rate(optimizer, 0.5)
    rates = {id(w): group["lr"] for group in optimizer.param_groups for w in group["params"]}
    assert {rates[id(w)] for name, w in weights.items() if "lora_A" in name} == {0.5}
    assert {rates[id(w)] for name, w in weights.items() if "lora_B" in name} == {8.0}
    assert len(rates) == len(weights)
