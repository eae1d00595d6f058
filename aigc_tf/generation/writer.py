"""Writer: the loop that reads, chooses and appends tokens until each text ends, and class Text, its result."""

import time
from collections.abc import Iterable, Iterator

import numpy as np

from ..models.weights import LstmWeights, TransformerWeights
from ..runtime.hardware import available_bytes, machine_bytes
from .banned_words import is_prefix
from .batch import RandomNumbers, TextBatch, log_probabilities
from .beams import search_beams
from .engines.engine import Engine, make_engine
from .forced_words import CANDIDATES, ForcedWords
from .processors import log_softmax
from .sampler import Sampler


class Text(str):
    """A generated text: a `str` of the prompt and what was written after it, with attributes.

    Attributes:
        new: what was written, without the prompt.
        ids: its tokens, with the end of document if the model ended the text.
        finish_reason: "stop" if the model ended the text or a stop string came, "length" if `max_new_tokens` were
            written.
        log_probability: natural logarithm of the probability that the model itself gives `ids`, without any settings;
            None unless asked for.
    """

    new: str = ""
    ids: tuple[int, ...] = ()
    finish_reason: str = "length"
    log_probability: float | None = None


_USUAL_BYTES = 4e9  # of free memory, where the system does not report it


def _bytes_per_text(source) -> int:
    """Estimate the memory that a text takes while it is written: KV cache or LSTM state, and logits."""
    if isinstance(source, TransformerWeights):
        return 8 * len(source.blocks) * source.position_embedding.size + 32 * len(source.token_embedding)
    if isinstance(source, LstmWeights):
        return 8 * sum(len(bias) for _, bias in source.layers) + 32 * len(source.token_embedding)
    return 8 * source.input_shape[1] * source.output_shape[-1]  # the logits of a window


class Writer:
    """An engine with the settings of generation, which knows when a text is finished."""

    def __init__(self, tokenizer, engine, source, settings, max_new_tokens, stop):
        self._tokenizer, self._engine, self._source = tokenizer, engine, source
        self._sampler = Sampler(tokenizer, settings, use_numba=engine == "numba")
        self._max_new_tokens = int(max_new_tokens)
        self._stop_bytes = [end.encode("utf-8", "surrogatepass") for end in stop]
        self._forced_words = None
        if settings.forced:
            self._forced_words = ForcedWords(self._sampler, tokenizer, self._max_new_tokens, self._stop_bytes)

    def texts_per_batch(self, samples: int) -> int:
        """Return how many texts of so many samples each fit into half of the free memory."""
        rows = samples * (ForcedWords.rows_per_text if self._forced_words else 1)
        return max(1, int(self._free_bytes() / 2 // (rows * _bytes_per_text(self._source))))

    def _free_bytes(self) -> float:
        return (available_bytes if self._engine == "device" else machine_bytes)() or _USUAL_BYTES

    def write(self, prefixes, seed: int, samples: int, scored: bool) -> list[tuple[list[int], float | None]]:
        """Write several samples after each prefix; return the ids of the likeliest one, and its score if `scored`."""
        per_batch = min(samples, self.texts_per_batch(len(prefixes))) if samples > 1 else 1
        best = None
        for first in range(0, samples, per_batch):
            new = self._write(prefixes, seed, range(first, min(samples, first + per_batch)), scored or samples > 1)
            best = [max(pair, key=_mean_log_probability) for pair in zip(best or new, new, strict=True)]
        return [(ids, score if scored else None) for ids, score in best]

    def _write(self, prefixes, seed: int, samples: range, scored: bool) -> list[tuple[list[int], float]]:
        """Write those samples in one batch, and return the likeliest after each prefix."""
        each = CANDIDATES if self._forced_words else 1
        numbers = range(samples.start * each, samples.stop * each)
        rng = RandomNumbers([(seed + i, j) if j else seed + i for i in range(len(prefixes)) for j in numbers])
        prefixes = [prefix for prefix in prefixes for _ in samples]
        rows, ids = self._begin(prefixes, rng)
        scores = np.zeros(len(prefixes))
        finished = np.array([self._is_finished(those) for those in ids])
        # With forced words the text is put together of several drafts, so it is scored as a whole at the end.
        scored_as_written = scored and self._forced_words is None
        steps = self._steps(prefixes, ids, rng, rows, finished, scores if scored_as_written else None)
        for column in steps:
            for row in np.flatnonzero(~finished):
                ids[row].append(int(column[row]))
                finished[row] = self._is_finished(ids[row])
        if scored and not scored_as_written:
            scores = log_probabilities(TextBatch(self._make_engine(len(prefixes)), prefixes), ids)
        written = list(zip(ids, scores.tolist(), strict=True))
        return [
            max(written[i : i + len(samples)], key=_mean_log_probability) for i in range(0, len(written), len(samples))
        ]

    def stream(self, prefix: list[int], seed: int) -> Iterator[int]:
        """Write one text, and yield its ids as they come."""
        rng = RandomNumbers([(seed, j) if j else seed for j in range(CANDIDATES if self._forced_words else 1)])
        rows, (ids,) = self._begin([prefix], rng)
        yield from ids
        finished = np.array([self._is_finished(ids)])
        for column in self._steps([prefix], [ids], rng, rows, finished, None):
            yield int(column[0])

    def search(self, prefixes, num_beams: int, length_penalty: float, scored: bool) -> list:
        """Search for the likeliest text after each prefix; return its ids, and its score if `scored`."""
        needed, free = num_beams * _bytes_per_text(self._source), self._free_bytes()
        if needed > free:
            raise ValueError(
                f"A beam search keeps num_beams texts in memory: {num_beams} need about {needed / 1e9:.3g} GB, and "
                f"{max(0, free) / 1e9:.3g} GB are free. Lower num_beams."
            )
        rows = [prefix for prefix in prefixes for _ in range(num_beams)]
        texts = TextBatch(self._make_engine(len(rows)), rows)
        is_stopped = self._is_stopped if self._stop_bytes else None
        found = search_beams(texts, self._sampler, num_beams, self._max_new_tokens, length_penalty, is_stopped)
        if not scored:
            return [(ids, None) for ids in found]
        scores = log_probabilities(TextBatch(self._make_engine(len(prefixes)), prefixes), found)
        return list(zip(found, scores.tolist(), strict=True))

    def check_prompt(self, prompt: str) -> None:
        """Raise ValueError if the forced words have no room after a prompt."""
        if self._forced_words:
            self._forced_words.check_prompt(prompt)

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield what was written, up to a stop string, in whole characters."""
        yield from self._tokenizer.decode_stream(_cut_at_stop(self._stop_bytes, ids, self._tokenizer), cut=True)

    def text(self, prompt: str, ids: list[int], log_probability: float | None) -> Text:
        """Make a `Text` of the ids written after a prompt."""
        new = "".join(self.pieces(ids))
        text = Text(prompt + new)
        text.new, text.ids, text.log_probability = new, tuple(ids), log_probability
        text.finish_reason = "stop" if self._is_stopped(ids) else "length"
        return text

    def _make_engine(self, num_rows: int) -> Engine:
        return make_engine(self._source, num_rows, self._engine)

    def _is_stopped(self, ids: list[int]) -> bool:
        """Return whether the last token ended the document or completed a stop string."""
        if not ids or ids[-1] == self._tokenizer.EOS:
            return bool(ids)
        longest = max(map(len, self._stop_bytes), default=0)
        data = b"".join(map(self._tokenizer.token_bytes, ids[-longest:] if longest else ()))
        return any(end in data for end in self._stop_bytes)

    def _is_finished(self, ids: list[int]) -> bool:
        return len(ids) >= self._max_new_tokens or self._is_stopped(ids)

    def _begin(self, prefixes, rng) -> tuple[np.ndarray, list[list[int]]]:
        """Write up to the last forced word, if there are any; return the row of `rng` and the ids for each text."""
        if self._forced_words is None:
            return np.arange(len(prefixes)), [[] for _ in prefixes]
        rows, ids = zip(*self._forced_words.write(self._make_engine, prefixes, rng), strict=True)
        return np.array(rows), list(ids)

    def _steps(self, prefixes, ids, rng, rows, finished, scores) -> Iterator[np.ndarray]:
        """Continue the texts: yield the ids of each step, (rows,). Texts marked in `finished` get no more tokens."""
        if self._engine == "device":
            from .engines import device_loop

            args = self._source, self._sampler, prefixes, rng, self._max_new_tokens, finished
            return device_loop.write_on_device(*args, log_probabilities=scores)
        written = [len(those) for those in ids]
        prefixes = [[*prefix, *those] for prefix, those in zip(prefixes, ids, strict=True)]
        texts = TextBatch(self._make_engine(len(prefixes)), prefixes, written)
        return write_steps(texts, self._sampler, rng, self._max_new_tokens, finished, scores, rows, np.array(written))


def _mean_log_probability(written: tuple[list[int], float]) -> float:
    ids, log_probability = written
    return log_probability / max(1, len(ids))


_SECONDS_AT_A_TIME = 0.02  # that compiled code may take before the reader of a stream sees what it wrote


def write_steps(
    texts: TextBatch,
    sampler: Sampler,
    rng: RandomNumbers,
    max_new_tokens: int,
    finished: np.ndarray,
    log_probabilities: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    written: np.ndarray | int = 0,
) -> Iterator[np.ndarray]:
    """Continue texts: yield the ids of each step, the end of document for a text that has ended.

    Args:
        texts: the texts.
        sampler: what chooses the tokens.
        rng: the random numbers it draws with.
        max_new_tokens: how many tokens each text may have.
        finished: `bool (rows,)`, the texts that get no more tokens; the caller may mark more between steps.
        log_probabilities: float (rows,), to which those of the tokens by the model itself are added; or None.
        rows: the row of `rng` for each text; None for the row of the same number.
        written: how many tokens each text has already.

    Returns:
        An iterator over `int64 (rows,)`.
    """
    rows = np.arange(len(finished)) if rows is None else rows
    written = np.broadcast_to(written, finished.shape).copy()
    has_ended, at_a_time = finished | (written >= max_new_tokens), 1
    may_compile = log_probabilities is None and not sampler.depends_on_text
    while len(active := np.flatnonzero(~(finished | has_ended))):
        num_compiled = texts.num_compiled_steps(active) if may_compile else 0
        if num_compiled:
            steps = min(num_compiled, at_a_time, max_new_tokens - int(written[active].max()))
            began = time.perf_counter()
            ids = texts.write_compiled(active, rng.take(rows[active], written[active], steps), sampler)
            at_a_time = 2 * at_a_time if time.perf_counter() - began < _SECONDS_AT_A_TIME / 2 else (at_a_time + 1) // 2
        else:
            logits, uniforms = texts.read(active), rng.take(rows[active], written[active], 1)[:, 0]
            ids = sampler.process_and_sample(logits, texts, active, uniforms)
            if log_probabilities is not None:
                log_probabilities[active] += log_softmax(logits)[np.arange(len(active)), ids]
            texts.write(active, ids)
            ids = ids[:, None]
        for column in ids.T:
            of_all = np.full(len(finished), sampler.eos)
            of_all[active] = np.where(column >= 0, column, sampler.eos)
            yield of_all
        written[active] += ids.shape[1]
        has_ended[active] = (ids[:, -1] < 0) | (ids[:, -1] == sampler.eos) | (written[active] >= max_new_tokens)


def _cut_at_stop(stop: list[bytes], ids: Iterable[int], tokenizer) -> Iterator[int]:
    """Yield the tokens of a text until a stop string comes, holding back those that may begin one.

    It compares bytes, as a character may take several tokens.
    """
    held, data, ordered = [], b"", sorted(stop)
    for i in ids:
        held.append(i)
        data += tokenizer.token_bytes(i)
        places = [data.index(end) for end in stop if end in data]
        open_ends = (first for first in range(len(data)) if is_prefix(data[first:], ordered))
        known = min(places) if places else next(open_ends, len(data))
        while held and (size := len(tokenizer.token_bytes(held[0]))) <= known:
            yield held.pop(0)
            data, known = data[size:], known - size
        if places:  # inside a token: what comes before the stop string is whole characters
            yield from (*tokenizer.encode(data[:known].decode()), tokenizer.EOS)
            return
    yield from held
