"""Writer: class Writer, an engine that writes texts with some settings, and class Text, what is written."""

import time
from collections.abc import Iterable, Iterator

import numpy as np

from ..models.weights import LstmWeights, TransformerWeights
from ..runtime.hardware import available_bytes, machine_bytes
from .banned_words import begins
from .batch import Batch, Noise, log_probabilities
from .beams import search_beams
from .engines.engine import Engine, make_engine
from .forced_words import CANDIDATES, Forcing
from .processors import log_softmax
from .sampler import Sampler


class Text(str):
    """What was written: a `str`, the prompt and what follows it, which also tells how it came.

    Attributes:
        new: what was written, without the prompt.
        ids: the tokens of that, with the end of document if the model ended the text.
        finish_reason: "stop" if the model ended the text or a stop string came, "length" if the tokens ran out.
        log_probability: the natural logarithm of the probability that the model itself, before all settings, gives to
            `ids`; None if it was not asked for.
    """

    new: str = ""
    ids: tuple[int, ...] = ()
    finish_reason: str = "length"
    log_probability: float | None = None


_USUAL_BYTES = 4e9  # of memory, where the system does not tell how much is free


def _bytes_of_a_text(source) -> int:
    """Return about how much memory a text takes while it is written: cache or state, and logits."""
    if isinstance(source, TransformerWeights):
        return 8 * len(source.blocks) * source.position_embedding.size + 32 * len(source.token_embedding)
    if isinstance(source, LstmWeights):
        return 8 * sum(len(bias) for _, bias in source.layers) + 32 * len(source.token_embedding)
    return 8 * source.input_shape[1] * source.output_shape[-1]  # the logits of a window


class Writer:
    """What writes texts: an engine with the settings, and when a text is over."""

    def __init__(self, tokenizer, engine, source, settings, max_new_tokens, stop):
        self._tokenizer, self._engine, self._source = tokenizer, engine, source
        self._sampler = Sampler(tokenizer, settings, use_numba=engine == "numba")
        self._max_new_tokens = int(max_new_tokens)
        self._stop_bytes = [end.encode("utf-8", "surrogatepass") for end in stop]
        self._forcing = None
        if settings.forced:
            self._forcing = Forcing(self._sampler, tokenizer, self._max_new_tokens, self._stop_bytes)

    def num_texts_at_once(self, samples: int) -> int:
        """Return how many texts of so many samples each are written at a time: in a half of the memory that is free."""
        rows = samples * (Forcing.rows_of_a_text if self._forcing else 1)
        return max(1, int(self._free_bytes() / 2 // (rows * _bytes_of_a_text(self._source))))

    def _free_bytes(self) -> float:
        return (available_bytes if self._engine == "device" else machine_bytes)() or _USUAL_BYTES

    def write(self, begins, seed: int, samples: int, scored: bool) -> list[tuple[list[int], float | None]]:
        """Write several samples after each of some beginnings, and return the ids of the likeliest and their score."""
        at_once = min(samples, self.num_texts_at_once(len(begins))) if samples > 1 else 1
        best = None
        for first in range(0, samples, at_once):
            new = self._write(begins, seed, range(first, min(samples, first + at_once)), scored or samples > 1)
            best = [max(pair, key=_average) for pair in zip(best or new, new, strict=True)]
        return [(ids, score if scored else None) for ids, score in best]

    def _write(self, begins, seed: int, samples: range, scored: bool) -> list[tuple[list[int], float]]:
        """Write those samples, and return the likeliest of each beginning."""
        each = CANDIDATES if self._forcing else 1
        numbers = range(samples.start * each, samples.stop * each)
        chance = Noise([(seed + i, j) if j else seed + i for i in range(len(begins)) for j in numbers])
        begins = [begin for begin in begins for _ in samples]
        rows, ids = self._begin(begins, chance)
        scores = np.zeros(len(begins))
        over = np.array([self._is_over(those) for those in ids])
        # Forced words were not read in one go from the prompt, as the model reads a text: that is done at the end.
        at_once = scored and self._forcing is None
        steps = self._steps(begins, ids, chance, rows, over, scores if at_once else None)
        for column in steps:
            for row in np.flatnonzero(~over):
                ids[row].append(int(column[row]))
                over[row] = self._is_over(ids[row])
        if scored and not at_once:
            scores = log_probabilities(Batch(self._make_engine(len(begins)), begins), ids)
        written = list(zip(ids, scores.tolist(), strict=True))
        return [max(written[i : i + len(samples)], key=_average) for i in range(0, len(written), len(samples))]

    def stream(self, begin: list[int], seed: int) -> Iterator[int]:
        """Write one text, and give its ids as they come."""
        chance = Noise([(seed, j) if j else seed for j in range(CANDIDATES if self._forcing else 1)])
        rows, (ids,) = self._begin([begin], chance)
        yield from ids
        over = np.array([self._is_over(ids)])
        for column in self._steps([begin], [ids], chance, rows, over, None):
            yield int(column[0])

    def search(self, begins, num_beams: int, length_penalty: float, scored: bool) -> list:
        """Search for the likeliest text after each of some beginnings, and return its ids and their score."""
        needed, free = num_beams * _bytes_of_a_text(self._source), self._free_bytes()
        if needed > free:
            raise ValueError(
                f"A search keeps num_beams texts in memory: {num_beams} need about {needed / 1e9:.3g} GB, and "
                f"{max(0, free) / 1e9:.3g} GB are free. Lower num_beams."
            )
        texts = Batch(self._make_engine(len(begins) * num_beams), [begin for begin in begins for _ in range(num_beams)])
        is_stopped = self._is_stopped if self._stop_bytes else None
        found = search_beams(texts, self._sampler, num_beams, self._max_new_tokens, length_penalty, is_stopped)
        if not scored:
            return [(ids, None) for ids in found]
        scores = log_probabilities(Batch(self._make_engine(len(begins)), begins), found)
        return list(zip(found, scores.tolist(), strict=True))

    def check_prompt(self, prompt: str) -> None:
        """Refuse a prompt after which the forced words have no room."""
        if self._forcing:
            self._forcing.check_prompt(prompt)

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """Decode what was written, up to a stop string, in whole characters."""
        yield from self._tokenizer.decode_stream(_until(self._stop_bytes, ids, self._tokenizer), cut=True)

    def text(self, prompt: str, ids: list[int], log_probability: float | None) -> Text:
        """Make the result of what was written after a prompt."""
        new = "".join(self.pieces(ids))
        text = Text(prompt + new)
        text.new, text.ids, text.log_probability = new, tuple(ids), log_probability
        text.finish_reason = "stop" if self._is_stopped(ids) else "length"
        return text

    def _make_engine(self, num_rows: int) -> Engine:
        return make_engine(self._source, num_rows, self._engine)

    def _is_stopped(self, ids: list[int]) -> bool:
        """Tell whether the last token ended the document, or completed a stop string."""
        if not ids or ids[-1] == self._tokenizer.EOS:
            return bool(ids)
        longest = max(map(len, self._stop_bytes), default=0)
        data = b"".join(map(self._tokenizer.token_bytes, ids[-longest:] if longest else ()))
        return any(end in data for end in self._stop_bytes)

    def _is_over(self, ids: list[int]) -> bool:
        return len(ids) >= self._max_new_tokens or self._is_stopped(ids)

    def _begin(self, begins, chance) -> tuple[np.ndarray, list[list[int]]]:
        """Write what must come first: forced words and what is before; return the row of chance and the ids of each."""
        if self._forcing is None:
            return np.arange(len(begins)), [[] for _ in begins]
        rows, ids = zip(*self._forcing.begin(self._make_engine, begins, chance), strict=True)
        return np.array(rows), list(ids)

    def _steps(self, begins, ids, chance, rows, over, scores) -> Iterator[np.ndarray]:
        """Write on, and give the ids of each step, (rows,); no more to a text once it is marked as over."""
        if self._engine == "device":
            from .engines import device_loop

            limit = self._max_new_tokens
            return device_loop.steps(self._source, self._sampler, begins, chance, limit, over, log_probabilities=scores)
        written = [len(those) for those in ids]
        begins = [[*begin, *those] for begin, those in zip(begins, ids, strict=True)]
        texts = Batch(self._make_engine(len(begins)), begins, written)
        return write_on(texts, self._sampler, chance, self._max_new_tokens, over, scores, rows, np.array(written))


def _average(written: tuple[list[int], float]) -> float:
    """Return the log-probability of a token of a text, on average."""
    ids, log_probability = written
    return log_probability / max(1, len(ids))


_SECONDS_AT_A_TIME = 0.02  # that compiled code may write before the reader of a stream sees it


def write_on(
    texts: Batch,
    sampler: Sampler,
    chance: Noise,
    max_new_tokens: int,
    over: np.ndarray,
    log_probabilities: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    written: np.ndarray | int = 0,
) -> Iterator[np.ndarray]:
    """Write texts on, and give the ids of each step, the end of document where nothing was written.

    Args:
        texts: the texts.
        sampler: what chooses.
        chance: what it draws with.
        max_new_tokens: how many tokens each may have.
        over: `bool (rows,)`, which texts are not written on; whoever reads the steps may mark more.
        log_probabilities: where given, those that the model itself gives to the tokens are added to it, (rows,).
        rows: the row of chance of each text; None for the same.
        written: how many tokens each has already.

    Returns:
        An iterator over `int64 (rows,)`.
    """
    rows = np.arange(len(over)) if rows is None else rows
    written = np.broadcast_to(written, over.shape).copy()
    has_ended, at_a_time = over | (written >= max_new_tokens), 1
    while len(going := np.flatnonzero(~(over | has_ended))):
        room = texts.can_write_on(going) if log_probabilities is None and not sampler.depends_on_text else 0
        if room:
            steps = min(room, at_a_time, max_new_tokens - int(written[going].max()))
            began = time.perf_counter()
            ids = texts.write_on(going, chance.take(rows[going], written[going], steps), sampler)
            at_a_time = 2 * at_a_time if time.perf_counter() - began < _SECONDS_AT_A_TIME / 2 else (at_a_time + 1) // 2
        else:
            logits, uniforms = texts.read(going), chance.take(rows[going], written[going], 1)[:, 0]
            ids = sampler.process_and_sample(logits, texts, going, uniforms)
            if log_probabilities is not None:
                log_probabilities[going] += log_softmax(logits)[np.arange(len(going)), ids]
            texts.write(going, ids)
            ids = ids[:, None]
        for column in ids.T:
            of_all = np.full(len(over), sampler.eos)
            of_all[going] = np.where(column >= 0, column, sampler.eos)
            yield of_all
        written[going] += ids.shape[1]
        has_ended[going] = (ids[:, -1] < 0) | (ids[:, -1] == sampler.eos) | (written[going] >= max_new_tokens)


def _until(stop: list[bytes], ids: Iterable[int], tokenizer) -> Iterator[int]:
    """Give the tokens of a text until one of some strings comes, and hold back those that may begin one.

    In bytes, as a character may be spelt in several tokens.
    """
    held, data, ordered = [], b"", sorted(stop)
    for i in ids:
        held.append(i)
        data += tokenizer.token_bytes(i)
        places = [data.index(end) for end in stop if end in data]
        open_ends = (first for first in range(len(data)) if begins(data[first:], ordered))
        known = min(places) if places else next(open_ends, len(data))
        while held and (size := len(tokenizer.token_bytes(held[0]))) <= known:
            yield held.pop(0)
            data, known = data[size:], known - size
        if places:  # amidst a token: what it holds before the stop string is whole characters
            yield from (*tokenizer.encode(data[:known].decode()), tokenizer.EOS)
            return
    yield from held
