"""Frozen-trunk activations on disk, kept across epochs and rounds.

An entry is named by base, layer, dtype and tokens, memory-mapped when read, and checked against its
digest: a damaged one is computed again and never used. The folder is bounded; entries that were not
used for longest go first. It holds what users wrote in another form: erasure deletes it.
"""

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from perennial.infra import artifacts
from perennial.training.modelfiles import weights_pattern
from perennial.training.tokens import TokenRow
from perennial.training.trunk import SplitModel

_LOG = logging.getLogger(__name__)
_DIGEST_BYTES = 32
_SUFFIX = ".trunk"
_WRITE_S = 60  # a file that grows for longer was left by a killed run


@dataclass(frozen=True, kw_only=True, slots=True)
class TrunkCache:
    """Entries are (T, width) in the model's dtype, after their SHA-256.

    `base` and `tokenizer` are digests.
    """

    folder: Path
    base: str
    tokenizer: str
    max_bytes: int

    def trunk(self, split: SplitModel, rows: Sequence[TokenRow], batch_tokens: int) -> list[Tensor]:
        """`split.trunk(rows, batch_tokens)`, of which only what is not here is computed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = [self._path(split, row) for row in rows]
        width = int(split.model.config.hidden_size)
        found = [
            _read(p, (row.num_tokens, width), split.dtype)
            for p, row in zip(paths, rows, strict=True)
        ]
        absent = [index for index, trunk in enumerate(found) if trunk is None]
        fresh = split.trunk([rows[index] for index in absent], batch_tokens)
        for index, trunk in zip(absent, fresh, strict=True):
            _write(paths[index], trunk)
            found[index] = trunk
        self._evict()
        _LOG.info("trunk cache num_found=%d num_computed=%d", len(rows) - len(absent), len(absent))
        return [trunk for trunk in found if trunk is not None]

    def _path(self, split: SplitModel, row: TokenRow) -> Path:
        made_by = f"{self.base}\n{self.tokenizer}\n{split.num_frozen}\n{split.dtype}\n"
        key = hashlib.sha256(made_by.encode() + row.ids_T.tobytes())
        return self.folder / (key.hexdigest() + _SUFFIX)

    def _evict(self) -> None:
        kept = 0
        for path, status in _used_last_first(self.folder):
            kept += status.st_size
            is_being_written = path.suffix != _SUFFIX and time.time() - status.st_mtime < _WRITE_S
            if kept > self.max_bytes and not is_being_written:
                path.unlink(missing_ok=True)


def model_digest(folder: Path) -> str:
    """Changes with what the model in the folder computes: its config.json and its weights."""
    return folder_digest(folder, "config.json", weights_pattern(folder))


def folder_digest(folder: Path, *patterns: str) -> str:
    """SHA-256 over the names and contents of the files that match."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(f"{path.name} {artifacts.sha256_file(path)}\n".encode())
    return digest.hexdigest()


def _used_last_first(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """Entries, and what killed runs left of some; other processes and erasure may delete them."""
    found = []
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                found.append((path, path.stat()))
    return sorted(found, key=lambda entry: -entry[1].st_mtime_ns)


def _read(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    """The entry, or None when it is absent, damaged or of another shape."""
    size = _DIGEST_BYTES + dtype.itemsize * shape[0] * shape[1]
    try:
        if not path.is_file() or path.stat().st_size != size:
            return None
        raw = np.memmap(path, mode="c").view(np.ndarray)
        os.utime(path)
    except FileNotFoundError:
        return None
    if hashlib.sha256(raw[_DIGEST_BYTES:].data).digest() != raw[:_DIGEST_BYTES].tobytes():
        _LOG.warning("trunk cache entry is damaged and computed again path=%s", path)
        return None
    return torch.from_numpy(raw[_DIGEST_BYTES:]).view(dtype).view(shape)


def _write(path: Path, trunk_TD: Tensor) -> None:
    # No fsync: an entry that a power loss cuts short fails its digest, and a full disk only costs
    # the computation.
    body = trunk_TD.contiguous().view(torch.uint8).numpy().tobytes()
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        partial.write_bytes(hashlib.sha256(body).digest() + body)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        _LOG.warning("trunk cache entry not written path=%s error=%s", path, error)
