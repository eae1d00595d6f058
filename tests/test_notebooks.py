"""What the stored notebooks hold; that they run is for `pytest --nbmake notebooks`."""

import ast
import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def printed(cell: dict) -> str:
    """The text of a cell's outputs and the cells of its tables, a picture's excepted."""
    texts = []
    for output in cell["outputs"]:
        texts += output.get("text", [])
        texts += output.get("data", {}).get("text/plain", [])
        texts += [
            f"\n{text}" for text in re.findall(r"<td>([^<]*)", "".join(output.get("data", {}).get("text/html", [])))
        ]
    return "".join(texts)


def figures(text: str) -> set[str]:
    """Return the numbers of two digits or more, written in one way: 7_000, 7,000 and 7000 are one."""
    text = re.sub(r"(?<=\d)[,_](?=\d{3})", "", text)
    return set(re.findall(r"\d+\.\d+|\d{2,}", text))


def prose(path: Path) -> str:
    """The text between the cells, without formulas and names such as `GPT-2`."""
    return re.sub(r"\$[^$]*\$|[A-Za-z_]+-?\d+", "", "\n".join(map(source, cells(path, "markdown"))))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_every_figure_in_prose_is_one_that_a_cell_set_or_printed(path):
    shown = figures("\n".join(source(cell) + "\n" + printed(cell) for cell in cells(path, "code")))
    assert figures(prose(path)) - shown == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_a_notebook_is_stored_as_it_ran_from_a_fresh_kernel(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not [cell for cell in code if "WARNING" in printed(cell)]  # in a notebook TensorFlow logs to standard output
    # As SVG, in which the reader's browser draws the Han characters: matplotlib's own font has none.
    pictures = [output["data"] for output in outputs if output["output_type"] == "display_data"]
    assert [picture for picture in pictures if "image/svg+xml" in picture]
    assert not [picture for picture in pictures if "image/png" in picture]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_a_notebook_defines_nothing_and_asserts_something(path):
    code = "\n".join(map(source, cells(path, "code")))
    tree = ast.parse(re.sub(r"^( *)%.*", r"\1pass", code, flags=re.MULTILINE))
    kinds = [type(node) for node in ast.walk(tree)]
    assert ast.FunctionDef not in kinds
    assert ast.ClassDef not in kinds
    assert ast.Assert in kinds
