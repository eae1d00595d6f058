"""The check of a device, on a CPU: a part that fails takes no other with it, and what was measured is kept."""

import importlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="the check is for Linux")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A function that imports a module of benchmarks/."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def run(load, tmp_path):
    """A function that runs Python code as a part, which finds `row` and the file `out`, and returns the rows."""
    beginning = "import json, os, sys, time\nout = open(sys.argv[1], 'a', buffering=1)\n"
    beginning += "def row(what): out.write(json.dumps({'what': what, 'passed': True}) + '\\n')\n"

    def run(code, seconds=30.0):
        command = [sys.executable, "-c", beginning + code, str(tmp_path / "rows")]
        return load("device_check").run_process(command, tmp_path / "rows", tmp_path / "log", seconds, dict(os.environ))

    return run


def test_a_part_that_ends_well_has_its_rows_alone(run):
    assert run("row('one'); row('two')") == [{"what": "one", "passed": True}, {"what": "two", "passed": True}]


@pytest.mark.parametrize(
    ("code", "note"),
    [
        ("raise ValueError('wrong\\n---\\nremarks of JAX')", "ended with 1: ValueError: wrong"),
        ("os.kill(os.getpid(), 11)", "ended with -11: nothing was printed"),
        ("out.write('{\"what'); sys.exit('error: cut off')", "ended with 1: error: cut off"),
    ],
)
def test_a_part_that_breaks_off_keeps_its_rows(run, code, note):
    first, last = run(f"row('one'); {code}")
    assert first["what"] == "one"
    assert (last["what"], last["passed"], last["note"]) == ("the rest of this part", False, note)


def test_a_part_that_hangs_is_ended_with_what_it_started(run, tmp_path):
    began = time.monotonic()
    child = (
        "import subprocess; p = subprocess.Popen(['sleep', '60']); open(sys.argv[1] + '.pid', 'w').write(str(p.pid))"
    )
    first, last = run(f"{child}; row('one'); time.sleep(60)", seconds=2.0)
    assert time.monotonic() - began < 20
    assert (first["what"], last["note"]) == ("one", "not done within 2 seconds, and ended")
    status = Path("/proc", (tmp_path / "rows.pid").read_text(), "stat")
    while status.exists() and status.read_text().split()[2] not in "ZX":  # whoever adopted it may leave it dead there
        assert time.monotonic() - began < 20
        time.sleep(0.05)


def test_only_packages_that_are_missing_are_unpacked(load, tmp_path):
    for name in ("numpy-1.0-py3-none-any.whl", "missing_here-1.0-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}/__init__.py", "")
    assert load("device_check").unpack_wheels(tmp_path, tmp_path / "site") == [str(tmp_path / "site")]
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["missing_here"]


def test_results_are_written_after_each_part(load, tmp_path, capsys):
    check = load("device_check")
    results = check.Results(tmp_path)
    results.add("resume", [check.row("a | b", "the same", passed=True)], "log of one")
    results.add("device", [check.row("speed", 1234.5, "TFLOP/s", note="fast"), check.row("x", passed=False)], "two")
    table = (tmp_path / "table.md").read_text().splitlines()
    rows = ["| device | speed | 1,234 TFLOP/s |  | fast |", "| device | x |  | failed |  |"]
    assert table[2:] == [*rows, "| resume | a / b | the same | passed |  |"]
    assert json.loads((tmp_path / "results.json").read_text())["device"][0]["value"] == 1234.5
    assert (tmp_path / "log.txt").read_text() == "=== resume\nlog of one\n=== device\ntwo\n"
    assert capsys.readouterr().out.splitlines()[:2] == table[:2]


def test_numbers_are_short(load):
    shown = [load("device_check").as_number(number) for number in (0, 0.000123, 0.5, 12.3456, 1234.5, 16)]
    assert shown == ["0", "0.000123", "0.5", "12.35", "1,234", "16"]


def test_the_verdicts_of_pytest_are_read(load):
    outcome_of = load("device_tests").outcome_of
    line = "tests/a/test_b.py::test_c[{'top_p': 0.5}] FAILED                  [ 12%]"
    assert outcome_of(line) == ("tests/a/test_b.py::test_c[{'top_p': 0.5}]", "FAILED")
    assert outcome_of("tests/b.py::test_c SKIPPED (what it expects) [100%]\n") == ("tests/b.py::test_c", "SKIPPED")
    assert outcome_of("[gw1] [  3%] PASSED tests/b.py::test_c[a b] \n") == ("tests/b.py::test_c[a b]", "PASSED")
    assert outcome_of("FAILED tests/b.py::test_c - assert 1 == 2") is None


def test_peaks_are_of_the_device_that_is_named(load):
    peak = load("device_parts").peak_flops
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA L4", "Tesla T4", "NVIDIA A100-SXM4-40GB"]
    assert [peak(name) / 1e12 for name in names] == [989, 756, 121, 65, 312]
    assert peak("NVIDIA L40S") is None
    assert peak("cpu") is None


def test_a_batch_that_does_not_fit_is_halved(load):
    def make(batch_size):
        def train(seconds):
            if batch_size > 8:
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes")
            if batch_size < 8:
                raise RuntimeError("something else")

        return train

    fits = load("device_speed").halved_until_it_fits
    assert fits(make, 32)[0] == 8
    with pytest.raises(RuntimeError, match="something else"):
        fits(make, 4)


def test_ratios_are_of_the_same_round(load):
    row = load("device_speed").ratio_row("x", {"ours": [1.0, 2.0, 4.0], "torch": [2.0, 2.0, 2.0]})
    assert (row["value"], row["note"]) == (1.0, "0.50 to 2.00 in 3 rounds")


def test_agreement_is_of_tokens_and_of_equal_texts(load):
    class Text:
        def __init__(self, ids, log_probability):
            self.ids, self.log_probability = ids, log_probability

    expected, written = [Text([1, 2], -3.0), Text([1, 2, 3, 4], -5.0)], [Text([1, 2], -3.5), Text([1, 2, 9], -9.0)]
    assert load("device_parts").agreement(expected, written) == (4 / 6, 0.25)


def test_pytorch_writes_with_its_cache_what_the_whole_model_computes(load):
    torch = pytest.importorskip("torch")
    load("torch_models")
    cached_transformer = load("device_torch").CachedTransformer
    model = load("torch_models").Transformer(50, 12, 2, 128).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 50, (3, 12)))
    with torch.no_grad():
        expected = model(ids)
        cached = cached_transformer(model, 3, 12)
        torch.testing.assert_close(cached(ids[:, :5], torch.arange(5)), expected[:, 4])
        for i in range(5, 12):
            torch.testing.assert_close(cached(ids[:, i : i + 1], torch.tensor([i])), expected[:, i])


def test_a_part_runs_on_a_cpu(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "device_check.py"), "--small", "--parts", "device", "--out", "results"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if importlib.util.find_spec("jax") is None:
        assert "| device | error |  | failed | ModuleNotFoundError: No module named 'jax' |" in done.stdout
        return
    assert done.returncode == 0, done.stderr
    assert "| device | devices | 1 x cpu |  | platform cpu |" in done.stdout
    assert (tmp_path / "results" / "table.md").read_text() == done.stdout
