"""Check on a GPU or TPU what a CPU cannot tell, and measure it there: correctness, speed, memory, in ten minutes.

    sh benchmarks/device_wheels.sh                        # where there is a network: some 34 MB for device_wheels/
    python benchmarks/device_check.py --out results       # on the machine with the device, which needs no network
    python benchmarks/device_check.py --out results --parts training generation
    python benchmarks/device_check.py --out results --small       # tiny, for a CPU: does the check itself run?

It needs Python and JAX; numba and PyTorch are used if they are there. What else Keras and the tests need is taken from
`device_wheels/` where it is not installed. Everything runs on JAX, but for PyTorch's models to compare with.

Each part is a process with a time limit, so that one that crashes or hangs takes no other with it. Parts that measure
no time run side by side, a process for each four cores; then the others, one by one. After each part its rows are
printed, and `results.json` and `table.md` are written anew; what the processes print is in `log.txt`. A figure stands
there only if it was measured: a part that fails has the row "failed", with the error.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent


class Part(NamedTuple):
    """A part of the check.

    Attributes:
        function: "module.function", a generator of rows.
        seconds: its time limit.
        is_timed: whether it measures time, and so runs alone.
        flags: what it adds to XLA_FLAGS.
    """

    function: str
    seconds: int
    is_timed: bool = False
    flags: str = ""


# The largest come first among those side by side.
PARTS = {
    "device": Part("device_parts.device", 60, is_timed=True),
    "tests": Part("device_tests.tests", 240),
    "precision": Part("device_parts.precision", 150),
    "resume": Part("device_parts.resume", 120),
    "resume, deterministic": Part("device_parts.resume", 120, flags="--xla_gpu_deterministic_ops=true"),
    "writing": Part("device_parts.writing", 120),
    # The flag concerns CPUs only.
    "devices": Part("device_parts.devices", 90, flags="--xla_force_host_platform_device_count=2"),
    "training": Part("device_speed.training", 240, is_timed=True),
    "generation": Part("device_speed.generation", 180, is_timed=True),
    "estimate": Part("device_parts.estimate", 120, is_timed=True),
}
_LEAST_SECONDS = 10  # with less left, a part is not begun


def main() -> None:
    """Run the parts and write their rows, or as a child process be a part, or one of the systems that it compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("device_results"), help="folder for the results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=570.0, help="time limit of all parts together")
    parser.add_argument("--small", action="store_true", help="tiny models and few steps")
    parser.add_argument("--child", nargs=3, metavar=("PART", "ROWS", "SECONDS"), help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        be_part(*options.child, options.small)
    elif options.serve:
        importlib.import_module("device_speed").serve(*options.serve)
    else:
        sys.exit(not run(options))


def run(options) -> bool:
    """Run the parts; return whether none failed."""
    ends = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out)
    with tempfile.TemporaryDirectory() as folder:
        environment = {"KERAS_BACKEND": "jax", "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        paths = [str(HERE.parent), *unpack_wheels(HERE / "device_wheels", Path(folder, "site"))]
        environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])

        def do(name):
            part, rows, log = PARTS[name], Path(folder, f"{name}.rows"), Path(folder, f"{name}.log")
            left = min(part.seconds, ends - time.monotonic())
            if left < _LEAST_SECONDS:
                return name, [row("this part", passed=False, note="not begun: no time was left")], ""
            small = ["--small"] if options.small else []
            command = [sys.executable, __file__, "--child", name, str(rows), str(left), *small]
            flags = f"{os.environ.get('XLA_FLAGS', '')} {part.flags}".strip()
            found = run_process(command, rows, log, left, {**environment, "XLA_FLAGS": flags})
            return name, found, log.read_text("utf-8", "replace")

        first = [name for name in options.parts if name == "device"]
        together = [name for name in options.parts if not PARTS[name].is_timed]
        alone = [name for name in options.parts if PARTS[name].is_timed and name not in first]
        for name in first:
            results.add(*do(name))
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as pool:
            for done in as_completed([pool.submit(do, name) for name in together]):
                results.add(*done.result())
        for name in alone:
            results.add(*do(name))
    return all(r["passed"] is not False for rows in results.rows.values() for r in rows)


def unpack_wheels(wheels: Path, site: Path) -> list[str]:
    """Unpack those wheels whose package is not installed; return the folder for PYTHONPATH, if any."""
    for wheel in sorted(wheels.glob("*.whl")):
        try:
            importlib.metadata.version(wheel.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
    if not site.exists() and importlib.util.find_spec("keras") is None:
        raise SystemExit(
            f"error: Keras is not installed, and {wheels} holds no wheels. Run benchmarks/device_wheels.sh where there "
            "is a network, and bring that folder here."
        )
    return [str(site)] if site.exists() else []


def run_process(command: list[str], rows: Path, log: Path, seconds: float, environment: dict[str, str]) -> list[dict]:
    """Run a part in a process, and end it with all its children when its time is over.

    Args:
        command: what to run; it writes each row to `rows` as a line of JSON as soon as it is known.
        rows: the file of rows.
        log: the file for what it prints.
        seconds: its time limit.
        environment: its environment.

    Returns:
        The rows, and one more that failed if the process did not come to its end.
    """
    rows.touch()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            problem = f"not done within {seconds:.0f} seconds, and ended"
        else:
            said = last_error(log.read_text("utf-8", "replace"))
            problem = f"ended with {process.returncode}: {said}" if process.returncode else ""
        finally:
            with contextlib.suppress(ProcessLookupError):  # what it started may outlive it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = rows.read_text("utf-8").splitlines()
    found = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut off
    if problem and not (found and found[-1]["what"] == ERROR):
        found.append(row("the rest of this part" if found else "this part", passed=False, note=problem))
    return found


def last_error(log: str) -> str:
    """Return the last line that reads as an error, else the last one: JAX adds remarks after its errors."""
    lines = [line.strip()[:200] for line in log.split("\n") if line.strip()]
    errors = [line for line in lines if re.match(r"([\w.]+(Error|Exception)|error)\b", line)]
    return (errors or lines or ["nothing was printed"])[-1]


class Results:
    """The rows of all parts so far: they are printed, and the files of a folder hold them."""

    def __init__(self, folder: Path):
        self.folder, self.rows = folder, {}
        (folder / "log.txt").write_text("", "utf-8")
        print(HEADER, flush=True)

    def add(self, name: str, rows: list[dict], log: str) -> None:
        self.rows[name] = rows
        print("\n".join(as_markdown(name, rows)), flush=True)
        ordered = {part: self.rows[part] for part in PARTS if part in self.rows}
        table = [line for part, rows in ordered.items() for line in as_markdown(part, rows)]
        (self.folder / "results.json").write_text(json.dumps(ordered, ensure_ascii=False, indent=1), "utf-8")
        (self.folder / "table.md").write_text("\n".join([HEADER, *table, ""]), "utf-8")
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"=== {name}\n{log}\n")


# --- rows -------------------------------------------------------------------------------------------------------

HEADER = "| part | what | measured | verdict | note |\n|---|---|---|---|---|"
ERROR = "error"


def row(what: str, value=None, unit: str = "", *, passed: bool | None = None, note: str = "", **details) -> dict:
    """Make a row of the table.

    Args:
        what: what was measured.
        value: a number or words, None if there is none.
        unit: of a number.
        passed: whether it is as it should be, None where nothing is expected.
        note: a remark.
        **details: for `results.json` alone.

    Returns:
        The row.
    """
    return {"what": what, "value": value, "unit": unit, "passed": passed, "note": note, **details}


def as_markdown(name: str, rows: list[dict]) -> Iterator[str]:
    for found in rows:
        value = found["value"]
        measured = "" if value is None else value if isinstance(value, str) else f"{as_number(value)} {found['unit']}"
        verdict = {True: "passed", False: "failed", None: ""}[found["passed"]]
        cells = [name, found["what"], measured.strip(), verdict, found["note"]]
        yield f"| {' | '.join(re.sub(r'[|]', '/', cell) for cell in cells)} |"


def as_number(value: float) -> str:
    """Write a number with about four digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


# --- a child ----------------------------------------------------------------------------------------------------


def be_part(name: str, rows: str, seconds: str, small: bool) -> None:
    """Compute a part, and write each row as soon as it is known."""
    threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()
    module, function = PARTS[name].function.split(".")
    with open(rows, "a", encoding="utf-8", buffering=1) as file:
        try:
            for found in getattr(importlib.import_module(module), function)(small, float(seconds)):
                file.write(json.dumps(found, ensure_ascii=False) + "\n")
        except Exception as error:
            file.write(json.dumps(row(ERROR, passed=False, note=describe(error)), ensure_ascii=False) + "\n")
            raise


def describe(error: Exception) -> str:
    """Describe an error in one line; what JAX adds beneath it is no part of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
