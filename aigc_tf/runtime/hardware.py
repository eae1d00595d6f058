"""Hardware: the memory and the power consumption that this machine reports."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

from .cores import control_groups

_PROC = Path("/proc")
_POWERCAP = Path("/sys/class/powercap")


def available_bytes() -> float | None:
    """Return how much memory training can use: of the GPU if one is in use, else of the machine.

    None if unknown: only Linux and Windows report it.
    """
    from .backend import gpu_bytes_in_use, uses_gpu

    if uses_gpu() and (sizes := _nvidia_smi("memory.total")):
        # Not the free memory: TensorFlow and JAX reserve nearly all of it at the start.
        return min(sizes) * 2**20 - gpu_bytes_in_use()
    return machine_bytes()


def machine_bytes() -> float | None:
    """Return the free memory of this machine, or of the container of this process; None if unknown."""
    if sys.platform == "win32":
        return _windows_bytes()
    kilobytes = _kilobytes(_PROC / "meminfo", "MemAvailable")
    return None if kilobytes is None else min(kilobytes * 1024, _container_bytes())


def process_bytes() -> float | None:
    """Return the memory that this process holds, on macOS its maximum so far; None if unknown."""
    if sys.platform == "darwin":
        import resource

        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # in bytes there, in kilobytes elsewhere
    kilobytes = _kilobytes(_PROC / "self" / "status", "VmRSS")
    return None if kilobytes is None else kilobytes * 1024


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of Windows."""

    _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32)] + [
        (name, ctypes.c_uint64)
        for name in ("physical", "available", "page_file", "free_page_file", "virtual", "free_virtual", "extended")
    ]


def _windows_bytes() -> float | None:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    return float(status.available) if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else None


def processor_joules(folder: Path = _POWERCAP) -> float | None:
    """Read the energy counters of the processors (Linux RAPL); None if there are none or they may not be read."""
    try:
        # intel-rapl:0 is a processor, intel-rapl:0:0 a part of it.
        counters = [p / "energy_uj" for p in folder.glob("intel-rapl:*") if p.name.count(":") == 1]
        return sum(int(counter.read_text()) for counter in counters) / 1e6 if counters else None
    except (OSError, ValueError):
        return None


def gpu_watts() -> float | None:
    """Return the power that all GPUs of this machine draw now; None if none is in use or it is unknown."""
    from .backend import uses_gpu

    readings = _nvidia_smi("power.draw") if uses_gpu() else []
    return sum(readings) if readings else None


def _container_bytes() -> float:
    """Return how much memory the control groups of this process still allow, infinity without a limit."""
    # The names of version 2 and of version 1.
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    return min(_group_bytes(folder, *pair) for folder in control_groups("memory") for pair in names)


def _group_bytes(folder: Path, limit_name: str, used_name: str) -> float:
    try:
        limit, used = (int((folder / name).read_text()) for name in (limit_name, used_name))
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):  # no such group, or "max": no limit
        return float("inf")
    # Cached files count as used, but are dropped when memory is needed.
    cached = next((int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file ")), 0)
    return limit - used + cached


def _nvidia_smi(field: str) -> list[float]:
    """Query a field of nvidia-smi for each GPU; empty if the tool is missing or does not know it."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"], capture_output=True, text=True
    )
    try:
        return [float(line) for line in done.stdout.split("\n") if line.strip()]
    except ValueError:
        return []


def _kilobytes(file: Path, field: str) -> float | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:  # not Linux
        return None
    return next((float(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
