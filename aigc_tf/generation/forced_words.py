"""Forced words: the words that a text must contain, and where they are placed.

A word is placed where the model finds it likeliest. To find that place, the text is drafted to its end, and the word is
scored at each place of the draft (`drafts.py`). The draft is kept up to the best place, the word follows, and the rest
is drafted again, with the next word. Of n missing words the first comes in the first n-th of a draft, so that there is
room for all. Several texts are written in this way, and the one with the highest mean log-probability is taken.
"""

import functools
from collections.abc import Callable

import numpy as np

from ..corpus.tokenizer import Tokenizer
from ..corpus.utf8 import complete_characters
from .batch import RandomNumbers, TextBatch, log_probabilities
from .drafts import SCORING_ROWS, DraftedText, Drafter, Place, Words
from .engines.engine import Engine
from .sampler import Sampler
from .word_order import MAX_WORDS_EXHAUSTIVE, WordOrder

CANDIDATES = 4  # texts written, of which one is taken


class ForcedWords:
    """Writes texts that contain the forced words of a sampler.

    Args:
        sampler: the sampler.
        tokenizer: the tokenizer.
        max_new_tokens: how many tokens each text may have.
        stop: the stop strings, as bytes. No word completes one of them, nor a banned word.

    Attributes:
        rows_per_text: how many rows of an engine each text needs.

    Raises:
        ValueError: the words need more tokens than may be written.
    """

    rows_per_text = CANDIDATES * (1 + SCORING_ROWS)

    def __init__(self, sampler: Sampler, tokenizer: Tokenizer, max_new_tokens: int, stop: list[bytes] = ()):
        self._sampler, self._room = sampler, max_new_tokens
        forced = sampler.settings.forced
        self._words = {
            word.encode("utf-8", "surrogatepass"): tokenizer.encode(word)
            for word in forced
            if not any(word in other for other in forced if other != word)  # such a word comes with the other
        }
        needed = sum(map(len, self._words.values()))
        if needed > max_new_tokens:
            raise ValueError(f"The forced words need {needed} tokens, got max_new_tokens {max_new_tokens}. Allow more.")
        self._bytes = tokenizer.bytes_of_tokens
        banned = [word.encode("utf-8", "surrogatepass") for word in sampler.settings.banned]
        separators = filter(None, map(self._whole_characters, range(len(self._bytes))))
        self._order = WordOrder(banned, stop, self._words, separators)
        self._drafter = Drafter(sampler, self._bytes, self._words, self._order, stop, max_new_tokens)

    def _whole_characters(self, token: int) -> str:
        """Return the characters of a token that may separate words, and "" for other tokens."""
        characters, rest = complete_characters(self._bytes[token])
        is_whole = characters.encode("utf-8", "surrogatepass") == self._bytes[token]
        return characters if is_whole and not rest and self._sampler.bias[token] > -np.inf else ""

    def check_prompt(self, prompt: str) -> None:
        """Raise ValueError if the words, and the tokens needed to separate them, have no room after a prompt."""
        tails, needed = self._order.begin(prompt.encode("utf-8", "surrogatepass")), sum(map(len, self._words.values()))
        more = self._order.separators_needed(tails, tuple(self._words))
        if needed + more > self._room:
            where = f"After {prompt[-20:]!r} the" if prompt else "The"
            what = "complete a banned word or a stop string where they meet"
            if more == np.inf:
                raise ValueError(
                    f"{where} forced words {what} in every order tried, and no token may separate them. Ban less."
                )
            need = "need" if len(self._words) <= MAX_WORDS_EXHAUSTIVE else "may need"
            raise ValueError(
                f"{where} forced words {what}; with tokens that separate them they {need} {needed + more}, "
                f"got max_new_tokens {self._room}. Allow more."
            )

    def write(
        self, make_engine: Callable[[int], Engine], prefixes: list[list[int]], rng: RandomNumbers
    ) -> list[tuple[int, list[int]]]:
        """Write texts until all words have come, and some tokens beyond.

        Args:
            make_engine: from a number of rows to an engine.
            prefixes: the ids that each text starts with.
            rng: the random numbers, `CANDIDATES` rows for each text.

        Returns:
            For each text the row of `rng` to continue with, and the ids written, the end of document last if the text
            has ended.
        """
        prompts = [self._order.begin(b"".join(self._bytes[i] for i in prefix)) for prefix in prefixes]
        candidates = [
            DraftedText(prefix, tails, dict(self._words), row * CANDIDATES + i)
            for row, (prefix, tails) in enumerate(zip(prefixes, prompts, strict=True))
            for i in range(CANDIDATES)
        ]
        while unfinished := [candidate for candidate in candidates if not candidate.is_done]:
            self._drafter.draft(make_engine, unfinished, rng)
            self._place_next(make_engine, [one for one in unfinished if one.missing and not one.places])
            for candidate in unfinished:
                self._keep(candidate)
        of_each = [candidates[i : i + CANDIDATES] for i in range(0, len(candidates), CANDIDATES)]
        taken = [max(those, key=lambda one: one.log_probability / max(1, len(one.kept))) for those in of_each]
        return [(one.row, one.kept) for one in taken]

    def _keep(self, one: DraftedText) -> None:
        """Keep a draft up to the best place of a word, and the word; or all of it if no word is missing."""
        kept, score = one.draft, 0.0
        if one.missing:
            end = len(one.draft) - one.has_ended  # what ends the text comes after all words
            first_part = [place for place in one.places if place.before <= end // len(one.missing)]
            if first_part:
                place = max(first_part, key=lambda place: place.score)
            else:
                place = min(one.places, key=lambda place: place.before)
            kept, score = [*one.draft[: place.before], *place.ids], place.score
            one.log_probability += sum(one.log_probabilities[: place.before]) + score
            one.missing = place.remaining
        else:
            one.log_probability += sum(one.log_probabilities)
            one.is_done = True
        one.kept = [*one.kept, *kept]
        one.kept_bytes = b"".join(self._bytes[i] for i in one.kept)
        one.kept_tails = functools.reduce(self._order.after, (self._bytes[i] for i in kept), one.kept_tails)
        one.is_done |= one.kept_tails is None  # at a stop string, before which all words have come

    def _place_next(self, make_engine, candidates: list[DraftedText]) -> None:
        """Place a word right after what is kept if it was scored nowhere: it has probability 0, or was not allowed."""
        if candidates:
            prefixes, words = [[*one.prefix, *one.kept] for one in candidates], list(map(self._next_word, candidates))
            scores = log_probabilities(TextBatch(make_engine(len(prefixes)), prefixes), [ids for ids, _ in words])
            for one, (ids, remaining), score in zip(candidates, words, scores.tolist(), strict=True):
                one.add_place(Place(0, ids, len(ids), score, remaining))

    def _next_word(self, one: DraftedText) -> tuple[list[int], Words]:
        """Return a word, after the likeliest token that separates it from the text if needed, and the words to come."""
        for word, ids in one.missing.items():
            remaining = self._drafter.remaining_after(one, one.kept_tails, one.kept_bytes, one.missing, word, 0)
            if remaining is not None:
                return ids, remaining
        for token in np.argsort(-one.first_logits, kind="stable").tolist() if one.spare > 0 else ():
            data = self._bytes[token]
            if self._whole_characters(token) and (tails := self._order.after(one.kept_tails, data)) is not None:
                text = one.kept_bytes + data
                for word, ids in one.missing.items():
                    remaining = self._drafter.remaining_after(one, tails, text, one.missing, word, 1)
                    if remaining is not None:
                        return [token, *ids], remaining
        words = ", ".join(repr(word.decode("utf-8", "surrogatepass")) for word in one.missing)
        raise ValueError(
            f"There is no room for {words} without completing a banned word or a stop string. "
            f"Raise max_new_tokens, now {self._room}."
        )
