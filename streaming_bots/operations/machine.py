"""The cores that this process may use."""

import math
import os
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def cores() -> int:
    """Whole cores, at least one: of the machine, of `taskset`, or of the container's limit.

    The limit is that of Linux' cgroups of both versions: microseconds per period.
    """
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limits = [float(found or 1)]
    with suppress(OSError, ValueError):  # there are none, or the limit is "max"
        quota, period = (CGROUP / "cpu.max").read_text().split()
        limits.append(int(quota) / int(period))
    with suppress(OSError, ValueError):
        quota, period = (
            (CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
        )
        if int(quota) > 0:  # -1 is no limit
            limits.append(int(quota) / int(period))
    return max(1, math.floor(min(limits)))
