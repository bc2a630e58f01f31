"""General rows: what the model could do before, to be kept (replay) or measured (probe).

They come from a file, of which two are packaged, or the base model writes them itself: this module
chooses which of its drafts are fit, `drafting` has it write them. The home of `datasets`, which
reads the formats that people have such rows in.
"""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from perennial.infra.artifacts import write_atomic
from perennial.infra.errors import InputError
from perennial.training.similar import Said, near_duplicates
from perennial.training.text import clean, words

_LOG = logging.getLogger(__name__)

_PACKAGED = Path(__file__).parent / "packaged"
PACKAGED_REPLAY = _PACKAGED / "general_replay.jsonl"
PACKAGED_PROBE = _PACKAGED / "general_probe.jsonl"

_READERS = {".jsonl": "from_json", ".json": "from_json", ".csv": "from_csv",
            ".parquet": "from_parquet"}  # fmt: skip
# Else pandas takes the words "NA" and "None" for an empty cell.
_OPTIONS = {".csv": {"keep_default_na": False}}
_COLUMNS = (("prompt", "answer"), ("instruction", "output"))
_NEAR_DUPLICATE = 0.8
_MAX_REPEATED = 0.2


def load_general(path: Path) -> tuple[tuple[str, str], ...]:
    """(prompt, answer) pairs of a JSON Lines, CSV or Parquet file with these two columns.

    The columns may also be `instruction` and `output`; an `input` then follows the instruction.
    Texts are cleaned; rows in which one is empty are left out, and the log says how many.

    Raises:
        InputError: the file is missing or of another format, a column is missing, or no row is
            left.
    """
    if path.suffix not in _READERS or not path.is_file():
        raise InputError(f"{path} must be a file that ends in {', '.join(_READERS)}")
    import datasets  # pyarrow and pandas come with it: only who reads rows pays

    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = getattr(datasets.Dataset, _READERS[path.suffix])(
                str(path),
                cache_dir=cache,
                keep_in_memory=True,
                **_OPTIONS.get(path.suffix, {}),
            )
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
    asked, told = next((p for p in _COLUMNS if {*p} <= {*rows.column_names}), (None, None))
    if asked is None:
        wanted = " or ".join("+".join(pair) for pair in _COLUMNS)
        raise InputError(f"{path} needs the columns {wanted}; it has {rows.column_names}")
    pairs = [(clean(_prompt(row, asked)), clean(_text(row[told]))) for row in rows]
    whole = tuple(pair for pair in pairs if all(pair))
    if not whole:
        raise InputError(f"{path} has no general row with a prompt and an answer", path=str(path))
    if len(whole) < len(pairs):
        num_empty = len(pairs) - len(whole)
        _LOG.warning("general rows left out, empty file=%s num_rows=%d", path, num_empty)
    return whole


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A question that the base model thought of, and its own answer to it."""

    prompt: str
    answer: str
    has_ended: bool  # the model ended question and answer itself, neither was cut off
    num_tokens: int


def fit_drafts(drafts: Sequence[Draft], num_rows: int) -> tuple[Draft, ...]:
    """The first `num_rows` drafts, cleaned, that hold the model to something worth keeping.

    Left out are empty or cut off answers, those that go round in circles (more than a fifth of
    all runs of four words were there before), and questions asked before in almost the same words.
    """
    cleaned = [
        replace(draft, prompt=clean(draft.prompt), answer=clean(draft.answer))
        for draft in drafts
        if draft.has_ended
    ]
    whole = [
        draft
        for draft in cleaned
        if words(draft.prompt) and words(draft.answer) and not _is_circular(draft.answer)
    ]
    asked = [Said(context="", asked=draft.prompt, told="") for draft in whole]
    flags = near_duplicates(asked, _NEAR_DUPLICATE)
    distinct = [draft for draft, is_known in zip(whole, flags, strict=True) if not is_known]
    return tuple(distinct[:num_rows])


def write_general(path: Path, drafts: Sequence[Draft]) -> None:
    """JSON Lines of prompt and answer, as `load_general` reads them; replaced as a whole."""
    rows = ({"prompt": draft.prompt, "answer": draft.answer} for draft in drafts)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(path, text.encode())


def _is_circular(text: str) -> bool:
    found = words(text)
    fours = [tuple(found[at : at + 4]) for at in range(len(found) - 3)]
    return len(fours) - len(set(fours)) > _MAX_REPEATED * len(fours)


def _prompt(row: Mapping[str, object], asked: str) -> str:
    given = _text(row.get("input")) if asked == "instruction" else ""
    return f"{_text(row[asked])}\n\n{given}" if given else _text(row[asked])


def _text(cell: object) -> str:
    return "" if cell is None else str(cell)
