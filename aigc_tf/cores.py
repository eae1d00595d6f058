"""Cores: how many cores of the processor this process may use."""

import contextlib
import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Count the processor cores that this process may use: of its affinity, and of what its container allows."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # no such thing on this system
        cores = os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _container_cores())))


def _container_cores(root: Path = _CGROUP) -> float:
    """Read how many cores the control groups of this process allow, infinity without a limit."""
    try:
        groups = [line.split(":", 2)[2].strip("/") for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        groups = []
    limits = [math.inf]
    for group in {"", *groups}:
        # The names of version 2 and of version 1.
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max": no limit
            quota, period = map(int, (root / group / "cpu.max").read_text().split())
            limits.append(quota / period)
        with contextlib.suppress(OSError, ValueError):
            folder = root / "cpu" / group
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            limits += [quota / period] if quota > 0 else []
    return min(limits)
