"""Batch: the token ids of the texts that are being written, and the random numbers they are drawn with."""

import numpy as np

from .engines.engine import Engine
from .processors import log_softmax
from .sampler import NOT_FINITE


class RandomNumbers:
    """The uniform random numbers that tokens are drawn with: a sequence for each row, generated as needed.

    Args:
        seeds: one for each row.
    """

    def __init__(self, seeds: list):
        self._generators = [np.random.default_rng(seed) for seed in seeds]
        self._drawn = np.empty((len(seeds), 0))

    def __len__(self) -> int:
        return len(self._generators)

    def take(self, rows: np.ndarray, first: np.ndarray | int, count: int) -> np.ndarray:
        """Return `count` numbers of each row from index `first`, uniform in [0, 1), `float64 (len(rows), count)`."""
        until = int(np.max(first, initial=0)) + count
        if until > self._drawn.shape[1]:
            more = max(until, 2 * self._drawn.shape[1], 64) - self._drawn.shape[1]
            new = [generator.random(more) for generator in self._generators]
            self._drawn = np.concatenate([self._drawn, np.reshape(new, (len(self), more))], axis=1)
        return self._drawn[np.asarray(rows)[:, None], np.reshape(first, (-1, 1)) + np.arange(count)]


class TextBatch:
    """A batch of texts as token ids, aligned at their newest token, each of which grows by a token at a time.

    A text that has used up the positions of a Transformer continues with the newest half of its context, which is read
    again from position 0.

    Args:
        engine: an engine with a row for each text.
        prefixes: the ids that each text starts with, at least one.
        num_written: how many of these were generated and do not belong to the prompt; None for none.

    Attributes:
        ids: `int32 (rows, columns)`, -1 where there is no token; columns are added as needed.
        end: the column after the newest token, which is written next.
    """

    def __init__(self, engine: Engine, prefixes: list[list[int]], num_written: list[int] | None = None):
        self._engine = engine
        self.end = max(map(len, prefixes), default=0)
        self.ids = np.full((len(prefixes), self.end + 64), -1, np.int32)
        for row, prefix in enumerate(prefixes):
            self.ids[row, self.end - len(prefix) : self.end] = prefix
        self._start = np.array([self.end - len(prefix) for prefix in prefixes], np.int64)  # the column of position 0
        self._read = self._start.copy()  # the first column that the engine has not read
        self._first_written = self.end - np.array(num_written or [0] * len(prefixes), np.int64)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Read the new tokens of some rows (ascending), and return the logits after them, (len(rows), V)."""
        if (limit := self._engine.num_positions) is not None:
            full = rows[self.end - self._start[rows] > limit]
            self._start[full] = self._read[full] = self.end - max(1, limit // 2)
        lengths = self.end - self._read[rows]
        tokens, columns = rows, np.full(len(rows), self.end - 1)
        if (lengths != 1).any():
            tokens = np.repeat(rows, lengths)
            columns = np.arange(len(tokens)) + np.repeat(self.end - np.cumsum(lengths), lengths)
        self._read[rows] = self.end
        return self._engine.read(tokens, columns - self._start[tokens], self.ids[tokens, columns].astype(np.int64))

    def num_compiled_steps(self, rows: np.ndarray) -> int:
        """Return how many tokens `write_compiled` can write to some rows, 0 if it cannot be used."""
        if self._engine.write is None or (self.end - self._read[rows] != 1).any():
            return 0
        return max(0, self._engine.num_positions + 1 - int((self.end - self._start[rows]).max()))

    def write_compiled(self, rows: np.ndarray, uniforms: np.ndarray, sampler) -> np.ndarray:
        """Read and write in compiled code, one step per column of `uniforms`; return ids as `Engine.write` does."""
        newest = self.ids[rows, self.end - 1].astype(np.int64)
        positions = self.end - 1 - self._start[rows]
        ids = self._engine.write(rows, positions, newest, sampler.pending(self, rows), uniforms, sampler.sampling_args)
        ids = sampler.check_finite(ids)
        ids = ids[:, (ids >= 0).any(0)]
        self._grow(ids.shape[1])
        self.ids[rows, self.end : self.end + ids.shape[1]] = ids
        self.end += ids.shape[1]
        self._read[rows] = self.end - 1
        return ids

    def write(self, rows: np.ndarray, ids: np.ndarray) -> None:
        """Append a token to some rows; the others have ended."""
        self._grow(1)
        self.ids[rows, self.end] = ids
        self.end += 1

    def _grow(self, num_columns: int) -> None:
        """Make room for more columns, by doubling them: so each is copied only about once."""
        if self.end + num_columns > self.ids.shape[1]:
            more = max(num_columns, self.ids.shape[1])
            self.ids = np.pad(self.ids, ((0, 0), (0, more)), constant_values=-1)

    def copy(self, parents: np.ndarray) -> None:
        """Replace the text of each row with that of its parent row."""
        for name in ("ids", "_start", "_read", "_first_written"):
            setattr(self, name, getattr(self, name)[parents])
        self._engine.copy(parents)

    def so_far(self, rows: np.ndarray) -> np.ndarray:
        """Return the texts of some rows, prompts included, `int32 (len(rows), end)`."""
        return self.ids[rows, : self.end]

    def written(self, rows: np.ndarray) -> np.ndarray:
        """Return what was written to some rows, -1 elsewhere, `int32 (len(rows), columns)`."""
        first = int(self._first_written[rows].min(initial=self.end))
        columns = np.arange(first, self.end)
        return np.where(columns >= self._first_written[rows, None], self.ids[rows, first : self.end], -1)


def finite_log_softmax(logits: np.ndarray) -> np.ndarray:
    """Turn logits into log-probabilities, and refuse those of a model whose training failed."""
    result = log_softmax(logits)
    if np.isnan(result).any():
        raise ValueError(NOT_FINITE)
    return result


def log_probabilities(texts: TextBatch, ids: list[list[int]]) -> np.ndarray:
    """Append given ids to texts, and return the log-probability that the model itself gives them, (rows,)."""
    total = np.zeros(len(ids))
    for step in range(max(map(len, ids), default=0)):
        rows = np.array([row for row, those in enumerate(ids) if step < len(those)])
        tokens = np.array([ids[row][step] for row in rows])
        total[rows] += finite_log_softmax(texts.read(rows))[np.arange(len(rows)), tokens]
        texts.write(rows, tokens)
    return total
