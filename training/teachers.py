"""What an adapter said about the rows it had just learned, kept for when they are replayed.

Cached once, when a round ends: 6 bytes for each of 20 tokens at each completion token, so 120 bytes
a token. Memory-mapped when read; a batch copies its own rows. A row whose tokens have changed since
has no teacher, nor has any row when another number of tokens is kept now.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from perennial.infra import artifacts
from perennial.training.loss import TopK
from perennial.training.tokens import TokenRow

_INDEX, _TOKENS, _LOG_PROBS = "index.json", "tokens.npy", "log_probs.npy"


def write_teachers(folder: Path, rows: Sequence[TokenRow], taught: Sequence[TopK]) -> None:
    """Publish `folder`: an entry for each row id, with a digest of its tokens; the last counts."""

    def write(inner: Path) -> None:
        index, start = {}, 0
        for row, teacher in zip(rows, taught, strict=True):
            stop = start + len(teacher.tokens_TK)
            index[row.id] = {"start": start, "stop": stop, "ids": _digest(row)}
            start = stop
        tokens = torch.cat([teacher.tokens_TK.int() for teacher in taught])
        log_probs = torch.cat([teacher.log_probs_TK.half() for teacher in taught])
        np.save(inner / _TOKENS, tokens.numpy().view(np.uint32))
        np.save(inner / _LOG_PROBS, log_probs.numpy())
        (inner / _INDEX).write_text(json.dumps(index))

    artifacts.publish(folder, write)


def size_mb(folder: Path) -> float:
    """MB (10^6 bytes) that the folder has on disk; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.glob("*")) / 1e6


def read_teachers(folder: Path, rows: Sequence[TokenRow], k: int) -> Mapping[str, TopK]:
    """The teachers of those of the rows that have one of `k` tokens, by id.

    They are views of the file, int32 and float16.

    Raises:
        IntegrityError: the folder is damaged.
    """
    artifacts.verify(folder)
    index = json.loads((folder / _INDEX).read_bytes())
    # "c": a tensor over an array that cannot be written is warned of.
    tokens = np.load(folder / _TOKENS, mmap_mode="c").view(np.int32)
    log_probs = np.load(folder / _LOG_PROBS, mmap_mode="c")
    found: dict[str, TopK] = {}
    if tokens.shape[1] != k:
        return found  # one batch holds teachers of one width
    for row in rows:
        entry = index.get(row.id)
        if entry is not None and entry["ids"] == _digest(row):
            part = slice(entry["start"], entry["stop"])
            found[row.id] = TopK(
                tokens_TK=torch.from_numpy(tokens[part]),
                log_probs_TK=torch.from_numpy(log_probs[part]),
            )
    return found


def _digest(row: TokenRow) -> str:
    return hashlib.sha256(row.ids_T.tobytes()).hexdigest()[:16]
