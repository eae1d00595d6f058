import itertools
import os
import subprocess
import sys

import numba
import numpy as np
import pytest

from aigc_tf.generation import processors
from aigc_tf.generation.engines import numba_engine, numba_sampling
from aigc_tf.generation.engines.engine import make_engine
from aigc_tf.models import networks
from aigc_tf.models.weights import Block, LstmWeights, TransformerWeights

SETTINGS = {
    "top_k": (1, 2, 5, 50, 300),
    "typical_p": (0.01, 0.2, 0.5, 0.9),
    "top_p": (0.01, 0.3, 0.8, 0.95, 1.0),
    "min_p": (0.001, 0.1, 0.5, 1.0),
}


def compose(logits, uniforms, temperature, top_k, typical_p, top_p, min_p):
    """Do what `numba_sampling.sample` does by `processors.py`; return ids, and which might have come."""
    changed = processors.apply_temperature(logits, np.float32(temperature))
    ids = np.broadcast_to(np.arange(logits.shape[1]), logits.shape)
    if top_k is not None:
        changed, ids = processors.top_k(changed, top_k)
    for keep, share in (
        (processors.keep_typical, typical_p),
        (processors.keep_top_p, top_p),
        (processors.keep_min_p, min_p),
    ):
        if share is not None:
            changed = keep(changed, share)
    probabilities = np.zeros(logits.shape)
    np.put_along_axis(probabilities, ids, processors.softmax(changed), axis=-1)
    return processors.sample(logits, uniforms, np.float32(temperature), top_k, typical_p, top_p, min_p), probabilities


def sample(logits, uniforms, temperature=1.0, top_k=None, typical_p=None, top_p=None, min_p=None):
    shares = (np.float32(share) for share in (typical_p or 1, top_p or 1, min_p or 0))
    top_k = min(top_k or logits.shape[1], logits.shape[1])
    bias, after = np.zeros((8, logits.shape[1]), np.float32), np.zeros((8, logits.shape[1]), np.int8)
    args = numba_sampling.SamplingArgs(bias, after, 0, np.float32(temperature), top_k, *shares)
    return numba_sampling.sample(logits.astype(np.float32), uniforms, np.zeros(len(logits), np.int64), args)


def random_logits(kind, num_rows, vocab_size):
    generator = np.random.default_rng(vocab_size)
    logits = generator.normal(size=(num_rows, vocab_size), scale=3)
    if kind == "ties":
        logits = logits.round()
    if kind == "minus infinity":
        logits[generator.random(logits.shape) < 0.5] = -np.inf
        logits[np.arange(num_rows), generator.integers(0, vocab_size, num_rows)] = 1
    return logits.astype(np.float32)


@pytest.mark.parametrize("vocab_size", [1, 7, 300])
@pytest.mark.parametrize("kind", ["different", "ties", "minus infinity"])
def test_compiled_sampling_is_that_of_the_processors(kind, vocab_size):
    num_rows = 60
    logits = random_logits(kind, num_rows, vocab_size)
    generator = np.random.default_rng(0)
    same, all_possible = [], []
    for used in 3 * list(itertools.product([False, True], repeat=len(SETTINGS))):
        settings = {
            name: generator.choice(SETTINGS[name]) if use else None for name, use in zip(SETTINGS, used, strict=True)
        }
        settings["temperature"] = generator.choice([0.3, 1.0, 2.0])
        uniforms = generator.random(num_rows)
        expected, probabilities = compose(logits, uniforms, **settings)
        ids = sample(logits, uniforms, **settings)
        assert ids.dtype == np.int64
        assert (logits[np.arange(num_rows), ids] > -np.inf).all()
        same.append((ids == expected).mean())
        all_possible.append((probabilities[np.arange(num_rows), ids] > 0).mean())
        # Sums that are equal but for rounding fall on either side of a share, at ties of several rows at once.
        assert same[-1] >= 0.9, settings
        assert all_possible[-1] >= 0.95, settings
    assert np.mean(same) > 0.999
    assert np.mean(all_possible) > 0.999


def test_rows_do_not_depend_on_one_another():
    logits = random_logits("ties", 64, 300)
    uniforms = np.random.default_rng(1).random(64)
    settings = {"temperature": 0.7, "top_k": 50, "typical_p": 0.9, "top_p": 0.8, "min_p": 0.02}
    ids = sample(logits, uniforms, **settings)
    assert len(set(ids.tolist())) > 10
    assert [sample(logits[i : i + 1], uniforms[i : i + 1], **settings)[0] for i in range(64)] == ids.tolist()


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 300}, {"typical_p": 0.7}, {"top_p": 0.8}, {"min_p": 0.1}],
)
def test_tokens_come_as_often_as_is_likely(settings):
    # 600 tokens are three blocks of the cumulative sum; evenly spaced uniforms leave nothing to luck.
    num_draws = 20_000
    logits = random_logits("minus infinity", 1, 600)
    uniforms = (np.arange(num_draws) + 0.5) / num_draws
    ids = sample(np.repeat(logits, num_draws, axis=0), uniforms, **settings)
    assert (np.diff(ids) >= 0).all()  # by inverting the cumulative sum
    frequencies = np.bincount(ids, minlength=600) / num_draws
    settings = {**dict.fromkeys(SETTINGS), "temperature": 1.0, **settings}
    np.testing.assert_allclose(frequencies, compose(logits, uniforms[:1], **settings)[1][0], atol=2.5 / num_draws)


def test_of_equal_ones_the_first_are_kept():
    uniforms = (np.arange(100) + 0.5) / 100
    logits = np.repeat([[-np.inf, 0, -np.inf, 0, 0, 0, -9.0]], 100, axis=0)
    for settings, expected in [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 5}, {1, 3, 4, 5}),  # the fifth is of about 3 in 100,000
        ({"top_p": 0.3}, {1, 3}),
        ({"top_p": 0.7}, {1, 3, 4}),
        ({"typical_p": 0.2}, {1}),
        ({"typical_p": 0.6}, {1, 3, 4}),
        ({"min_p": 1.0}, {1, 3, 4, 5}),
    ]:
        assert set(sample(logits, uniforms, **settings).tolist()) == expected, settings


def test_what_cannot_come_is_never_drawn_at_the_ends():
    ends = np.array([0.0, 0.5, np.nextafter(1.0, 0.0)])
    for vocab_size in (1, 5, 256, 257, 600):
        for possible in (0, vocab_size // 2, vocab_size - 1):
            logits = np.full((3, vocab_size), -np.inf)
            logits[:, possible] = -3.0
            assert sample(logits, ends).tolist() == [possible] * 3


def test_a_hopeless_token_is_not_drawn_by_rounding():
    # The last token is of e^-200, which no sum of floats holds; a number next to 1 must not lead to it.
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(1000, 300)).astype(np.float32)
    logits[:, -1] = -200
    assert (sample(logits, np.full(1000, np.nextafter(1.0, 0.0))) < 299).all()


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-42, 1e-50])
def test_at_a_temperature_near_0_the_likeliest_comes(temperature):
    # In a process of its own: memory beyond an array may be read where all sums are NaN.
    code = f"""
import numpy as np
from aigc_tf import Tokenizer
from aigc_tf.generation.sampler import Sampler
from aigc_tf.generation.settings import check_sampling
tokenizer = Tokenizer.train(["白日"])
logits = np.random.default_rng(0).normal(size=(20, tokenizer.vocab_size)).astype(np.float32)
for compiled in (False, True):
    sampler = Sampler(tokenizer, check_sampling(temperature={temperature}), compiled)
    assert (sampler.sample(logits, np.linspace(0, 0.99, 20)) == logits.argmax(-1)).all(), compiled
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_the_top_k_may_lie_in_a_single_block_or_hardly_exist():
    for possible in ([*range(40, 50)], [5], [*range(0, 600, 7)], [*range(600)]):
        logits = np.full((64, 600), -np.inf, np.float32)
        logits[:, possible] = np.random.default_rng(0).normal(size=len(possible))
        for top_k in (1, 3, 10, 18, 19, 599):
            kept = {possible[i] for i in np.argsort(-logits[0, possible])[:top_k]}
            ids = sample(logits, (np.arange(64) + 0.5) / 64, temperature=1e3, top_k=top_k)
            assert set(ids.tolist()) <= kept, (possible, top_k)
            assert len(kept) > 60 or set(ids.tolist()) == kept


def test_bias_end_and_logits_that_are_not_finite():
    logits = np.zeros((7, 300), np.float32)
    logits[0, 7] = 9
    logits[1] = -np.inf
    logits[2, 200] = np.nan
    logits[4:, 200] = np.inf
    logits[5:, 201:] = -np.inf
    logits[6, :200] = np.inf
    bias = np.zeros((8, 300), np.float32)
    bias[:, 7], bias[:, 8] = -np.inf, 30
    for temperature in (0, 1):
        args = numba_sampling.SamplingArgs(
            bias, np.zeros((8, 300), np.int8), 2, np.float32(temperature), 300, *map(np.float32, (1, 1, 0))
        )
        for uniform in (0.0, 0.5, np.nextafter(1.0, 0.0)):
            ids = numba_sampling.sample(logits, np.full(7, uniform), np.zeros(7, np.int64), args)
            assert uniform != 0.5 or ids[[0, 1, 3]].tolist() == [8, 2, 8]
            assert (ids[[2, 4, 5, 6]] == numba_sampling.NOT_FINITE_ID).all()


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
