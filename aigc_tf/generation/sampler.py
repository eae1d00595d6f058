"""Sampler: the settings of sampling, checked in one place, and the choice of the next token that follows from them.

In order: bias, where bytes come only as they make whole characters (`utf8.py`), repeated n-grams and banned words,
penalties, temperature, top-k, typical, top-p, min-p, the draw.
Forced words stand above it (`generation/forced_words.py`): they take the place of the draw.
"""

import functools
import math

import numpy as np

from ..corpus import utf8
from ..corpus.tokenizer import Tokenizer
from . import processors
from .banned_words import BannedWords
from .settings import Settings, check_number

NOT_FINITE = "The model's logits are not finite (NaN or infinite). Its training failed: load an earlier one."


class Sampler:
    """Settings of sampling made ready for a tokenizer: its tables over the vocabulary.

    Args:
        tokenizer: the tokenizer.
        settings: what `check_sampling` gave.
        use_numba: sample with `engines/numba_sampling.py`.

    Attributes:
        biases: `float32 (8, V)`, added to the logits, by what is pending of a character: minus infinity for all that
            does not go on with it. A character is not begun whose other bytes are all banned.
        bias: the first of them, for a text of whole characters.
        after: what is pending after each token, `int8 (8, V)`.

    Raises:
        ValueError: a token of `logit_bias` is none of the vocabulary, or no token is left to choose.
    """

    def __init__(self, tokenizer: Tokenizer, settings: Settings, use_numba: bool = False):
        self.settings = settings
        self.use_numba = use_numba
        self.eos = tokenizer.EOS
        self.bias = np.zeros(tokenizer.vocab_size, np.float32)
        with np.errstate(over="ignore"):
            for token, bias in settings.logit_bias.items():
                self.bias[_token_id(tokenizer, token)] += _checked_bias(token, bias)
        if np.isposinf(self.bias).any():
            raise ValueError("logit_bias of a token that is named twice adds up to infinity. Lower it.")
        self.bias[[tokenizer.PAD, tokenizer.BOS]] = -np.inf
        banned = [word.encode("utf-8", "surrogatepass") for word in settings.banned]
        self.banned = BannedWords(banned, tokenizer.bytes_of_tokens if banned else ())
        self.bias[self.banned.held] = -np.inf
        self.biases, self.after = _by_pending(self.bias, tokenizer.BYTES)
        self.bias = self.biases[0]
        if np.isneginf(self.bias).all():
            raise ValueError("banned and logit_bias leave no token to choose, not even the end of the text.")
        exempt = [i for i in map(tokenizer.piece_id, settings.exempt) if i is not None]
        self.exempt = np.isin(np.arange(tokenizer.vocab_size), exempt)

    def process(self, logits: np.ndarray, texts, rows: np.ndarray) -> np.ndarray:
        """Apply the bias, the n-gram rule, the banned words and the penalties: what depends on the text so far.

        Args:
            logits: (R, V).
            texts: the `Batch` that they follow.
            rows: which of them, (R,).

        Returns:
            New logits (R, V).
        """
        s = self.settings
        logits = logits + self.biases[self.pending(texts, rows)]
        if not self.depends_on_text:
            return self._or_end(logits)
        ids, vocab_size = texts.so_far(rows), len(self.bias)
        if s.no_repeat_ngram is not None:
            repeating = processors.count_tokens(processors.repeating_tokens(ids, s.no_repeat_ngram), vocab_size) > 0
            logits[repeating & ~self.exempt] = -np.inf
        for row, text in enumerate(ids if self.banned.longest else ()):
            logits[row, self.banned.completing(text)] = -np.inf
        logits = self._or_end(logits)
        if s.repetition_penalty != 1:
            counts = np.where(self.exempt, 0, processors.count_tokens(ids, vocab_size))
            logits = processors.penalize_repetition(logits, counts, s.repetition_penalty)
        if s.presence_penalty or s.frequency_penalty:
            counts = np.where(self.exempt, 0, processors.count_tokens(texts.written(rows), vocab_size))
            logits = processors.penalize_counts(logits, counts, s.presence_penalty, s.frequency_penalty)
        return logits

    def pending(self, texts, rows: np.ndarray) -> np.ndarray:
        """Return what is pending of the newest character of some texts, as `utf8.py` numbers it, `int64 (R,)`."""
        pending = np.zeros(len(rows), np.int64)
        for ids in texts.ids[rows, max(0, texts.now - 3) : texts.now].T:  # more than three bytes are never pending
            pending = self.after[pending, ids]  # -1, no token, is the last one here, after which nothing is pending
        return pending.astype(np.int64)

    def _or_end(self, logits: np.ndarray) -> np.ndarray:
        """Let a text end for which nothing is left to come; in place."""
        highest = logits.max(axis=-1)
        if not (highest < np.inf).all():
            raise ValueError(NOT_FINITE)
        logits[highest == -np.inf, self.eos] = 0
        return logits

    @property
    def depends_on_text(self) -> bool:
        """Whether the adjustment depends on more of the text so far than its newest character."""
        s = self.settings
        neutral = (s.no_repeat_ngram, s.repetition_penalty, s.presence_penalty, s.frequency_penalty) == (None, 1, 0, 0)
        return not neutral or self.banned.longest > 0

    def sample(self, adjusted: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Choose a token from each row: the likeliest at temperature 0, or a draw from what the settings keep.

        Args:
            adjusted: logits (R, V) that `process` gave.
            uniforms: (R,), uniform in [0, 1).

        Returns:
            Ids, `int64 (R,)`.
        """
        if self.use_numba:
            return self._sample_compiled(adjusted, uniforms, None)
        s = self.settings
        return processors.sample(adjusted, uniforms, s.temperature or None, s.top_k, s.typical_p, s.top_p, s.min_p)

    def process_and_sample(self, logits: np.ndarray, texts, rows: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Adjust and choose as the methods of these names do."""
        if not self.use_numba or self.depends_on_text:
            return self.sample(self.process(logits, texts, rows), uniforms)
        return self._sample_compiled(logits, uniforms, self.pending(texts, rows))

    @functools.cached_property
    def sampling_args(self):
        """The adjustment and choice where no more of the text matters than its newest character, for compiled code."""
        from .engines.numba_sampling import SamplingArgs

        s, vocab_size = self.settings, len(self.bias)
        top_k = min(s.top_k or vocab_size, vocab_size)
        shares = s.typical_p or 1, s.top_p or 1, s.min_p or 0
        return SamplingArgs(
            self.biases, self.after, self.eos, np.float32(s.temperature), top_k, *map(np.float32, shares)
        )

    def _sample_compiled(self, logits, uniforms, pending):
        """Choose in compiled code, from logits that are adjusted already if `pending` is None."""
        from .engines.numba_sampling import sample

        args = self.sampling_args
        if pending is None:
            pending, args = (
                np.zeros(len(logits), np.int64),
                args._replace(bias=np.zeros((1, logits.shape[1]), np.float32)),
            )
        return self.check_numbers(sample(logits, uniforms, pending, args))

    @staticmethod
    def check_numbers(chosen: np.ndarray) -> np.ndarray:
        """Return what compiled code chose; refuse logits that were not finite."""
        from .engines.numba_sampling import NO_NUMBER

        if (chosen == NO_NUMBER).any():
            raise ValueError(NOT_FINITE)
        return chosen


def _by_pending(bias: np.ndarray, byte_ids: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return the bias by what is pending of a character, (8, V), and what is pending after each token, (8, V)."""
    may_come, after_byte = utf8.tables()
    biases = np.full((len(may_come), len(bias)), -np.inf, np.float32)
    biases[0] = bias
    biases[:, byte_ids] = np.where(may_come, bias[byte_ids], -np.inf)
    can_go_on = (biases > -np.inf).any(axis=1)
    biases[0, byte_ids][~can_go_on[after_byte[0]]] = -np.inf
    after = np.zeros(biases.shape, np.int8)
    after[:, byte_ids] = after_byte
    return biases, after


def _token_id(tokenizer: Tokenizer, token: str | int) -> int:
    if isinstance(token, str):
        ids = tokenizer.encode(token)
        if len(ids) != 1:
            raise ValueError(f"logit_bias takes single tokens, and {token!r} is {len(ids)}. Use banned or forced.")
        return ids[0]
    if not isinstance(token, int | np.integer):
        raise ValueError(f"logit_bias takes tokens as their text or their id, got {token!r}.")
    if not 0 <= token < tokenizer.vocab_size:
        raise ValueError(f"Ids of this vocabulary run from 0 to {tokenizer.vocab_size - 1}, got {token} in logit_bias.")
    return int(token)


def _checked_bias(token: str | int, bias: float) -> float:
    if bias != -math.inf:
        largest = float(np.finfo(np.float32).max)
        check_number("logit_bias", bias, lambda x: abs(x) <= largest, f"a number or minus infinity ({token!r})")
    return float(bias)
