"""Vocabulary: counting the characters and words of documents, and ranking them by frequency."""

import functools
from collections import Counter
from collections.abc import Iterable

from .parallel import map_chunks
from .segmentation import segmenter
from .utf8 import SURROGATE


def rank_pieces(documents: Iterable[str], unit: str, user_dict: tuple[str, ...] = (), processes: int = 1) -> list[str]:
    """Rank the characters of documents, and with `unit="word"` their words, by frequency.

    Args:
        documents: the documents.
        unit: "char" or "word".
        user_dict: the lines of a jieba user dictionary; only for words.
        processes: how many processes segment.

    Returns:
        `list[str]`, the most frequent first. A character counts wherever it occurs, in words too.
    """
    counts = Counter()
    count = functools.partial(_count, unit=unit, user_dict=user_dict)
    for chunk_counts in map_chunks(count, documents, processes):
        counts.update(chunk_counts)
    # At equal counts characters go before words, which are made of them, then by code point.
    return sorted(counts, key=lambda piece: (-counts[piece], len(piece), piece))


def _count(documents: list[str], unit: str, user_dict: tuple[str, ...]) -> Counter:
    cut = segmenter(user_dict) if unit == "word" else None
    counts = Counter()
    for document in documents:
        counts.update(document)
        if cut:
            counts.update(word for word in cut(document) if len(word) > 1)
    # A vocabulary file cannot hold surrogates: they are encoded as bytes.
    return Counter({piece: n for piece, n in counts.items() if not SURROGATE.search(piece)})
