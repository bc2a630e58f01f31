"""The rows that a job names, as tokens. A row that does not fit is reported, never cut short."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perennial.infra.errors import InputError, TooLargeError
from perennial.training.examples import read_examples
from perennial.training.job import TrainJob
from perennial.training.objective import Sources
from perennial.training.teachers import read_teachers
from perennial.training.tokens import TokenRow, encode_example

_LOG = logging.getLogger(__name__)


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


def rows_of_job(job: TrainJob, tokenizer: Any, *, is_rebuild: bool) -> Rows:  # Any: transformers
    """The job's rows; an adapter that is rebuilt from the base learns its replayed rows as new.

    Raises:
        InputError: no new row fits.
    """
    left_out: list[LeftOut] = []
    paths = (job.train_rows, job.replay_rows, job.general_rows, job.dev_rows)
    new, replay, general, dev = (
        _encoded(tokenizer, p, job.config.max_len, left_out) for p in paths
    )
    if not new:
        raise InputError(
            f"no row of {job.train_rows} fits in max_len {job.config.max_len} tokens; raise max_len"
        )
    if is_rebuild:
        new, replay = new + replay, ()
    teachers = read_teachers(job.teachers, replay) if job.teachers else {}
    sources = Sources(new=new, replay=replay, general=general, teachers=teachers)
    return Rows(sources=sources, dev=dev, left_out=tuple(left_out))


def _encoded(
    tokenizer: Any,  # Any: transformers
    path: Path | None,
    max_len: int,
    left_out: list[LeftOut],
) -> tuple[TokenRow, ...]:
    """The rows of a file that fit; the others are added to `left_out`."""
    found = []
    for example in read_examples(path) if path else ():
        try:
            found.append(encode_example(tokenizer, example, max_len))
        except TooLargeError as error:
            _LOG.warning("left out: %s", error)
            left_out.append(LeftOut(id=example.id, num_tokens=int(error.fields["num_tokens"] or 0)))
    return tuple(found)
