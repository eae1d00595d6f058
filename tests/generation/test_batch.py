import numpy as np
import pytest

from aigc_tf.generation.batch import RandomNumbers, TextBatch
from aigc_tf.generation.engines.engine import Engine
from aigc_tf.generation.writer import write_steps


class Memory:
    """An engine that remembers what it reads: the logits after a row are the ids at its positions, then -1."""

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

    def make_engine(self):
        return Engine(self.read, self.copy, self.num_positions)


def ids_of(logits):
    return [row[row >= 0].tolist() for row in logits]


def written(texts, row):
    (ids,) = texts.written(np.array([row]))
    return ids[ids >= 0].tolist()


def test_prompts_of_different_lengths_end_together():
    texts = TextBatch(Memory(3).make_engine(), [[5, 6, 7], [8], [9, 10]])
    assert texts.so_far(np.arange(3)).tolist() == [[5, 6, 7], [-1, -1, 8], [-1, 9, 10]]
    assert ids_of(texts.read(np.array([0, 2]))) == [[5, 6, 7], [9, 10]]
    assert ids_of(texts.read(np.array([1]))) == [[8]]


def test_each_token_is_read_once_at_the_position_after_the_one_before():
    memory = Memory(2)
    texts = TextBatch(memory.make_engine(), [[5, 6, 7], [8]])
    rows = np.arange(2)
    texts.read(rows)
    assert memory.num_read == 4
    for step, expected in enumerate([[[5, 6, 7, 11], [8, 21]], [[5, 6, 7, 11, 12], [8, 21, 22]]], 1):
        texts.write(rows, np.array([10, 20]) + step)
        assert ids_of(texts.read(rows)) == expected
        assert memory.num_read == 4 + 2 * step
        assert written(texts, 0) == [10 + i for i in range(1, step + 1)]
        assert written(texts, 1) == [20 + i for i in range(1, step + 1)]


def test_a_text_that_has_ended_is_left_alone():
    memory = Memory(3)
    texts = TextBatch(memory.make_engine(), [[5], [6, 7], [8]])
    texts.read(np.arange(3))
    texts.write(np.arange(3), np.array([1, 2, 3]))
    active = np.array([0, 2])
    assert ids_of(texts.read(active)) == [[5, 1], [8, 3]]
    texts.write(active, np.array([11, 13]))
    assert texts.so_far(np.arange(3)).tolist() == [[-1, 5, 1, 11], [6, 7, 2, -1], [-1, 8, 3, 13]]
    assert texts.so_far(active).tolist() == [[-1, 5, 1, 11], [-1, 8, 3, 13]]
    assert [written(texts, row) for row in range(3)] == [[1, 11], [2], [3, 13]]
    assert ids_of(texts.read(active)) == [[5, 1, 11], [8, 3, 13]]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("lengths", [[1], [1, 5, 30], [8, 9, 7]])
def test_beyond_the_context_the_newest_half_is_read_again(limit, lengths):
    """A text sees from `start` on, which moves to its newest half where more than the context stands after it."""
    memory = Memory(len(lengths), limit)
    prompts = [list(range(100 * row, 100 * row + length)) for row, length in enumerate(lengths)]
    texts = TextBatch(memory.make_engine(), prompts)
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


def test_rows_continue_the_texts_of_others():
    memory = Memory(4, 4)
    # The second prompt is beyond the context, so that copied rows start at another column.
    texts = TextBatch(memory.make_engine(), [[5], [1, 2, 3, 4, 5, 6], [7], [8]])
    assert ids_of(texts.read(np.array([0, 1]))) == [[5], [5, 6]]
    texts.copy(np.array([1, 0, 0, 1]))
    texts.write(np.arange(4), np.array([11, 12, 13, 14]))
    num_read = memory.num_read
    assert ids_of(texts.read(np.arange(4))) == [[5, 6, 11], [5, 12], [5, 13], [5, 6, 14]]
    assert memory.num_read == num_read + 4  # and not what the others had read already
    assert [written(texts, row) for row in range(4)] == [[11], [12], [13], [14]]
    texts.copy(np.array([3, 3, 2, 2]))
    texts.write(np.arange(4), np.array([21, 22, 23, 24]))
    assert ids_of(texts.read(np.arange(4))) == [[5, 6, 14, 21], [5, 6, 14, 22], [5, 13, 23], [5, 13, 24]]
    assert texts.so_far(np.array([1, 2])).tolist() == [[1, 2, 3, 4, 5, 6, 14, 22], [-1, -1, -1, -1, -1, 5, 13, 23]]
    texts.write(np.arange(4), np.array([31, 32, 33, 34]))
    assert ids_of(texts.read(np.arange(4))) == [[21, 31], [22, 32], [5, 13, 23, 33], [5, 13, 24, 34]]


def test_nothing_to_write_and_nothing_written():
    texts = TextBatch(Memory(1).make_engine(), [[5, 6]])
    assert written(texts, 0) == []
    assert texts.so_far(np.array([0])).tolist() == [[5, 6]]


def test_ids_grow_with_the_text():
    texts = TextBatch(Memory(2, 9).make_engine(), [[5, 6], [7]])
    for step in range(500):
        texts.read(np.arange(2))
        texts.write(np.arange(2), np.array([step, 1000 + step]))
    assert texts.ids.shape[1] < 2000
    assert written(texts, 0) == list(range(500))
    assert texts.so_far(np.arange(2))[1].tolist() == [-1, 7, *range(1000, 1500)]


def test_tokens_written_before_do_not_belong_to_the_prompt():
    texts = TextBatch(Memory(2).make_engine(), [[5, 6, 7], [8, 9]], [1, 0])
    assert [written(texts, row) for row in range(2)] == [[7], []]
    texts.write(np.arange(2), np.array([11, 12]))
    assert [written(texts, row) for row in range(2)] == [[7, 11], [12]]
    texts.copy(np.array([1, 0]))
    assert [written(texts, row) for row in range(2)] == [[12], [7, 11]]


def test_random_numbers_depend_on_the_seed_alone():
    rng = RandomNumbers([3, (3, 1)])
    expected = [np.random.default_rng(seed).random(1000) for seed in (3, (3, 1))]
    np.testing.assert_array_equal(rng.take(np.arange(2), 0, 5), [row[:5] for row in expected])
    np.testing.assert_array_equal(rng.take(np.array([1]), 990, 10), [expected[1][990:]])
    np.testing.assert_array_equal(
        rng.take(np.array([1, 0]), np.array([70, 3]), 4), [expected[1][70:74], expected[0][3:7]]
    )
    assert len(np.unique(rng.take(np.arange(2), 0, 1000))) == 2000


def compiled_texts(num_positions):
    """A text of an engine with a loop of its own, which writes 7, and the numbers of tokens that it was asked for."""
    asked = []

    def write(rows, positions, ids, pending, uniforms, args):
        assert positions[0] + uniforms.shape[1] <= num_positions
        asked.append(uniforms.shape[1])
        return np.full(uniforms.shape, 7)

    memory = Memory(1, num_positions)
    return TextBatch(Engine(memory.read, memory.copy, num_positions, write), [[1, 5]]), asked


class AnySampler:
    eos, depends_on_text, sampling_args = 2, False, None

    def check_finite(self, chosen):
        return chosen

    def pending(self, texts, rows):
        return np.zeros(len(rows), np.int64)

    def process_and_sample(self, logits, texts, rows, uniforms):
        return np.full(len(logits), 7)


def test_a_compiled_loop_fills_the_context_and_no_more():
    texts, asked = compiled_texts(9)
    texts.read(np.array([0]))
    texts.write(np.array([0]), np.array([7]))
    # The newest of three tokens is still to be read, at position 2; so seven are read, of which each gives another.
    assert texts.num_compiled_steps(np.array([0])) == 7
    texts.write_compiled(np.array([0]), np.zeros((1, 7)), AnySampler())
    assert texts.num_compiled_steps(np.array([0])) == 0
    assert asked == [7]


def test_compiled_stretches_grow():
    texts, asked = compiled_texts(5000)
    steps = write_steps(texts, AnySampler(), RandomNumbers([0]), 3000, np.zeros(1, bool))
    assert sum(1 for _ in steps) == 3000
    assert len(asked) < 300
