import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aigc_tf.runtime import numba_jit

INLINED = "from .runtime.numba_jit import numba_jit\n\n@numba_jit(inline='always')\ndef one(x):\n    return x + {}\n"
CALLER = """
from .inlined import one
from .runtime.numba_jit import numba_jit

@numba_jit()
def two(x):
    return one(x)
"""


@pytest.fixture
def two(tmp_path):
    """A function that calls, in a process of its own, compiled code into which other was inlined."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "runtime").mkdir()
    shutil.copy(Path(numba_jit.__file__), package / "runtime")
    (package / "caller.py").write_text(CALLER)

    def call(added, **variables):
        (package / "inlined.py").write_text(INLINED.format(added))
        done = subprocess.run(
            [sys.executable, "-c", "from package.caller import two; print(two(1))"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **variables},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-500:]
        return done.stdout.strip(), done.stderr

    call.package = package
    return call


def test_cached_code_is_renewed_when_inlined_code_changes(two, tmp_path):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    told = "aigc_tf: compiling for this machine, once: up to half a minute on one core\n"
    assert two(1, **cache) == ("2", told)
    assert two(1, **cache) == ("2", "")  # it was kept
    assert two(7, **cache) == ("8", told)


def test_without_a_writable_cache_each_process_compiles(two, tmp_path):
    file = tmp_path / "file"
    file.touch()
    (two.package / "__pycache__").touch()  # so that no folder can be made there, not by root either
    nowhere = {"NUMBA_CACHE_DIR": str(file / "a"), "XDG_CACHE_HOME": str(file / "b"), "HOME": str(file)}
    for _ in range(2):
        result, told = two(1, **nowhere)
        assert result == "2"
        assert "compiling for this machine" in told


def test_fresh_and_cached_code_give_the_same_results(tmp_path):
    """Or the process that compiles would train to other weights than one that resumes its training."""
    code = (
        "import numpy as np; from aigc_tf.training.fast import fused_ops\n"
        "x, gamma = np.random.default_rng(0).standard_normal((2, 80, 64)).astype(np.float32)\n"
        "y = fused_ops.layer_norm(x, gamma[0], gamma[1], 1e-5, 1)\n"
        "print(y.tobytes().hex(), *(a.tobytes().hex() for a in fused_ops.layer_norm_gradient(x, gamma[0], y, 1e-5, 1)))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    assert "compiling" in first.stderr
    assert "compiling" not in second.stderr
    assert first.stdout == second.stdout


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("content", [b"", b"\x93garbled"], ids=["truncated", "garbled"])
def test_damaged_cached_code_is_compiled_and_cached_again(two, tmp_path, kind, content):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    two(1, **cache)
    for file in (tmp_path / "cache").rglob(f"*.{kind}"):
        file.write_bytes(content)
    result, told = two(1, **cache)
    assert result == "2"
    assert told.count("\n") == 1
    assert "compiling for this machine" in told
    assert two(1, **cache) == ("2", "")
