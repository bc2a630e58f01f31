"""Has the base model write general rows: it asks what a user would, and answers that.

A chat template that stops where the user begins to speak makes a model speak as the user (Magpie,
Xu et al. 2024, arXiv:2406.08464). Both turns are sampled: the likeliest answers of a small model go
round in circles. Drafts come in batches, each from a seed of its own and kept when it is done, so a
killed run goes on to the same rows. Which drafts are fit is left to `general`.
"""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perennial.infra.artifacts import write_atomic
from perennial.infra.errors import InputError
from perennial.training.general import Draft, fit_drafts
from perennial.training.generate import Choose, generate_ids
from perennial.training.progress import Meter
from perennial.training.text import clean, words
from perennial.training.tokens import encode_prompt, open_user_turn

_LOG = logging.getLogger(__name__)
BATCH_ROWS = 16
MAX_TRIES = 8
_QUESTION_TOKENS = 64
_ANSWER_TOKENS = 256
_TOP_K = 50


def write_drafts(
    model: Any,  # Any: transformers
    tokenizer: Any,
    num_rows: int,
    seed: int,
    batches: Path,
    meter: Meter,
) -> tuple[Draft, ...]:
    """`num_rows` fit drafts; every batch is in a file in `batches`, and is read where it is there.

    Raises:
        InputError: of `MAX_TRIES` drafts a row, too few were fit.
    """
    max_drafts = MAX_TRIES * num_rows
    drafts: list[Draft] = []
    fit: tuple[Draft, ...] = ()
    started, num_tokens, num_found = time.monotonic(), 0, len(list(batches.glob("*.jsonl")))
    for number in range(-(-max_drafts // BATCH_ROWS)):
        path = batches / f"{number:05}.jsonl"
        if not path.exists():
            _write(path, _draft(model, tokenizer, (seed << 20) + number))
        batch = _read(path)
        drafts += batch
        fit = fit_drafts(drafts, num_rows)
        num_tokens += sum(draft.num_tokens for draft in batch) if number >= num_found else 0
        elapsed_s = time.monotonic() - started
        note = f"{len(drafts)} drafts · {num_tokens / elapsed_s:.0f} tokens/s"
        eta_s = elapsed_s / max(1, len(fit)) * (num_rows - len(fit))
        meter.show(len(fit), num_rows, note, eta_s)
        if len(fit) == num_rows:
            return fit
    raise InputError(
        f"of {len(drafts)} drafts of the base model {len(fit)} are fit, {num_rows} are wanted: "
        "lower training.general_drafts, or set it to 0 and supply training.general_file",
        num_drafts=len(drafts),
        num_fit=len(fit),
    )


def sampled(generator: torch.Generator) -> Choose:
    """Draws each next id from the model's distribution over its likeliest ids, on the CPU."""

    def choose(logits_BV: Tensor) -> Tensor:
        top = logits_BV.float().topk(_TOP_K)
        drawn_B1 = torch.multinomial(top.values.softmax(-1).cpu(), 1, generator=generator)
        return top.indices.gather(-1, drawn_B1.to(logits_BV.device))[:, 0]

    return choose


def _draft(model: Any, tokenizer: Any, seed: int) -> Iterator[Draft]:  # Any: transformers
    """A batch: questions that the model ended are answered, the others count as not ended."""
    opening, end = open_user_turn(tokenizer)
    choose = sampled(torch.Generator().manual_seed(seed))
    asked = generate_ids(model, [opening] * BATCH_ROWS, _QUESTION_TOKENS, end, choose)
    questions = [clean(tokenizer.decode(ids, skip_special_tokens=True)) for ids in asked]
    whole = [
        index
        for index, ids in enumerate(asked)
        if len(ids) < _QUESTION_TOKENS and words(questions[index])
    ]
    prompts = [encode_prompt(tokenizer, (("user", questions[index]),)) for index in whole]
    eos = int(tokenizer.eos_token_id)
    told = generate_ids(model, prompts, _ANSWER_TOKENS, eos, choose) if prompts else []
    answers = dict(zip(whole, told, strict=True))
    for index, ids in enumerate(asked):
        answer = answers.get(index, [])
        yield Draft(
            prompt=questions[index],
            answer=tokenizer.decode(answer, skip_special_tokens=True).strip(),
            has_ended=index in answers and len(answer) < _ANSWER_TOKENS,
            num_tokens=len(ids) + len(answer),
        )


def _write(path: Path, drafts: Iterator[Draft]) -> None:
    lines = (json.dumps(asdict(draft), ensure_ascii=False) + "\n" for draft in drafts)
    write_atomic(path, "".join(lines).encode())


def _read(path: Path) -> list[Draft]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [Draft(**json.loads(line)) for line in lines if line]
