"""Rounds in bf16 and on another device than the CPU.

Without a GPU torch's "meta" stands for one: its tensors know device, shape and dtype, and hold no
numbers.
"""

import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from perennial.infra.errors import ConfigError
from perennial.training import checkpoint, lora, objective, rounds, trainer
from perennial.training.batching import pack
from perennial.training.cache import FrozenCache
from perennial.training.checkpoint import Cursor, Found
from perennial.training.config import TrainConfig
from perennial.training.evaluate import SuiteRow, base_top_k, evaluate, leave_out_long
from perennial.training.grading import EvalRow
from perennial.training.job import Device, DType
from perennial.training.machine import CPU, Place, choose_place
from perennial.training.mix import Pick, Planned, Source
from perennial.training.modelfiles import load_model
from perennial.training.prepared import Sources, prepare
from perennial.training.progress import StepRecord
from perennial.training.trunk import SplitModel
from tests.training.builders import example, save_tiny, tiny_model, tiny_tokenizer, write_job
from tests.training.test_objective import adapted, first_batches, rows, whole_round

CONFIG = TrainConfig(
    rank=4,
    alpha=8,
    top_layers=1,
    lr=5e-3,
    epochs=4,
    batch_tokens=200,
    replay_share=0.25,
    general_share=0.2,
)
BF16 = Place(device="cpu", dtype="bfloat16")
LOSS_GAP = 0.01  # bf16 keeps 8 bits of a number; seen: 0.1% of a loss, 0.3% with DoRA
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("device") / "tiny")


def with_fields(**fields: Any) -> TrainConfig:
    return TrainConfig(**{**CONFIG.to_json(), **fields})


def trained(
    model: Any, config: TrainConfig, folder: Path, sources: Sources | None = None
) -> list[StepRecord]:
    steps: list[StepRecord] = []
    given = sources or whole_round(config)
    trainer.train(model, given, config, checkpoints=folder, job="j", on_step=steps.append)
    return steps


@pytest.mark.parametrize(
    "fields", [{"kernels": "fused"}, {"kernels": "plain"}, {"method": "dora", "top_layers": 2}]
)
def test_a_round_in_bf16_has_the_losses_of_float32_and_a_float32_adapter(
    tiny: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    config = with_fields(**fields)
    found = {}
    for place in (CPU, BF16):
        model = lora.attach(load_model(tiny, place), config)
        steps = trained(model, config, tmp_path / place.dtype)
        assert {weight.dtype for weight in lora.trainable(model).values()} == {torch.float32}
        assert SplitModel(model.get_base_model(), 0).dtype == place.torch_dtype
        assert {weight.dtype for weight in lora.state(model).values()} == {torch.float32}
        found[place] = [step.loss for step in steps]
    assert found[BF16] != found[CPU]
    assert found[BF16] == pytest.approx(found[CPU], rel=LOSS_GAP)
    assert found[BF16][-1] < 0.8 * found[BF16][0]


@pytest.mark.parametrize("kernels", ["fused", "plain"])
def test_gradients_in_bf16_point_where_those_of_float32_do(tiny: Path, kernels: Any) -> None:
    config = with_fields(kernels=kernels)
    found = []
    for place in (CPU, BF16):
        model = adapted(config, load_model(tiny, place))
        sources = whole_round(config)
        prepared = prepare(model, sources, config, sources.picks)
        gradients_of(model, prepared, config)
        found.append(torch.cat([w.grad.flatten() for w in lora.trainable(model).values()]))
    assert {grad.dtype for grad in found} == {torch.float32}
    assert torch.cosine_similarity(found[0], found[1], dim=0) > 0.999


def test_a_small_change_survives_beside_weights_in_bf16_on_a_cpu(tiny: Path) -> None:
    changes = []
    for place in (CPU, BF16):
        model = adapted(CONFIG, load_model(tiny, place))
        for name, weight in lora.trainable(model).items():
            weight.data *= 0.1 if "lora_B" in name else 1.0
        split = SplitModel(model.get_base_model(), 0, "fused")
        packed = pack(rows(0, 3), labels=["completion"] * 3)
        with torch.no_grad():
            changed = split.hidden(packed, None)
            with model.disable_adapter():
                changes.append((changed - split.hidden(packed, None)).flatten())
    assert torch.cosine_similarity(changes[0], changes[1], dim=0) > 0.99  # all in bf16: 0.98


def test_moments_in_bf16_are_float32_and_a_resumed_run_goes_on(tiny: Path, tmp_path: Path) -> None:
    config = with_fields(checkpoint_steps=2)
    whole = trained(lora.attach(load_model(tiny, BF16), config), config, tmp_path / "a")
    (kept,) = (tmp_path / "a").iterdir()
    tensors = safetensors.torch.load_file(kept / "tensors.safetensors")
    assert {t.dtype for name, t in tensors.items() if name != "rng"} == {torch.float32}
    resumed = trained(lora.attach(load_model(tiny, BF16), config), config, tmp_path / "a")
    assert 0 < len(resumed) < len(whole)
    assert [s.loss for s in resumed] == [s.loss for s in whole[-len(resumed) :]]


def suite(num: int = 6) -> tuple[SuiteRow, ...]:
    asked = [
        EvalRow(id=row.id, messages=row.messages, reference=row.completion, rule="exact")
        for row in (example(n) for n in range(num))
    ]
    return leave_out_long(tiny_tokenizer(), asked, 512)[0]


def test_an_evaluation_in_bf16_is_near_that_of_float32(tiny: Path, tmp_path: Path) -> None:
    """An adapter is merged in float32 and the sum rounded; taking it off restores every bit."""
    lora.save(adapted(CONFIG), tmp_path)
    found = []
    for place in (CPU, BF16):
        model = load_model(tiny, place)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        base = base_top_k(model, suite())
        kept = lora.merge(model, tmp_path)
        results, summary = evaluate(model, tiny_tokenizer(), suite(), 4, base)
        lora.unmerge(model, kept)
        assert all(torch.equal(before[n], weight) for n, weight in model.state_dict().items())
        found.append((summary.nll, sum(row.kl or 0 for row in results) / len(results)))
    assert found[1][0] == pytest.approx(found[0][0], rel=LOSS_GAP)
    assert found[1][1] == pytest.approx(found[0][1], rel=0.1)


def test_an_activation_in_bf16_is_another_entry_of_the_cache(tiny: Path, tmp_path: Path) -> None:
    cache = FrozenCache(folder=tmp_path, base="b", tokenizer="t", max_bytes=10**9)
    sizes = {}
    for place in (CPU, BF16):
        split = SplitModel(load_model(tiny, place), 1)
        made = cache.trunk(split, rows(0, 3), 1000)
        again = cache.trunk(split, rows(0, 3), 1000)
        assert {trunk.dtype for trunk in again} == {place.torch_dtype}
        assert all(torch.equal(one, other) for one, other in zip(made, again, strict=True))
        entries = set(tmp_path.glob("*.frozen")) - set(sizes)
        sizes |= {path: path.stat().st_size for path in entries}
    num_tokens = sum(row.num_tokens for row in rows(0, 3))
    assert len(sizes) == 6
    assert sum(sizes.values()) == 6 * 32 + num_tokens * 64 * (4 + 2)


def test_trunks_of_other_weights_share_no_entry_where_activations_are_alike(
    tiny: Path, tmp_path: Path
) -> None:
    cache = FrozenCache(folder=tmp_path, base="b", tokenizer="t", max_bytes=10**9)
    for place in (CPU, BF16):
        made = cache.trunk(SplitModel(load_model(tiny, place), 1, "fused"), rows(0, 3), 1000)
        assert {trunk.dtype for trunk in made} == {torch.float32}
    assert len(list(tmp_path.glob("*.frozen"))) == 6


class Apart(TorchDispatchMode):
    """Raises where one operation has tensors of two devices, as a GPU does, and counts copies.

    What is read from "meta" is zeros. Indexing by an index on the CPU is refused too: a GPU
    copies it and waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_copied: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {**(kwargs or {})}
        name, flat = func.overloadpacket.__name__, torch.utils._pytree.tree_leaves((args, given))
        devices = {t.device.type for t in flat if isinstance(t, Tensor) and t.dim()}
        if name == "_local_scalar_dense" and args[0].is_meta:
            self.num_copied["from"] += 1
            return 0
        if name in ("_to_copy", "copy_"):
            target = str(given.get("device") or args[0].device)
            source = args[1 if name == "copy_" else 0]
            if source.is_meta and target == "cpu":
                self.num_copied["from"] += 1
                return torch.zeros(source.shape, dtype=given.get("dtype") or source.dtype)
            self.num_copied["to"] += target == "meta" and not source.is_meta
        elif len(devices) > 1:
            raise AssertionError(f"{func} has tensors of {sorted(devices)}")
        return func(*args, **given)


def gradients_of(model: Any, prepared: Any, config: TrainConfig) -> Any:
    """Of the first batches of an epoch, the last of them set."""
    optimizer = torch.optim.SGD(lora.trainable(model).values())
    for step, batch in enumerate(first_batches(prepared.sources, config)[:4]):
        planned = Planned(step=step, num_steps=9, batch=batch)
        found, _ = trainer.gradients(prepared, planned, config, optimizer, 1)
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {"kernels": "fused", "kl_scope": "all", "question_dropout": 0.3},
        {"kernels": "fused", "top_layers": 2, "reference": "base"},
        {"kernels": "plain"},
        {"method": "dora"},
    ],
)
def test_every_tensor_of_a_round_lives_on_the_models_device(fields: dict[str, Any]) -> None:
    config = with_fields(**fields)
    sources = whole_round(config)
    model = adapted(config).to("meta")
    with Apart():
        prepared = prepare(model, sources, config, sources.picks)
        gradients_of(model, prepared, config)
    assert {weight.grad.device.type for weight in lora.trainable(model).values()} == {"meta"}
    kept = [*prepared.trunks.values(), [t.tokens_TK for t in prepared.teachers.values()]]
    assert {tensor.device.type for part in kept for tensor in part} == {"cpu"}
    assert {tensor.device.type for tensor in prepared.references.values()} == {"meta"}


def test_a_tensor_on_another_device_is_noticed() -> None:
    here, there = torch.zeros(3), torch.zeros(3, device="meta")
    with Apart() as seen:
        for mixed in (lambda: here + there, lambda: there[here.long()]):
            with pytest.raises(AssertionError, match="has tensors of"):
                mixed()
        assert float(here.to("meta").sum()) == 0
    assert seen.num_copied == {"to": 1, "from": 1}


def test_a_batch_is_copied_as_often_with_many_rows_as_with_few() -> None:
    config = with_fields(top_layers=1)
    model = adapted(config).to("meta")
    copied = []
    with Apart() as seen:
        sources = Sources(new=rows(0, 9))
        prepared = prepare(model, sources, config, sources.picks)
        for num in (2, 9):
            batch = tuple(Pick(source=Source.NEW, index=index) for index in range(num))
            over = objective.sums(prepared, batch)
            seen.num_copied.clear()
            objective.batch_loss(prepared, batch, over, config, 1).total.backward()
            copied.append(dict(seen.num_copied))
    assert copied[0] == copied[1]


def test_every_tensor_of_an_evaluation_lives_on_the_models_device(tmp_path: Path) -> None:
    lora.save(adapted(CONFIG), tmp_path)
    model = tiny_model().to("meta")
    with Apart():
        base = base_top_k(model, suite())
        kept = lora.merge(model, tmp_path)
        results, _ = evaluate(model, tiny_tokenizer(), suite(), 3, base)
        lora.unmerge(model, kept)
    assert len(results) == 6


def test_an_adapter_leaves_the_device_to_be_averaged(tmp_path: Path) -> None:
    model = adapted(CONFIG)
    lora.save(model, tmp_path)
    old = lora.read_state(tmp_path)
    with Apart():
        found = rounds.slow(old, lora.state(model.to("meta")), 2)
    assert {weight.device.type for weight in found.values()} == {"cpu"}


FOUND = Found(loss=1.0, row_losses=(1.0,), kl=None, num_tokens=3)


def test_a_checkpoint_is_restored_to_the_device_of_the_weights(tmp_path: Path) -> None:
    config = with_fields(checkpoint_steps=2, epochs=1)
    model = lora.attach(tiny_model(), config)
    weights = lora.trainable(model)
    optimizer = trainer.make_optimizer(weights, config)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    checkpoint.save(tmp_path, Cursor(job="j", found=(FOUND,)), weights, optimizer)
    there = lora.trainable(model.to("meta"))
    fresh = torch.optim.AdamW(there.values())
    assert checkpoint.restore(tmp_path, "j", there, fresh).step == 1
    devices = {m.device.type for moments in fresh.state.values() for m in moments.values()}
    assert devices == {"meta"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_asked_for_is_what_is_chosen(dtype: DType) -> None:
    assert choose_place("cpu", dtype) == Place(device="cpu", dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_auto_is_float32_on_the_cpu_and_cuda_is_refused() -> None:
    assert choose_place("auto", "auto") == CPU
    with pytest.raises(ConfigError, match="torch finds no GPU; set it to 'auto'"):
        choose_place("cuda", "auto")


def process(command: str, job: Path, out: Path) -> dict[str, Any]:
    line = [sys.executable, "-m", "perennial.training.run", command, str(job), str(out)]
    subprocess.run(line, check=True, timeout=300)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_bytes())
    return summary


def round_and_score(folder: Path, device: Device, dtype: DType) -> tuple[Any, Any]:
    """Summaries of a round, and of the base and its adapter on what it was taught."""
    place = {"device": device, "dtype": dtype}
    done = process("train", write_job(folder, **place), folder / "out")
    lines = [
        json.dumps({"id": r.id, "messages": r.messages, "reference": r.completion, "rule": "exact"})
        for r in map(example, range(10))
    ]
    (folder / "suite.jsonl").write_text("\n".join(lines))
    body = {
        "base_model": str(folder / "tiny"),
        "adapters": {"base": None, "new": "out/adapter"},
        "suites": {"s": "suite.jsonl"},
        "kl_suites": ["s"],
        **place,
    }
    (folder / "eval.json").write_text(json.dumps(body))
    scored = process("evaluate", folder / "eval.json", folder / "scores")
    return done, scored


def assert_alike(one: tuple[Any, Any], other: tuple[Any, Any], gap: float) -> None:
    (trained_, scored), (wanted, expected) = one, other
    # Of one batch, after the roundings of all steps before it: seen 1% in bf16.
    assert trained_["last_loss"] == pytest.approx(wanted["last_loss"], rel=3 * gap)
    for name in ("base", "new"):
        found, known = (s["results"][name]["s"]["nll"] for s in (scored, expected))
        assert found == pytest.approx(known, rel=gap)


@pytest.mark.slow
def test_a_process_trains_and_judges_in_bf16(tmp_path: Path) -> None:
    plain = round_and_score(tmp_path / "a", "cpu", "auto")
    narrow = round_and_score(tmp_path / "b", "cpu", "bfloat16")
    assert [(s["device"], s["dtype"]) for s in plain] == [("cpu", "float32")] * 2
    assert [(s["device"], s["dtype"]) for s in narrow] == [("cpu", "bfloat16")] * 2
    assert_alike(narrow, plain, LOSS_GAP)
    weights = safetensors.torch.load_file(tmp_path / "b" / "out" / "adapter" / lora.WEIGHTS)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@GPU
@pytest.mark.slow
def test_a_gpu_trains_and_judges_as_the_cpu_does(tmp_path: Path) -> None:
    cpu = round_and_score(tmp_path / "cpu", "cpu", "float32")
    for name, dtype, gap in (("a", "float32", 1e-3), ("b", "bfloat16", LOSS_GAP)):
        found = round_and_score(tmp_path / name, "auto", dtype)  # type: ignore[arg-type]
        assert [s["device"] for s in found] == ["cuda"] * 2
        assert found[0]["peak_gpu_mb"] > 0
        assert_alike(found, cpu, gap)
        again = process("train", tmp_path / name / "job.json", tmp_path / name / "again")
        assert again["adapter_digest"] == found[0]["adapter_digest"]


@GPU
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_a_gpu_goes_on_on_the_cpu(tiny: Path, tmp_path: Path, dtype: Any) -> None:
    config = with_fields(checkpoint_steps=2)
    gpu = lora.attach(load_model(tiny, Place(device="cuda", dtype=dtype)), config)
    whole = trained(gpu, config, tmp_path)
    rest = trained(lora.attach(load_model(tiny, CPU), config), config, tmp_path)
    assert 0 < len(rest) < len(whole)
    wanted = [step.loss for step in whole[-len(rest) :]]
    assert [step.loss for step in rest] == pytest.approx(wanted, rel=LOSS_GAP)


@GPU
def test_refused_memory_of_a_gpu_halves_the_batch(tiny: Path, tmp_path: Path) -> None:
    config = with_fields(epochs=1, batch_tokens=100_000, kernels="plain", top_layers=2)
    model = lora.attach(load_model(tiny, Place(device="cuda", dtype="float32")), config)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.cuda.set_per_process_memory_fraction, 1.0)
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(2**30 / total)
        found = trainer.train(
            model,
            Sources(new=rows(0, 400)),
            config,
            checkpoints=tmp_path,
            job="j",
            on_step=lambda _: None,
        )
    assert found.num_parts > 1
