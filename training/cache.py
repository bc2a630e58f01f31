"""What the frozen base makes of rows, on disk: activations of its trunk, and its likeliest tokens.

It is kept across epochs and rounds. An entry is named by what it is of, base, layer, dtype and
tokens, memory-mapped when read, and checked against its digest: a damaged one is computed again and
never used. The folder is bounded; entries that were not used for longest go first. It holds what
users wrote in another form: erasure deletes it.
"""

import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from perennial.infra import artifacts
from perennial.training.config import TrainConfig
from perennial.training.loss import TopK
from perennial.training.modelfiles import weights_pattern
from perennial.training.prepared import Trunks, teach
from perennial.training.tokens import TokenRow
from perennial.training.trunk import SplitModel

_LOG = logging.getLogger(__name__)
_DIGEST_BYTES = 32
_SUFFIX = ".frozen"
_WRITE_S = 60  # a file that grows for longer was left by a killed run


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenCache:
    """Entries follow their SHA-256: a trunk (T, width) in the dtype of activations, or a top K.

    That is (2, labels, K) in int32, the tokens and then the bits of their fp32 log-probabilities.
    `base` and `tokenizer` are digests.
    """

    folder: Path
    base: str
    tokenizer: str
    max_bytes: int

    def trunk(self, split: SplitModel, rows: Sequence[TokenRow], batch_tokens: int) -> list[Tensor]:
        """`split.trunk(rows, batch_tokens)`, of which only what is not here is computed."""
        width = int(split.model.config.hidden_size)

        def compute(absent: Sequence[int]) -> list[Tensor]:
            return split.trunk([rows[index] for index in absent], batch_tokens)

        paths = [self._path(split, "trunk", row) for row in rows]
        shapes = [(row.num_tokens, width) for row in rows]
        return self._entries(paths, shapes, split.dtype, compute)

    def teach(
        self,
        split: SplitModel,
        rows: Sequence[TokenRow],
        trunks: Trunks | None,
        scope: str,
        config: TrainConfig,
    ) -> list[TopK]:
        """`teach(split, rows, trunks, scope, config)` of the base, likewise; tokens are int32."""
        k = min(config.kl_top_k, len(split.head.weight))

        def compute(absent: Sequence[int]) -> list[Tensor]:
            known = None if trunks is None else [trunks[index] for index in absent]
            taught = teach(split, [rows[index] for index in absent], known, scope, config)
            return [
                torch.stack([top.tokens_TK.int(), top.log_probs_TK.view(torch.int32)])
                for top in taught
            ]

        firsts = [row.num_prompt if scope == "completion" else 1 for row in rows]
        named = zip(rows, firsts, strict=True)
        paths = [self._path(split, f"top {k} from {first}", row) for row, first in named]
        shapes = [(2, row.num_tokens - first, k) for row, first in zip(rows, firsts, strict=True)]
        entries = self._entries(paths, shapes, torch.int32, compute)
        return [
            TopK(tokens_TK=entry[0], log_probs_TK=entry[1].view(torch.float32)) for entry in entries
        ]

    def _entries(
        self,
        paths: Sequence[Path],
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
        compute: Callable[[Sequence[int]], list[Tensor]],
    ) -> list[Tensor]:
        """Each as it is here, or else computed and kept."""
        if not paths:
            return []
        self.folder.mkdir(parents=True, exist_ok=True)
        found = [_read(path, shape, dtype) for path, shape in zip(paths, shapes, strict=True)]
        absent = [index for index, entry in enumerate(found) if entry is None]
        for index, entry in zip(absent, compute(absent), strict=True):
            _write(paths[index], entry)
            found[index] = entry
        self._evict()
        _LOG.info("cache num_found=%d num_computed=%d", len(paths) - len(absent), len(absent))
        return [entry for entry in found if entry is not None]

    def _path(self, split: SplitModel, kind: str, row: TokenRow) -> Path:
        by = (self.base, self.tokenizer, split.num_frozen, split.weight_dtype, split.dtype, kind)
        key = hashlib.sha256(repr(by).encode() + row.ids_T.tobytes())
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


def _read(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """The entry, or None when it is absent, damaged or of another shape."""
    size = _DIGEST_BYTES + dtype.itemsize * math.prod(shape)
    try:
        if not path.is_file() or path.stat().st_size != size:
            return None
        raw = np.memmap(path, mode="c").view(np.ndarray)
        os.utime(path)
    except FileNotFoundError:
        return None
    if hashlib.sha256(raw[_DIGEST_BYTES:].data).digest() != raw[:_DIGEST_BYTES].tobytes():
        _LOG.warning("cache entry is damaged and computed again path=%s", path)
        return None
    return torch.from_numpy(raw[_DIGEST_BYTES:]).view(dtype).view(shape)


def _write(path: Path, entry: Tensor) -> None:
    # No fsync: an entry that a power loss cuts short fails its digest, and a full disk only costs
    # the computation.
    body = entry.contiguous().view(torch.uint8).numpy().tobytes()
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        partial.write_bytes(hashlib.sha256(body).digest() + body)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        _LOG.warning("cache entry not written path=%s error=%s", path, error)
