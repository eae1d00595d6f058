"""Drafts: texts written ahead, with the score of each forced word at every place where it may come.

While a text is drafted in a row of an engine, other rows read forced words token by token, each from the place of the
draft where it would begin: log p(word | text before). `forced_words.py` decides what is kept of a draft.
"""

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import numpy as np

from ..corpus.utf8 import complete_characters
from .batch import RandomNumbers, TextBatch, finite_log_softmax
from .engines.engine import Engine
from .sampler import Sampler
from .word_order import Tails, WordOrder

HORIZON = 64  # tokens that a draft looks ahead, within which a word is placed
SCORING_ROWS = 2  # next to each draft: how many words are scored at a time

Words = dict[bytes, list[int]]  # from words to their tokens


class Place(NamedTuple):
    """A forced word at a place of a draft.

    Attributes:
        before: how many tokens of the draft come before it.
        ids: its tokens.
        num_read: how many of them were read.
        score: the log-probability of these.
        remaining: the words that are still to come after it.
    """

    before: int
    ids: list[int]
    num_read: int
    score: float
    remaining: Words

    @property
    def mean_score(self) -> float:
        return self.score / self.num_read


class DraftedText:
    """A text in progress: what is kept of it, and the newest draft of what follows.

    Attributes:
        prefix: the ids it starts with.
        row: the row of the random numbers that it is drawn with.
        kept, kept_bytes, kept_tails: what was written and is final.
        log_probability: of what is kept.
        missing: the words that are still to come.
        is_done: whether nothing more is to be kept.
    """

    def __init__(self, prefix: list[int], tails: Tails, missing: Words, row: int):
        self.prefix, self.missing, self.row = prefix, missing, row
        self.kept, self.kept_bytes, self.log_probability, self.is_done = [], b"", 0.0, False
        self.kept_tails = tails

    def start_draft(self, room: int, longest_stop: int) -> None:
        needed = sum(map(len, self.missing.values()))
        self.spare = room - len(self.kept) - needed
        # After the last word, a draft goes on until no stop string can begin in the word: a token has a byte or more.
        self.limit = min(HORIZON if self.missing else max(HORIZON, longest_stop), self.spare)
        self.draft, self.log_probabilities, self.draft_bytes, self.tails = [], [], b"", self.kept_tails
        self.incomplete = b""  # the first bytes of a character at the end of the draft
        self.undrafted = self.missing  # the words that do not come in the draft either
        self.places, self.best_score = [], -np.inf  # where words were read to their end
        self.scoring = {}  # row -> `Place` of a word that is being read
        self.is_drafting, self.has_ended, self.first_logits = True, False, None

    def add_place(self, place: Place) -> None:
        self.places.append(place)
        self.best_score = max(self.best_score, place.score)


class Drafter:
    """Writes drafts, and scores forced words at their places.

    Args:
        sampler: chooses the tokens of drafts.
        token_bytes: the bytes of each token.
        words: the forced words.
        order: what may follow what.
        stop: the stop strings, as bytes.
        max_new_tokens: how many tokens each text may have.
    """

    def __init__(
        self,
        sampler: Sampler,
        token_bytes: list[bytes],
        words: Collection[bytes],
        order: WordOrder,
        stop: Iterable[bytes],
        max_new_tokens: int,
    ):
        self._sampler, self._bytes, self._words = sampler, token_bytes, words
        self._order, self._stop, self._room = order, list(stop), max_new_tokens
        self._longest = max(map(len, words))

    def draft(self, make_engine: Callable[[int], Engine], candidates: list[DraftedText], rng: RandomNumbers) -> None:
        """Draft each text to its end, or as far as it looks ahead, and score the words at its places."""
        rows_per_draft = 1 + SCORING_ROWS
        prefixes = [[*one.prefix, *one.kept] for one in candidates for _ in range(rows_per_draft)]
        written = [len(one.kept) for one in candidates for _ in range(rows_per_draft)]
        texts = TextBatch(make_engine(len(prefixes)), prefixes, written)
        for one in candidates:
            one.start_draft(self._room, max(map(len, self._stop), default=0))
        draft_rows = range(0, len(prefixes), rows_per_draft)
        next_tokens = dict.fromkeys(draft_rows)
        while next_tokens:
            rows = sorted(next_tokens)
            logits = texts.read(np.array(rows))
            log_probabilities = dict(zip(rows, finite_log_softmax(logits), strict=True))
            logits = dict(zip(rows, logits, strict=True))
            parents, next_tokens, drafting = np.arange(len(prefixes)), {}, []
            for row, one in zip(draft_rows, candidates, strict=True):
                self._continue_words(one, log_probabilities)
                if one.is_drafting:
                    self._assign_rows(one, self._new_places(one, log_probabilities[row]), row, parents)
                    one.is_drafting = len(one.draft) < one.limit
                    if one.is_drafting:
                        drafting.append((row, one))
                next_tokens.update({i: place.ids[place.num_read - 1] for i, place in one.scoring.items()})
            if (parents != np.arange(len(parents))).any():
                texts.copy(parents)
            if drafting:
                next_tokens |= self._draw(texts, drafting, logits, log_probabilities, rng)
            if next_tokens:
                rows = sorted(next_tokens)
                texts.write(np.array(rows), np.array([next_tokens[row] for row in rows]))
                ended = [row for row, one in drafting if not one.is_drafting]
                next_tokens = {row: token for row, token in next_tokens.items() if row not in ended}

    def _draw(self, texts: TextBatch, drafting, logits, log_probabilities, rng: RandomNumbers) -> dict[int, int]:
        """Draw the next token of each draft, and return them by row."""
        for row, one in drafting:
            logits[row][self._tokens_that_cut(one)] = -np.inf
        rows = np.array([row for row, _ in drafting])
        processed = self._sampler.process(np.stack([logits[row] for row in rows]), texts, rows)
        steps = np.array([len(one.kept) + len(one.draft) for _, one in drafting])
        uniforms = rng.take(np.array([one.row for _, one in drafting]), steps, 1)[:, 0]
        tokens = self._sampler.sample(processed, uniforms).tolist()
        for (row, one), token, allowed in zip(drafting, tokens, processed, strict=True):
            self._append(one, token, float(log_probabilities[row][token]), allowed)
        return dict(zip(rows.tolist(), tokens, strict=True))

    def _tokens_that_cut(self, one: DraftedText) -> list[int]:
        """Return the tokens that would complete a stop string that begins before the end of a word in the text."""
        text = one.kept_bytes + one.draft_bytes
        rests = tuple(
            end[size:]
            for end in self._stop
            for size in range(1, len(end))
            if text.endswith(end[:size]) and any(word in text and word not in text[:-size] for word in self._words)
        )
        return [i for i, data in enumerate(self._bytes) if data.startswith(rests)] if rests else []

    def _append(self, one: DraftedText, token: int, log_probability: float, allowed: np.ndarray) -> None:
        """Append a token to a draft, and note the words that it completes."""
        if not one.draft:
            one.first_logits = allowed
        one.draft.append(token)
        one.log_probabilities.append(log_probability)
        data = self._bytes[token]
        one.draft_bytes += data
        one.incomplete = complete_characters(one.incomplete + data)[1]
        one.tails = self._order.after(one.tails, data)
        one.has_ended = token == self._sampler.eos or one.tails is None
        one.is_drafting = not one.has_ended
        text = one.kept_bytes + one.draft_bytes
        if any(word in text[-len(word) - len(data) + 1 :] for word in one.undrafted):
            if one.tails is None:
                text = text[: min(text.index(end) for end in self._stop if end in text)]
            undrafted = {word: ids for word, ids in one.undrafted.items() if word not in text}
            is_new, one.undrafted = len(undrafted) < len(one.undrafted), undrafted
            if is_new and self.fits(one, one.tails, undrafted, len(one.draft)):
                one.add_place(Place(len(one.draft), [], 0, 0.0, undrafted))

    def _continue_words(self, one: DraftedText, log_probabilities: dict[int, np.ndarray]) -> None:
        """Add the score of the token after which words were read, and drop those less likely than one read whole."""
        scoring, one.scoring = one.scoring, {}
        for row, place in scoring.items():
            score = place.score + float(log_probabilities[row][place.ids[place.num_read]])
            place = place._replace(num_read=place.num_read + 1, score=score)
            if score > one.best_score:
                if place.num_read == len(place.ids):
                    one.add_place(place)
                else:
                    one.scoring[row] = place

    def _new_places(self, one: DraftedText, log_probabilities: np.ndarray) -> list[Place]:
        """Return the words that may come now, but those already known to be less likely than at an earlier place."""
        if one.incomplete:
            return []
        places = []
        for word, ids in one.undrafted.items():
            score, text = float(log_probabilities[ids[0]]), one.kept_bytes + one.draft_bytes
            if score <= one.best_score:
                continue
            remaining = self.remaining_after(one, one.tails, text, one.undrafted, word, len(one.draft))
            if remaining is not None:
                place = Place(len(one.draft), ids, 1, score, remaining)
                if len(ids) == 1:
                    one.add_place(place)
                else:
                    places.append(place)
        return places

    def _assign_rows(self, one: DraftedText, new: list[Place], draft_row: int, parents: np.ndarray) -> None:
        """Find rows to read words in: free ones, or those of words that are less likely, token by token."""
        for place in new:
            free = [row for row in range(draft_row + 1, draft_row + 1 + SCORING_ROWS) if row not in one.scoring]
            row = free[0] if free else min(one.scoring, key=lambda row: one.scoring[row].mean_score)
            if free or one.scoring[row].mean_score < place.mean_score:
                one.scoring[row] = place
                parents[row] = draft_row

    def remaining_after(
        self, one: DraftedText, tails: Tails, text: bytes, words: Words, word: bytes, num_tokens: int
    ) -> Words | None:
        """Return the words that are still to come after a word, or None if they could not follow it.

        A word that arises where others meet comes once more if it is needed to separate others.

        Args:
            one: the drafted text.
            tails: of the text before the word.
            text: that text.
            words: the words that are to come after that text.
            word: one of them.
            num_tokens: how many tokens of the text are not kept yet.
        """
        tails, end = self._order.after(tails, word), text[-self._longest :] + word
        others = {other: ids for other, ids in words.items() if other != word}
        unmet = {other: ids for other, ids in others.items() if other not in end}
        num_tokens += len(one.missing[word])
        fitting = (some for some in (unmet, others) if tails is not None and self.fits(one, tails, some, num_tokens))
        return next(fitting, None)

    def fits(self, one: DraftedText, tails: Tails, words: Words, num_tokens: int) -> bool:
        """Return whether words may follow a text of so many tokens beyond what is kept."""
        room = self._room - len(one.kept) - num_tokens - sum(map(len, words.values()))
        return room >= 0 and (not words or self._order.fits(tails, words, room))
