"""The cores and the memory that this process may use."""

import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")
M_MMAP_THRESHOLD = -3  # of mallopt, by malloc.h

Result = TypeVar("Result")


def cores() -> int:
    """Return how many whole cores, at least one, the machine, `taskset` and cgroups allow."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limits = [float(found or 1)]
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # v2, v1
        with suppress(OSError, ValueError):  # there are none, or the limit is "max"
            texts = [(CGROUP / name).read_text() for name in names]
            quota, period = map(int, " ".join(texts).split())
            if quota > 0:  # -1 is no limit
                limits.append(quota / period)
    return max(1, int(min(limits)))


def set_threads(count: int) -> None:
    """Let torch compute with `count` threads, even if a batch has only a few rows.

    On AMD's processors, MKL by default divides a float32 product such that with 2 to 16 rows a
    second thread adds nothing. By these stripes, each thread takes its part of the outputs.
    """
    torch.set_num_threads(count)
    with suppress(OSError, AttributeError):  # this torch has no MKL
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        library.mkl_serv_set_num_stripes(count)


def in_a_thread(compute: Callable[..., Result], *arguments: Any) -> Result:
    """Run a computation in a thread of its own, and return its result.

    Its OpenMP threads end with it. Otherwise, they would compete with the model thread's.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(compute, *arguments).result()


def free_memory(device: torch.device) -> int:
    """Return the bytes free for the model: on its GPU, or for this container on this machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return min([psutil.virtual_memory().available, *container_memory()])


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Return memory that is freed in this block to the system.

    glibc would keep what lies between blocks in use: 40 % of a model whose layers are replaced.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim"):  # it is not glibc
        yield
        return
    library.mallopt(M_MMAP_THRESHOLD, 1 << 16)  # each larger block is mapped, and unmapped, alone
    try:
        yield
    finally:
        library.mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the largest that it chooses itself
        library.malloc_trim(0)


def container_memory() -> Iterator[int]:
    """Yield the bytes left of a container's limit, by cgroups v1 and v2."""
    for folder, limit, used in (
        (CGROUP, "memory.max", "memory.current"),
        (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # there is no such file, or the limit is "max"
            statistics = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
            # The used bytes include cached files, which Linux drops when memory is needed.
            files = int(statistics.get("inactive_file", 0))
            limit_bytes, used_bytes = (int((folder / name).read_text()) for name in (limit, used))
            yield max(0, limit_bytes - used_bytes + files)
