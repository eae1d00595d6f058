"""Batch being written: class Batch, a batch of them with what an engine has read of each, and class Noise."""

import numpy as np

from .engines.engine import Engine
from .processors import log_softmax
from .sampler import NOT_FINITE


class Noise:
    """The numbers that texts are drawn with: a sequence for each row, drawn as far as it is asked for.

    Args:
        seeds: of each row.
    """

    def __init__(self, seeds: list):
        self._generators = [np.random.default_rng(seed) for seed in seeds]
        self._drawn = np.empty((len(seeds), 0))

    def __len__(self) -> int:
        return len(self._generators)

    def take(self, rows: np.ndarray, first: np.ndarray | int, count: int) -> np.ndarray:
        """Return the numbers from `first` on of some rows, uniform in [0, 1), `float64 (len(rows), count)`."""
        until = int(np.max(first, initial=0)) + count
        if until > self._drawn.shape[1]:
            more = max(until, 2 * self._drawn.shape[1], 64) - self._drawn.shape[1]
            new = [generator.random(more) for generator in self._generators]
            self._drawn = np.concatenate([self._drawn, np.reshape(new, (len(self), more))], axis=1)
        return self._drawn[np.asarray(rows)[:, None], np.reshape(first, (-1, 1)) + np.arange(count)]


class Batch:
    """A batch of texts as token ids, aligned at their newest token, that grow by a token at a time.

    A text whose positions are used up goes on with its newest half of them, which is read anew at the first
    positions.

    Args:
        engine: of as many rows as there are texts.
        begins: the ids that each begins with, at least one.
        num_written: how many of these were written before, and are not its prompt; None for none.

    Attributes:
        ids: `int32 (rows, columns)`, -1 where there is no token; it grows as texts are written.
        now: the column that is written next.
    """

    def __init__(self, engine: Engine, begins: list[list[int]], num_written: list[int] | None = None):
        self._engine = engine
        self.now = max(map(len, begins), default=0)
        self.ids = np.full((len(begins), self.now + 64), -1, np.int32)
        for row, begin in enumerate(begins):
            self.ids[row, self.now - len(begin) : self.now] = begin
        self._start = np.array([self.now - len(begin) for begin in begins], np.int64)  # the column of position 0
        self._read = self._start.copy()  # the first column that the engine has not read
        self._first_written = self.now - np.array(num_written or [0] * len(begins), np.int64)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Read what is new in some rows, which rise, and return the logits after it, (len(rows), V)."""
        if (limit := self._engine.num_positions) is not None:
            full = rows[self.now - self._start[rows] > limit]
            self._start[full] = self._read[full] = self.now - max(1, limit // 2)
        lengths = self.now - self._read[rows]
        tokens, columns = rows, np.full(len(rows), self.now - 1)
        if (lengths != 1).any():
            tokens = np.repeat(rows, lengths)
            columns = np.arange(len(tokens)) + np.repeat(self.now - np.cumsum(lengths), lengths)
        self._read[rows] = self.now
        return self._engine.read(tokens, columns - self._start[tokens], self.ids[tokens, columns].astype(np.int64))

    def can_write_on(self, rows: np.ndarray) -> int:
        """Return how many tokens `write_on` can write to some rows: 0 where it cannot."""
        if self._engine.write is None or (self.now - self._read[rows] != 1).any():
            return 0
        return max(0, self._engine.num_positions + 1 - int((self.now - self._start[rows]).max()))

    def write_on(self, rows: np.ndarray, uniforms: np.ndarray, sampler) -> np.ndarray:
        """Read and write in compiled code, one step for each column of uniforms; return ids as `Engine.write` does."""
        newest = self.ids[rows, self.now - 1].astype(np.int64)
        positions = self.now - 1 - self._start[rows]
        ids = self._engine.write(rows, positions, newest, sampler.pending(self, rows), uniforms, sampler.sampling_args)
        ids = sampler.check_numbers(ids)
        ids = ids[:, (ids >= 0).any(0)]
        self._grow(ids.shape[1])
        self.ids[rows, self.now : self.now + ids.shape[1]] = ids
        self.now += ids.shape[1]
        self._read[rows] = self.now - 1
        return ids

    def write(self, rows: np.ndarray, ids: np.ndarray) -> None:
        """Add a token to some rows; the others have ended."""
        self._grow(1)
        self.ids[rows, self.now] = ids
        self.now += 1

    def _grow(self, num_columns: int) -> None:
        """Make room for more columns, twice as many as there are: so that a column is copied but once on average."""
        if self.now + num_columns > self.ids.shape[1]:
            more = max(num_columns, self.ids.shape[1])
            self.ids = np.pad(self.ids, ((0, 0), (0, more)), constant_values=-1)

    def copy(self, parents: np.ndarray) -> None:
        """Let each row go on from the text of the row named."""
        for name in ("ids", "_start", "_read", "_first_written"):
            setattr(self, name, getattr(self, name)[parents])
        self._engine.copy(parents)

    def so_far(self, rows: np.ndarray) -> np.ndarray:
        """Return the texts of some rows, prompt and written, `int32 (len(rows), now)`."""
        return self.ids[rows, : self.now]

    def written(self, rows: np.ndarray) -> np.ndarray:
        """Return what was written to some rows, -1 elsewhere, `int32 (len(rows), as many columns as need be)`."""
        first = int(self._first_written[rows].min(initial=self.now))
        columns = np.arange(first, self.now)
        return np.where(columns >= self._first_written[rows, None], self.ids[rows, first : self.now], -1)


def finite_log_softmax(logits: np.ndarray) -> np.ndarray:
    """Turn the logits of a model into log-probabilities, and refuse those of a model whose training failed."""
    result = log_softmax(logits)
    if np.isnan(result).any():
        raise ValueError(NOT_FINITE)
    return result


def log_probabilities(texts: Batch, ids: list[list[int]]) -> np.ndarray:
    """Write given ids to texts, and return the log-probabilities that the model itself gives to them, (rows,)."""
    total = np.zeros(len(ids))
    for step in range(max(map(len, ids), default=0)):
        rows = np.array([row for row, those in enumerate(ids) if step < len(those)])
        tokens = np.array([ids[row][step] for row in rows])
        total[rows] += finite_log_softmax(texts.read(rows))[np.arange(len(rows)), tokens]
        texts.write(rows, tokens)
    return total
