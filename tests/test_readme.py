import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

from aigc_tf.parser import make_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
CHINESE = (ROOT / "README.zh.md").read_text("utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_both_languages_have_the_same_code_commands_and_figures():
    assert "[中文](README.zh.md)" in README
    assert "[English](README.md)" in CHINESE
    assert blocks(r"\w+", CHINESE) == blocks(r"\w+")
    assert len(rows(README)) == len(rows(CHINESE)) > 40
    for english, chinese in zip(rows(README), rows(CHINESE), strict=True):
        assert re.findall("`[^`]+`", english[-1]) == re.findall("`[^`]+`", chinese[-1]), english
        # The section of the article, or a figure without its unit.
        assert english[0] == chinese[0] or not english[0].isdigit(), english
        assert re.findall(r"\d+\.\d\d", english[1]) == re.findall(r"\d+\.\d\d", chinese[1]), english


def test_the_table_goes_through_all_sections_of_the_article():
    sections = [row[0] for row in rows(README) if row[0].isdigit()]
    assert sections == sorted(sections)
    assert set(sections) == set("123456")


@pytest.mark.slow
def test_the_python_example_prints_what_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "tang_quatrains.txt", tmp_path / "data")
    (code, ways_to_write), (promised,) = blocks("python"), blocks("text")[:1]
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), names)
    # What makes it faster depends on what is installed.
    printed = [line for line in printed.getvalue().splitlines() if not line.startswith("trains with ")]
    promised = promised.splitlines()
    assert [line.split("  ")[0] for line in printed[:2]] == [line.split("  ")[0] for line in promised[:2]]
    # Other processors round otherwise, and a text may part from there; the figure hardly moves.
    assert float(printed[2]) == pytest.approx(float(promised[2]), abs=0.1)
    assert printed[3].startswith("春风")
    assert promised[3].startswith("春风")
    assert (tmp_path / "runs" / "tang" / "run.json").exists()
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(ways_to_write, "README.md", "exec"), names)
    assert all(text.startswith("春风") for text in names["texts"])


def test_every_command_of_the_readme_is_one():
    commands = [line for block in blocks("bash") for line in re.findall(r"aigc-tf [^#\n]+", block)]
    assert len(commands) == 12
    for command in commands:
        make_parser().parse_args(shlex.split(command)[1:])


def test_every_file_that_the_readme_names_exists():
    names = set(re.findall(r"\b[\w/]+(?:\.zh)?\.(?:py|md|txt|svg|ipynb)\b|aigc_tf/LICENSE|benchmarks/[\w.]+", README))
    assert len(names) > 12
    for name in names - {"README.md"}:
        assert any((ROOT / folder / name).exists() for folder in (".", "aigc_tf")), name


def test_the_package_says_its_version_once():
    import aigc_tf

    assert "version = attr: aigc_tf.__version__" in (ROOT / "setup.cfg").read_text("utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+", aigc_tf.__version__)
