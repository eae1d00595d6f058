"""Word order: in which orders forced words may come, so that no banned word or stop string arises where they meet."""

import functools
import math
from collections.abc import Iterable

_EVERY_ORDER = 8  # words of which every order is tried; of more the first are taken one by one

Tails = tuple[bytes, bytes]  # how a text ends: its longest end that begins a banned word, or a stop string


class WordOrder:
    """What banned words and stop strings allow to follow one another.

    Args:
        banned: the banned words, which may not arise from the end of a prompt either.
        stop: the stop strings, which count in what is written alone.
        can_part: whether there is a token that keeps any two words apart.
    """

    def __init__(self, banned: Iterable[bytes], stop: Iterable[bytes], can_part: bool):
        self._words = frozenset(banned), frozenset(stop)
        self._beginnings = [
            {word[:size] for word in words for size in range(len(word))} | {b""} for words in self._words
        ]
        self._can_part = can_part
        self._longest = max(map(len, self._beginnings[0]))
        self.after = functools.cache(self._after)
        self._fewest = functools.cache(self._fewest_partings)

    def begin(self, prompt: bytes) -> Tails:
        """Return the tails of a text of which nothing is written. What the prompt holds itself does not matter."""
        return self._tail(0, prompt[max(0, len(prompt) - self._longest) :]), b""

    def _tail(self, i: int, text: bytes) -> bytes:
        return next(text[first:] for first in range(len(text) + 1) if text[first:] in self._beginnings[i])

    def _after(self, tails: Tails, data: bytes) -> Tails | None:
        """Return the tails once bytes were written, None if they complete a banned word or a stop string."""
        new = []
        for i, tail in enumerate(tails):
            for byte in data:
                tail += bytes([byte])
                if any(tail[first:] in self._words[i] for first in range(len(tail))):
                    return None
                tail = self._tail(i, tail)
            new.append(tail)
        return tuple(new)

    def partings(self, tails: Tails, words: tuple[bytes, ...]) -> float:
        """Return how many parting tokens suffice for words to follow, infinity if they cannot: of few the fewest."""
        total, nearest, more = 0, list(words[:_EVERY_ORDER]), words[_EVERY_ORDER:]
        for word in more:
            fitting = (i for i, near in enumerate(nearest) if self.after(tails, near) is not None)
            if (i := next(fitting, None)) is None:
                i, tails, total = 0, (b"", b""), total + (1 if self._can_part else math.inf)
            tails, nearest[i] = self.after(tails, nearest[i]), word
        return total + self._fewest(tails, tuple(nearest))

    def _fewest_partings(self, tails: Tails, words: tuple[bytes, ...]) -> float:
        fewest = math.inf if words else 0
        for cost, before in ((0, tails), (1, (b"", b""))) if self._can_part else ((0, tails),):
            for word in words:
                if cost >= fewest:
                    return fewest
                if (after := self.after(before, word)) is not None:
                    rest = tuple(other for other in words if other != word)
                    fewest = min(fewest, cost + self._fewest(after, rest))
        return fewest

    def fits(self, tails: Tails | None, words: tuple[bytes, ...], room: float) -> bool:
        """Tell whether words may follow with so many tokens of room for what parts them."""
        if tails is None or room < 0:
            return False
        return (self._can_part and room >= len(words)) or self.partings(tails, words) <= room
