"""Forcing: the words that a text must hold, and where they come."""

import numpy as np

from .sampler import Sampler
from .sampling import softmax
from .tokenizer import Tokenizer, complete_characters

_WITHIN = 16  # tokens in which a forced word comes, where it is as likely everywhere


class Forcing:
    """The forced words that one text still lacks, and when each begins.

    A word begins where it is likely compared with the text so far, on the average within `_WITHIN` tokens;
    at the latest when the room runs out. Until all have come the text does not end.

    Args:
        sampler: the sampler of the text.
        tokenizer: the tokenizer.
        prompt: how the text begins.
        max_new_tokens: how many tokens may be written.

    Raises:
        ValueError: the words need more tokens than may be written.
    """

    def __init__(self, sampler: Sampler, tokenizer: Tokenizer, prompt: str, max_new_tokens: int):
        self._eos = tokenizer.EOS
        self._banned = [word.encode("utf-8", "surrogatepass") for word in sampler.settings.banned]
        forced = sampler.settings.forced
        self._missing = {
            word.encode("utf-8", "surrogatepass"): tokenizer.encode(word)
            for word in forced
            if not any(word in other for other in forced if other != word)  # which comes with the other
        }
        if self._needed() > max_new_tokens:
            raise ValueError(
                f"The forced words need {self._needed()} tokens, got max_new_tokens {max_new_tokens}. Allow more."
            )
        self._bytes = data = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self._beginning = [i for i, held in enumerate(data) if complete_characters(held)[1]]
        self._not_continuing = [i for i, held in enumerate(data) if not (len(held) == 1 and 0x80 <= held[0] < 0xC0)]
        self._text = prompt.encode("utf-8", "surrogatepass")
        self._written = b""
        self._half_written = b""
        self._rest = []  # of the word begun
        self._odds, self._num_odds, self._urge = 0.0, 0, 0.0

    def _needed(self) -> int:
        return sum(map(len, self._missing.values()))

    def constrain(self, logits: np.ndarray, steps_left: int) -> None:
        """Leave those tokens that a forced word allows now: its own, where one begins or goes on.

        Args:
            logits: adjusted, (V,); those tokens that must not come get minus infinity, in place.
            steps_left: how many tokens may be written, this one among them.
        """
        if not self._missing:
            return
        if not self._rest:
            word = None if self._half_written else self._fitting_word(steps_left)
            if word and (self._is_due(logits, self._missing[word][0]) or steps_left <= self._needed()):
                self._rest = list(self._missing[word])
        if not self._rest:
            logits[self._eos] = -np.inf
            if steps_left - self._needed() < 4:  # a character spelt in bytes takes up to 4
                logits[self._not_continuing if self._half_written else self._beginning] = -np.inf
                self._keep_words_possible(logits)
            if np.isneginf(logits).all():
                self._rest = list(next(iter(self._missing.values())))
        if self._rest:
            logits[:] = -np.inf
            logits[self._rest.pop(0)] = 0

    def _fitting_word(self, steps_left: int) -> bytes | None:
        """Return a word that there is room for and that completes no banned one; at best others may follow it."""
        if order := self._order(self._text, list(self._missing)):
            return order[0]
        for word, ids in self._missing.items():
            if len(ids) <= steps_left and self._fits(self._text, word):
                return word
        return None

    def _order(self, text: bytes, words: list[bytes]) -> list[bytes] | None:
        """Return an order in which the words may follow a text and one another, or None."""
        for word in words:
            if self._fits(text, word):
                others = self._order(text + word, [other for other in words if other != word])
                if others is not None:
                    return [word, *others]
        return None if words else []

    def _fits(self, text: bytes, word: bytes) -> bool:
        return not any(banned in text[max(0, len(text) - len(banned) + 1) :] + word for banned in self._banned)

    def _keep_words_possible(self, logits: np.ndarray) -> None:
        """Leave those tokens after which some word may come without completing a banned one."""
        tail = self._text[-max(map(len, self._banned), default=0) :]
        for i in np.flatnonzero(logits > -np.inf) if self._banned else ():
            if not any(self._fits(tail + self._bytes[i], word) for word in self._missing):
                logits[i] = -np.inf

    def _is_due(self, logits: np.ndarray, first: int) -> bool:
        probability = float(softmax(logits)[first])
        self._odds, self._num_odds = self._odds + probability, self._num_odds + 1
        self._urge += probability * self._num_odds / self._odds / _WITHIN if self._odds else 1 / _WITHIN
        return self._urge >= 1

    def note(self, token: int) -> None:
        """Take account of the token written."""
        data = self._bytes[token]
        self._text, self._written = self._text + data, self._written + data
        self._half_written = complete_characters(self._half_written + data)[1]
        come = [word for word in self._missing if word in self._written]
        for word in come:
            del self._missing[word]
        if come:
            self._odds, self._num_odds, self._urge = 0.0, 0, 0.0
