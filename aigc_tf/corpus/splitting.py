"""Splitting: dividing documents into training and held-out ones."""

import hashlib
import math

from .documents import check_documents

MAX_PIECE_CHARS = 4_000  # longer documents are cut into pieces before the split; some 30 contexts


def split(documents: list[str], valid_fraction: float = 0.05) -> tuple[list[str], list[str]]:
    """Divide documents into training and held-out documents, by a stable hash of each.

    The side of a document depends only on its text and `valid_fraction`: it does not change when other documents are
    added, removed or reordered, nor between machines. Only in a corpus so small that one side would be empty does that
    side get the document with the nearest hash.

    A document of more than 4,000 characters, such as a novel, is first cut at line ends into pieces of at most that
    length (a longer line stays whole), which are divided like documents. Joined by newlines, the pieces are the
    document. Editing a long document changes its later pieces, and so possibly their sides.

    Args:
        documents: the documents.
        valid_fraction: the expected share of held-out documents, between 0 and 1.

    Returns:
        The training documents and the held-out documents, each `list[str]` in the order given.

    Raises:
        ValueError: `valid_fraction` is out of range, there are fewer than two different documents, or `documents` is
            a single text.

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
            f"documents by blank lines, or add text; one over {MAX_PIECE_CHARS:,} characters is cut at line ends."
        )
    bound = min(max(valid_fraction, math.nextafter(min(ranks), 1)), max(ranks))
    train_documents = [piece for piece, rank in zip(pieces, ranks, strict=True) if rank >= bound]
    valid_documents = [piece for piece, rank in zip(pieces, ranks, strict=True) if rank < bound]
    return train_documents, valid_documents


def _pieces(document: str) -> list[str]:
    """Cut a document at line ends into pieces of at most `MAX_PIECE_CHARS` characters, where its lines allow it."""
    pieces, start = [], 0
    while len(document) - start > MAX_PIECE_CHARS:
        end = document.rfind("\n", start + 1, start + MAX_PIECE_CHARS + 1)
        if end < 0:
            end = document.find("\n", start + MAX_PIECE_CHARS)
        if end < 0:
            break
        pieces.append(document[start:end])
        start = end + 1
    return [*pieces, document[start:]]


def _rank(document: str) -> float:
    """Map a document to [0, 1) by its text alone."""
    digest = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
