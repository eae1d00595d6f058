import itertools
import subprocess
import sys

import numpy as np
import pytest

from aigc_tf.generation import processors
from aigc_tf.generation.engines import numba_sampling

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
        changed, ids = processors.select_top_k(changed, top_k)
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
