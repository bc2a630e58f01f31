"""Folders that are either complete or absent.

A folder is written beside its target, every file is synced, `manifest.json` with the SHA-256 of
each file comes last, and a rename makes it visible. Whoever finds the folder can trust it; whoever
is killed on the way leaves only a `.partial-…` folder that nobody reads.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from perennial.infra.errors import IntegrityError

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a folder holds: relative path → SHA-256 in hex, and one digest over them all."""

    files: Mapping[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 over the sorted `path sha256` lines; two equal folders have equal digests."""
        lines = "".join(f"{name} {sha}\n" for name, sha in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()


def publish(target: Path, write: Callable[[Path], None]) -> Manifest:
    """The manifest of `target`, filled by `write(folder)` unless it is there already.

    Safe to run twice and from two processes: the first rename wins, the other's copy is dropped.
    """
    if target.exists():
        return verify(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".partial-{target.name}-", dir=target.parent))
    try:
        write(partial)
        manifest = seal(partial)
        try:
            partial.rename(target)
        except OSError:
            if not target.exists():
                raise
            return verify(target)
        _sync_folder(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def verify(folder: Path) -> Manifest:
    """The manifest of `folder`, after every file in it was hashed again.

    Raises:
        IntegrityError: the manifest is missing or unreadable, a file is missing, added or changed.
    """
    manifest = read_manifest(folder)
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    if present != set(manifest.files):
        odd = ", ".join(sorted(present ^ set(manifest.files)))
        raise IntegrityError(f"{folder} does not hold what its manifest lists: {odd}")
    for name, expected in manifest.files.items():
        found = sha256_file(folder / name)
        if found != expected:
            raise IntegrityError(
                f"{folder / name} has SHA-256 {found[:12]}…, its manifest says {expected[:12]}…; "
                "delete the folder and let the step run again"
            )
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest as written, without hashing the files.

    Raises:
        IntegrityError: there is no readable manifest, so the folder was never completed.
    """
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{folder} has no readable {MANIFEST}: {error}") from error
    return Manifest(files=MappingProxyType(dict(files)))


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: a reader sees the old bytes or the new ones, never a mixture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def seal(folder: Path) -> Manifest:
    """The manifest of what `folder` holds now, written into it; for files changed on purpose."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        _sync_file(path)
        files[str(path.relative_to(folder))] = sha256_file(path)
    manifest = Manifest(files=MappingProxyType(files))
    body = {"digest": manifest.digest, "files": files}
    write_atomic(folder / MANIFEST, json.dumps(body, indent=1, sort_keys=True).encode())
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        _sync_folder(inner)
    folder.chmod(0o755)
    return manifest


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
