import math
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from aigc_tf.runtime.backend import tf

fused_ops = pytest.importorskip("aigc_tf.training.fast.fused_ops", reason="numba is not installed")
BFLOAT16 = tf.bfloat16.as_numpy_dtype
# Odd widths, and arrays for one thread and for several.
SHAPES = [(3, 7), (5, 1), (700, 131), (2, 70_001)]
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float32, 2e-5), (BFLOAT16, 2**-8)], ids=["float32", "bfloat16"]
)


def normal(shape, dtype=np.float32, scale=1.0, seed=0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def as_float64(x):
    return np.asarray(x, np.float64)


def assert_close(got, expected, tolerance):
    assert np.abs(as_float64(got) - expected).max() <= tolerance * (max(np.abs(expected).max(), 1e-3))


def slope(function, x, step=1e-6):
    """Differentiate a sum of what a function of float64 gives for each number by itself."""
    return (function(x + step) - function(x - step)) / (2 * step)


@PRECISIONS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_cross_entropy(shape, dtype, tolerance, num_threads):
    logits = normal(shape, dtype, scale=4.0)
    targets = np.random.default_rng(1).integers(0, shape[1], shape[0]).astype(np.int32)
    nats, gradient = fused_ops.cross_entropy(logits, targets, num_threads)
    x = as_float64(logits)
    log_odds = x - x.max(1, keepdims=True)
    log_p = log_odds - np.log(np.exp(log_odds).sum(1, keepdims=True))
    rows = np.arange(shape[0])
    np.testing.assert_allclose(nats, -log_p[rows, targets], rtol=1e-5, atol=1e-5)
    expected = np.exp(log_p)
    expected[rows, targets] -= 1
    assert gradient.dtype == dtype
    assert_close(gradient, expected / shape[0], tolerance)


def test_cross_entropy_of_large_logits_is_finite_and_of_nan_is_nan():
    nats, gradient = fused_ops.cross_entropy(np.array([[500.0, -500.0]], np.float32), np.array([1], np.int32), 1)
    assert nats[0] == pytest.approx(1000.0)
    assert gradient.tolist() == [[1.0, -1.0]]
    nats, _ = fused_ops.cross_entropy(np.array([[np.nan, 1.0]], np.float32), np.array([1], np.int32), 1)
    assert math.isnan(nats[0])


@pytest.mark.parametrize("wrong", [-100, -1, 4, 7])
def test_targets_outside_the_vocabulary_are_refused(wrong):
    with pytest.raises(ValueError, match=f"Targets must be from 0 to 3, the tokens of the vocabulary, got {wrong}"):
        fused_ops.cross_entropy(normal((2, 4)), np.array([1, wrong], np.int32), 1)


@PRECISIONS
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu(shape, dtype, tolerance):
    def reference(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x, d_y = normal(shape, dtype, 3.0), normal(shape, dtype, seed=1)
    assert_close(fused_ops.gelu(x, 2), reference(as_float64(x)), tolerance)
    assert_close(fused_ops.gelu_gradient(x, d_y, 2), as_float64(d_y) * slope(reference, as_float64(x)), tolerance)


# From small numbers to far larger ones than models have; compared one by one, not relative to the largest.
GRID = np.concatenate([-np.geomspace(1e4, 1e-4, 300), [0.0], np.geomspace(1e-4, 1e4, 300)])


def assert_each_close(got, expected, tolerance, least=0.1):
    np.testing.assert_allclose(as_float64(got), expected, rtol=tolerance, atol=least * tolerance)


@PRECISIONS
def test_gelu_of_large_numbers(dtype, tolerance):
    x = GRID.astype(dtype)[None]
    v = as_float64(x)
    share = 1 / (1 + np.exp(-2 * np.clip(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3), -300, 300)))
    slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * v**2)
    assert_each_close(fused_ops.gelu(x, 1), v * share, tolerance)
    assert_each_close(
        fused_ops.gelu_gradient(x, np.ones_like(x), 1), share + v * share * (1 - share) * slope, tolerance
    )


@PRECISIONS
@pytest.mark.parametrize("low", [-1e4, -1e9, -1e30, -np.inf])
def test_softmaxes_of_large_numbers(dtype, tolerance, low):
    rows = np.random.default_rng(0).permutation(np.tile(GRID, (8, 1)), axis=1).astype(dtype)
    rows = np.hstack([rows / dtype(scale) for scale in (1, 10, 100, 1000)])[:, :2000]
    rows[:, ::7] = low
    v = as_float64(rows)
    odds = np.exp(v - v.max(1, keepdims=True))
    expected = odds / odds.sum(1, keepdims=True)
    targets = np.array([1, 1999, *v.argmax(1)[2:]], np.int32)
    nats, gradient = fused_ops.cross_entropy(rows, targets, 2)
    chosen = v[np.arange(8), targets]
    np.testing.assert_allclose(nats, v.max(1) + np.log(odds.sum(1)) - chosen, rtol=1e-5, atol=1e-5)
    shares = expected.copy()
    shares[np.arange(8), targets] -= 1
    assert_each_close(as_float64(gradient) * 8, shares, tolerance)
    square = np.tile(rows[:, :500, None].transpose(0, 2, 1), (1, 500, 1))
    v = np.where(np.tri(500, dtype=bool), as_float64(square), -np.inf)[:, 3:]
    odds = np.exp((v - v.max(-1, keepdims=True)) / 2)
    assert_each_close(fused_ops.causal_softmax(square, 0.5, 2)[:, 3:], odds / odds.sum(-1, keepdims=True), tolerance)


@PRECISIONS
def test_layer_norm_of_rows_that_are_constant_or_far_from_zero(dtype, tolerance):
    width = 384
    rows = np.concatenate([np.zeros((1, width)), np.ones((2, width)) * [[1e4], [-3.3]], GRID[:width][None]])
    rows = np.concatenate([rows, 1e3 + normal((1, width)), 1e4 * normal((1, width), seed=1)]).astype(dtype)
    gamma, beta, d_y = normal(width, seed=2), normal(width, seed=3), normal(rows.shape, dtype, seed=4)
    v = tf.constant(as_float64(rows))
    with tf.GradientTape() as tape:
        tape.watch(v)
        mean, variance = tf.nn.moments(v, [-1], keepdims=True)
        y = (v - mean) / tf.sqrt(variance + 1e-5) * gamma.astype(float) + beta.astype(float)
    expected = tape.gradient(y, v, tf.constant(as_float64(d_y))).numpy()
    got = fused_ops.layer_norm_gradient(rows, gamma, d_y, 1e-5, 1)[0]
    for i, one in enumerate(fused_ops.layer_norm(rows, gamma, beta, 1e-5, 1)):
        assert_each_close(one, y[i].numpy(), max(tolerance, 2e-4), least=1.0)
        assert_close(got[i], expected[i], max(tolerance, 2e-4))


@PRECISIONS
@pytest.mark.parametrize("shape", [(3, 7), (2, 400, 131), (1, 70_001)])
def test_layer_norm(shape, dtype, tolerance):
    x, d_y = normal(shape, dtype, 2.0) + dtype(3), normal(shape, dtype, seed=1)
    gamma, beta = normal(shape[-1], seed=2), normal(shape[-1], seed=3)
    v = tf.constant(as_float64(x)), tf.constant(as_float64(gamma)), tf.constant(as_float64(beta))
    with tf.GradientTape() as tape:
        tape.watch(v)
        mean, variance = tf.nn.moments(v[0], [-1], keepdims=True)
        y = (v[0] - mean) / tf.sqrt(variance + 1e-5) * v[1] + v[2]
    assert_close(fused_ops.layer_norm(x, gamma, beta, 1e-5, 2), y.numpy(), tolerance)
    got = fused_ops.layer_norm_gradient(x, gamma, d_y, 1e-5, 2)
    for one, expected in zip(got, tape.gradient(y, v, tf.constant(as_float64(d_y))), strict=True):
        assert_close(one, expected.numpy(), tolerance)


@PRECISIONS
@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (40, 64, 64), (1, 1, 1)])
def test_causal_softmax(shape, dtype, tolerance):
    scores, d_p = normal(shape, dtype, 3.0), normal(shape, dtype, seed=1)
    v = tf.constant(as_float64(scores))
    with tf.GradientTape() as tape:
        tape.watch(v)
        later = np.triu(np.full(shape[-2:], -1e30), 1)
        p = tf.nn.softmax(0.3 * v + later)
    got = fused_ops.causal_softmax(scores, 0.3, 2)
    assert_close(got, p.numpy(), tolerance)
    assert not np.triu(as_float64(got), 1).any()
    got = fused_ops.causal_softmax_gradient(p.numpy().astype(dtype), d_p, 0.3, 2)
    assert_close(got, tape.gradient(p, v, tf.constant(as_float64(d_p))).numpy(), 2 * tolerance)


def test_results_keep_their_buffers_and_free_buffers_are_reused():
    x = normal((100, 100))
    fused_ops.release_buffers()
    results = [fused_ops.gelu(x, 1) for _ in range(3)]
    addresses = {result.ctypes.data for result in results}
    assert len(addresses) == 3
    assert all(address % 64 == 0 for address in addresses)
    copy = results[1].copy()
    del results[0]
    results += [fused_ops.gelu(-x, 1), fused_ops.gelu(-x, 1)]
    assert results[2].ctypes.data in addresses  # the free buffer
    assert results[3].ctypes.data not in addresses
    np.testing.assert_array_equal(results[0], copy)


@pytest.mark.parametrize("view", [lambda x: x[3:], lambda x: x.reshape(-1).view(np.uint8), memoryview, tf.constant])
def test_a_view_keeps_the_buffer_of_a_result(view):
    x = normal((100, 100))
    result = fused_ops.gelu(x, 1)
    address, part = result.ctypes.data, view(result)
    copy = np.array(part)
    del result
    fused_ops.gelu(-x, 1)
    np.testing.assert_array_equal(np.array(part), copy)
    if view is not tf.constant:  # a copy
        assert fused_ops.gelu(-x, 1).ctypes.data != address


def test_buffers_are_released():
    result = fused_ops.gelu(normal((100, 100)), 1)
    size = result.nbytes
    del result
    memory = weakref.ref(fused_ops._free_buffers[size][-1].base)
    fused_ops.release_buffers()
    assert memory() is None
    late = fused_ops.gelu(normal((100, 100)), 1)
    fused_ops.release_buffers()
    del late
    assert not fused_ops._free_buffers


def test_threads_share_no_buffers():
    x = np.arange(20.0, dtype=np.float32)[:, None] * np.ones(257, np.float32)

    def check(i):
        for _ in range(300):
            results = [fused_ops.gelu(x[j : j + 1], 1) for j in (i, i + 1)]
            assert all((result == result[0, 0]).all() for result in results)
            assert results[0][0, 0] != results[1][0, 0]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, range(2, 18)))


@pytest.mark.parametrize("clip_norm", [None, 1e9, 0.5])
@pytest.mark.parametrize("shapes", [[(3,), (4, 5), (600, 1000), ()], [(3,), (2,), (), (4, 5)]], ids=["large", "small"])
def test_adamw(clip_norm, shapes):
    weights, gradients, momenta = ([normal(s, seed=i).reshape(s) for s in shapes] for i in range(3))
    velocities = [normal(s, seed=3).reshape(s) ** 2 for s in shapes]
    decays = [0.0, 0.1, 0.1, 0.0]
    settings = {"rate": 0.01, "step": 3, "beta_1": 0.9, "beta_2": 0.95, "epsilon": 1e-7, "clip_norm": clip_norm}
    got = fused_ops.adamw(weights, gradients, momenta, velocities, decays, **settings, num_threads=2)
    norm = math.sqrt(sum((as_float64(g) ** 2).sum() for g in gradients))
    scale = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
    for i in range(len(shapes)):
        w, g, m, v = (as_float64(a[i]) for a in (weights, gradients, momenta, velocities))
        g = g * scale
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        rate = 0.01 * math.sqrt(1 - 0.95**3) / (1 - 0.9**3)
        w = w - 0.01 * decays[i] * w - rate * m / (np.sqrt(v) + 1e-7)
        for one, expected in zip(got[i :: len(shapes)], (w, m, v), strict=True):
            np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-5)


def test_adamw_turns_infinite_gradients_into_nan_weights():
    arrays = [[np.ones(3, np.float32)], [np.array([1, np.inf, 1], np.float32)], *([[np.ones(3, np.float32)]] * 2)]
    settings = {"rate": 0.01, "step": 1, "beta_1": 0.9, "beta_2": 0.95, "epsilon": 1e-7}
    weights, *_ = fused_ops.adamw(*arrays, [0.0], **settings, clip_norm=1.0, num_threads=1)
    assert np.isnan(weights).all()


def test_adamw_of_large_and_zero_gradients():
    gradients = np.concatenate([GRID, [0.0, 1e-30, -1e-30, 1e15]]).astype(np.float32)
    ones = np.ones_like(gradients)
    settings = {"rate": 0.5, "step": 1, "beta_1": 0.9, "beta_2": 0.95, "epsilon": 1e-7, "clip_norm": None}
    weights, momenta, velocities = fused_ops.adamw(
        [ones], [gradients], [0 * ones], [0 * ones], [0.0], **settings, num_threads=1
    )
    g = as_float64(gradients)
    step = 0.5 * math.sqrt(0.05) / 0.1 * (0.1 * g) / (np.sqrt(0.05 * g**2) + 1e-7)
    np.testing.assert_allclose(weights, 1 - step, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(momenta, 0.1 * g, rtol=1e-5)
    np.testing.assert_allclose(velocities, 0.05 * g**2, rtol=1e-5, atol=1e-37)
