import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_a_missing_backend_is_one_clear_line_on_the_command_line(backend, tmp_path):
    code = (
        f"import sys; sys.modules[{backend!r}] = None; from aigc_tf.cli.commands import main\n"
        "sys.exit(main(['train', 'corpus:tang_quatrains', '--steps', '1', '--out', sys.argv[1]]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    environment |= {"KERAS_BACKEND": "jax"} if backend == "jax" else {}
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    (line,) = done.stderr.splitlines()
    assert f"aigc_tf needs {backend} here, which is not installed. Install tensorflow" in line
    assert done.returncode == 1
