import itertools
import os
import subprocess
import sys

import numba
import numpy as np
import pytest

from aigc_tf.generation.engines import numba_engine, numba_sampling
from aigc_tf.generation.engines.engine import make_engine
from aigc_tf.models import networks
from aigc_tf.models.weights import Block, LstmWeights, TransformerWeights


def transformer_weights(num_blocks, dim=8, vocab_size=41, context=6):
    generator = np.random.default_rng(num_blocks)

    def array(*shape):
        return generator.normal(size=shape).astype(np.float32)

    blocks = [
        Block(array(2, dim), array(dim, 3 * dim), array(3 * dim), array(dim, dim), array(dim), array(2, dim),
              array(dim, 4 * dim), array(4 * dim), array(4 * dim, dim), array(dim))
        for _ in range(num_blocks)
    ]  # fmt: skip
    return TransformerWeights(array(vocab_size, dim), array(context, dim), blocks, array(2, dim), 2)


def lstm_weights(sizes, heads, vocab_size=41):
    generator = np.random.default_rng(len(sizes))

    def array(*shape):
        return generator.normal(size=shape, scale=0.5).astype(np.float32)

    layers = [(array(a + b, 4 * b), array(4 * b)) for a, b in itertools.pairwise(sizes)]
    head = [(array(a, b), array(b)) for a, b in itertools.pairwise([sizes[-1], *heads, vocab_size])]
    return LstmWeights(array(vocab_size, sizes[0]), layers, head)


WEIGHTS = {
    "one block": lambda: transformer_weights(1),
    "three blocks": lambda: transformer_weights(3),
    "one layer": lambda: lstm_weights([8, 16], []),
    "layers of odd widths": lambda: lstm_weights([5, 7, 3], [5]),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("num_rows", [1, 2, 5, 9])
def test_logits_are_those_of_numpy_for_any_number_of_rows(name, num_rows):
    weights = WEIGHTS[name]()
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 41, (num_rows, 6))
    readers = [make_engine(weights, num_rows, engine) for engine in ("numpy", "numba")]
    for start, end in ((0, 3), (3, 4), (4, 6)):
        rows = np.repeat(np.arange(num_rows), end - start)
        positions = np.tile(np.arange(start, end), num_rows)
        expected, logits = (reader.read(rows, positions, ids[rows, positions]) for reader in readers)
        assert logits.shape == (num_rows, 41)
        np.testing.assert_allclose(logits, expected, atol=3e-3 * expected.std())
    # Each row continues another, two of them the same one.
    parents = np.minimum(np.arange(num_rows)[::-1], max(0, num_rows - 2))
    for reader in readers:
        reader.copy(parents)
    rows, positions = np.arange(num_rows), np.full(num_rows, 5)
    expected, logits = (reader.read(rows, positions, ids[:, 0].copy()) for reader in readers)
    np.testing.assert_allclose(logits, expected, atol=3e-3 * expected.std())


def test_a_row_of_zeros_is_a_matrix_too():
    weights = lstm_weights([8, 16], [])
    weights.head[0][0][:, 5] = 0
    weights.head[0][1][5] = 2
    logits = make_engine(weights, 1, "numba").read(*np.zeros((3, 1), np.int64))
    assert np.isfinite(logits).all()
    assert logits[0, 5] == 2


def test_models_of_any_depth_and_origin_run_the_same_compiled_code():
    # Another memory layout would be compiled again, for seconds, and is slower to read.
    for model in [*(make() for make in WEIGHTS.values()), networks.lstm(41, 8), networks.transformer(41, 8)]:
        make_engine(model, 1, "numba").read(*np.zeros((3, 1), np.int64))
    assert len(numba_engine._read_transformer.signatures) == len(numba_engine._lstm_layer.signatures) == 1


@pytest.mark.parametrize("num_rows", [1, 5])
def test_the_compiled_loop_equals_reading_and_sampling_step_by_step(num_rows):
    weights = transformer_weights(2, context=12)
    shares = (np.float32(share) for share in (1, 0.9, 0))
    generator = np.random.default_rng(5)
    bias = generator.normal(size=(8, 41)).astype(np.float32)
    bias[:, 3] = 12  # the end
    after = generator.integers(0, 8, (8, 41)).astype(np.int8)
    args = numba_sampling.SamplingArgs(bias, after, 3, np.float32(3), 30, *shares)
    rows, ids = np.arange(num_rows), np.random.default_rng(1).integers(4, 41, num_rows)
    uniforms = np.random.default_rng(3).random((num_rows, 11))
    at_once, step_by_step = (make_engine(weights, num_rows, "numba") for _ in range(2))
    pending = np.arange(num_rows)
    written = at_once.write(rows, np.zeros(num_rows, np.int64), ids, pending, uniforms, args)
    for step in range(11):
        expected = np.full(num_rows, -1)
        if len(rows):
            logits = step_by_step.read(rows, np.full(len(rows), step), ids)
            ids = expected[rows] = numba_sampling.sample(logits, uniforms[rows, step], pending, args)
            pending = after[pending, ids].astype(np.int64)[ids != 3]
        assert written[:, step].tolist() == expected.tolist()
        rows, ids = rows[ids != 3], ids[ids != 3]
    lengths = (written >= 0).sum(1)
    assert num_rows == 1 or len(set(lengths)) > 1  # some end before others


COLD = """
import sys
import numpy as np
sys.path[:0] = ["tests", "tests/generation/engines"]
from test_numba_engine import transformer_weights
from aigc_tf.generation.engines.engine import make_engine
for num_blocks in (1, 3):
    weights = transformer_weights(num_blocks)
    read = [make_engine(weights, 1, engine).read(*np.zeros((3, 1), np.int64)) for engine in ("numpy", "numba")]
    np.testing.assert_allclose(*read, atol=0.01)
"""


def test_code_kept_on_disk_serves_models_of_any_depth(pytestconfig):
    make_engine(transformer_weights(2), 1, "numba").read(*np.zeros((3, 1), np.int64))
    done = subprocess.run([sys.executable, "-c", COLD], cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")  # nor was anything compiled, which is said


THREADS = """
import sys, threading
import numpy as np
sys.path[:0] = ["tests", "tests/generation/engines"]
from test_numba_engine import lstm_weights, transformer_weights
from aigc_tf import Tokenizer
from aigc_tf.generation import generate as generate_module

tokenizer = Tokenizer.train(["白日依山尽黄河入海流"])
models = [transformer_weights(2, vocab_size=tokenizer.vocab_size), lstm_weights([8, 16], [], tokenizer.vocab_size)]
models *= 2

def write(i, model):
    texts[i] = "".join(generate_module.stream(model, tokenizer, "白", seed=i, max_new_tokens=150, engine="numba"))

texts = {}
for i, model in enumerate(models):
    write(i, model)
alone, texts = texts, {}
threads = [threading.Thread(target=write, args=pair) for pair in enumerate(models)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert texts == alone
"""


@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_streams_may_be_read_by_threads_on_every_threading_layer(layer, pytestconfig):
    if layer == "omp" and sys.platform != "linux":
        pytest.skip("numba's wheels bring it on Linux")
    done = subprocess.run(
        [sys.executable, "-c", THREADS],
        cwd=pytestconfig.rootpath,
        env={**os.environ, "NUMBA_THREADING_LAYER": layer},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-800:]


def test_the_fastest_number_of_threads_is_taken(monkeypatch):
    taken, now = [], [0.0]
    seconds = {1: 3.0, 2: 0.1, 4: 1.0}

    def run(num_threads, function):
        taken.append(num_threads)
        now[0] += seconds[num_threads]

    monkeypatch.setattr(numba_engine, "_run", run)
    monkeypatch.setattr(numba_engine.time, "perf_counter", lambda: now[0])
    threads = numba_engine._Threads(4)
    threads.PERIOD = 100.0
    for _ in range(12):
        threads.run(None)
    assert sorted(taken[:6]) == [1, 1, 2, 2, 4, 4]
    assert taken[6:] == [2] * 6
    now[0] += 100
    seconds[1] = 0.01
    for _ in range(8):
        threads.run(None)
    assert taken[-1] == 1


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one thread")
def test_the_user_s_number_of_threads_is_respected_and_restored(monkeypatch):
    seen, weights = [], lstm_weights([8, 16], [])

    def threads_within():
        reader = make_engine(weights, 1, "numba")
        reader.read(*np.zeros((3, 1), np.int64))
        numba_engine._run(numba_engine._max_threads(), lambda: seen.append(numba.get_num_threads()))
        return seen[-1]

    monkeypatch.setattr(numba_engine, "usable_cores", lambda: 2)
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(2)
        assert threads_within() == 2
        kept = numba_engine._threads[weights]
        assert make_engine(weights, 1, "numba") is not None
        assert numba_engine._threads[weights] is kept  # what was found serves the next text
        numba_engine._run(1, lambda: None)
        assert numba.get_num_threads() == 2
        numba.set_num_threads(1)
        assert threads_within() == 1
        numba.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert threads_within() == 1
    finally:
        numba.set_num_threads(before)
