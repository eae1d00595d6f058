"""Cores: how many processor cores this process may use, and the control groups that limit it."""

import contextlib
import math
import os
from pathlib import Path

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Count the processor cores that this process may use, by its affinity and the limits of its container."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        cores = os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _container_cores())))


def control_groups(controller: str) -> set[Path]:
    """Return the folders of this process's control groups and of their parents, whose limits also apply.

    Args:
        controller: the limited resource, such as "cpu"; in version 1 of control groups each has its own.

    Returns:
        The folders of version 2 and of version 1; they need not exist.
    """
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    bases = {"": _CGROUP, controller: _CGROUP / controller}
    folders = set(bases.values())  # in a container, where the listed paths may be those of the host, its own group
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for base in (bases[name] for name in controllers.split(",") if name in bases):
            group = base / path.strip("/")
            folders |= {folder for folder in (group, *group.parents) if folder.is_relative_to(base)}
    return folders


def _container_cores() -> float:
    """Return how many cores the control groups of this process allow, infinity without a limit."""
    limits = [math.inf]
    for folder in control_groups("cpu"):
        # The names of version 2 and of version 1.
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max": no limit
            quota, period = map(int, (folder / "cpu.max").read_text().split())
            limits.append(quota / period)
        with contextlib.suppress(OSError, ValueError):
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            limits += [quota / period] if quota > 0 else []
    return min(limits)
