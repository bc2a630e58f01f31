"""The rows that a job names, as tokens. A row that does not fit is reported, never cut short."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from perennial.infra.errors import ConfigError, InputError, TooLargeError
from perennial.training.compile import class_weights
from perennial.training.examples import (
    Example,
    Judgement,
    Row,
    read_examples,
    read_judgements,
    read_pairs,
)
from perennial.training.job import TrainJob
from perennial.training.prepared import Sources
from perennial.training.recipes import JudgedRows, encode_judged, encode_pair
from perennial.training.teachers import read_teachers
from perennial.training.tokens import TokenRow, encode_example

_LOG = logging.getLogger(__name__)

Encoded = TypeVar("Encoded")


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """A row that is longer than the context."""

    id: str
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """All rows of a job; `dev` chooses between adapters and is not trained on."""

    sources: Sources
    dev: tuple[TokenRow, ...]
    left_out: tuple[LeftOut, ...]


def rows_of_job(
    job: TrainJob,
    tokenizer: Any,  # Any: transformers
    context: int,
    *,
    is_rebuild: bool,
) -> Rows:
    """The job's rows; an adapter that is rebuilt from the base learns its replayed rows as new.

    context: tokens that the model was made for; no row is longer, whatever `max_len` allows.

    Raises:
        InputError: there is no new row, or none fits.
        ConfigError: the start is "blend" and there is no row to choose α by.
    """
    left_out: list[LeftOut] = []
    max_len = min(job.config.max_len, context)

    def encoded(rows: Sequence[Example]) -> tuple[TokenRow, ...]:
        return _fitting(rows, lambda row: encode_example(tokenizer, row, max_len), left_out)

    paths = (job.train_rows, job.replay_rows, job.general_rows, job.dev_rows)
    given, *others = (read_examples(path) if path else () for path in paths)
    new, replay, general, dev = map(encoded, (given, *others))
    pairs = read_pairs(job.pair_rows) if job.pair_rows else ()
    judged = read_judgements(job.judgement_rows) if job.judgement_rows else ()
    is_blend = job.config.start == "blend" and job.parent_adapter is not None
    if is_blend and not is_rebuild and not dev:
        raise ConfigError("start 'blend' needs dev_rows to choose α by", name="dev_rows")
    if is_rebuild:
        new, replay = new + replay, ()
    sources = Sources(
        new=new,
        replay=replay,
        general=general,
        pairs=_fitting(pairs, lambda row: encode_pair(tokenizer, row, max_len), left_out),
        judgements=_judgements(tokenizer, judged, max_len, job.config.seed, left_out),
        teachers=read_teachers(job.teachers, replay, job.config.kl_top_k) if job.teachers else {},
    )
    if not sources.new and not sources.pairs and not sources.judgements:
        if not given and not pairs and not judged:
            raise InputError(f"{job.train_rows} is empty, and no pair or judgement is given")
        raise InputError(
            f"no row of {job.train_rows} fits in {max_len} tokens; "
            + ("raise max_len" if max_len < context else "that is all of the model's context")
        )
    return Rows(sources=sources, dev=dev, left_out=tuple(left_out))


def _judgements(
    tokenizer: Any,  # Any: transformers
    rows: Sequence[Judgement],
    max_len: int,
    seed: int,
    left_out: list[LeftOut],
) -> tuple[JudgedRows, ...]:
    """Groups of those that fit; none if one label alone is left, which would only push one way."""
    known = {row.id: row for row in rows}
    encoded = _fitting(rows, lambda row: encode_example(tokenizer, row, max_len), left_out)
    fitting = [known[row.id] for row in encoded]
    if len({row.label for row in fitting}) < 2:
        if rows:
            _LOG.warning("no judgement is trained on: those that fit have not both labels")
        return ()
    return encode_judged(tokenizer, fitting, class_weights(fitting), max_len, seed)


def _fitting(
    rows: Sequence[Row], encode: Callable[[Row], Encoded], left_out: list[LeftOut]
) -> tuple[Encoded, ...]:
    """The rows that fit; the others are added to `left_out`."""
    found = []
    for row in rows:
        try:
            found.append(encode(row))
        except TooLargeError as error:
            _LOG.warning("left out: %s", error)
            left_out.append(LeftOut(id=row.id, num_tokens=int(error.fields["num_tokens"] or 0)))
    return tuple(found)
