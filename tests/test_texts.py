import numpy as np
import pytest

from aigc_tf.decoding import Decoder
from aigc_tf.texts import Texts


class Memory:
    """A decoder that remembers what it reads: the logits after a row are the ids at its positions, then -1."""

    def __init__(self, num_rows, num_positions=None):
        self.num_positions = num_positions
        self.seen = np.full((num_rows, num_positions or 99), -1)
        self.num_read = 0

    def read(self, rows, positions, ids):
        assert rows.dtype == positions.dtype == ids.dtype == np.int64
        assert (np.diff(rows) >= 0).all()
        self.num_read += len(ids)
        for row, position, i in zip(rows, positions, ids, strict=True):
            assert position == 0 or self.seen[row, position - 1] >= 0
            self.seen[row, position] = i
            self.seen[row, position + 1 :] = -1
        return self.seen[np.unique(rows)]

    def copy(self, parents):
        self.seen = self.seen[parents]

    def decoder(self):
        return Decoder(self.read, self.copy, self.num_positions)


def ids_of(logits):
    return [row[row >= 0].tolist() for row in logits]


def test_prompts_of_different_lengths_end_together():
    texts = Texts(Memory(3).decoder(), [[5, 6, 7], [8], [9, 10]], 2)
    assert texts.so_far(np.arange(3)).tolist() == [[5, 6, 7], [-1, -1, 8], [-1, 9, 10]]
    assert texts.ids.shape == (3, 5)
    assert ids_of(texts.read(np.array([0, 2]))) == [[5, 6, 7], [9, 10]]
    assert ids_of(texts.read(np.array([1]))) == [[8]]


def test_each_token_is_read_once_at_the_position_after_the_one_before():
    memory = Memory(2)
    texts = Texts(memory.decoder(), [[5, 6, 7], [8]], 3)
    rows = np.arange(2)
    texts.read(rows)
    assert memory.num_read == 4
    for step, expected in enumerate([[[5, 6, 7, 11], [8, 21]], [[5, 6, 7, 11, 12], [8, 21, 22]]], 1):
        texts.write(rows, np.array([10, 20]) + step)
        assert ids_of(texts.read(rows)) == expected
        assert memory.num_read == 4 + 2 * step
        assert texts.num_written == step
        assert texts.written(0) == [10 + i for i in range(1, step + 1)]
        assert texts.written(1) == [20 + i for i in range(1, step + 1)]


def test_a_text_that_has_ended_is_left_alone():
    memory = Memory(3)
    texts = Texts(memory.decoder(), [[5], [6, 7], [8]], 4)
    texts.read(np.arange(3))
    texts.write(np.arange(3), np.array([1, 2, 3]))
    going = np.array([0, 2])
    assert ids_of(texts.read(going)) == [[5, 1], [8, 3]]
    texts.write(going, np.array([11, 13]))
    assert texts.so_far(np.arange(3)).tolist() == [[-1, 5, 1, 11], [6, 7, 2, -1], [-1, 8, 3, 13]]
    assert texts.so_far(going).tolist() == [[-1, 5, 1, 11], [-1, 8, 3, 13]]
    assert [texts.written(row) for row in range(3)] == [[1, 11], [2], [3, 13]]
    assert ids_of(texts.read(going)) == [[5, 1, 11], [8, 3, 13]]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("lengths", [[1], [1, 5, 30], [8, 9, 7]])
def test_beyond_the_context_the_newest_half_is_read_anew(limit, lengths):
    """A text sees from `start` on, which moves to its newest half where more than the context stands after it."""
    memory = Memory(len(lengths), limit)
    prompts = [list(range(100 * row, 100 * row + length)) for row, length in enumerate(lengths)]
    texts = Texts(memory.decoder(), prompts, 25)
    rows = np.arange(len(lengths))
    starts = [0] * len(lengths)
    for step in range(25):
        for row, prompt in enumerate(prompts):
            if len(prompt) - starts[row] > limit:
                starts[row] = len(prompt) - max(1, limit // 2)
        assert ids_of(texts.read(rows)) == [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
        texts.write(rows, 50 + step + 100 * rows)
        for row, prompt in enumerate(prompts):
            prompt.append(50 + step + 100 * row)
    # A long prompt is not read but for its newest half, and each later token once or, in time, twice.
    assert memory.num_read <= (25 + max(1, limit)) * 2 * len(lengths)


def test_rows_go_on_from_others():
    memory = Memory(4, 4)
    # The second prompt is beyond the context, so that copied rows start at another column.
    texts = Texts(memory.decoder(), [[5], [1, 2, 3, 4, 5, 6], [7], [8]], 4)
    assert ids_of(texts.read(np.array([0, 1]))) == [[5], [5, 6]]
    texts.copy(np.array([1, 0, 0, 1]))
    texts.write(np.arange(4), np.array([11, 12, 13, 14]))
    num_read = memory.num_read
    assert ids_of(texts.read(np.arange(4))) == [[5, 6, 11], [5, 12], [5, 13], [5, 6, 14]]
    assert memory.num_read == num_read + 4  # and not what the others had read already
    assert [texts.written(row) for row in range(4)] == [[11], [12], [13], [14]]
    texts.copy(np.array([3, 3, 2, 2]))
    texts.write(np.arange(4), np.array([21, 22, 23, 24]))
    assert ids_of(texts.read(np.arange(4))) == [[5, 6, 14, 21], [5, 6, 14, 22], [5, 13, 23], [5, 13, 24]]
    assert texts.so_far(np.array([1, 2])).tolist() == [[1, 2, 3, 4, 5, 6, 14, 22], [-1, -1, -1, -1, -1, 5, 13, 23]]
    texts.write(np.arange(4), np.array([31, 32, 33, 34]))
    assert ids_of(texts.read(np.arange(4))) == [[21, 31], [22, 32], [5, 13, 23, 33], [5, 13, 24, 34]]


def test_nothing_to_write_and_nothing_written():
    texts = Texts(Memory(1).decoder(), [[5, 6]], 0)
    assert texts.num_written == 0
    assert texts.written(0) == []
    assert texts.so_far(np.array([0])).tolist() == [[5, 6]]
