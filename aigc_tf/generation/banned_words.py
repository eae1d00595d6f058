"""Banned words: the tokens that contain one, or would complete one, however the text is tokenised."""

import bisect
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from ..corpus import utf8


class BannedWords:
    """Banned words, prepared for a vocabulary.

    The first bytes of a character are banned too if every way to complete it is banned, as nothing could follow them.

    Args:
        words: in UTF-8.
        token_bytes: the bytes of each token.

    Attributes:
        containing: the ids of the tokens that contain a word.
        longest: how many of the newest bytes of a text decide at most what would complete a word.
    """

    def __init__(self, words: Iterable[bytes], token_bytes: Sequence[bytes]):
        words = _closed(set(words))
        self._token_bytes = token_bytes
        self.containing = [i for i, data in enumerate(token_bytes) if _contains(data, words, set(map(len, words)))]
        self._words = sorted(word for word in words if len(word) > 1)
        self.longest = max(map(len, self._words), default=1) - 1
        self._ids = sorted(range(len(token_bytes)), key=token_bytes.__getitem__)
        self._ordered = [token_bytes[i] for i in self._ids]
        self._completing = functools.cache(self._find_completing)

    def completing(self, text: np.ndarray) -> np.ndarray:
        """Return the tokens that would complete a word after a text of ids (T,), -1 for none: ids `int64`."""
        data = b"".join(self._token_bytes[i] for i in text[-self.longest :] if i >= 0)
        ends = (data[first:] for first in range(max(0, len(data) - self.longest), len(data)))
        found = [self._completing(end) for end in ends if is_prefix(end, self._words)]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def _find_completing(self, beginning: bytes) -> np.ndarray:
        ids = set()
        for word in self._words[slice(*_range(beginning, self._words))]:
            if rest := word[len(beginning) :]:
                ids.update(self._ids[slice(*_range(rest, self._ordered))])
        return np.array(sorted(ids), np.int64)


def is_prefix(beginning: bytes, ordered: list[bytes]) -> bool:
    """Return whether one of some words, which are sorted, begins so."""
    first = bisect.bisect_left(ordered, beginning)
    return first < len(ordered) and ordered[first].startswith(beginning)


def _range(beginning: bytes, ordered: list[bytes]) -> tuple[int, int]:
    # No byte of UTF-8 is 255, so all words that begin so sort before this.
    return bisect.bisect_left(ordered, beginning), bisect.bisect_left(ordered, beginning + b"\xff")


def _contains(data: bytes, words: set[bytes], sizes: set[int]) -> bool:
    return any(data[i : i + size] in words for size in sizes for i in range(len(data) - size + 1))


def _closed(words: set[bytes]) -> set[bytes]:
    may_come, after = utf8.transition_tables()
    endings, after = [np.flatnonzero(row).tolist() for row in may_come], after.tolist()

    def is_dead(beginning, sizes):
        pending = 0
        for byte in beginning[-3:]:
            pending = after[pending][byte]
        grown = (beginning + bytes([byte]) for byte in endings[pending])
        return pending and all(any(data[-size:] in words for size in sizes) for data in grown)

    ends = words
    while ends:  # a byte less of a character each time
        sizes = set(map(len, words))
        ends = {beginning for beginning in {word[:-1] for word in ends} if is_dead(beginning, sizes)}
        words = words | ends
    return words
