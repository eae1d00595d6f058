"""Word order: the orders in which forced words may come, so that none completes a banned word or a stop string."""

import functools
import math
from collections.abc import Collection, Iterable

from .banned_words import is_prefix

MAX_WORDS_EXHAUSTIVE = 10  # of which every order is tried; with more, the first ones are chosen one by one

# How a text ends: its longest end that begins a banned word, and its longest end that begins a stop string.
Tails = tuple[bytes, bytes]


class WordOrder:
    """Which words may follow a text and each other, given banned words and stop strings.

    Args:
        banned: the banned words, which may not be completed from the end of a prompt either.
        stop: the stop strings, which are looked for only in what is written.
        words: the forced words.
        separators: the characters of each token that may come between words.
    """

    def __init__(
        self, banned: Iterable[bytes], stop: Iterable[bytes], words: Iterable[bytes], separators: Iterable[str]
    ):
        self._words = frozenset(banned), frozenset(stop)
        self._ordered = [sorted(words) for words in self._words]
        self._sizes = [{len(word) for word in words} for words in self._words]
        shared = _characters(b"".join([*self._words[0], *self._words[1]]))
        self._separating = {word for word in words if not shared & _characters(word)}
        self._can_separate = any(not shared & set(token) for token in separators)
        self._found = {}  # (tails, words) -> the number of separators in an order that was found
        self.after = functools.cache(self._after)
        self._fewest = functools.cache(self._fewest_separators)

    def begin(self, prompt: bytes) -> Tails:
        """Return the tails of a prompt after which nothing is written. Words within the prompt do not matter."""
        longest = max(self._sizes[0], default=0)
        return self._tail(0, prompt[max(0, len(prompt) - longest) :]), b""

    def _tail(self, i: int, text: bytes) -> bytes:
        ends = (text[first:] for first in range(len(text)))
        return next((end for end in ends if is_prefix(end, self._ordered[i])), b"")

    def _after(self, tails: Tails, data: bytes) -> Tails | None:
        """Return the tails after more bytes, or None if those complete a banned word or a stop string."""
        new = []
        for i, tail in enumerate(tails):
            for byte in data if self._words[i] else b"":
                tail += bytes([byte])
                if any(tail[-size:] in self._words[i] for size in self._sizes[i]):
                    return None
                tail = self._tail(i, tail)
            new.append(tail)
        return tuple(new)

    def separators_needed(self, tails: Tails, words: Collection[bytes]) -> float:
        """Return how many separating tokens suffice for words to follow, infinity if no order was found.

        Words that share no character with the banned words and stop strings separate others, too. With up to
        `MAX_WORDS_EXHAUSTIVE` other words the number is the smallest. With more, one order is looked for, which `fits`
        then knows.
        """
        others = frozenset(words) - self._separating
        more = self._look_for_order(tails, others) - (len(words) - len(others))
        return max(0, more) if self._can_separate or more <= 0 else math.inf

    def fits(self, tails: Tails | None, words: Collection[bytes], room: float) -> bool:
        """Return whether words may follow, with room for so many tokens that separate them.

        If so, there is a word, or a separating token and a word, after which the other words fit.
        """
        if tails is None or room < 0:
            return False
        others = frozenset(words) - self._separating
        num_separators = len(words) - len(others) + (room if self._can_separate else 0)
        if num_separators >= len(others):
            return True
        if len(others) <= MAX_WORDS_EXHAUSTIVE:
            return self._fewest(tails, others) <= num_separators
        return self._found.get((tails, others), math.inf) <= num_separators

    def _look_for_order(self, tails: Tails, words: frozenset[bytes]) -> float:
        follow = functools.cache(lambda tails: {word for word in words if self.after(tails, word) is not None})
        left, order = words, []
        while len(left) > MAX_WORDS_EXHAUSTIVE and (tails, left) not in self._found:
            is_separated = not follow(tails) & left
            order.append((tails, left, is_separated))
            if is_separated:
                tails = b"", b""
                if not follow(tails) & left:
                    return math.inf
                order.append((tails, left, False))
            # First the word with the fewest successors, if it has any: later those may be used up.
            ways = {word: len(follow(self.after(tails, word)) & left - {word}) for word in follow(tails) & left}
            word = min(sorted(ways), key=lambda word: ways[word] or math.inf)
            left -= {word}
            tails = self.after(tails, word)
        cost = self._fewest(tails, left) if len(left) <= MAX_WORDS_EXHAUSTIVE else self._found[tails, left]
        for *state, is_separated in reversed(order):
            cost += is_separated
            self._found[tuple(state)] = cost
        return cost

    def _fewest_separators(self, tails: Tails, words: frozenset[bytes]) -> float:
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
