"""The folders and the one direction of their imports, written down."""

import ast
import graphlib
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import aigc_tf
from aigc_tf.runtime import backend

PACKAGE = Path(aigc_tf.__file__).parent

# Each folder may import those before it, as the README's picture shows.
FOLDERS = ["runtime", "corpus", "models", "generation", "evaluation", "training", "runs", "cli"]
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[Path]:
    """Find the files of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            named = {base / alias.name for alias in node.names} | {base}
            found |= {one.with_suffix(".py") for one in named if one.with_suffix(".py").is_file()}
    return found


def folder_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def test_folders_import_those_before_them():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FOLDERS)
    for path in FILES:
        if path.parent != PACKAGE:
            for other in imported(path):
                assert other.parent == PACKAGE or (FOLDERS.index(folder_of(other)) <= FOLDERS.index(folder_of(path))), (
                    f"{path} imports {other}"
                )


def test_files_import_in_no_circle():
    order = graphlib.TopologicalSorter({path: imported(path) for path in FILES if path.parent != PACKAGE})
    order.prepare()


def test_each_folder_names_its_public_functions():
    named = {}
    for folder in FOLDERS:
        doc = importlib.import_module(f"aigc_tf.{folder}").__doc__
        named |= dict.fromkeys(re.findall(r"`(\w+)`", doc.partition("Public: ")[2]), folder)
    assert named == {name: module.split(".")[0] for name, module in aigc_tf._MODULE_OF.items()}


def test_tensorflow_keras_and_jax_enter_through_the_backend_alone():
    for path in FILES:
        if path.relative_to(PACKAGE).as_posix() not in ("runtime/backend.py", "runtime/distribution.py"):
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
            assert not tops & {"tensorflow", "keras", "jax"}, path


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


def test_jieba_is_loaded_when_words_are_cut(tmp_path):
    (tmp_path / "a.txt").write_text("春眠不觉晓\n\n处处闻啼鸟", "utf-8")
    code = (
        "import sys, aigc_tf\n"
        f"documents = aigc_tf.load_documents({str(tmp_path)!r}); aigc_tf.split(documents); aigc_tf.load_stopwords()\n"
        "tokenizer = aigc_tf.Tokenizer.train(documents); aigc_tf.make_store(documents, tokenizer)\n"
        "words = aigc_tf.Tokenizer(['春眠'], unit='word')\n"
        "assert not {'jieba', 'rjieba'} & set(sys.modules)\n"
        "words.encode('春眠')\n"
        "assert {'jieba', 'rjieba'} & set(sys.modules)"
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
        "import os, aigc_tf.runtime.backend as devices\n"
        "with devices.hidden_native_logs():\n"
        "    os.write(2, b'I0000 00:00:1795749208.2 4558 port.cc:153] oneDNN custom operations are on.\\n')\n"
        "    os.write(2, b'a line of another thread\\n')"
    )
    assert run_python(code).stderr == "a line of another thread\n"


def test_without_a_place_for_a_temporary_file_nothing_is_hidden(monkeypatch, capfd):
    def fail():
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr("tempfile.TemporaryFile", fail)
    with backend.hidden_native_logs():
        os.write(2, b"a line\n")
    assert capfd.readouterr().err == "a line\n"
