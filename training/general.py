"""General rows: what the model could do before, to be kept (replay) or measured (probe).

The home of `datasets`, which reads the formats that people have such rows in.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from perennial.infra.errors import InputError

_READERS = {".jsonl": "from_json", ".json": "from_json", ".csv": "from_csv",
            ".parquet": "from_parquet"}  # fmt: skip
_COLUMNS = (("prompt", "answer"), ("instruction", "output"))


def load_general(path: Path) -> tuple[tuple[str, str], ...]:
    """(prompt, answer) pairs of a JSON Lines, CSV or Parquet file with these two columns.

    The columns may also be `instruction` and `output`; an `input` then follows the instruction.

    Raises:
        InputError: the file is missing or of another format, or a column is missing.
    """
    if path.suffix not in _READERS or not path.is_file():
        raise InputError(f"{path} must be a file that ends in {', '.join(_READERS)}")
    import datasets  # pyarrow and pandas come with it: only who reads rows pays

    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = getattr(datasets.Dataset, _READERS[path.suffix])(
                str(path), cache_dir=cache, keep_in_memory=True
            )
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
    asked, told = next((p for p in _COLUMNS if {*p} <= {*rows.column_names}), (None, None))
    if asked is None:
        wanted = " or ".join("+".join(pair) for pair in _COLUMNS)
        raise InputError(f"{path} needs the columns {wanted}; it has {rows.column_names}")
    return tuple((_prompt(row, asked), str(row[told])) for row in rows)


def _prompt(row: Mapping[str, object], asked: str) -> str:
    given = row.get("input") if asked == "instruction" else None
    return f"{row[asked]}\n\n{given}" if given else str(row[asked])
