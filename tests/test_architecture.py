"""The rooms and the one direction of their imports, written down."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import aigc_tf
from aigc_tf import devices

PACKAGE = Path(aigc_tf.__file__).parent

# Each room may import the rooms named here, all of them above it.
# fmt: off
ALLOWED = {
    "files": set(),
    "live": set(),
    "text": set(),
    "documents": {"files", "text"},
    "corpora": {"documents", "files", "text"},
    "segmentation": {"files", "text"},
    "cores": set(),
    "chunks": set(),
    "keras_internals": set(),
    "tokenizer": {"chunks", "cores", "files", "keras_internals", "segmentation", "text"},
    "devices": {"cores", "keras_internals"},
    "distribution": {"devices", "keras_internals"},
    "dataset": {"devices", "files", "tokenizer"},
    "sizes": set(),
    "tables": set(),
    "models": {"devices", "distribution", "sizes"},
    "source": {"devices"},
    "ngram": {"tokenizer"},
    "numba_tools": set(),
    "compilation": set(),
    "matrices": {"compilation"},
    "sampling": {"devices"},
    "weights": {"files"},
    "choice": {"compilation", "matrices", "numba_tools"},
    "kernels": {"choice", "compilation", "cores", "matrices", "numba_tools", "weights"},
    "variables": {"devices", "keras_internals"},
    "decoding": {"distribution", "kernels", "keras_internals", "ngram", "variables", "weights"},
    "evaluation": {
        "dataset", "decoding", "devices", "distribution", "ngram", "sampling", "text", "tokenizer", "weights",
    },
    "initialisation": {"dataset", "devices", "tokenizer"},
    "recurrence": {"devices", "keras_internals"},
    "pass_kernels": {"compilation", "matrices"},
    "passes": {"pass_kernels", "sizes"},
    "fast_training": {"devices", "keras_internals", "numba_tools", "passes", "recurrence"},
    "candidates": {"devices", "keras_internals", "sizes"},
    "checkpoints": {"files"},
    "course": {"checkpoints", "devices", "distribution", "evaluation", "files", "live"},
    "optimization": {"devices", "distribution", "keras_internals"},
    "training": {
        "candidates", "course", "devices", "distribution", "fast_training", "files", "optimization", "text",
        "tokenizer",
    },
    "utf8": set(),
    "banned": {"utf8"},
    "sampler": {"banned", "choice", "sampling", "tokenizer", "utf8"},
    "texts": {"decoding", "sampler", "sampling"},
    "word_order": {"banned"},
    "forcing": {"decoding", "sampler", "texts", "tokenizer", "word_order"},
    "beams": {"sampler", "sampling", "texts"},
    "loop": {"devices", "sampler", "sampling", "texts", "weights"},
    "engines": {"decoding", "devices", "numba_tools", "sampler", "weights"},
    "hardware": {"cores", "devices"},
    "writer": {
        "banned", "beams", "decoding", "forcing", "hardware", "loop", "sampler", "sampling", "texts", "weights",
    },
    "generation": {"engines", "sampler", "tokenizer", "writer"},
    "saving": {"devices", "distribution", "files", "keras_internals", "tokenizer", "weights"},
    "estimation": {
        "devices", "distribution", "evaluation", "fast_training", "hardware", "models", "sizes", "tables", "training",
    },
    "pipeline": {
        "checkpoints", "dataset", "distribution", "estimation", "evaluation", "files", "generation", "initialisation",
        "models", "optimization", "saving", "segmentation", "tables", "text", "tokenizer", "training",
    },
    "search_space": {"pipeline"},
    "tuning": {"dataset", "devices", "files", "pipeline", "saving", "search_space", "text"},
    "explanation": {"devices", "distribution", "evaluation", "ngram", "tokenizer", "weights"},
}
# fmt: on
# The front doors and the demo put the rooms together.
FREE = {"__init__", "__main__", "demo", "parser"}


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            rooms |= {node.module} if node.module else {alias.name for alias in node.names}
    return rooms - {"__version__"}


def test_each_file_is_a_known_room():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ALLOWED) | FREE


def test_rooms_import_only_what_the_table_allows():
    for room, allowed in ALLOWED.items():
        assert imported_rooms(PACKAGE / f"{room}.py") == allowed, room


def test_the_table_has_one_direction():
    rooms = list(ALLOWED)
    for i, room in enumerate(rooms):
        assert ALLOWED[room] <= set(rooms[:i]), room


def test_tensorflow_keras_and_jax_enter_through_devices_alone():
    for path in PACKAGE.glob("*.py"):
        if path.stem not in ("devices", "distribution"):
            tops = {
                name.split(".")[0]
                for node in ast.walk(ast.parse(path.read_text("utf-8")))
                for name in (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom) and not node.level
                    else []
                )
            }
            assert not tops & {"tensorflow", "keras", "jax"}, path.stem


def test_every_public_name_exists_and_says_what_it_does():
    for name in aigc_tf.__all__:
        assert getattr(aigc_tf, name).__doc__.splitlines()[0].endswith((".", ":")), name


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_text_and_tokens_load_no_tensorflow():
    code = (
        "import sys, aigc_tf; dir(aigc_tf); t = aigc_tf.Tokenizer.train(['春眠']); aigc_tf.keywords('春眠不觉晓')\n"
        "assert not {'tensorflow', 'keras', 'jax'} & set(sys.modules)"
    )
    run_python(code)


def test_a_normal_run_writes_no_log_lines():
    code = (
        "import aigc_tf; t = aigc_tf.Tokenizer.train(['春眠不觉晓'], unit='word')\n"
        "m = aigc_tf.transformer(t.vocab_size, 4, hidden_dim=8, num_heads=1)\n"
        "d = aigc_tf.make_dataset(['春眠不觉晓'] * 9, t, 4, 2, seed=0)\n"
        "aigc_tf.train(m, d, t, ['春眠'], steps=2, progress=False)\n"
        "aigc_tf.generate(m, t, max_new_tokens=2)"
    )
    done = run_python(code)
    # The first time on a machine, the wait for the compiler is told.
    lines = [line for line in done.stderr.splitlines() if not line.startswith("aigc_tf: compiling for this machine")]
    assert (done.stdout, lines) == ("", [])


def test_only_log_lines_are_hidden_while_tensorflow_is_loaded():
    code = (
        "import os, aigc_tf.devices as devices\n"
        "with devices.hidden_native_logs():\n"
        "    os.write(2, b'I0000 00:00:1795749208.2 4558 port.cc:153] oneDNN custom operations are on.\\n')\n"
        "    os.write(2, b'a line of another thread\\n')"
    )
    assert run_python(code).stderr == "a line of another thread\n"


def test_without_a_place_for_a_temporary_file_nothing_is_hidden(monkeypatch, capfd):
    def fail():
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr("tempfile.TemporaryFile", fail)
    with devices.hidden_native_logs():
        os.write(2, b"a line\n")
    assert capfd.readouterr().err == "a line\n"
