"""Text intake: files -> clean documents -> training and held-out documents."""

import hashlib
import json
import os
import re
from pathlib import Path

from .files import read_text

# Characters that str.splitlines and editors take for a line end, beside "\n".
_NEWLINE = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
# Zero-width and bidirectional marks, soft hyphen, Hangul fillers, byte order mark, control characters
# but tab and newline, ideographic variation selectors: nothing a reader sees.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200c\u200e\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\U000e0100-\U000e01ef]"
)
# Inside an emoji a variation selector and a joiner belong to the picture; elsewhere they are dirt.
_EMOJI = "#*0-9©®\u203c\u2049\u2100-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
_STRAY_SELECTOR = re.compile(f"(?<![{_EMOJI}])[\ufe00-\ufe0f]")
# What a joiner joins; digits take a selector (keycaps), never a joiner.
_JOINED = "\u2190-\u2bff\U0001f000-\U0001faff"
_STRAY_JOINER = re.compile(f"(?<![{_JOINED}\ufe0f])\u200d|\u200d(?![{_JOINED}])")
_FULL_WIDTH = {
    ord(wide): ord(wide) - 0xFEE0
    for first, last in ("０９", "ＡＺ", "ａｚ")
    for wide in map(chr, range(ord(first), ord(last) + 1))
}
# A match begins at the first blank of a run only: begun at each, a long run within a line takes quadratic time.
_LINE_TAIL = re.compile(r"(?<![^\S\n])[^\S\n]+(?=\n|\Z)")
_BLANK_LINES = re.compile(r"\n{3,}")


def clean(text: str) -> str:
    """Normalise what a reader cannot see, and nothing else.

    One kind of newline, no blanks at line ends, at most one blank line in a row; zero-width, control and
    bidirectional characters removed (joiners inside emoji stay); full-width letters and digits made
    ASCII. Chinese punctuation is untouched, unlike under Unicode NFKC. Cleaning twice changes nothing.

    Args:
        text: any string.

    Returns:
        `str`, without newlines at either end.

    Example:
        >>> clean("\\ufeff２０２６年，ＡＩ写诗！ \\r\\n春风\\u200b。")
        '2026年，AI写诗！\\n春风。'
    """
    text = _INVISIBLE.sub("", text)
    text = _STRAY_JOINER.sub("", _STRAY_SELECTOR.sub("", text))
    text = _NEWLINE.sub("\n", text).translate(_FULL_WIDTH)
    return _BLANK_LINES.sub("\n\n", _LINE_TAIL.sub("", text)).strip("\n")


def load_documents(paths, field: str = "text") -> list[str]:
    """Read files and folders into clean documents, exact duplicates dropped.

    In a `.jsonl` file each line is a record and `field` names its text; in any other file blank lines
    separate the documents. A folder gives its `.txt` and `.jsonl` files, sub-folders included, by name.

    Args:
        paths: a path, or a list of paths.
        field: the field of a `.jsonl` record that holds the text.

    Returns:
        `list[str]` in the order of the files, none of them empty.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no text file.
        ValueError: a file is not UTF-8, a record is not JSON or lacks `field`, or nothing is left.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "a.txt").write_text("春眠不觉晓，\\n处处闻啼鸟。\\n\\n夜来风雨声", "utf-8")
        ...     load_documents(folder)
        ['春眠不觉晓，\\n处处闻啼鸟。', '夜来风雨声']
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files = [file for path in paths for file in _text_files(Path(path))]
    documents = dict.fromkeys(document for file in files for document in _read_documents(file, field))
    documents.pop("", None)
    if not documents:
        raise ValueError(
            f"No text found in {', '.join(map(str, paths)) or 'an empty list of paths'}: "
            "a corpus needs at least one document. Name files that hold UTF-8 text."
        )
    return list(documents)


def split(documents: list[str], valid_fraction: float = 0.05) -> tuple[list[str], list[str]]:
    """Divide documents into a training and a held-out side by a stable hash of each document.

    A document's side depends on its own text and `valid_fraction` alone: it never changes when others are
    added, removed or reordered, nor between machines.

    Args:
        documents: the documents.
        valid_fraction: the expected share of held-out documents, between 0 and 1.

    Returns:
        The training documents and the held-out documents, each `list[str]` in the order given.

    Raises:
        ValueError: `valid_fraction` is out of range, one side would be empty, or `documents` is one text.

    Example:
        >>> train_documents, valid_documents = split([f"第{i}首" for i in range(1000)])
        >>> len(train_documents), len(valid_documents)
        (949, 51)
    """
    check_documents(documents)
    if not 0 < valid_fraction < 1:
        raise ValueError(f"valid_fraction must lie between 0 and 1, got {valid_fraction}.")
    ranks = [_rank(document) for document in documents]
    train_documents = [d for d, rank in zip(documents, ranks, strict=True) if rank >= valid_fraction]
    valid_documents = [d for d, rank in zip(documents, ranks, strict=True) if rank < valid_fraction]
    if train_documents and valid_documents:
        return train_documents, valid_documents
    if len(set(ranks)) < 2:
        way_out = "Separate documents by blank lines, or add text."
    else:
        smallest, largest = min(ranks), max(ranks)
        way_out = f"Choose valid_fraction above {smallest} and up to {largest}, or add documents."
    raise ValueError(
        f"A split needs documents on both sides, but of {len(documents)} with "
        f"valid_fraction={valid_fraction}, {len(train_documents)} are for training "
        f"and {len(valid_documents)} held out. {way_out}"
    )


def check_documents(documents) -> None:
    """Refuse one text, or one path, where several texts are meant: it would be taken letter by letter."""
    if isinstance(documents, (str, bytes, os.PathLike)):
        raise ValueError(
            f"documents must be a list of texts, got one {type(documents).__name__}. Write [text], divide it with "
            "text.split('\\n\\n'), or read files with load_documents(paths)."
        )


def _rank(document: str) -> float:
    """Map a document to [0, 1) by its text alone."""
    digest = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def documents_sha256(documents: list[str]) -> str:
    """Hash a corpus, document by document, in order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def _text_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"There is no file or folder {path}. Check the name.")
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".txt", ".jsonl") and p.is_file())
    if not files:
        raise FileNotFoundError(f"The folder {path} holds no .txt or .jsonl file. Name another, or a file.")
    return files


def _read_documents(file: Path, field: str) -> list[str]:
    text = read_text(file)
    if file.suffix.lower() != ".jsonl":
        return clean(text).split("\n\n")
    return [
        clean(_field_of(line, field, f"{file}, line {number}"))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def _field_of(line: str, field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
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
