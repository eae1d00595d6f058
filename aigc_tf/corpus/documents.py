"""Documents: files and folders -> clean documents, and word of what was left out."""

import codecs
import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..runtime.files import not_utf8_error
from .cleaning import clean

_SUFFIXES = (".txt", ".jsonl")
_RECORDS = {".csv": "a table", ".tsv": "a table", ".json": "JSON"}  # whose marks would be taken for text
_BLOCK = 2**16  # of bytes or characters, read in one go: larger ones take memory and save no time


class LeftOutWarning(UserWarning):
    """What `load_documents` and `iter_documents` left out: files, records, duplicates."""


def load_documents(paths, field: str = "text") -> list[str]:
    """Read files and folders into clean documents, exact duplicates dropped.

    In a `.jsonl` file each line is a record and `field` names its text; in any other file blank lines separate the
    documents. A folder gives its `.txt` and `.jsonl` files, sub-folders included, by name. What it has besides, and
    what of it cannot be read, is left out, and so are hidden files; a file that was named must be readable.

    Args:
        paths: a path, or a list of paths.
        field: the field of a `.jsonl` record that holds the text.

    Returns:
        `list[str]` in the order of the files, none of them empty.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no text file.
        ValueError: a file that was named is not UTF-8 or a table, a record of it is not JSON or lacks `field`, or
            nothing is left.

    Warns:
        LeftOutWarning: one line that counts what of folders was left out, and the duplicates.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "a.txt").write_text("春眠不觉晓，\\n处处闻啼鸟。\\n\\n夜来风雨声", "utf-8")
        ...     load_documents(folder)
        ['春眠不觉晓，\\n处处闻啼鸟。', '夜来风雨声']
    """
    return list(iter_documents(paths, field))


def iter_documents(paths, field: str = "text") -> Iterator[str]:
    """Read files and folders into clean documents one after the other, for a corpus larger than the memory.

    It gives what `load_documents` gives. In memory are one document and a number for each before it, by which
    duplicates are known. Fill a store with it: `make_store(iter_documents("texts"), tokenizer, "store")`.

    Args:
        paths: a path, or a list of paths.
        field: the field of a `.jsonl` record that holds the text.

    Returns:
        An iterator over `str`, none of them empty.

    Raises:
        FileNotFoundError: as `load_documents`.
        ValueError: as `load_documents`.

    Warns:
        LeftOutWarning: as `load_documents`, at the end.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "a.txt").write_text("春眠不觉晓，\\n处处闻啼鸟。\\n\\n夜来风雨声", "utf-8")
        ...     next(iter_documents(folder))
        '春眠不觉晓，\\n处处闻啼鸟。'
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    left_out = _LeftOut()
    files = [file for path in paths for file in _text_files(Path(path), left_out)]
    return _different(_read_files(files, field, left_out), left_out, ", ".join(map(str, paths)))


class _LeftOut:
    """What was left out: how many of each kind, and of what could not be read, why the first."""

    def __init__(self):
        self.suffixes, self.counts, self.reasons = Counter(), Counter(), {}

    def add(self, kind: str, reason: object = "") -> None:
        self.counts[kind] += 1
        if reason:
            self.reasons.setdefault(kind, f" (the first: {reason})")

    def __str__(self) -> str:
        """Say it in one line, empty if nothing was left out."""
        kinds = [f"{n:,} {suffix or 'without a suffix'}" for suffix, n in sorted(self.suffixes.items())]
        kinds += [f"{n:,} {kind}{'s' * (n > 1)}{self.reasons.get(kind, '')}" for kind, n in self.counts.items()]
        return ", ".join(kinds)


def _text_files(path: Path, left_out: _LeftOut) -> list[tuple[Path, bool]]:
    """List the files to read, and of each whether it was named itself."""
    if path.is_file():
        if what := _RECORDS.get(path.suffix.lower()):
            raise ValueError(
                f"{path} is {what}, not plain text. Write a .jsonl file, each text a line of its own: "
                '{"text": "..."}; or save the text alone as .txt.'
            )
        return [(path, True)]
    if not path.is_dir():
        raise FileNotFoundError(f"There is no file or folder {path}. Check the name.")
    files, others = [], Counter()
    for file in sorted(path.rglob("*")):
        # What systems put beside a user's files: .DS_Store, ._a.txt in an archive from a Mac.
        if any(name.startswith(".") or name == "__MACOSX" for name in file.relative_to(path).parts):
            continue
        if file.is_file():
            if file.suffix.lower() in _SUFFIXES:
                files.append((file, False))
            else:
                others[file.suffix.lower()] += 1
    if not files:
        found = ", ".join(f"{n:,} {suffix or 'without a suffix'}" for suffix, n in sorted(others.items()))
        raise FileNotFoundError(
            f"The folder {path} holds no .txt or .jsonl file{f', but {found}' * bool(found)}. Name another, or a file."
        )
    left_out.suffixes.update(others)
    return files


def _read_files(files: list[tuple[Path, bool]], field: str, left_out: _LeftOut) -> Iterator[str]:
    for file, is_named in files:
        try:
            _check_utf8(file)
        except (ValueError, OSError) as error:
            if is_named:
                raise
            left_out.add("unreadable file", error)
            continue
        if file.suffix.lower() != ".jsonl":
            for part in _parts(file):
                yield from clean(part).split("\n\n")
            continue
        with open(file, encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    text = _field_of(line, field, f"{file}, line {number}")
                except ValueError as error:
                    if is_named:
                        raise
                    left_out.add("unreadable record", error)
                else:
                    yield clean(text)


def _different(documents: Iterator[str], left_out: _LeftOut, paths: str) -> Iterator[str]:
    """Yield each document once, and at the end tell what was left out."""
    seen = set()
    for document in documents:
        number = hash(document)  # of 64 bits: among ten million documents two are alike once in 400,000 corpora
        if number in seen:
            left_out.add("duplicate")
        elif document:
            seen.add(number)
            yield document
    if not seen:
        raise ValueError(
            f"No text found in {paths or 'an empty list of paths'}: a corpus needs at least one document. "
            f"Name files that hold UTF-8 text.{f' Left out: {left_out}' * bool(str(left_out))}"
        )
    if str(left_out):
        warnings.warn(f"left out: {left_out}", LeftOutWarning, stacklevel=3)


def _check_utf8(file: Path) -> None:
    """Refuse a file that is not UTF-8 before any document of it is used."""
    decoder, start, offset = codecs.getincrementaldecoder("utf-8")(), b"", 0
    with open(file, "rb") as opened:
        while True:
            block = opened.read(_BLOCK)
            start = start or block[:8]
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # What is decoded begins with the bytes that the block before left incomplete.
                place = offset + len(block) - len(error.object) + error.start
                raise not_utf8_error(file, start, error.object[error.start], place) from None
            offset += len(block)
            if not block:
                return


def _parts(file: Path) -> Iterator[str]:
    """Read a file in parts of about a block, each ending before a blank line, or else the file."""
    parts = []  # of what comes after the last blank line
    with open(file, encoding="utf-8", newline="") as opened:
        while block := opened.read(_BLOCK):
            # A blank line may begin in one block and end in the next.
            newest = (parts[-1][-2:] if parts else "") + block
            parts.append(block)
            blank = max(newest.rfind("\n\n"), newest.rfind("\n\r\n"))
            if blank >= 0:
                text = "".join(parts)
                end = len(text) - len(newest) + blank
                yield text[:end]
                parts = [text[end:]]
    yield "".join(parts)


def _field_of(line: str, field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # also a number of too many digits, brackets too deep
        raise ValueError(f"{place} must be a JSON record, but: {error}. Mend or delete the line.") from None
    if not isinstance(record, dict):
        raise ValueError(f"{place} must be a JSON object, got {type(record).__name__}. Mend or delete the line.")
    if not isinstance(record.get(field), str):
        fields = ", ".join(f"{name} ({type(value).__name__})" for name, value in record.items())
        raise ValueError(
            f"{place} must have its text in the field {field!r}, but has: {fields}. "
            "Name the right field (field=..., --field)."
        )
    return record[field]


def check_documents(documents) -> None:
    """Refuse one text, or one path, where several texts are meant: it would be taken letter by letter."""
    if isinstance(documents, (str, bytes, os.PathLike)):
        raise ValueError(
            f"documents must be a list of texts, got one {type(documents).__name__}. Write [text], divide it with "
            "text.split('\\n\\n'), or read files with load_documents(paths)."
        )


def documents_sha256(documents: list[str]) -> str:
    """Hash a corpus, document by document, in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()
