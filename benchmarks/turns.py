"""Shared by the comparisons of speed: a process for each system, turns in rounds, one allocator for all.

A child is idle while it waits for orders. In each round all take their turns, so that slow changes of the machine
affect all alike. Ratios are medians, over the rounds, of what two systems took in the same round.
"""

import argparse
import contextlib
import ctypes.util
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# How large arrays get their memory. By default glibc returns it to the system and requests it again, page by page, so
# PyTorch's tuning guide recommends another allocator. "kept" is glibc set to keep it.
_KEPT = {"MALLOC_MMAP_THRESHOLD_": 2**33, "MALLOC_TRIM_THRESHOLD_": 2**35, "MALLOC_TOP_PAD_": 2**28}
ALLOCATORS = {
    "glibc": {},
    "kept": {name: str(value) for name, value in _KEPT.items()},
    # And one heap for all threads: those of other threads are too small for large arrays, whatever the threshold.
    "kept-1": {**{name: str(value) for name, value in _KEPT.items()}, "MALLOC_ARENA_MAX": "1"},
    "tcmalloc": {"LD_PRELOAD": ["tcmalloc_minimal", "tcmalloc"]},
    "jemalloc": {"LD_PRELOAD": ["jemalloc"]},
}
_BENEATH = ("keras", "tensorflow", "numba", "numpy")
THREADS = "OMP_NUM_THREADS OPENBLAS_NUM_THREADS NUMBA_NUM_THREADS TF_NUM_INTRAOP_THREADS TF_NUM_INTEROP_THREADS".split()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all comparisons have."""
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each system")
    parser.add_argument("--passes", type=int, default=5, metavar="N", help="rounds after the warm-up")
    parser.add_argument(
        "--allocators", nargs="+", choices=ALLOCATORS, default=["kept"],
        help="the allocator of all systems; with several, each system runs with each (default: kept)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the machine and every measured time here")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)


def installed(systems: dict[str, tuple], chosen: list[str]) -> list[str]:
    """Return the systems whose packages, the second item of each, are installed; report the others."""
    there = []
    for system in chosen:
        missing = [package for package in systems[system][1] if version(package) is None]
        if missing:
            print(f"{system}: skipped, {' and '.join(missing)} not installed", file=sys.stderr)
        else:
            there.append(system)
    return there


def version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def machine(packages) -> dict:
    """Describe the machine: processor, its instruction sets, system, date, versions."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = set(facts.get("flags", "").split())
    kinds = [kind for kind in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if kind in flags]
    return {
        "processor": facts.get("model name", platform.processor() or platform.machine()),
        "flags": kinds,
        "cores": os.cpu_count(),
        "system": f"{platform.platform()}, {' '.join(platform.libc_ver())}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in sorted({*packages, *_BENEATH}) if version(name)},
    }


def show_machine(facts: dict) -> None:
    versions = ", ".join(f"{package} {number}" for package, number in facts["versions"].items())
    print(
        f"{facts['processor']}, {facts['cores']} cores, {' '.join(facts['flags'])}; {facts['system']}; {facts['date']}"
    )
    print(f"Python {facts['python']}, {versions}", flush=True)


# --- the parent -------------------------------------------------------------------------------------------------


def measure(
    children: dict[str, tuple[list[str], dict[str, str], str]], warm_up: list[int], orders: list[int], passes: int
) -> dict[str, dict]:
    """Let children work in turns.

    Args:
        children: of each its arguments, its environment beside this process' own, and its allocator.
        warm_up: the orders before the rounds.
        orders: the orders of a round.
        passes: the number of rounds.

    Returns:
        Of each child that did not fail "hello", what it said when it was ready, and "warm_up" and "rounds": for each
        order, or for those of each round, a dict of "answer", "cpu" (seconds) and "faults" (pages).
    """
    results, processes, logs = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for name, (arguments, extra, allocator) in children.items():
            environment = {**os.environ, "NUMBA_CACHE_DIR": folder, **extra, **memory_settings(allocator)}
            logs[name] = stack.enter_context(open(Path(folder) / f"{len(logs)}.log", "w+", encoding="utf-8"))
            processes[name] = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, sys.argv[0], *arguments],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=logs[name], env=environment, text=True,
                )
            )  # fmt: skip
            with _failures_shown(name, logs[name], results):
                hello = _read(processes[name])
                results[name] = {"hello": hello, "warm_up": [_ask(processes[name], n) for n in warm_up], "rounds": []}
        for _ in range(passes):
            for name in list(results):
                with _failures_shown(name, logs[name], results):
                    results[name]["rounds"].append([_ask(processes[name], n) for n in orders])
    return results


def memory_settings(allocator: str) -> dict[str, str]:
    """Return the environment that gives a process an allocator."""
    settings = dict(ALLOCATORS[allocator])
    if "LD_PRELOAD" in settings:
        found = [path for path in map(ctypes.util.find_library, settings["LD_PRELOAD"]) if path]
        if not found:
            raise SystemExit(f"error: {allocator} is not installed (on Debian: libtcmalloc-minimal4, libjemalloc2)")
        settings["LD_PRELOAD"] = found[0]
    return settings


@contextlib.contextmanager
def _failures_shown(name: str, log, results: dict):
    try:
        yield
    except BrokenPipeError:
        results.pop(name, None)
        log.seek(0)
        print(f"{name}: failed\n{log.read()[-1500:]}", file=sys.stderr, flush=True)


def _ask(process: subprocess.Popen, order: int) -> dict:
    process.stdin.write(f"{order}\n")
    process.stdin.flush()
    return _read(process)


def _read(process: subprocess.Popen):
    answer = process.stdout.readline()
    if not answer:
        raise BrokenPipeError
    return json.loads(answer)


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Return the median, the least and the largest of what theirs took as a multiple of ours, round by round."""
    ratios = [their / our for our, their in zip(ours, theirs, strict=False)]
    return statistics.median(ratios), min(ratios), max(ratios)


def print_table(title: str, figures: dict[tuple[str, str], object], form: Callable[[object], str]) -> None:
    """Print figures by (row, column)."""
    if not figures:
        return
    columns = list(dict.fromkeys(column for _, column in figures))
    print(f"\n{title:46}" + "".join(f"{column:>19}" for column in columns))
    for row in dict.fromkeys(row for row, _ in figures):
        cells = (form(figures[row, column]) if (row, column) in figures else "-" for column in columns)
        print(f"{row:46}" + "".join(f"{cell:>19}" for cell in cells))


def as_ratio(figures: tuple[float, float, float]) -> str:
    return "{:.2f} ({:.2f}-{:.2f})".format(*figures)


# --- a child ----------------------------------------------------------------------------------------------------


def serve(make: Callable[[], tuple[object, Callable[[int], object]]]) -> None:
    """Make a system: what it says when it is ready, and what it does by an order. Then do as stdin orders."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    hello, do = make()
    print(json.dumps(hello), file=answers, flush=True)
    for line in sys.stdin:
        cpu, faults = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        answer = {"answer": do(int(line))}
        answer["cpu"] = time.process_time() - cpu
        answer["faults"] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        print(json.dumps(answer), file=answers, flush=True)
