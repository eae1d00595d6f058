import contextlib
import importlib.util
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

from aigc_tf import Tokenizer, generate_batch, lstm, read_run
from aigc_tf.cli.demo import is_quatrain
from aigc_tf.cli.parser import make_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
CHINESE = (ROOT / "README.zh.md").read_text("utf-8")
PAGES = [f"{folder}README{language}.md" for folder in ("", "notebooks/", "benchmarks/") for language in ("", ".zh")]
ARTICLE = tuple((ROOT / "notebooks" / name).read_text("utf-8") for name in ("README.md", "README.zh.md"))
BENCHMARKS = tuple((ROOT / "benchmarks" / name).read_text("utf-8") for name in ("README.md", "README.zh.md"))
FIGURES = tuple(
    text.split(f"\n## {title}\n")[1].split("\n## ")[0]
    for text, title in zip(BENCHMARKS, ("Figures", "数字"), strict=True)
)


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def code(block: str) -> str:
    """A block of code without its comments, which are in the reader's language."""
    return re.sub(r"^#.*\n|  +#.*", "", block, flags=re.M)


def files_drawn(picture: str) -> list[str]:
    """The files that the picture of the package names, in its order."""
    plain = re.sub(r"^ *\w+/|[(（].*?[)）]", "", picture, flags=re.M)
    return re.findall(r"(?<=  )[a-z_]+(?=  |$)", re.sub(r" +$", "", plain, flags=re.M), re.M)


def commands(text: str) -> list[str]:
    return re.findall(r"`((?:python benchmarks/|time aigc-tf|aigc-tf )[^`]+)`", text)


def numbers(cell: str) -> list[float]:
    """The numbers in a cell, each written in one way: 3.16 亿 and 316 million are one."""
    units = {"million": 1e6, "万": 1e4, "亿": 1e8, "": 1.0}
    found = re.findall(r"(\d[\d,]*(?:\.\d+)?)\s*(million|万|亿|)", cell)
    return sorted(round(float(number.replace(",", "")) * units[unit], 6) for number, unit in found)


def test_both_languages_have_the_same_code_and_commands():
    assert "[中文](README.zh.md)" in README
    assert "[English](README.md)" in CHINESE
    for language in ("python", "bash"):
        assert [code(block) for block in blocks(language, CHINESE)] == [code(block) for block in blocks(language)]
    (pipeline, promised), (also_pipeline, also_promised) = blocks("text"), blocks("text", CHINESE)
    assert promised == also_promised
    assert files_drawn(pipeline) == files_drawn(also_pipeline)


@pytest.mark.parametrize("pair", [(README, CHINESE), FIGURES], ids=["README", "benchmarks"])
def test_both_languages_have_the_same_figures(pair):
    english, chinese = pair
    assert len(commands(english)) > 3
    assert commands(english) == commands(chinese)
    assert len(rows(english)) == len(rows(chinese)) > 10
    for row, also_row in zip(rows(english), rows(chinese), strict=True):
        assert [numbers(cell) for cell in row[1:]] == [numbers(cell) for cell in also_row[1:]], row
        assert numbers(row[0]) == numbers(also_row[0]), row


def test_the_figures_of_the_readme_are_those_of_the_benchmarks():
    results = README.split("\n## Results\n")[1].split("\n## ")[0]
    measured = set(numbers(FIGURES[0]))
    for row in rows(results)[2:]:
        assert set(numbers(row[1])) <= measured, row


def test_both_languages_have_the_same_table_of_the_article():
    for row, also_row in zip(*map(rows, ARTICLE), strict=True):
        assert row[0] == also_row[0] or not row[0].isdigit()
        assert re.findall("`[^`]+`", row[-1]) == re.findall("`[^`]+`", also_row[-1]), row


def test_the_table_goes_through_all_sections_of_the_article():
    sections = [row[0] for row in rows(ARTICLE[0]) if row[0].isdigit()]
    assert len(sections) > 25
    assert sections == sorted(sections)
    assert set(sections) == set("123456")


@pytest.mark.slow
def test_the_five_lines_train_a_model_that_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        # In small: how well a model writes is for the longer example.
        short = (
            blocks("python")[0].replace("steps=300", "steps=30").replace('"tang_quatrains")', '"tang_quatrains")[:500]')
        )
        exec(compile(short, "README.md", "exec"), {})
    assert [line for line in printed.getvalue().splitlines() if line.startswith("春风")]
    run = read_run("runs/spring")
    assert (run["settings"]["steps"], run["data"]["documents"]) == (30, 500)


@pytest.mark.slow
def test_the_python_example_prints_what_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "tang_quatrains.txt", tmp_path / "data")
    _, code, ways_to_write = blocks("python")
    promised = blocks("text")[1].splitlines()
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), names)
    # What makes it faster depends on what is installed.
    printed = [line for line in printed.getvalue().splitlines() if not line.startswith("trains with ")]
    assert [line.split("  ")[0] for line in printed[:2]] == [line.split("  ")[0] for line in promised[:2]]
    # As the demo's after more steps, most texts have learnt the form.
    texts = generate_batch(names["model"], names["tokenizer"], [""] * 50, max_new_tokens=36, seed=0)
    assert sum(map(is_quatrain, texts)) > 40
    # Other processors round otherwise, and a text may part from there; the figure hardly moves.
    assert float(printed[2]) == pytest.approx(float(promised[2]), abs=0.1)
    for text in (printed[3:], promised[3:]):
        assert text[0].startswith("春风")
    assert is_quatrain("\n".join(promised[3:]))
    assert (tmp_path / "runs" / "tang" / "run.json").exists()
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(ways_to_write, "README.md", "exec"), names)
    assert len({*names["texts"], "春风"}) == 4


def test_the_poem_of_the_readme_is_a_quatrain():
    (poem,) = re.findall(r"^> (.*)<br>\n> (.*)$", README, re.M)
    assert is_quatrain("\n".join(poem))
    assert re.findall(r"^> (.*)<br>\n> (.*)$", CHINESE, re.M) == [poem]


def test_the_picture_says_what_the_readme_says_of_it():
    picture = (ROOT / "notebooks" / "surprisal.svg").read_text("utf-8")
    assert len(picture) < 60_000
    for bits in re.findall(r"([\d.]+) bits per character", picture):
        assert bits in README
        assert bits in CHINESE


def test_the_picture_is_drawn_from_the_strip_of_the_package():
    spec = importlib.util.spec_from_file_location("strip", ROOT / "notebooks" / "surprisal_strip.py")
    strip = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(strip)
    tokenizer = Tokenizer.train([strip.POEM])
    drawn = strip.row(0, "LSTM", lstm(tokenizer.vocab_size, 8), tokenizer)
    shown = re.findall(r'text-anchor="middle">([^<]+)</text>', drawn)
    assert shown[::2] == [*strip.POEM.replace("\n", "↵"), "EOS"]
    assert sum(map(float, shown[1::2])) / len(strip.POEM) == pytest.approx(
        float(re.search(r"([\d.]+) bits", drawn)[1]), abs=0.1
    )


def test_every_command_of_the_readme_is_one():
    commands = [line for block in blocks("bash") for line in re.findall(r"aigc-tf [^#\n]+", block)]
    (shown,) = (action.choices for action in make_parser()._subparsers._group_actions)
    assert {command.split()[1] for command in commands} == set(shown)
    for command in commands:
        make_parser().parse_args(shlex.split(command)[1:])


def test_every_measurement_can_be_asked_of_its_script():
    asked = {command for text in (README, *BENCHMARKS) for command in re.findall(r"`python (benchmarks/[^`]+)`", text)}
    assert len(asked) > 10
    for command in asked:
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


@pytest.mark.parametrize("path", PAGES)
def test_every_file_that_is_named_exists(path):
    text = (ROOT / path).read_text("utf-8")
    names = set(re.findall(r"(?<![\w/.])(?:\.\./)?[\w/]+(?:\.zh)?\.(?:py|md|txt|svg|ipynb)\b|aigc_tf/LICENSE", text))
    assert len(names) > 5
    folders = (ROOT, ROOT / "aigc_tf", (ROOT / path).parent, ROOT / "benchmarks")
    for name in names:
        assert any((folder / name).exists() for folder in folders), name


@pytest.mark.parametrize("path", PAGES)
def test_every_link_leads_somewhere(path):
    text = (ROOT / path).read_text("utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in links:
        target, _, anchor = link.partition("#")
        file = (ROOT / path).parent / target if target else ROOT / path
        assert file.exists(), link
        titles = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}, (
            link
        )


def test_the_picture_of_the_package_has_all_its_folders_and_only_files_that_exist():
    folders = {path.parent.name for path in (ROOT / "aigc_tf").glob("*/__init__.py")}
    files = {path.stem for path in (ROOT / "aigc_tf").rglob("*.py")}
    for readme in (README, CHINESE):
        picture = blocks("text", readme)[0]
        assert set(re.findall(r"^  (\w+)/", picture, re.M)) == folders
        assert len(files_drawn(picture)) > 30
        assert set(files_drawn(picture)) <= files


def test_the_package_says_its_version_once():
    import aigc_tf

    assert "version = attr: aigc_tf.__version__" in (ROOT / "setup.cfg").read_text("utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+", aigc_tf.__version__)
