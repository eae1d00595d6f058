"""The part of `device_check.py` that runs the tests which a device can change, with the device."""

import importlib.util
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from device_check import row

TESTS = [
    "tests/models", "tests/training/test_train.py", "tests/training/test_optimizer.py",
    "tests/training/test_checkpoints.py", "tests/training/test_sampled_softmax.py",
    "tests/generation/engines/test_device_loop.py", "tests/runtime/test_distribution.py",
]  # fmt: skip


def tests(small: bool, seconds: float) -> Iterator[dict]:
    """Run the tests that a device can change; float32 is multiplied as such there, and in the same order each time."""
    began = time.monotonic()
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true"
    exact = {"AIGC_TF_TEST_DEVICE": "1", "JAX_DEFAULT_MATMUL_PRECISION": "highest", "XLA_FLAGS": flags}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "--tb=short",
        "-W",
        "default",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
    ]
    if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 8:
        command += ["-n", "4"]
    chosen = ["tests/training/test_sampled_softmax.py"] if small else TESTS
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(
        [*command, *chosen], cwd=root, env={**os.environ, **exact}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    stop = threading.Timer(seconds - 5, process.kill)
    stop.start()
    counts, outcome = {}, None
    for line in process.stdout:
        print(line, end="", flush=True)
        if outcome := outcome_of(line):
            name, verdict = outcome
            counts[verdict] = counts.get(verdict, 0) + 1
            if verdict in ("FAILED", "ERROR"):
                yield row(name, verdict.lower(), passed=False)
    stop.cancel()
    words = ", ".join(f"{number} {verdict.lower()}" for verdict, number in sorted(counts.items()))
    is_complete = process.wait() in (0, 1)
    note = "" if is_complete else f"pytest ended with {process.returncode} after {time.monotonic() - began:.0f} seconds"
    is_good = is_complete and bool(counts.get("PASSED")) and not (counts.get("FAILED") or counts.get("ERROR"))
    yield row("tests", words or "none ran", passed=is_good, note=note, files=chosen)


_VERDICT = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"


def outcome_of(line: str) -> tuple[str, str] | None:
    """Read (test, verdict) from a line of `pytest -v`, with xdist or without; None if it is none."""
    if match := re.match(rf"\[gw\d+\] \[ *\d+%\] {_VERDICT} (tests/.*?) *$", line):
        return match[2], match[1]
    match = re.match(rf"(tests/.*?) {_VERDICT}( \(.*\))? +\[ *\d+%\]", line)
    return (match[1], match[2]) if match else None
