"""Documents: reading files and folders into clean documents, and reporting what was left out."""

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
_NOT_PLAIN = {".csv": "a table", ".tsv": "a table", ".json": "JSON"}  # whose syntax would be read as text
_BLOCK = 2**16  # bytes or characters to read at a time: more takes memory and saves no time


class LeftOutWarning(UserWarning):
    """The files, records and duplicates that `load_documents` and `iter_documents` left out."""


def load_documents(paths, field: str = "text") -> list[str]:
    """Read files and folders into clean documents, without exact duplicates.

    In a `.jsonl` file each line is a record, and its `field` is a document. In any other file, blank lines separate the
    documents. Of a folder the `.txt` and `.jsonl` files are read, sorted by name, sub-folders included. Other files,
    hidden ones and those that cannot be read are left out; a file that you name yourself must be readable.

    Args:
        paths: a path, or a list of paths.
        field: the field of a `.jsonl` record that holds the text.

    Returns:
        `list[str]` in the order of the files, none of them empty; see `clean` for what is normalised.

    Raises:
        FileNotFoundError: a path does not exist, or a folder contains no text file.
        ValueError: a file that was named is not UTF-8, is a table, or has a record that is not JSON or lacks `field`;
            or no text is left.

    Warns:
        LeftOutWarning: one line with the number of files, records and duplicates that were left out.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "a.txt").write_text("春眠不觉晓，\\n处处闻啼鸟。\\n\\n夜来风雨声", "utf-8")
        ...     load_documents(folder)
        ['春眠不觉晓，\\n处处闻啼鸟。', '夜来风雨声']
    """
    return list(iter_documents(paths, field))


def iter_documents(paths, field: str = "text") -> Iterator[str]:
    """Read files and folders into clean documents one at a time, for a corpus larger than the memory.

    The documents are those of `load_documents`. Memory holds one document, and a hash of each document before it, by
    which duplicates are recognised. Fill a store with them: `make_store(iter_documents("texts"), tokenizer, "store")`.

    Args:
        paths: a path, or a list of paths.
        field: the field of a `.jsonl` record that holds the text.

    Returns:
        An iterator over `str`, none of them empty.

    Raises:
        FileNotFoundError: see `load_documents`.
        ValueError: see `load_documents`.

    Warns:
        LeftOutWarning: see `load_documents`; at the end.

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
    """What was left out: the number of each kind, and the reason for the first that could not be read."""

    def __init__(self):
        self.suffixes, self.counts, self.reasons = Counter(), Counter(), {}

    def add(self, kind: str, reason: object = "") -> None:
        self.counts[kind] += 1
        if reason:
            self.reasons.setdefault(kind, f" (the first: {reason})")

    def __str__(self) -> str:
        """Describe it in one line, which is empty if nothing was left out."""
        kinds = [f"{n:,} {suffix or 'without a suffix'}" for suffix, n in sorted(self.suffixes.items())]
        kinds += [f"{n:,} {kind}{'s' * (n > 1)}{self.reasons.get(kind, '')}" for kind, n in self.counts.items()]
        return ", ".join(kinds)


def _text_files(path: Path, left_out: _LeftOut) -> list[tuple[Path, bool]]:
    """List the files to read, and whether each was named itself."""
    if path.is_file():
        if what := _NOT_PLAIN.get(path.suffix.lower()):
            raise ValueError(
                f"{path} is {what}, not plain text. Write a .jsonl file with one text in each line: "
                '{"text": "..."}; or save only the text as .txt.'
            )
        return [(path, True)]
    if not path.is_dir():
        raise FileNotFoundError(f"There is no file or folder {path}. Check the name.")
    files, others = [], Counter()
    for file in sorted(path.rglob("*")):
        # Files that systems add to a user's folder: .DS_Store, ._a.txt in an archive from a Mac.
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
            f"The folder {path} contains no .txt or .jsonl file{f', but {found}' * bool(found)}. Name another one."
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
    """Yield each document once, and at the end warn about what was left out."""
    seen = set()
    for document in documents:
        key = hash(document)  # 64 bits: two of ten million documents collide in one of 400,000 corpora
        if key in seen:
            left_out.add("duplicate")
        elif document:
            seen.add(key)
            yield document
    if not seen:
        raise ValueError(
            f"No text found in {paths or 'an empty list of paths'}: a corpus needs at least one document. "
            f"Name files with UTF-8 text.{f' Left out: {left_out}' * bool(str(left_out))}"
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
                # The decoder puts the incomplete character of the previous block in front.
                place = offset + len(block) - len(error.object) + error.start
                raise not_utf8_error(file, start, error.object[error.start], place) from None
            offset += len(block)
            if not block:
                return


def _parts(file: Path) -> Iterator[str]:
    """Read a file in parts of about a block, each of which ends at a blank line or at the end of the file."""
    parts = []  # what was read since the last blank line
    with open(file, encoding="utf-8", newline="") as opened:
        while block := opened.read(_BLOCK):
            # A blank line may start in one block and end in the next.
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
    except (ValueError, RecursionError) as error:  # such as a number of too many digits, or brackets nested too deep
        raise ValueError(f"{place} must be a JSON record, but: {error}. Correct or delete the line.") from None
    if not isinstance(record, dict):
        raise ValueError(f"{place} must be a JSON object, got {type(record).__name__}. Correct or delete the line.")
    if not isinstance(record.get(field), str):
        fields = ", ".join(f"{name} ({type(value).__name__})" for name, value in record.items())
        raise ValueError(
            f"{place} must have its text in the field {field!r}, but has: {fields}. "
            "Name the right one (field=..., --field)."
        )
    return record[field]


def check_documents(documents) -> None:
    """Refuse a single text or path instead of a list of texts: it would be read character by character."""
    if isinstance(documents, (str, bytes, os.PathLike)):
        raise ValueError(
            f"documents must be a list of texts, got one {type(documents).__name__}. Pass [text], split it with "
            "text.split('\\n\\n'), or read files with load_documents(paths)."
        )


def documents_sha256(documents: list[str]) -> str:
    """Hash the documents of a corpus, in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()
