"""General rows: what the model could do before, to be kept (replay) or measured (probe).

The home of `datasets`, which reads the formats that people have such rows in.
"""

import tempfile
from pathlib import Path

from perennial.infra.errors import InputError

_READERS = {".jsonl": "from_json", ".json": "from_json", ".csv": "from_csv",
            ".parquet": "from_parquet"}  # fmt: skip


def load_general(path: Path) -> tuple[tuple[str, str], ...]:
    """(prompt, answer) pairs of a JSON Lines, CSV or Parquet file with these two columns.

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
    missing = {"prompt", "answer"} - set(rows.column_names)
    if missing:
        raise InputError(f"{path} lacks the column {', '.join(sorted(missing))}")
    return tuple((str(row["prompt"]), str(row["answer"])) for row in rows)
