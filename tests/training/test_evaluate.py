"""What is scored and what is not, through the process's own entry, with a tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest

from perennial.training import run
from perennial.training.evaluate import longest_row
from perennial.training.generate import generate
from perennial.training.tokens import encode_prompt
from tests.training.builders import save_tiny, tiny_model, tiny_tokenizer

CONTEXT = 512  # of the tiny model, whose tokens are bytes


def row(name: str, num_chars: int = 10) -> dict[str, Any]:
    return {
        "id": name,
        "messages": [["user", "x" * num_chars]],
        "reference": "box 7",
        "rule": "exact",
        "cluster": name,
    }


def evaluate(folder: Path, suites: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    save_tiny(folder / "tiny")
    for name, rows in suites.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    job = {
        "base_model": str(folder / "tiny"),
        "adapters": {"champion": None, "candidate": None},
        "suites": {name: f"{name}.jsonl" for name in suites},
        "kl_suites": list(suites),
        "max_new_tokens": 4,
        "num_threads": 1,
        "device": "cpu",
    }
    (folder / "eval.json").write_text(json.dumps(job))
    assert run.main(["evaluate", str(folder / "eval.json"), str(folder / "out")]) == 0
    found: dict[str, Any] = json.loads((folder / "out" / "summary.json").read_bytes())
    return found


def test_a_row_that_is_too_long_is_left_out_for_every_adapter_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row("short"), row("long", CONTEXT), row("other", 300)]

    summary = evaluate(tmp_path, {"target": rows, "general": [row("g")]})

    for adapter in ("champion", "candidate"):
        lines = (tmp_path / "out" / adapter / "target.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == ["short", "other"]
        assert summary["results"][adapter]["target"]["num_rows"] == 2
    (left_out,) = summary["left_out"]
    assert (left_out["suite"], left_out["id"]) == ("target", "long")
    assert left_out["num_tokens"] > CONTEXT
    assert "target · 1 of 3 rows left out, over 512 tokens" in capsys.readouterr().out


def test_a_suite_of_which_no_row_fits_is_empty_and_not_an_error(tmp_path: Path) -> None:
    summary = evaluate(tmp_path, {"retained": [row("a", CONTEXT), row("b", 2 * CONTEXT)]})

    for adapter in ("champion", "candidate"):
        assert (tmp_path / "out" / adapter / "retained.jsonl").read_text() == ""
        assert summary["results"][adapter]["retained"]["num_rows"] == 0
    assert [item["id"] for item in summary["left_out"]] == ["a", "b"]


@pytest.mark.parametrize(("context", "longest"), [(512, 512), (8192, 4096), (None, 4096)])
def test_a_row_may_be_as_long_as_the_context_up_to_a_bound(
    tmp_path: Path, context: int | None, longest: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": context}))

    assert longest_row(tmp_path) == longest


def test_long_prompts_are_answered_apart_as_they_would_be_together() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    asked = [f"{n} {'ab ' * size}?" for n, size in enumerate((1000, 990, 980, 3))]
    prompts = [encode_prompt(tokenizer, (("user", text),)) for text in asked]

    together = generate(model, tokenizer, prompts, max_new_tokens=4)

    alone = [generate(model, tokenizer, [prompt], max_new_tokens=4)[0] for prompt in prompts]
    assert together == alone
