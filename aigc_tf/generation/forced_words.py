"""Forcing: the words that a text must hold, and where they come.

A word comes where the model finds it likeliest. To know where that is, the text is drafted to its end, and at the
places of the draft the word is read whole, in rows beside it: log p(word | text before). The draft is kept up to the
best place, the word follows, and the rest is drafted anew, with the next word. Of n missing words the first comes in
the first n-th of a draft, so that there is room for all. Several texts are written in this way, and the one whose
tokens the model finds likeliest on average is taken.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..corpus.tokenizer import Tokenizer
from ..corpus.utf8 import complete_characters
from .batch import Batch, Noise, finite_log_softmax, log_probabilities
from .engines.engine import Engine
from .sampler import Sampler
from .word_order import EVERY_ORDER, WordOrder

CANDIDATES = 4  # texts written, of which one is taken
_HORIZON = 64  # tokens that a draft looks ahead, and so within which a word comes
_TRIALS = 2  # words that are read at a time beside a draft, each begun at another place


class _Place(NamedTuple):
    """A word in a draft: how many tokens stand before it, its tokens, those read, and the log-probability of these.

    Also the words that are still to come after it.
    """

    before: int
    ids: list[int]
    num_read: int
    score: float
    left: dict[bytes, list[int]]

    @property
    def average(self) -> float:
        return self.score / self.num_read


class _Candidate:
    """A text on its way: what is kept of it, the words it lacks, and the newest draft of what follows."""

    def __init__(self, begin: list[int], tails, missing: dict[bytes, list[int]], row: int):
        self.begin, self.missing, self.row = begin, missing, row
        self.kept, self.written, self.log_probability, self.is_done = [], b"", 0.0, False
        self.kept_tails = tails  # of the prompt and what is kept, for the order of the words

    def start(self, room: int, longest_stop: int) -> None:
        needed = sum(map(len, self.missing.values()))
        self.spare = room - len(self.kept) - needed
        # After the last word a draft goes on until no stop string can begin in the word: a token has a byte or more.
        self.limit = min(_HORIZON if self.missing else max(_HORIZON, longest_stop), self.spare)
        self.draft, self.log_probabilities, self.data, self.half, self.tails = [], [], b"", b"", self.kept_tails
        self.lacking = self.missing  # the words that come in the draft neither
        self.places, self.best = [], -np.inf  # where words were read whole, and the highest score of these
        self.trials = {}  # row -> `_Place`, where words are being read
        self.is_drafting, self.has_ended, self.first_logits = True, False, None

    def found(self, place: _Place) -> None:
        self.places.append(place)
        self.best = max(self.best, place.score)


class Forcing:
    """Write texts that hold the forced words of a sampler.

    Args:
        sampler: the sampler.
        tokenizer: the tokenizer.
        max_new_tokens: how many tokens each text may have.
        stop: the stop strings, as bytes: no word may complete one, nor a banned word.

    Attributes:
        rows_of_a_text: how many rows of an engine the texts need, each.

    Raises:
        ValueError: the words need more tokens than may be written.
    """

    rows_of_a_text = CANDIDATES * (1 + _TRIALS)

    def __init__(self, sampler: Sampler, tokenizer: Tokenizer, max_new_tokens: int, stop: list[bytes] = ()):
        self._sampler, self._room, self._stop = sampler, max_new_tokens, list(stop)
        forced = sampler.settings.forced
        self._words = {
            word.encode("utf-8", "surrogatepass"): tokenizer.encode(word)
            for word in forced
            if not any(word in other for other in forced if other != word)  # which comes with the other
        }
        needed = sum(map(len, self._words.values()))
        if needed > max_new_tokens:
            raise ValueError(f"The forced words need {needed} tokens, got max_new_tokens {max_new_tokens}. Allow more.")
        self._bytes = tokenizer.bytes_of_tokens
        banned = [word.encode("utf-8", "surrogatepass") for word in sampler.settings.banned]
        between = filter(None, map(self._characters, range(len(self._bytes))))
        self._order = WordOrder(banned, self._stop, self._words, between)
        self._longest = max(map(len, self._words))

    def _characters(self, token: int) -> str:
        """Return the characters of a token that may stand between words, nothing for others."""
        characters, rest = complete_characters(self._bytes[token])
        is_whole = characters.encode("utf-8", "surrogatepass") == self._bytes[token]
        return characters if is_whole and not rest and self._sampler.bias[token] > -np.inf else ""

    def check_prompt(self, prompt: str) -> None:
        """Refuse a prompt after which the words, and what keeps them from making a banned one, have no room."""
        tails, needed = self._order.begin(prompt.encode("utf-8", "surrogatepass")), sum(map(len, self._words.values()))
        more = self._order.partings(tails, tuple(self._words))
        if needed + more > self._room:
            where = f"After {prompt[-20:]!r} the" if prompt else "The"
            what = "complete a banned word or a stop string where they meet"
            if more == np.inf:
                raise ValueError(
                    f"{where} forced words {what} in each order tried, and no token may part them. Ban less."
                )
            need = "need" if len(self._words) <= EVERY_ORDER else "may need"
            raise ValueError(
                f"{where} forced words {what}; with tokens that part them they {need} {needed + more}, "
                f"got max_new_tokens {self._room}. Allow more."
            )

    def begin(
        self, make_engine: Callable[[int], Engine], begins: list[list[int]], chance: Noise
    ) -> list[tuple[int, list[int]]]:
        """Write texts until all words have come and some tokens beyond.

        Args:
            make_engine: from a number of rows to an engine.
            begins: the ids that each text begins with.
            chance: of `CANDIDATES` rows for each text.

        Returns:
            For each text the row of chance that it goes on with, and the ids written, the last of them the end of
            document if the text has ended.
        """
        prompts = [self._order.begin(b"".join(self._bytes[i] for i in begin)) for begin in begins]
        candidates = [
            _Candidate(begin, tails, dict(self._words), row * CANDIDATES + i)
            for row, (begin, tails) in enumerate(zip(begins, prompts, strict=True))
            for i in range(CANDIDATES)
        ]
        while unfinished := [candidate for candidate in candidates if not candidate.is_done]:
            self._draft(make_engine, unfinished, chance)
            self._bridge(make_engine, [one for one in unfinished if one.missing and not one.places])
            for candidate in unfinished:
                self._keep(candidate)
        of_each = [candidates[i : i + CANDIDATES] for i in range(0, len(candidates), CANDIDATES)]
        taken = [max(those, key=lambda one: one.log_probability / max(1, len(one.kept))) for those in of_each]
        return [(one.row, one.kept) for one in taken]

    def _draft(self, make_engine, candidates: list[_Candidate], chance: Noise) -> None:
        """Draft each text to its end, or as far as it looks ahead, and read the words beside it."""
        each = 1 + _TRIALS
        begins = [[*one.begin, *one.kept] for one in candidates for _ in range(each)]
        written = [len(one.kept) for one in candidates for _ in range(each)]
        engine = make_engine(len(begins))
        texts = Batch(engine, begins, written)
        for one in candidates:
            one.start(self._room, max(map(len, self._stop), default=0))
        next_tokens = dict.fromkeys(range(0, len(begins), each))
        while next_tokens:
            rows = sorted(next_tokens)
            logits = texts.read(np.array(rows))
            log_probabilities = dict(zip(rows, finite_log_softmax(logits), strict=True))
            logits = dict(zip(rows, logits, strict=True))
            parents, next_tokens, drafting = np.arange(len(begins)), {}, []
            for main, one in zip(range(0, len(begins), each), candidates, strict=True):
                self._read_on(one, log_probabilities)
                if one.is_drafting:
                    new = self._new_trials(one, log_probabilities[main])
                    self._begin_trials(one, new, main, parents)
                    one.is_drafting = len(one.draft) < one.limit
                    if one.is_drafting:
                        drafting.append((main, one))
                next_tokens.update({row: place.ids[place.num_read - 1] for row, place in one.trials.items()})
            if (parents != np.arange(len(parents))).any():
                texts.copy(parents)
            if drafting:
                mains = np.array([main for main, _ in drafting])
                for main, one in drafting:
                    logits[main][self._cutting(one)] = -np.inf
                adjusted = self._sampler.process(np.stack([logits[main] for main in mains]), texts, mains)
                steps = np.array([len(one.kept) + len(one.draft) for _, one in drafting])
                uniforms = chance.take(np.array([one.row for _, one in drafting]), steps, 1)[:, 0]
                for (main, one), token, allowed in zip(
                    drafting, self._sampler.sample(adjusted, uniforms).tolist(), adjusted, strict=True
                ):
                    self._append(one, token, float(log_probabilities[main][token]), allowed)
                    next_tokens[main] = token
            if next_tokens:
                rows = sorted(next_tokens)
                texts.write(np.array(rows), np.array([next_tokens[row] for row in rows]))
                ended = [main for main, one in drafting if not one.is_drafting]
                next_tokens = {row: token for row, token in next_tokens.items() if row not in ended}

    def _cutting(self, one: _Candidate) -> list[int]:
        """Return the tokens that would complete a stop string which begins before the end of a word that has come."""
        text = one.written + one.data
        rests = tuple(
            end[size:]
            for end in self._stop
            for size in range(1, len(end))
            if text.endswith(end[:size]) and any(word in text and word not in text[:-size] for word in self._words)
        )
        return [i for i, data in enumerate(self._bytes) if data.startswith(rests)] if rests else []

    def _append(self, one: _Candidate, token: int, log_probability: float, allowed: np.ndarray) -> None:
        """Add a token to a draft, and note the words that come with it."""
        if not one.draft:
            one.first_logits = allowed
        one.draft.append(token)
        one.log_probabilities.append(log_probability)
        data = self._bytes[token]
        one.data += data
        one.half = complete_characters(one.half + data)[1]
        one.tails = self._order.after(one.tails, data)
        one.has_ended = token == self._sampler.eos or one.tails is None
        one.is_drafting = not one.has_ended
        text = one.written + one.data
        if any(word in text[-len(word) - len(data) + 1 :] for word in one.lacking):
            if one.tails is None:
                text = text[: min(text.index(end) for end in self._stop if end in text)]
            before, one.lacking = one.lacking, {word: ids for word, ids in one.lacking.items() if word not in text}
            if len(one.lacking) < len(before) and self._fits(one, one.tails, one.lacking, len(one.draft)):
                one.found(_Place(len(one.draft), [], 0, 0.0, one.lacking))

    # --- words beside a draft ---------------------------------------------------------------------------------

    def _read_on(self, one: _Candidate, log_probabilities: dict[int, np.ndarray]) -> None:
        """Take account of a token read of each word, and keep on with those likelier than one that is read whole."""
        trials, one.trials = one.trials, {}
        for row, place in trials.items():
            score = place.score + float(log_probabilities[row][place.ids[place.num_read]])
            place = place._replace(num_read=place.num_read + 1, score=score)
            if score > one.best:
                if place.num_read == len(place.ids):
                    one.found(place)
                else:
                    one.trials[row] = place

    def _new_trials(self, one: _Candidate, log_probabilities: np.ndarray) -> list[_Place]:
        """Return the words that may come now and are not known to be less likely than at a place before."""
        if one.half:
            return []
        trials = []
        for word, ids in one.lacking.items():
            score, text = float(log_probabilities[ids[0]]), one.written + one.data
            if score <= one.best:
                continue
            left = self._left_after(one, one.tails, text, one.lacking, word, len(one.draft))
            if left is not None:
                place = _Place(len(one.draft), ids, 1, score, left)
                if len(ids) == 1:
                    one.found(place)
                else:
                    trials.append(place)
        return trials

    def _begin_trials(self, one: _Candidate, new: list[_Place], main: int, parents: np.ndarray) -> None:
        """Find rows for new trials: free ones, or those of trials less likely, token by token."""
        for place in new:
            free = [row for row in range(main + 1, main + 1 + _TRIALS) if row not in one.trials]
            row = free[0] if free else min(one.trials, key=lambda row: one.trials[row].average)
            if free or one.trials[row].average < place.average:
                one.trials[row] = place
                parents[row] = main

    # --- what is kept ----------------------------------------------------------------------------------------

    def _keep(self, one: _Candidate) -> None:
        """Keep a draft up to a word, and the word; or all of it if no word is missing."""
        kept, score = one.draft, 0.0
        if one.missing:
            end = len(one.draft) - one.has_ended  # what ends it comes after all words
            first_part = [place for place in one.places if place.before <= end // len(one.missing)]
            if first_part:
                place = max(first_part, key=lambda place: place.score)
            else:
                place = min(one.places, key=lambda place: place.before)
            kept, score = [*one.draft[: place.before], *place.ids], place.score
            one.log_probability += sum(one.log_probabilities[: place.before]) + score
            one.missing = place.left
        else:
            one.log_probability += sum(one.log_probabilities)
            one.is_done = True
        one.kept = [*one.kept, *kept]
        one.written = b"".join(self._bytes[i] for i in one.kept)
        one.kept_tails = functools.reduce(self._order.after, (self._bytes[i] for i in kept), one.kept_tails)
        one.is_done |= one.kept_tails is None  # at a stop string, before which all words have come

    def _left_after(self, one: _Candidate, tails, text: bytes, lacking, word: bytes, num_tokens: int) -> dict | None:
        """Return the words that are still to come after a word, or None if they could not follow it.

        A word that arises where others meet comes once more if it is needed to part others.

        Args:
            one: the candidate.
            tails: of the text before the word.
            text: that text.
            lacking: the words that it lacks.
            word: the word.
            num_tokens: how many tokens of the text are not kept yet.
        """
        tails, end = self._order.after(tails, word), text[-self._longest :] + word
        others = {other: ids for other, ids in lacking.items() if other != word}
        unmet = {other: ids for other, ids in others.items() if other not in end}
        num_tokens += len(one.missing[word])
        fitting = (left for left in (unmet, others) if tails is not None and self._fits(one, tails, left, num_tokens))
        return next(fitting, None)

    def _fits(self, one: _Candidate, tails, lacking: dict[bytes, list[int]], num_tokens: int) -> bool:
        """Tell whether the words that a text lacks, of so many tokens beyond what is kept, may follow it."""
        room = self._room - len(one.kept) - num_tokens - sum(map(len, lacking.values()))
        return room >= 0 and (not lacking or self._order.fits(tails, lacking, room))

    # --- words that have no place ----------------------------------------------------------------------------

    def _bridge(self, make_engine, candidates: list[_Candidate]) -> None:
        """Let a word follow at once where it was read at no place: the model gives it no probability, or it may not."""
        if candidates:
            begins, bridges = [[*one.begin, *one.kept] for one in candidates], list(map(self._bridged, candidates))
            scores = log_probabilities(Batch(make_engine(len(begins)), begins), [ids for ids, _ in bridges])
            for one, (ids, left), score in zip(candidates, bridges, scores.tolist(), strict=True):
                one.found(_Place(0, ids, len(ids), score, left))

    def _bridged(self, one: _Candidate) -> tuple[list[int], dict[bytes, list[int]]]:
        """Return a word, after the likeliest token that parts it from the text if need be, and what is to come then."""
        for word, ids in one.missing.items():
            left = self._left_after(one, one.kept_tails, one.written, one.missing, word, 0)
            if left is not None:
                return ids, left
        for token in np.argsort(-one.first_logits, kind="stable").tolist() if one.spare > 0 else ():
            if self._characters(token) and (tails := self._order.after(one.kept_tails, self._bytes[token])) is not None:
                text = one.written + self._bytes[token]
                for word, ids in one.missing.items():
                    if (left := self._left_after(one, tails, text, one.missing, word, 1)) is not None:
                        return [token, *ids], left
        words = ", ".join(repr(word.decode("utf-8", "surrogatepass")) for word in one.missing)
        raise ValueError(
            f"No room without a banned word or stop string for {words}. Raise max_new_tokens {self._room}."
        )
