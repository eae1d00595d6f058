"""Word order: in which orders forced words may come, so that no banned word or stop string arises where they meet."""

import functools
import math
from collections.abc import Collection, Iterable

from .banned_words import begins

EVERY_ORDER = 10  # words of which every order is tried; of more the first are taken one by one

Tails = tuple[bytes, bytes]  # how a text ends: its longest end that begins a banned word, or a stop string


class WordOrder:
    """What banned words and stop strings allow to follow one another.

    Args:
        banned: the banned words, which may not arise from the end of a prompt either.
        stop: the stop strings, which count in what is written alone.
        words: the forced words.
        between: the characters of each token that may stand between words.
    """

    def __init__(self, banned: Iterable[bytes], stop: Iterable[bytes], words: Iterable[bytes], between: Iterable[str]):
        self._words = frozenset(banned), frozenset(stop)
        self._ordered = [sorted(words) for words in self._words]
        self._sizes = [{len(word) for word in words} for words in self._words]
        shared = _characters(b"".join([*self._words[0], *self._words[1]]))
        self._apart = {word for word in words if not shared & _characters(word)}
        self._can_part = any(not shared & set(token) for token in between)
        self._found = {}  # (tails, words) -> the partings of an order that was found
        self.after = functools.cache(self._after)
        self._fewest = functools.cache(self._fewest_partings)

    def begin(self, prompt: bytes) -> Tails:
        """Return the tails of a text of which nothing is written. What the prompt holds itself does not matter."""
        longest = max(self._sizes[0], default=0)
        return self._tail(0, prompt[max(0, len(prompt) - longest) :]), b""

    def _tail(self, i: int, text: bytes) -> bytes:
        ends = (text[first:] for first in range(len(text)))
        return next((end for end in ends if begins(end, self._ordered[i])), b"")

    def _after(self, tails: Tails, data: bytes) -> Tails | None:
        """Return the tails once bytes were written, None if they complete a banned word or a stop string."""
        new = []
        for i, tail in enumerate(tails):
            for byte in data if self._words[i] else b"":
                tail += bytes([byte])
                if any(tail[-size:] in self._words[i] for size in self._sizes[i]):
                    return None
                tail = self._tail(i, tail)
            new.append(tail)
        return tuple(new)

    def partings(self, tails: Tails, words: Collection[bytes]) -> float:
        """Return how many tokens that part suffice for words to follow, infinity if no order was found.

        Words that share no character with what may not arise part others, too. Of up to `EVERY_ORDER` others it is the
        fewest. Of more one order is looked for, which `fits` will know.
        """
        others = frozenset(words) - self._apart
        more = self._look_for_order(tails, others) - (len(words) - len(others))
        return max(0, more) if self._can_part or more <= 0 else math.inf

    def fits(self, tails: Tails | None, words: Collection[bytes], room: float) -> bool:
        """Tell whether words may follow with so many tokens of room for what parts them.

        What fits goes on to fit: there is a word, or a token that parts and a word, after which the others do.
        """
        if tails is None or room < 0:
            return False
        others = frozenset(words) - self._apart
        num_parting = len(words) - len(others) + (room if self._can_part else 0)
        if num_parting >= len(others):
            return True
        if len(others) <= EVERY_ORDER:
            return self._fewest(tails, others) <= num_parting
        return self._found.get((tails, others), math.inf) <= num_parting

    def _look_for_order(self, tails: Tails, words: frozenset[bytes]) -> float:
        follow = functools.cache(lambda tails: {word for word in words if self.after(tails, word) is not None})
        left, order = words, []
        while len(left) > EVERY_ORDER and (tails, left) not in self._found:
            parted = not follow(tails) & left
            order.append((tails, left, parted))
            if parted:
                tails = b"", b""
                if not follow(tails) & left:
                    return math.inf
                order.append((tails, left, False))
            # First what leaves the fewest ways to go on, but for none: later they may be gone.
            ways = {word: len(follow(self.after(tails, word)) & left - {word}) for word in follow(tails) & left}
            word = min(sorted(ways), key=lambda word: ways[word] or math.inf)
            left -= {word}
            tails = self.after(tails, word)
        cost = self._fewest(tails, left) if len(left) <= EVERY_ORDER else self._found[tails, left]
        for *state, parted in reversed(order):
            cost += parted
            self._found[tuple(state)] = cost
        return cost

    def _fewest_partings(self, tails: Tails, words: frozenset[bytes]) -> float:
        fewest = math.inf if words else 0
        for cost, before in ((0, tails), (1, (b"", b""))):
            for word in sorted(words):
                if cost >= fewest:
                    return fewest
                if (after := self.after(before, word)) is not None:
                    fewest = min(fewest, cost + self._fewest(after, words - {word}))
        return fewest


def _characters(data: bytes) -> set[str]:
    return set(data.decode("utf-8", "surrogatepass"))
