"""Products in whole numbers."""

import numpy as np
import pytest

from aigc_tf.generation.engines import int16


def product(x, matrix, bias=None, gelu=False):
    bias = np.zeros(matrix.shape[1], np.float32) if bias is None else bias
    rounded, scale, bias = (stack[0] for stack in int16.pack((matrix, bias)))
    return int16.linear(x, rounded, scale, bias, gelu)


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 6, 9])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(1, 1), (5, 3), (64, 32), (65, 33), (200, 70), (256, 129)])
def test_a_product_is_that_of_floats_to_rounding(num_tokens, num_inputs, num_outputs):
    x, matrix, bias = normal(num_tokens, num_inputs), normal(num_inputs, num_outputs), normal(num_outputs)
    expected = x.astype(np.float64) @ matrix + bias
    sizes = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(matrix, axis=0)
    np.testing.assert_array_less(np.abs(product(x, matrix, bias) - expected), 1e-4 * sizes + 1e-6)
    gelu = 0.5 * expected * (1 + np.tanh((2 / np.pi) ** 0.5 * (expected + 0.044715 * expected**3)))
    np.testing.assert_array_less(np.abs(product(x, matrix, bias, True) - gelu), 1.2e-4 * sizes + 1e-5)


def test_tokens_do_not_depend_on_one_another():
    x, matrix = normal(9, 70), normal(70, 45)
    together = product(x, matrix)
    assert (together == np.concatenate([product(row[None], matrix) for row in x])).all()


@pytest.mark.parametrize("num_inputs", [1, 63, 256, 4096])
@pytest.mark.parametrize("direction", ["all equal", "all in one", "as the row", "against the row"])
def test_no_sum_leaves_32_bits(num_inputs, direction):
    # The largest sums are those of vectors that point the same way, of whatever form and size.
    matrix = np.ones((num_inputs, 4), np.float32)
    if direction == "all in one":
        matrix[1:] = 0
    if "row" in direction:
        matrix = normal(num_inputs, 4)
    rows = np.repeat(matrix.T[:1], 5, axis=0) * (-1 if direction == "against the row" else 1)
    # At the ends their squares are 0, or beyond float32.
    for size in map(np.float32, (1e-30, 1e-24, 1e-20, 1e-3, 1.0, 1e6, 1e20, 1e32)):
        for x, by in ((size * rows, matrix), (rows, size * matrix)):
            expected = x.astype(np.float64) @ by
            np.testing.assert_allclose(product(x, by)[:, 0], expected[:, 0], rtol=1e-3)


def test_zeros_and_nan():
    x, matrix = normal(5, 8), normal(8, 6)
    x[0], matrix[:, 1] = 0, 0
    out = product(x, matrix)
    assert (out[0] == 0).all()
    assert (out[:, 1] == 0).all()
    x[2, 3], matrix[4, 2] = np.nan, np.nan
    out = product(x, matrix)
    assert np.isnan(out[2]).all()
    assert np.isnan(out[:, 2]).all()
    assert np.isfinite(np.delete(np.delete(out, 2, axis=0), 2, axis=1)).all()


def test_a_matrix_packed_in_parts_is_packed_as_a_whole():
    stack = [normal(70, 130), 1e-3 * normal(70, 130), normal(130, 70).T]  # the last lies otherwise in memory
    packed = int16.pack(*[(matrix, normal(130)) for matrix in stack])
    for i, matrix in enumerate(stack):
        scale = np.maximum(np.linalg.norm(matrix, axis=0) / np.float32(46_000), np.abs(matrix).max(0) / 32_767)
        np.testing.assert_array_equal(packed.scale[i], scale)
        np.testing.assert_array_equal(packed.rounded[i, :, :70], np.rint(matrix / scale).T)
    assert not packed.rounded[:, :, 70:].any()


def test_rows_begin_with_a_line_of_the_cache():
    for shape in ((1, 1), (3, 70), (130, 64)):
        rounded = int16.pack(*[(normal(*shape), normal(shape[1]))] * 3).rounded
        assert rounded.shape == (3, shape[1], int16.padded_width(shape[0]))
        assert all(row.ctypes.data % 64 == 0 for row in rounded.reshape(-1, rounded.shape[-1]))


def test_the_exponential_is_as_near_as_it_says():
    x = np.concatenate([np.linspace(-87, 88, 40_001), [-87, 0, 88]]).astype(np.float32)
    y = np.array([int16.exp(value) for value in x])
    exact = np.exp(x.astype(np.float64))
    assert np.abs(y / exact - 1).max() < 4e-6
    assert int16.exp(np.float32(0)) == pytest.approx(1, abs=1e-6)
    # Beyond its range it stays at the range's ends, and so is neither 0 nor infinite.
    assert 0 < int16.exp(np.float32(-1e30)) < 2e-38
    assert 1e38 < int16.exp(np.float32(1e30)) < np.inf
