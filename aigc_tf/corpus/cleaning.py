"""Text: what cleaning does to a text, and how documents are divided into training and held-out ones."""

import hashlib
import math
import os
import re

MOST_CHARS = 4_000  # of a document that is not cut into pieces to be split: some 30 contexts
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


def split(documents: list[str], valid_fraction: float = 0.05) -> tuple[list[str], list[str]]:
    """Divide documents into a training and a held-out side by a stable hash of each document.

    A document's side depends on its own text and `valid_fraction` alone: it does not change when others are added,
    removed or reordered, nor between machines. The exception is a corpus so small that one side would be empty: it
    gets the document whose hash is nearest to it.

    A document longer than 4,000 characters, such as a novel, is cut at line ends into pieces of at most so many
    (a longer line stays whole), and these are divided. Joined by newlines they are the document. An edit of a long
    document changes its later pieces, and so perhaps their sides.

    Args:
        documents: the documents.
        valid_fraction: the expected share of held-out documents, between 0 and 1.

    Returns:
        The training documents and the held-out documents, each `list[str]` in the order given.

    Raises:
        ValueError: `valid_fraction` is out of range, there are fewer than two different documents, or `documents` is
            one text.

    Example:
        >>> train_documents, valid_documents = split([f"第{i}首" for i in range(1000)])
        >>> len(train_documents), len(valid_documents)
        (949, 51)
    """
    check_documents(documents)
    if not 0 < valid_fraction < 1:
        raise ValueError(f"valid_fraction must lie between 0 and 1, got {valid_fraction}.")
    pieces = [piece for document in documents for piece in _pieces(document)]
    ranks = [_rank(piece) for piece in pieces]
    if len(set(ranks)) < 2:
        raise ValueError(
            f"A split needs at least two different documents, one to hold out, got {len(set(ranks))}. Separate "
            f"documents by blank lines, or add text; one of over {MOST_CHARS:,} characters is divided at line ends."
        )
    bound = min(max(valid_fraction, math.nextafter(min(ranks), 1)), max(ranks))
    train_documents = [piece for piece, rank in zip(pieces, ranks, strict=True) if rank >= bound]
    valid_documents = [piece for piece, rank in zip(pieces, ranks, strict=True) if rank < bound]
    return train_documents, valid_documents


def _pieces(document: str) -> list[str]:
    """Cut a document at line ends into pieces of at most `MOST_CHARS` characters, where its lines allow it."""
    pieces, start = [], 0
    while len(document) - start > MOST_CHARS:
        end = document.rfind("\n", start + 1, start + MOST_CHARS + 1)
        if end < 0:
            end = document.find("\n", start + MOST_CHARS)
        if end < 0:
            break
        pieces.append(document[start:end])
        start = end + 1
    return [*pieces, document[start:]]


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
