"""What this machine gives to training: a device, threads and memory."""

import logging
import math
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import psutil
import torch
from torch.utils import deterministic

from perennial.infra.artifacts import write_atomic
from perennial.infra.errors import ConfigError, OutOfMemoryError
from perennial.infra.settings import fix_cublas_workspace
from perennial.training.job import Device, DType

_LOG = logging.getLogger(__name__)
_Row = TypeVar("_Row")
_Found = TypeVar("_Found")
_LOOK_S = 0.5
_REFUSALS = (
    "allocate memory",
    "bad_alloc",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_MAX_THREADS = 16  # beyond it a model of this size gains nothing from one more core


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a model is computed, and in what its frozen weights are.

    Adapter, optimiser, softmax and loss are float32 everywhere.
    """

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]


CPU = Place(device="cpu", dtype="float32")


def choose_place(device: Device, dtype: DType) -> Place:
    """What is asked for; of "auto" a GPU where torch finds one, bf16 where that GPU computes it.

    A CPU stays with float32: without AMX or AVX-512 bf16 is 7 times slower, and with them it saves
    a tenth of a round's time and was not shown to keep as much (docs/recipe.md).

    Raises:
        ConfigError: "cuda" without a GPU that torch can use.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError(
            "model.device is 'cuda', but torch finds no GPU; set it to 'auto', or install a torch "
            "that is built for this GPU's driver"
        )
    chosen: Literal["cpu", "cuda"] = "cuda" if has_gpu and device != "cpu" else "cpu"
    if dtype != "auto":
        return Place(device=chosen, dtype=dtype)
    is_native = chosen == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return Place(device=chosen, dtype="bfloat16" if is_native else "float32")


def choose_threads(wanted: int | None) -> int:
    """Set and return torch's threads: `wanted`, or as `threads_for` this machine as it is now."""
    num = wanted or _threads_for_now()
    torch.set_num_threads(num)
    return num


def _threads_for_now() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Not the load average: it still counts what ended a minute ago.
    idle_share = 1 - psutil.cpu_percent(interval=_LOOK_S) / 100
    return threads_for(allowed or 1, cpu_quota(), idle_share)


def threads_for(num_allowed: int, quota: float, idle_share: float) -> int:
    """The cores that are idle, as far as the quota goes, bounded.

    Two threads beside another busy process run several times slower than one, so a core that others
    keep busy is not counted; nor is one that the quota would take away.
    """
    return max(1, int(min(round(num_allowed * idle_share), quota, _MAX_THREADS)))


def cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that this container may use, by cgroup v2 or v1; else infinity."""
    v1 = [cgroup / "cpu" / f"cpu.cfs_{name}_us" for name in ("quota", "period")]
    for paths in ([cgroup / "cpu.max"], v1):
        with suppress(OSError):
            quota, period = " ".join(path.read_text(encoding="ascii") for path in paths).split()
            return math.inf if quota in ("max", "-1") else float(quota) / float(period)
    return math.inf


def choose_threads_once(path: Path, wanted: int | None) -> int:
    """As `choose_threads`, but the number in `path` if an earlier run of the same left one there.

    With another number sums are rounded otherwise.
    """
    num = choose_threads(int(path.read_text()) if path.exists() else wanted)
    write_atomic(path, str(num).encode())
    return num


def peak_rss_mb() -> float:
    """Most memory this process has held, in MB (10^6 bytes)."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage begins with the peak of the process that began it
        peak_kib = status.read_text(encoding="ascii").partition("VmHWM:")[2].split()[0]
        return float(peak_kib) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def peaks_mb() -> dict[str, float]:
    """Most memory that this process held, and its tensors on a GPU, in MB; 0 without a GPU."""
    return {"peak_rss_mb": peak_rss_mb(), "peak_gpu_mb": torch.cuda.max_memory_allocated() / 1e6}


def be_deterministic() -> None:
    """Have torch refuse what gives other numbers the next time, for the rest of this process."""
    fix_cublas_workspace()
    torch.use_deterministic_algorithms(True)
    # It would fill every new tensor, 3% of a round; nothing reads memory before it is written.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property


def yield_cores() -> None:
    """Have only what no other process wants of the cores: somebody waits for their answers.

    A low priority alone would keep a core until its slice ends, milliseconds after it was wanted.
    """
    os.nice(10)
    if hasattr(os, "SCHED_IDLE"):  # Linux
        with suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def in_halves(run: Callable[[Sequence[_Row]], list[_Found]], rows: Sequence[_Row]) -> list[_Found]:
    """`run(rows)`; where memory is refused, that of each half. One row that does not fit raises."""
    try:
        return run(rows)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(rows) < 2:
            raise
    _LOG.warning("out of memory: rows are halved num_rows=%d", len(rows))
    middle = len(rows) // 2
    return [*in_halves(run, rows[:middle]), *in_halves(run, rows[middle:])]


@contextmanager
def telling_out_of_memory() -> Iterator[None]:
    """Raise OutOfMemoryError, which says what to do, where memory is refused."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            "out of memory outside a step; lower max_len or the number of rows, use a smaller "
            "base_model, or free memory"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch, its allocators, CUDA and Python raise when memory is refused."""
    refused = any(said in str(error) for said in _REFUSALS)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or refused
