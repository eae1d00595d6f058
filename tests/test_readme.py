import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

from aigc_tf import generate_batch
from aigc_tf.cli.demo import is_quatrain
from aigc_tf.cli.parser import make_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
CHINESE = (ROOT / "README.zh.md").read_text("utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def code(block: str) -> str:
    """A block of code without its comments, which are in the reader's language."""
    return re.sub(r"  +#.*", "", block)


def numbers(cell: str) -> list[float]:
    """The numbers in a cell, each written in one way: 3.16 亿 and 316 million are one."""
    units = {"million": 1e6, "万": 1e4, "亿": 1e8, "": 1.0}
    found = re.findall(r"(\d[\d,]*(?:\.\d+)?)\s*(million|万|亿|)", cell)
    return sorted(round(float(number.replace(",", "")) * units[unit], 6) for number, unit in found)


def test_both_languages_have_the_same_code_commands_and_figures():
    assert "[中文](README.zh.md)" in README
    assert "[English](README.md)" in CHINESE
    for language in ("python", "bash"):
        assert [code(block) for block in blocks(language, CHINESE)] == [code(block) for block in blocks(language)]
    (promised, pipeline), (also_promised, also_pipeline) = blocks("text"), blocks("text", CHINESE)
    assert promised == also_promised
    assert re.findall(r"\w+\.py", pipeline) == re.findall(r"\w+\.py", also_pipeline)
    assert len(rows(README)) == len(rows(CHINESE)) > 40
    for english, chinese in zip(rows(README), rows(CHINESE), strict=True):
        assert re.findall("`[^`]+`", english[-1]) == re.findall("`[^`]+`", chinese[-1]), english
        if english[0].isdigit():  # the section of the article
            assert english[0] == chinese[0], english
        else:
            assert numbers(english[1]) == numbers(chinese[1]), english


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
    # As the demo's after more steps, most texts have learnt the form.
    texts = generate_batch(names["model"], names["tokenizer"], [""] * 50, max_new_tokens=36, seed=0)
    assert sum(map(is_quatrain, texts)) > 40
    # Other processors round otherwise, and a text may part from there; the figure hardly moves.
    assert float(printed[2]) == pytest.approx(float(promised[2]), abs=0.1)
    for text in (printed[3:], promised[3:]):
        assert text[0].startswith("春风")
        assert is_quatrain("\n".join(text))
    assert (tmp_path / "runs" / "tang" / "run.json").exists()
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(ways_to_write, "README.md", "exec"), names)
    assert len({*names["texts"], "春风"}) == 4


def test_every_command_of_the_readme_is_one():
    commands = [line for block in blocks("bash") for line in re.findall(r"aigc-tf [^#\n]+", block)]
    (shown,) = (action.choices for action in make_parser()._subparsers._group_actions)
    assert {command.split()[1] for command in commands} == set(shown)
    for command in commands:
        make_parser().parse_args(shlex.split(command)[1:])


def test_every_measurement_of_the_readme_can_be_asked_of_its_script():
    for command in set(re.findall(r"`python (benchmarks/[^`]+)`", README)):
        script, *words = shlex.split(command)
        source = (ROOT / script).read_text("utf-8") + (ROOT / "benchmarks" / "turns.py").read_text("utf-8")
        for word in words:
            assert word.replace(".", "").isdigit() or f'"{word}"' in source, (command, word)


def test_nothing_is_installed_by_the_name_of_this_package():
    """It is not on PyPI: whoever took the name there would be installed."""
    files = [
        ROOT / "README.md",
        ROOT / "README.zh.md",
        *ROOT.glob("*/*.py"),
        *ROOT.glob("*/*.md"),
        *ROOT.glob("*/*.ipynb"),
    ]
    for path in files:
        for line in path.read_text("utf-8").splitlines():
            asked = re.findall(r"pip3? install ([^`&\n]*)", line)
            assert not any(re.search(r'aigc[_-]tf|"\{', packages) for packages in asked), (path.name, line)


def test_every_file_that_the_readme_names_exists():
    names = set(re.findall(r"\b[\w/]+(?:\.zh)?\.(?:py|md|txt|svg|ipynb)\b|aigc_tf/LICENSE|benchmarks/[\w.]+", README))
    assert len(names) > 12
    for name in names - {"README.md"}:
        assert any((ROOT / folder / name).exists() for folder in (".", "aigc_tf")), name


def test_every_folder_of_the_package_is_drawn_in_both_languages():
    drawn = [{path.name for path in (ROOT / "aigc_tf").glob("*/") if (path / "__init__.py").exists()}]
    for readme in (README, CHINESE):
        (picture,) = (block for block in re.findall(r"```text\n(.*?)```", readme, re.S) if block.startswith("aigc_tf/"))
        drawn.append(set(re.findall(r"^  (\w+)/", picture, re.M)))
        files = {path.stem for path in (ROOT / "aigc_tf").rglob("*.py")}
        for line in picture.splitlines()[1:]:
            names = re.findall(r"(?<=  )[a-z_]+(?=  |$| \(|（)", re.sub(r"^ {2,4}\w+/|[(（].*?[)）]", "", line))
            assert set(names) <= files, line
    assert drawn[0] == drawn[1] == drawn[2]


def test_the_package_says_its_version_once():
    import aigc_tf

    assert "version = attr: aigc_tf.__version__" in (ROOT / "setup.cfg").read_text("utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+", aigc_tf.__version__)
