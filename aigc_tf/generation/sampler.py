"""Sampler: the choice of the next token from logits, as the settings of sampling say.

In order: the bias, which also keeps UTF-8 well formed (`corpus/utf8.py`), repeated n-grams and banned words, penalties,
temperature, top-k, typical, top-p, min-p, the draw. Forced words replace the draw (`forced_words.py`).
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
    """The settings of sampling, prepared for a tokenizer as tables over its vocabulary.

    Args:
        tokenizer: the tokenizer.
        settings: what `check_sampling` gave.
        use_numba: whether to sample with `engines/numba_sampling.py`.

    Attributes:
        biases: `float32 (8, V)`, added to the logits; a row for each state that an incomplete character can be in
            (`corpus/utf8.py`), minus infinity for tokens that do not continue it. No character is begun that could not
            be completed, as all its other bytes are banned.
        bias: the first row, for a text of whole characters.
        after: the state after each token in each state, `int8 (8, V)`.

    Raises:
        ValueError: a token of `logit_bias` is not in the vocabulary, or no token is left to choose.
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
            raise ValueError("The two values of logit_bias for one token add up to infinity. Lower them.")
        self.bias[[tokenizer.PAD, tokenizer.BOS]] = -np.inf
        banned = [word.encode("utf-8", "surrogatepass") for word in settings.banned]
        self.banned = BannedWords(banned, tokenizer.bytes_of_tokens if banned else ())
        self.bias[self.banned.containing] = -np.inf
        self.biases, self.after = _by_pending(self.bias, tokenizer.BYTES)
        self.bias = self.biases[0]
        if np.isneginf(self.bias).all():
            raise ValueError("banned and logit_bias leave no token to choose, not even the end of the text. Ban less.")
        exempt = [i for i in map(tokenizer.piece_id, settings.exempt) if i is not None]
        self.exempt = np.isin(np.arange(tokenizer.vocab_size), exempt)

    def process(self, logits: np.ndarray, texts, rows: np.ndarray) -> np.ndarray:
        """Apply what depends on the text so far: the bias, the n-gram rule, the banned words and the penalties.

        Args:
            logits: (R, V).
            texts: the `TextBatch` whose next tokens they are for.
            rows: which rows of it, (R,).

        Returns:
            New logits (R, V).
        """
        s = self.settings
        logits = logits + self.biases[self.pending(texts, rows)]
        if not self.depends_on_text:
            return self._end_if_stuck(logits)
        ids, vocab_size = texts.so_far(rows), len(self.bias)
        if s.no_repeat_ngram is not None:
            repeating = processors.repeating_tokens(ids, s.no_repeat_ngram)
            is_repeating = processors.count_tokens_per_text(repeating, vocab_size) > 0
            logits[is_repeating & ~self.exempt] = -np.inf
        for row, text in enumerate(ids if self.banned.longest else ()):
            logits[row, self.banned.completing(text)] = -np.inf
        logits = self._end_if_stuck(logits)
        if s.repetition_penalty != 1:
            counts = np.where(self.exempt, 0, processors.count_tokens_per_text(ids, vocab_size))
            logits = processors.penalize_repetition(logits, counts, s.repetition_penalty)
        if s.presence_penalty or s.frequency_penalty:
            counts = np.where(self.exempt, 0, processors.count_tokens_per_text(texts.written(rows), vocab_size))
            logits = processors.penalize_counts(logits, counts, s.presence_penalty, s.frequency_penalty)
        return logits

    def pending(self, texts, rows: np.ndarray) -> np.ndarray:
        """Return the state of the newest character of each text, 0 if complete (`corpus/utf8.py`), `int64 (R,)`."""
        pending = np.zeros(len(rows), np.int64)
        for ids in texts.ids[rows, max(0, texts.end - 3) : texts.end].T:  # at most three bytes are pending
            pending = self.after[pending, ids]  # -1, no token, indexes the last one, after which nothing is pending
        return pending.astype(np.int64)

    def _end_if_stuck(self, logits: np.ndarray) -> np.ndarray:
        """Allow the end of document where no token is left; in place."""
        highest = logits.max(axis=-1)
        if not (highest < np.inf).all():
            raise ValueError(NOT_FINITE)
        logits[highest == -np.inf, self.eos] = 0
        return logits

    @property
    def depends_on_text(self) -> bool:
        """Whether `process` depends on more of the text than its newest character."""
        s = self.settings
        neutral = (s.no_repeat_ngram, s.repetition_penalty, s.presence_penalty, s.frequency_penalty) == (None, 1, 0, 0)
        return not neutral or self.banned.longest > 0

    def sample(self, processed: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Choose a token from each row: the likeliest at temperature 0, or a draw from what the settings keep.

        Args:
            processed: logits (R, V) that `process` gave.
            uniforms: (R,), uniform in [0, 1).

        Returns:
            Ids, `int64 (R,)`.
        """
        if self.use_numba:
            return self._sample_compiled(processed, uniforms, None)
        s = self.settings
        return processors.sample(processed, uniforms, s.temperature or None, s.top_k, s.typical_p, s.top_p, s.min_p)

    def process_and_sample(self, logits: np.ndarray, texts, rows: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Do what `process` and `sample` do, in one compiled function if possible."""
        if not self.use_numba or self.depends_on_text:
            return self.sample(self.process(logits, texts, rows), uniforms)
        return self._sample_compiled(logits, uniforms, self.pending(texts, rows))

    @functools.cached_property
    def sampling_args(self):
        """What compiled code needs to choose a token, if only the newest character of the text matters."""
        from .engines.numba_sampling import SamplingArgs

        s, vocab_size = self.settings, len(self.bias)
        top_k = min(s.top_k or vocab_size, vocab_size)
        shares = s.typical_p or 1, s.top_p or 1, s.min_p or 0
        return SamplingArgs(
            self.biases, self.after, self.eos, np.float32(s.temperature), top_k, *map(np.float32, shares)
        )

    def _sample_compiled(self, logits, uniforms, pending):
        """Choose in compiled code; `pending` is None for logits that are processed already."""
        from .engines.numba_sampling import sample

        args = self.sampling_args
        if pending is None:
            pending, args = (
                np.zeros(len(logits), np.int64),
                args._replace(bias=np.zeros((1, logits.shape[1]), np.float32)),
            )
        return self.check_finite(sample(logits, uniforms, pending, args))

    @staticmethod
    def check_finite(chosen: np.ndarray) -> np.ndarray:
        """Return the tokens that compiled code chose, or raise ValueError if logits were not finite."""
        from .engines.numba_sampling import NOT_FINITE_ID

        if (chosen == NOT_FINITE_ID).any():
            raise ValueError(NOT_FINITE)
        return chosen


def _by_pending(bias: np.ndarray, byte_ids: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return the bias for each state of an incomplete character, and the state after each token, both (8, V)."""
    may_come, after_byte = utf8.transition_tables()
    biases = np.full((len(may_come), len(bias)), -np.inf, np.float32)
    biases[0] = bias
    biases[:, byte_ids] = np.where(may_come, bias[byte_ids], -np.inf)
    can_continue = (biases > -np.inf).any(axis=1)
    biases[0, byte_ids][~can_continue[after_byte[0]]] = -np.inf
    after = np.zeros(biases.shape, np.int8)
    after[:, byte_ids] = after_byte
    return biases, after


def _token_id(tokenizer: Tokenizer, token: str | int) -> int:
    if isinstance(token, str):
        ids = tokenizer.encode(token)
        if len(ids) != 1:
            raise ValueError(
                f"logit_bias takes single tokens, and {token!r} is {len(ids)}. Use banned or forced for it."
            )
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
