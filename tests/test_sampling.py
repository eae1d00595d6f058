import subprocess
import sys

import numpy as np
import pytest

from aigc_tf.devices import keras
from aigc_tf.sampling import apply_temperature, draw, keep_top_p, top_k

P = np.array([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]])


@pytest.fixture(params=["numpy", "keras"])
def array(request):
    """A function that makes an array of the one kind, and of the other, from numbers."""
    make = np.asarray if request.param == "numpy" else keras.ops.convert_to_tensor
    return lambda numbers: make(numbers, dtype="float32")


def keep_top_k(logits, k):
    kept, ids = top_k(logits, k)
    ids = np.asarray(keras.ops.convert_to_numpy(ids))
    out = np.full(logits.shape, -np.inf, np.float32)
    np.put_along_axis(out, ids, np.asarray(keras.ops.convert_to_numpy(kept)), axis=-1)
    assert (np.diff(ids) > 0).all()
    return out if isinstance(logits, np.ndarray) else keras.ops.convert_to_tensor(out)


def logits(array):
    return array(np.log(P))


def probabilities(logits):
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.softmax(logits, axis=-1)))


def test_temperature_is_a_power_of_the_probabilities(array):
    for temperature in (0.5, 1.0, 2.0):
        powers = P ** (1 / temperature)
        expected = powers / powers.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(probabilities(apply_temperature(logits(array), temperature)), expected, rtol=1e-5)


def test_top_k_by_hand(array):
    np.testing.assert_allclose(probabilities(keep_top_k(logits(array), 1))[0], [0, 1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(probabilities(keep_top_k(logits(array), 2))[0], [0, 4 / 7, 0, 3 / 7], atol=1e-6)
    np.testing.assert_allclose(probabilities(keep_top_k(logits(array), 99)), P, atol=1e-6)


def test_top_k_keeps_exactly_k_of_equal_ones(array):
    for k in (1, 2, 3):
        kept = probabilities(keep_top_k(logits(array), k))[1] > 0
        assert kept.sum() == k
        assert kept[:k].all()


def test_top_p_by_hand(array):
    # By falling probability the first row is 0.4, 0.3, 0.2, 0.1.
    for p, kept in [(0.05, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.89, 3), (0.91, 4), (1.0, 4)]:
        first = probabilities(keep_top_p(logits(array), p))[0]
        expected = np.where(np.isin(np.arange(4), [1, 3, 2, 0][:kept]), P[0], 0)
        np.testing.assert_allclose(first, expected / expected.sum(), atol=1e-6, err_msg=str(p))


def test_top_p_goes_by_what_is_left(array):
    assert (probabilities(keep_top_p(keep_top_k(logits(array), 2), 1.0))[0] > 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize("row", [0, 1])
def test_draw_inverts_the_cumulative_sum(array, row):
    uniforms = (np.arange(1000) + 0.5) / 1000
    ids = draw(array(np.log(P)[[row] * 1000]), array(uniforms))
    counts = np.bincount(np.asarray(keras.ops.convert_to_numpy(ids)), minlength=4)
    np.testing.assert_allclose(counts / 1000, P[row], atol=0.002)


def test_draw_never_takes_what_cannot_come(array):
    impossible_ends = array([[-np.inf, 0.0, -np.inf, 0.0, -np.inf]])
    for uniform in (0.0, 0.25, 0.5, 0.75, np.nextafter(np.float32(1), np.float32(0))):
        assert int(draw(impossible_ends, array([uniform]))[0]) in (1, 3)


def test_arrays_of_numpy_are_drawn_from_without_keras():
    code = """
import sys
import numpy as np
from aigc_tf import kernels, sampling, weights
logits = sampling.keep_top_p(sampling.top_k(np.zeros((2, 9), np.float32), 3)[0], 0.5)
assert isinstance(sampling.draw(logits, np.array([0.1, 0.9])), np.ndarray)
assert not {"keras", "tensorflow", "jax"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
