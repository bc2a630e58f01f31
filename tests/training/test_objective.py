"""The losses against plain implementations, and the fused path against the modules it replaces."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from perennial.infra import artifacts
from perennial.infra.errors import InputError
from perennial.training import lora, objective
from perennial.training.batching import pack
from perennial.training.compile import ClassWeights
from perennial.training.config import TrainConfig
from perennial.training.examples import Judgement, Label, Pair
from perennial.training.loss import Targets, TopK, dpo, head_losses, kto, plain_losses, top_k
from perennial.training.mix import Batch, Pick, Source, epoch_batches
from perennial.training.prepared import Sources, prepare, teach
from perennial.training.recipes import encode_judged, encode_pair
from perennial.training.teachers import read_teachers, write_teachers
from perennial.training.tokens import TokenRow, encode_example
from perennial.training.trainer import halved, mix_of
from perennial.training.trunk import Kernels, SplitModel
from tests.training.builders import example, tiny_model, tiny_tokenizer

CONFIG = TrainConfig(rank=4, alpha=8, top_layers=1, question_dropout=0.3, batch_tokens=400)


WEIGHTS = ClassWeights(desirable=1.0, undesirable=0.5)


def rows(start: int, num: int, kind: Any = "correction") -> tuple[TokenRow, ...]:
    return tuple(
        encode_example(tiny_tokenizer(), example(n, kind), 512) for n in range(start, start + num)
    )


def thumb(index: int, label: Label = "desirable", messages: Any = (("user", "?"),)) -> Judgement:
    return Judgement(
        id=f"t{index}", messages=messages, completion=f"room {index * index}", label=label
    )


def preferences() -> dict[str, tuple[Any, ...]]:
    asked = [(("user", f"where is shelf {n}?"),) for n in range(5)]
    edits = [
        Pair(id=f"e{n}", messages=asked[n], chosen=f"hall {n}", rejected="no idea, sorry")
        for n in range(2)
    ]
    labels: tuple[Label, ...] = ("desirable", "undesirable")
    thumbs = [thumb(n, labels[n % 2], asked[n]) for n in range(4)]
    return {
        "pairs": tuple(encode_pair(tiny_tokenizer(), edit, 512) for edit in edits),
        "judgements": encode_judged(tiny_tokenizer(), thumbs, WEIGHTS, 512, 0),
    }


def with_fields(**fields: Any) -> TrainConfig:
    return TrainConfig(**{**CONFIG.to_json(), **fields})


def adapted(config: TrainConfig, model: Any = None) -> Any:
    """A model whose adapter has a product that is not zero."""
    found = lora.attach(model or tiny_model(), config)
    torch.manual_seed(5)
    for name, weight in found.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return found


def random_targets(num: int, vocabulary: int, k: int) -> Targets:
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(num, vocabulary, generator=random)
    probs, tokens = logits.softmax(-1).topk(k)
    blend = torch.tensor([0.0, 0.5, 1.0]).repeat(num)[:num]
    return Targets(
        label_M=torch.randint(vocabulary, (num,), generator=random),
        blend_M=blend,
        tokens_MK=tokens,
        probs_MK=probs,
    )


def test_the_heads_own_gradient_equals_the_automatic_one() -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False).requires_grad_(False)
    targets = random_targets(150, 50, 7)
    hidden = torch.randn(150, 16)
    weight_M = torch.rand(150)
    found = []
    for kind in ("fused", "plain"):
        own = hidden.clone().requires_grad_(True)
        losses = (
            head_losses(own, head, targets) if kind == "fused" else plain_losses(head(own), targets)
        )
        (losses.loss_M * weight_M).sum().backward()  # type: ignore[no-untyped-call]  # torch
        assert own.grad is not None
        found.append((losses.loss_M.detach(), losses.ce_M, losses.kl_M, own.grad))
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)


def test_kl_over_top_tokens_and_a_rest_is_known_by_hand() -> None:
    targets = Targets(
        label_M=torch.tensor([0]),
        blend_M=torch.tensor([1.0]),
        tokens_MK=torch.tensor([[0]]),
        probs_MK=torch.tensor([[0.5]]),
    )
    loss = plain_losses(torch.tensor([[0.25, 0.25, 0.5]]).log(), targets).loss_M
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))


def test_dpo_and_kto_are_known_by_hand() -> None:
    value = dpo(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([1.0]), beta=0.5)
    assert value.item() == pytest.approx(math.log(1 + math.exp(-0.5 * (2 - 1))))
    liked = torch.tensor([True, False])
    ratio, others = torch.tensor([1.0, 1.0]), torch.tensor([0.2, 0.6])
    found = kto(ratio, others, liked, beta=2.0).tolist()
    sigmoid = 1 / (1 + math.exp(-2 * (1 - 0.4)))
    assert found == pytest.approx([1 - sigmoid, sigmoid])
    below = kto(ratio, -others, liked, beta=2.0).tolist()
    assert below[0] == pytest.approx(1 - 1 / (1 + math.exp(-2)))  # z₀ is never negative


def test_one_judged_answer_alone_is_refused() -> None:
    with pytest.raises(InputError, match="two judged answers or more, got t0 alone"):
        encode_judged(tiny_tokenizer(), [thumb(0)], WEIGHTS, 512, 0)


def test_a_lone_last_judged_answer_joins_a_group() -> None:
    groups = encode_judged(tiny_tokenizer(), [thumb(n) for n in range(9)], WEIGHTS, 512, 0)
    assert [len(group.judged) for group in groups] == [9]


def test_judged_answers_that_fit_have_mismatched_ones_that_may_be_longer() -> None:
    thumbs = [
        Judgement(id="a", messages=(("user", "why? " * 20),), completion="so", label="desirable"),
        Judgement(id="b", messages=(("user", "?"),), completion="so " * 30, label="undesirable"),
    ]
    (group,) = encode_judged(tiny_tokenizer(), thumbs, WEIGHTS, 150, 0)
    assert max(row.num_tokens for row in group.judged) <= 150
    assert max(row.num_tokens for row in group.mismatched) > 150


def test_mismatched_answers_are_no_part_of_a_groups_tokens() -> None:
    (group,) = preferences()["judgements"]
    assert group.num_tokens == sum(row.num_tokens for row in group.judged)


def test_only_rows_that_are_drawn_are_prepared() -> None:
    config = with_fields(recipe="anchor")
    model = adapted(config)
    sources = Sources(new=rows(0, 2), general=rows(2, 3, "general"))
    drawn = {Pick(source=Source.NEW, index=1), Pick(source=Source.GENERAL, index=2)}
    prepared = prepare(model, sources, config, drawn)
    assert set(prepared.trunks) == {
        Pick(source=Source.NEW, index=1),
        Pick(source=Source.GENERAL, index=2),
    }
    assert set(prepared.teachers) == {Pick(source=Source.GENERAL, index=2)}


def log_prob(model: Any, row: TokenRow) -> Tensor:
    """Of the completion, by the plain model, the row alone."""
    ids = torch.from_numpy(row.ids_T)
    log_probs = model(ids[None]).logits[0, row.num_prompt - 1 : -1].log_softmax(-1)
    found: Tensor = log_probs.gather(-1, ids[row.num_prompt :, None]).sum()
    return found


@pytest.mark.parametrize("reference", ["start", "base"])
def test_preferences_in_a_packed_batch_equal_plain_ones(reference: Any) -> None:
    config = with_fields(reference=reference, kernels="fused")
    model = adapted(config)
    sources = Sources(**preferences())
    prepared = prepare(model, sources, config, sources.picks)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_A" in name:
                weight *= 1.5
    places = [(Source.PAIRS, 0), (Source.PAIRS, 1), (Source.JUDGEMENTS, 0)]
    batch = tuple(Pick(source=source, index=index) for source, index in places)
    over = objective.sums(prepared, batch)
    found = objective.batch_loss(prepared, batch, over, config, step=1)
    plain = plain_preferences(model, sources, config, reference)
    assert found.total.item() == pytest.approx(plain.item(), rel=1e-4)
    assert_equal_gradients(model, found.total, plain)


def plain_preferences(
    model: Any, sources: Sources, config: TrainConfig, reference: str
) -> Tensor:  # fmt: skip
    """DPO + SFT and KTO as in their papers, one row at a time."""
    edits, (group,) = sources.pairs, sources.judgements
    start = adapted(config)

    def ratio(row: TokenRow) -> Tensor:
        with torch.no_grad(), start.disable_adapter():
            base = log_prob(start, row)
        with torch.no_grad():
            before = log_prob(start, row)
        return log_prob(model, row) - (base if reference == "base" else before)

    total = torch.zeros(())
    for edit in edits:
        margin = ratio(edit.chosen) - ratio(edit.rejected)
        num = edit.chosen.num_tokens - edit.chosen.num_prompt
        sft = -log_prob(model, edit.chosen) / num
        logistic = -torch.log(torch.sigmoid(config.preference_beta * margin))
        total = total + (logistic + config.dpo_sft_weight * sft) / len(edits)
    with torch.no_grad():
        zero = torch.stack([ratio(row) for row in group.mismatched]).mean().clamp_min(0)
    for row, label in zip(group.judged, group.labels, strict=True):
        sign, weight = (1, 1.0) if label == "desirable" else (-1, 0.5)
        value = torch.sigmoid(config.preference_beta * sign * (ratio(row) - zero))
        total = total + weight * (1 - value) / len(group.judged)
    return total


def assert_equal_gradients(model: Any, one: Tensor, other: Tensor, scale: float = 1e-4) -> None:
    weights = list(lora.trainable(model).values())
    for mine, plain in zip(
        torch.autograd.grad(one, weights), torch.autograd.grad(other, weights), strict=True
    ):
        torch.testing.assert_close(mine, plain, atol=scale * float(plain.abs().max()), rtol=1e-3)


def whole_round(config: TrainConfig) -> Sources:
    replay = rows(20, 6, "replay")
    split = SplitModel(tiny_model(7), 0)
    taught = teach(split, replay[:4], None, "completion", config)
    teachers = {row.id: teacher for row, teacher in zip(replay, taught, strict=False)}
    return Sources(
        new=rows(0, 8),
        replay=replay,
        general=rows(40, 4, "general"),
        teachers=teachers,
        **preferences(),
    )


def first_batches(sources: Sources, config: TrainConfig) -> tuple[Batch, ...]:
    return epoch_batches(mix_of(sources, config), {}, 0)


def losses_of(model: Any, config: TrainConfig) -> list[Any]:
    sources = whole_round(config)
    prepared = prepare(model, sources, config, sources.picks)
    found = []
    for step, batch in enumerate(first_batches(prepared.sources, config)[:4]):
        over = objective.sums(prepared, batch)
        found.append(objective.batch_loss(prepared, batch, over, config, step))
    return found


FAMILIES: Mapping[str, Any] = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
}


def family_model(name: str) -> Any:
    torch.manual_seed(0)
    config = FAMILIES[name](
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for name_, weight in model.named_parameters():
        if name_.endswith("bias") or "norm" in name_:
            nn.init.uniform_(weight, 0.5, 1.5)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", "mlp"])
def test_fused_kernels_have_the_losses_and_gradients_of_the_modules(
    family: str, targets: Any
) -> None:
    """To 1e-4 of the largest entry of each gradient, in fp32."""
    fields = {"recipe": "replay-kd-anchor", "targets": targets, "general_share": 0.3}
    model = adapted(with_fields(**fields), family_model(family))
    plain = losses_of(model, with_fields(**fields, kernels="plain"))
    fused = losses_of(model, with_fields(**fields, kernels="fused"))
    for mine, theirs in zip(fused, plain, strict=True):
        assert mine.total.item() == pytest.approx(theirs.total.item(), rel=1e-5)
        assert mine.row_losses == pytest.approx(theirs.row_losses, rel=1e-4, abs=1e-4)
        assert_equal_gradients(model, mine.total, theirs.total)


@pytest.mark.parametrize("kernels", ["fused", "plain"])
@pytest.mark.parametrize("scope", ["completion", "all"])
def test_parts_of_a_batch_add_up_to_the_whole(kernels: Kernels, scope: str) -> None:
    config = with_fields(
        recipe="replay-kd-anchor", kernels=kernels, kl_scope=scope, general_share=0.4
    )
    model = adapted(config)
    sources = whole_round(config)
    prepared = prepare(model, sources, config, sources.picks)
    batch = first_batches(prepared.sources, config)[0]
    over = objective.sums(prepared, batch)
    whole = objective.batch_loss(prepared, batch, over, config, 3)
    parts = [objective.batch_loss(prepared, part, over, config, 3) for part in halved(batch, 3)]
    together = torch.stack([part.total for part in parts]).sum()
    assert together.item() == pytest.approx(whole.total.item(), rel=1e-5)
    assert objective.add(parts).row_losses == pytest.approx(whole.row_losses, rel=1e-4, abs=1e-4)
    assert_equal_gradients(model, together, whole.total)


def test_a_fused_model_keeps_one_copy_of_its_weights_and_the_same_answers() -> None:
    model = tiny_model()
    ids = torch.arange(20)[None]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        logits = model(ids).logits
        SplitModel(model, 0, "fused")
        torch.testing.assert_close(model(ids).logits, logits)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    attention = model.model.layers[0].self_attn
    storages = {p.weight.untyped_storage().data_ptr() for p in (attention.q_proj, attention.k_proj)}
    assert len(storages) == 1


def test_dora_and_other_models_run_through_their_modules() -> None:
    config = with_fields(method="dora", recipe="replay")
    model = adapted(config)
    fused, plain = (
        losses_of(model, with_fields(method="dora", recipe="replay", kernels=k))
        for k in ("fused", "plain")
    )
    assert [f.total.item() for f in fused] == [p.total.item() for p in plain]


@pytest.mark.parametrize(
    ("recipe", "drawn"),
    [
        ("sft", set()),
        ("replay", {Source.REPLAY}),
        ("replay-kd", {Source.REPLAY}),
        ("anchor", {Source.REPLAY, Source.GENERAL}),
        ("replay-kd-anchor", {Source.REPLAY, Source.GENERAL}),
    ],
)
def test_a_recipe_draws_its_own_sources(recipe: Any, drawn: set[Source]) -> None:
    mix = mix_of(whole_round(CONFIG), with_fields(recipe=recipe, epochs=3))
    assert {pick.source for pick in mix.drawable} == {
        Source.NEW,
        Source.PAIRS,
        Source.JUDGEMENTS,
    } | drawn


def test_a_replayed_row_is_half_its_label_and_half_its_teacher() -> None:
    config = with_fields(recipe="replay-kd", question_dropout=0)
    model = adapted(config)
    sources = whole_round(config)
    prepared = prepare(model, sources, config, sources.picks)
    for index, share in ((0, 0.5), (5, 0.0)):  # the first has a teacher, the last has none
        batch: Batch = (Pick(source=Source.REPLAY, index=index),)
        over = objective.sums(prepared, batch)
        found = objective.batch_loss(prepared, batch, over, config, 1).total.item()
        row = sources.replay[index]
        packed = pack([row], labels=["completion"])
        logits = model(torch.from_numpy(row.ids_T)[None]).logits[0, packed.predict_M]
        ce = nn.functional.cross_entropy(logits, torch.from_numpy(packed.label_M)).item()
        kl = full_kl(sources.teachers[row.id], logits) if share else 0.0
        assert found == pytest.approx((1 - share) * ce + share * kl, rel=1e-4)


def test_a_teacher_in_a_file_is_read_where_it_lies_and_gives_the_same_loss(tmp_path: Path) -> None:
    config = with_fields(recipe="replay-kd")
    model, sources = adapted(config), whole_round(config)
    write_teachers(tmp_path / "a", sources.replay[:4], list(sources.teachers.values()))
    mapped = read_teachers(tmp_path / "a", sources.replay, config.kl_top_k)
    assert {(t.tokens_TK.dtype, t.log_probs_TK.dtype) for t in mapped.values()} == {
        (torch.int32, torch.float16)
    }
    copied = {
        id_: TopK(tokens_TK=t.tokens_TK.long(), log_probs_TK=t.log_probs_TK.float())
        for id_, t in mapped.items()
    }
    batch = tuple(Pick(source=Source.REPLAY, index=index) for index in range(5))
    found = []
    for teachers in (mapped, copied):
        prepared = prepare(model, replace(sources, teachers=teachers), config, sources.picks)
        over = objective.sums(prepared, batch)
        found.append(objective.batch_loss(prepared, batch, over, config, 1).total.item())
    assert found[0] == found[1]
    write_teachers(tmp_path / "b", sources.replay[:4], list(mapped.values()))
    assert artifacts.verify(tmp_path / "a") == artifacts.verify(tmp_path / "b")


def test_a_general_row_is_held_to_the_base_at_each_of_its_tokens() -> None:
    config = with_fields(kl_scope="all", general_blend=1.0)
    model = adapted(config)
    sources = whole_round(config)
    prepared = prepare(model, sources, config, sources.picks)
    batch = tuple(Pick(source=Source.GENERAL, index=index) for index in range(3))
    found = objective.batch_loss(prepared, batch, objective.sums(prepared, batch), config, 1)
    totals, num = 0.0, 0
    for row in prepared.sources.general[:3]:
        ids = torch.from_numpy(row.ids_T)[None]
        logits = model(ids).logits[0, :-1]
        with model.disable_adapter():
            base = top_k(model(ids).logits[0, :-1], config.kl_top_k)
        totals, num = totals + full_kl(base, logits) * len(logits), num + len(logits)
    assert found.kl == pytest.approx(totals / num, rel=1e-3)


def full_kl(teacher: TopK, logits: Tensor) -> float:
    p = teacher.log_probs_TK.exp().numpy()
    q = logits.detach().softmax(-1).gather(-1, teacher.tokens_TK).numpy()
    rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
    return float(((p * np.log(p / q)).sum(-1) + rest_p * np.log(rest_p / rest_q)).mean())
