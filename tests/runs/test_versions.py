import json
import os
import subprocess
import sys

from aigc_tf.runtime.backend import keras


def test_versions_are_found_without_loading_keras(tmp_path):
    (tmp_path / "keras.json").write_text('{"backend": "jax"}')
    code = (
        "import sys; from aigc_tf.cli.commands import main; main(['info', '--json']); assert 'keras' not in sys.modules"
    )
    for variables, expected in (({}, "jax"), ({"KERAS_BACKEND": "tensorflow"}, "tensorflow")):
        environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
        environment |= {"KERAS_HOME": str(tmp_path), **variables}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-500:]
        told = json.loads(done.stdout)
        assert told["backend"] == expected
        assert told["keras"] == keras.__version__
