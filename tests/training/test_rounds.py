import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perennial.infra.errors import IntegrityError
from perennial.training import lora, rounds
from perennial.training.cache import FrozenCache, model_digest
from perennial.training.config import TrainConfig
from perennial.training.loss import TopK
from perennial.training.prepared import teach
from perennial.training.rounds import Lineage
from perennial.training.teachers import read_teachers, write_teachers
from perennial.training.tokens import TokenRow, encode_example
from perennial.training.trunk import SplitModel
from tests.training.builders import example, save_tiny, tiny_model, tiny_tokenizer

A, B = "x.lora_A.weight", "x.lora_B.weight"


def adapter(seed: int, rank: int = 3) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        A: torch.randn(rank, 10, generator=random),
        B: torch.randn(8, rank, generator=random),
    }


def product(state: Any) -> torch.Tensor:
    found: torch.Tensor = state[B] @ state[A]
    return found


def test_a_blend_is_the_best_cut_of_the_sum_of_products() -> None:
    old, new = adapter(1), adapter(2)
    wanted = 0.3 * product(old) + 0.7 * product(new)
    u, values, vh = torch.linalg.svd(wanted)
    nearest = (u[:, :3] * values[:3]) @ vh[:3]
    found = rounds.blend(old, new, 0.7)
    torch.testing.assert_close(product(found), nearest, atol=1e-5, rtol=1e-5)
    assert {name: weight.shape for name, weight in found.items()} == {
        name: weight.shape for name, weight in new.items()
    }


def test_the_ends_of_a_blend_are_the_parent_and_the_new_adapter() -> None:
    old, new = adapter(1), adapter(2)
    for alpha, state in ((0.0, old), (1.0, new)):
        found = product(rounds.blend(old, new, alpha))
        torch.testing.assert_close(found, product(state), atol=1e-5, rtol=1e-5)


def test_a_blend_of_an_adapter_with_itself_is_itself() -> None:
    same = adapter(1)
    found = product(rounds.blend(same, same, 0.4))
    torch.testing.assert_close(found, product(same), atol=1e-5, rtol=1e-5)


def test_the_sweep_takes_the_smallest_dev_loss_and_of_equals_the_newest() -> None:
    old, new = adapter(1), adapter(2)
    middle = product(rounds.blend(old, new, 0.5))
    losses = rounds.sweep(old, new, lambda state: float((product(state) - middle).norm()))
    assert tuple(losses) == rounds.ALPHAS
    assert rounds.best(losses) == 0.5
    assert rounds.best({0.25: 1.0, 0.5: 1.0, 1.0: 2.0}) == 0.5


def test_the_fast_start_has_orthonormal_rows_of_the_same_space() -> None:
    state = adapter(1)
    found = rounds.orthogonal(state)
    torch.testing.assert_close(found[A] @ found[A].T, torch.eye(3), atol=1e-5, rtol=0)
    assert torch.linalg.matrix_rank(torch.cat([found[A], state[A]]), tol=1e-4) == 3
    assert torch.equal(found[B], state[B])


def test_the_slow_adapter_moves_by_one_over_the_root_of_the_round() -> None:
    old, new = adapter(1), adapter(2)
    found = rounds.slow(old, new, 4)
    assert torch.equal(found[A], new[A])
    torch.testing.assert_close(found[B], (old[B] + new[B]) / 2)
    assert torch.equal(rounds.slow(old, new, 1)[B], new[B])


@pytest.mark.parametrize(
    ("fields", "parent", "start"),
    [
        ({}, None, "base"),
        ({}, Lineage(num_rounds=9, kl_to_base=9.0), "parent"),
        ({"start": "slow-fast"}, Lineage(num_rounds=2, kl_to_base=None), "slow-fast"),
        ({"rebuild_every": 5}, Lineage(num_rounds=4, kl_to_base=None), "parent"),
        ({"rebuild_every": 5}, Lineage(num_rounds=5, kl_to_base=None), "base"),
        ({"kl_budget": 0.1}, Lineage(num_rounds=1, kl_to_base=0.2), "base"),
        ({"kl_budget": 0.1}, Lineage(num_rounds=1, kl_to_base=0.05), "parent"),
    ],
)
def test_a_round_starts_as_told_or_is_rebuilt(
    fields: dict[str, Any], parent: Lineage | None, start: str
) -> None:
    found = rounds.begin(TrainConfig(**fields), parent)
    assert found.start == start
    assert (found.reason is not None) == (start == "base" and parent is not None)


def test_a_lineage_is_read_back_and_a_damaged_one_refused(tmp_path: Path) -> None:
    assert rounds.read_lineage(tmp_path) == Lineage(num_rounds=1, kl_to_base=None)
    config = TrainConfig(shrink=0.7)
    lineage = rounds.after(config, Lineage(num_rounds=2, kl_to_base=0.1), 0.2)
    rounds.write_lineage(tmp_path, lineage)
    assert rounds.read_lineage(tmp_path) == lineage
    assert lineage == Lineage(num_rounds=3, kl_to_base=0.2, shrink=0.7)
    (tmp_path / rounds.LINEAGE).write_text('{"num_rounds": 2, "kl_to_base": null}')
    assert rounds.read_lineage(tmp_path).shrink == 1
    (tmp_path / rounds.LINEAGE).write_text("{")
    with pytest.raises(IntegrityError, match="is not a lineage"):
        rounds.read_lineage(tmp_path)


@pytest.mark.parametrize("fields", [{"method": "dora"}, {"scaling": "rslora"}])
def test_a_merged_variant_answers_as_the_attached_one(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    model = lora.attach(tiny_model(), TrainConfig(rank=4, alpha=8, top_layers=2, **fields))
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
        if "magnitude" in name:
            weight.data *= 1.1
    lora.save(model, tmp_path)
    ids = torch.arange(30)[None]
    plain = tiny_model()
    with torch.no_grad():
        lora.merge(plain, tmp_path)
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def token_rows(num: int) -> tuple[TokenRow, ...]:
    return tuple(encode_example(tiny_tokenizer(), example(n), 512) for n in range(num))


def cache_in(folder: Path, **fields: Any) -> FrozenCache:
    given = {"base": "b", "tokenizer": "t", "max_bytes": 10**9}
    return FrozenCache(folder=folder, **{**given, **fields})


class Counting(SplitModel):
    """Notes the rows whose trunk is computed, and how often logits are."""

    def __init__(self) -> None:
        super().__init__(tiny_model(), 1)
        self.asked: list[str] = []
        self.num_logits = 0

    def logits(self, packed: Any, trunks: Any) -> torch.Tensor:
        self.num_logits += 1
        return super().logits(packed, trunks)

    def trunk(self, rows: Any, batch_tokens: int) -> list[torch.Tensor]:
        self.asked += [row.id for row in rows]
        return super().trunk(rows, batch_tokens)


def test_cached_trunks_equal_computed_ones_and_are_not_computed_again(tmp_path: Path) -> None:
    split, rows = Counting(), token_rows(4)
    first = cache_in(tmp_path).trunk(split, rows[:3], 200)
    split.asked.clear()
    second = cache_in(tmp_path).trunk(split, rows, 200)
    assert split.asked == [rows[3].id]
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=False))


@pytest.mark.parametrize("scope", ["completion", "all"])
def test_cached_teachers_equal_computed_ones_and_are_not_computed_again(
    tmp_path: Path, scope: str
) -> None:
    split, rows, config = Counting(), token_rows(3), TrainConfig(kl_top_k=5)
    wanted = teach(split, rows, None, scope, config)
    cache_in(tmp_path).teach(split, rows, split.trunk(rows, 200), scope, config)
    split.num_logits = 0
    found = cache_in(tmp_path).teach(split, rows, None, scope, config)
    assert split.num_logits == 0
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.tokens_TK.long(), other.tokens_TK)
        torch.testing.assert_close(one.log_probs_TK, other.log_probs_TK)


def test_teachers_of_other_tokens_positions_or_another_number_share_no_entry(
    tmp_path: Path,
) -> None:
    split, rows, cache = Counting(), token_rows(1), cache_in(tmp_path)
    later = replace(rows[0], num_prompt=rows[0].num_prompt + 1)
    for k, asked, scope in (
        (5, rows, "completion"),
        (4, rows, "completion"),
        (5, rows, "all"),
        (5, [later], "completion"),
    ):
        (found,) = cache.teach(split, asked, None, scope, TrainConfig(kl_top_k=k))
        (wanted,) = teach(split, asked, None, scope, TrainConfig(kl_top_k=k))
        assert torch.equal(found.tokens_TK.long(), wanted.tokens_TK)
    cache.trunk(split, rows, 200)
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("fields", [{"base": "other"}, {"tokenizer": "other"}])
def test_another_base_or_tokenizer_shares_no_entry(tmp_path: Path, fields: Any) -> None:
    split, rows = Counting(), token_rows(2)
    cache_in(tmp_path).trunk(split, rows, 200)
    cache_in(tmp_path, **fields).trunk(split, rows, 200)
    assert len(split.asked) == 4


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_another_config_or_other_weights_have_another_digest(tmp_path: Path, name: str) -> None:
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    found = [model_digest(tmp_path)]
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"x")
    found.append(model_digest(tmp_path))
    config = json.loads((tmp_path / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    found.append(model_digest(tmp_path))
    assert len(set(found)) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_entry_is_computed_again_and_never_used(tmp_path: Path, damage: str) -> None:
    split, rows = Counting(), token_rows(1)
    (wanted,) = cache_in(tmp_path).trunk(split, rows, 200)
    (entry,) = tmp_path.iterdir()
    raw = bytearray(entry.read_bytes())
    raw[-3] ^= 1
    entry.write_bytes({"flip": bytes(raw), "cut": bytes(raw[:-4]), "empty": b""}[damage])
    (found,) = cache_in(tmp_path).trunk(split, rows, 200)
    assert torch.equal(found, wanted)
    assert split.asked == [rows[0].id] * 2
    cache_in(tmp_path).trunk(split, rows, 200)
    assert len(split.asked) == 2


def test_the_cache_is_bounded_and_what_was_used_last_stays(tmp_path: Path) -> None:
    split, rows = Counting(), token_rows(3)
    cache_in(tmp_path).trunk(split, rows[:2], 200)
    size = max(path.stat().st_size for path in tmp_path.iterdir())
    for path in tmp_path.iterdir():
        os.utime(path, (1, 1))
    cache_in(tmp_path).trunk(split, rows[:1], 200)
    small = cache_in(tmp_path, max_bytes=2 * size + 300)
    small.trunk(split, rows[2:], 200)
    split.asked.clear()
    small.trunk(split, (rows[0], rows[2]), 200)
    assert split.asked == []
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * size + 300


def test_what_killed_runs_left_is_counted_and_what_is_written_now_stays(tmp_path: Path) -> None:
    left, now = tmp_path / "abc.77", tmp_path / "def.78"
    for path in (left, now):
        path.write_bytes(b"x" * 1000)
    os.utime(left, (1, 1))
    cache_in(tmp_path, max_bytes=10**5).trunk(Counting(), token_rows(1), 200)
    assert left.exists()
    cache_in(tmp_path, max_bytes=1).trunk(Counting(), token_rows(1), 200)
    assert list(tmp_path.iterdir()) == [now]


def test_an_entry_that_another_process_deletes_meanwhile_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "gone.frozen").symlink_to(tmp_path / "nowhere")  # listed, and not there when read
    assert len(cache_in(tmp_path).trunk(Counting(), token_rows(1), 200)) == 1


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    split, rows = Counting(), token_rows(1)
    cache = cache_in(tmp_path)
    cache.trunk(split, rows, 200)
    (entry,) = tmp_path.iterdir()
    entry.unlink()
    entry.mkdir()  # the rename onto a folder fails, as it would on a full disk
    (found,) = cache.trunk(split, rows, 200)
    assert found.shape == (rows[0].num_tokens, 64)
    assert list(tmp_path.iterdir()) == [entry]


def test_teachers_come_back_for_equal_tokens_only(tmp_path: Path) -> None:
    rows = token_rows(2)
    nums = [row.num_tokens - row.num_prompt for row in rows]
    taught = [
        TopK(tokens_TK=torch.arange(n * 3).view(n, 3), log_probs_TK=-torch.rand(n, 3)) for n in nums
    ]
    write_teachers(tmp_path / "t", rows, taught)
    other = TokenRow(id=rows[1].id, ids_T=rows[1].ids_T + 1, num_prompt=rows[1].num_prompt)
    found = read_teachers(tmp_path / "t", [rows[0], other], 3)
    assert set(found) == {rows[0].id}
    assert torch.equal(found[rows[0].id].tokens_TK.long(), taught[0].tokens_TK)
    assert torch.equal(found[rows[0].id].log_probs_TK, taught[0].log_probs_TK.half())
    tokens = np.load(tmp_path / "t" / "tokens.npy")
    assert tokens.nbytes + np.load(tmp_path / "t" / "log_probs.npy").nbytes == 6 * 3 * sum(nums)
    (tmp_path / "t" / "tokens.npy").write_bytes(b"x")
    with pytest.raises(IntegrityError):
        read_teachers(tmp_path / "t", rows, 3)
