import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

from aigc_tf.__main__ import _parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_the_python_example_prints_what_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "tang_quatrains.txt", tmp_path / "data")
    (code,), (promised,) = blocks("python"), blocks("text")[:1]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    promised, printed = promised.splitlines(), printed.getvalue().splitlines()
    assert [line.split("  ")[0] for line in printed[:2]] == [line.split("  ")[0] for line in promised[:2]]
    # Other processors round otherwise, and a text may part from there; the figure hardly moves.
    assert float(printed[2]) == pytest.approx(float(promised[2]), abs=0.1)
    assert printed[3].startswith("春风")
    assert promised[3].startswith("春风")
    assert (tmp_path / "runs" / "tang" / "run.json").exists()


def test_every_command_of_the_readme_is_one():
    commands = [line for block in blocks("bash") for line in re.findall(r"aigc-tf [^#\n]+", block)]
    assert len(commands) == 5
    for command in commands:
        _parser().parse_args(shlex.split(command)[1:])


def test_every_file_that_the_readme_names_exists():
    names = set(re.findall(r"\b[\w/]+\.(?:py|md|txt)\b|aigc_tf/LICENSE|benchmarks/[\w.]+", README))
    assert len(names) > 12
    for name in names - {"README.md"}:
        assert any((ROOT / folder / name).exists() for folder in (".", "aigc_tf")), name


def test_the_package_says_its_version_once():
    import aigc_tf

    assert "version = attr: aigc_tf.__version__" in (ROOT / "setup.cfg").read_text("utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+", aigc_tf.__version__)
