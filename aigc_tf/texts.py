"""Texts being written: class Texts, a batch of them with what a decoder has read of each."""

import numpy as np

from .decoding import Decoder


class Texts:
    """A batch of texts as token ids, aligned at their newest token, that grow by a token at a time.

    A text whose positions are used up goes on with its newest half of them, which is read anew at the first
    positions.

    Args:
        decoder: of as many rows as there are texts.
        prompts: the ids that each begins with, at least one.
        max_new_tokens: how many tokens will be written at the most.

    Attributes:
        ids: `int32 (rows, longest prompt + max_new_tokens)`, -1 where there is no token.
        now: the column that is written next.
    """

    def __init__(self, decoder: Decoder, prompts: list[list[int]], max_new_tokens: int):
        self._decoder = decoder
        self._longest = self.now = max(map(len, prompts), default=0)
        self.ids = np.full((len(prompts), self.now + max_new_tokens), -1, np.int32)
        for row, prompt in enumerate(prompts):
            self.ids[row, self.now - len(prompt) : self.now] = prompt
        self._start = np.array([self.now - len(prompt) for prompt in prompts], np.int64)  # the column of position 0
        self._read = self._start.copy()  # the first column that the decoder has not read

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Read what is new in some rows, which rise, and return the logits after it, (len(rows), V)."""
        if (limit := self._decoder.num_positions) is not None:
            full = rows[self.now - self._start[rows] > limit]
            self._start[full] = self._read[full] = self.now - max(1, limit // 2)
        lengths = self.now - self._read[rows]
        tokens, columns = rows, np.full(len(rows), self.now - 1)
        if (lengths != 1).any():
            tokens = np.repeat(rows, lengths)
            columns = np.arange(len(tokens)) + np.repeat(self.now - np.cumsum(lengths), lengths)
        self._read[rows] = self.now
        return self._decoder.read(tokens, columns - self._start[tokens], self.ids[tokens, columns].astype(np.int64))

    def can_write_on(self, rows: np.ndarray) -> int:
        """Return how many tokens `write_on` can write to some rows: 0 where it cannot."""
        if self._decoder.write is None or (self.now - self._read[rows] != 1).any():
            return 0
        return max(0, self._decoder.num_positions + 1 - int((self.now - self._start[rows]).max()))

    def write_on(self, rows: np.ndarray, uniforms: np.ndarray, sampler) -> np.ndarray:
        """Read and write in compiled code, one step for each column of uniforms; return ids as `Decoder.write` does."""
        newest = self.ids[rows, self.now - 1].astype(np.int64)
        positions = self.now - 1 - self._start[rows]
        ids = sampler.check_numbers(self._decoder.write(rows, positions, newest, uniforms, sampler.choosing))
        ids = ids[:, (ids >= 0).any(0)]
        self.ids[rows, self.now : self.now + ids.shape[1]] = ids
        self.now += ids.shape[1]
        self._read[rows] = self.now - 1
        return ids

    def write(self, rows: np.ndarray, ids: np.ndarray) -> None:
        """Add a token to some rows; the others have ended."""
        self.ids[rows, self.now] = ids
        self.now += 1

    def copy(self, parents: np.ndarray) -> None:
        """Let each row go on from the text of the row named."""
        self.ids, self._start, self._read = self.ids[parents], self._start[parents], self._read[parents]
        self._decoder.copy(parents)

    def so_far(self, rows: np.ndarray) -> np.ndarray:
        """Return the texts of some rows, prompt and written, `int32 (len(rows), now)`."""
        return self.ids[rows, : self.now]

    @property
    def num_written(self) -> int:
        """How many tokens have been written to the texts that have not ended."""
        return self.now - self._longest

    def written(self, row: int) -> list[int]:
        """Return the ids written to a row."""
        ids = self.ids[row, self._longest : self.now]
        return ids[ids >= 0].tolist()
