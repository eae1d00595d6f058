import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aigc_tf.generation.processors import (
    apply_temperature,
    count_tokens_per_text,
    draw,
    keep_min_p,
    keep_top_p,
    keep_typical,
    log_softmax,
    penalize_counts,
    penalize_repetition,
    repeating_tokens,
    select_top_k,
    softmax,
)
from aigc_tf.runtime.backend import keras

P = np.array([[0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1]])


@pytest.fixture(params=["numpy", "keras"])
def array(request):
    """A function that makes an array of the one kind, and of the other, from numbers."""
    make = np.asarray if request.param == "numpy" else keras.ops.convert_to_tensor
    return lambda numbers, dtype="float32": make(numbers, dtype=dtype)


def numbers(x):
    return np.asarray(keras.ops.convert_to_numpy(x))


def kept(logits):
    """Return the ids of the one row of logits that are above minus infinity."""
    return np.flatnonzero(numbers(logits).ravel() > -np.inf).tolist()


def keep_top_k(logits, k):
    kept, ids = select_top_k(logits, k)
    ids = numbers(ids)
    out = np.full(logits.shape, -np.inf, np.float32)
    np.put_along_axis(out, ids, numbers(kept), axis=-1)
    assert (np.diff(ids) > 0).all()
    return out if isinstance(logits, np.ndarray) else keras.ops.convert_to_tensor(out)


def logits(array):
    return array(np.log(P))


def probabilities(logits):
    return numbers(keras.ops.softmax(logits, axis=-1))


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


def test_top_p_keeps_the_first_of_equal_ones(array):
    even = array(np.zeros(4))
    for p, expected in [(0.2, [0]), (0.25, [0]), (0.3, [0, 1]), (0.5, [0, 1]), (0.6, [0, 1, 2]), (1.0, [0, 1, 2, 3])]:
        assert kept(keep_top_p(even, p)) == expected
    # The border lies among equal ones behind a likelier token.
    assert kept(keep_top_p(array(np.log([0.2, 0.4, 0.2, 0.2])), 0.7)) == [0, 1, 2]
    assert kept(keep_top_p(array([-np.inf, 0, -np.inf, 0, 0]), 0.5)) == [1, 3]


def test_min_p_by_hand(array):
    for p, expected in [(0, [0, 1, 2, 3]), (0.24, [0, 1, 2, 3]), (0.26, [1, 2, 3]), (0.74, [1, 3]), (0.76, [1])]:
        changed = keep_min_p(array(np.log(P[0])), p)
        assert kept(changed) == expected
        np.testing.assert_allclose(numbers(changed)[expected], np.log(P[0])[expected], rtol=1e-6)


def test_min_p_1_keeps_all_of_the_likeliest_and_never_what_cannot_come(array):
    logits = array([-np.inf, 3.0, 1.0, 3.0])
    assert kept(keep_min_p(logits, 1)) == [1, 3]
    assert kept(keep_min_p(logits, 1e-9)) == [1, 2, 3]


def test_typical_by_hand(array):
    # The entropy of the first row is 1.280 nats, the surprisals 2.303, 0.916, 1.609, 1.204: nearest is 0.3.
    for p, expected in [(0.29, [3]), (0.31, [2, 3]), (0.49, [2, 3]), (0.51, [1, 2, 3]), (0.91, [0, 1, 2, 3])]:
        changed = keep_typical(array(np.log(P[0])), p)
        assert kept(changed) == expected, p
        np.testing.assert_allclose(numbers(changed)[expected], np.log(P[0])[expected], rtol=1e-6)


def test_typical_can_leave_out_the_likeliest(array):
    # Ten tokens of 0.06 are nearer to the entropy, 2.055 nats, than one of 0.4.
    p = [0.06] * 5 + [0.4] + [0.06] * 5
    assert kept(keep_typical(array(np.log(p)), 0.5)) == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_typical_keeps_the_first_of_equal_ones_and_never_what_cannot_come(array):
    logits = array([-np.inf, 0.0, -np.inf, 0.0, 0.0, 0.0])
    for p, expected in [(0.01, [1]), (0.3, [1, 3]), (0.6, [1, 3, 4]), (1.0, [1, 3, 4, 5])]:
        assert kept(keep_typical(logits, p)) == expected
    assert kept(keep_typical(array([-np.inf, 7.0]), 0.5)) == [1]


def test_top_k_gives_logits_and_ids_by_rising_id(array):
    logits, ids = select_top_k(array([1.0, -np.inf, 4.0, 3.0, -np.inf, 3.0]), 3)
    assert numbers(ids).tolist() == [2, 3, 5]
    assert numbers(ids).dtype == np.int32
    assert numbers(logits).tolist() == [4, 3, 3]
    for k in (6, 7):
        logits, ids = select_top_k(array([1.0, -np.inf, 4.0, 3.0, -np.inf, 3.0]), k)
        assert numbers(ids).tolist() == [0, 1, 2, 3, 4, 5]


def test_top_k_settles_ties_in_each_row_by_itself(array):
    # In the first row two are equal at the border, in the second all, in the third none.
    rows = array([[1.0, 2.0, 1.0, 0.0], [5.0, 5.0, 5.0, 5.0], [0.0, 1.0, 2.0, 3.0]])
    assert numbers(select_top_k(rows, 2)[1]).tolist() == [[0, 1], [0, 1], [2, 3]]


def test_tokens_are_counted_by_hand(array):
    ids = [[-1, 2, 0, 2], [-1, -1, -1, -1], [3, 3, 3, 3]]
    counts = count_tokens_per_text(array(ids, "int32"), 4)
    assert numbers(counts).tolist() == [[1, 0, 2, 0], [0, 0, 0, 0], [0, 0, 0, 4]]
    assert numbers(counts).dtype == np.int32
    assert numbers(count_tokens_per_text(array([1, 1, -1], "int32"), 3)).tolist() == [0, 2, 0]


def test_of_no_tokens_there_are_none(array):
    for shape in ((0,), (2, 0), (3, 2, 0)):
        counts = numbers(count_tokens_per_text(array(np.zeros(shape), "int32"), 5))
        assert counts.shape == (*shape[:-1], 5)
        assert not counts.any()


def test_repetition_penalty_is_a_power_of_the_probability(array):
    counts = array([0, 1, 0, 3], "int32")
    for penalty in (0.5, 1, 2):
        changed = numbers(penalize_repetition(array(np.log(P[0])), counts, penalty))
        np.testing.assert_allclose(np.exp(changed), [0.1, 0.4**penalty, 0.2, 0.3**penalty], rtol=1e-5)


@pytest.mark.parametrize("shift", [-20.0, -1.0, 0.0, 20.0])
def test_repetition_penalty_lowers_what_stands_there_wherever_logits_have_their_zero(array, shift):
    logits = np.log(P) + shift  # all negative, or all positive
    for token in range(4):
        counts = array(np.broadcast_to(np.arange(4) == token, P.shape), "int32")
        changed = probabilities(penalize_repetition(array(logits), counts, 1.3))
        odds = np.where(np.arange(4) == token, P**1.3, P)
        np.testing.assert_allclose(changed, odds / odds.sum(axis=-1, keepdims=True), rtol=1e-4)
        assert (changed[:, token] < P[:, token]).all()
        assert (np.delete(changed, token, 1) > np.delete(P, token, 1)).all()
    unchanged = probabilities(penalize_repetition(array(logits), array(np.ones(P.shape), "int32"), 1))
    np.testing.assert_allclose(unchanged, P, rtol=1e-4)


def test_penalties_leave_what_cannot_come(array):
    logits, counts = array([-np.inf, 0.0, -np.inf, 0.0]), array([1, 1, 0, 0], "int32")
    assert kept(penalize_repetition(logits, counts, 1.5)) == [1, 3]
    assert kept(penalize_counts(logits, counts, 1.0, -1.0)) == [1, 3]


def test_presence_and_frequency_penalties_by_hand(array):
    logits, counts = array([[1.0, 1.0, -1.0]]), array([[0, 1, 3]], "int32")
    assert numbers(penalize_counts(logits, counts, 0.5, 0.0)).tolist() == [[1, 0.5, -1.5]]
    assert numbers(penalize_counts(logits, counts, 0.0, 0.5)).tolist() == [[1, 0.5, -2.5]]
    assert numbers(penalize_counts(logits, counts, 0.25, 0.5)).tolist() == [[1, 0.25, -2.75]]
    assert numbers(penalize_counts(logits, counts, -1.0, 0.0)).tolist() == [[1, 2, 0]]
    assert numbers(penalize_counts(logits, counts, 0.0, 0.0)).tolist() == [[1, 1, -1]]


@pytest.mark.parametrize(
    ("ids", "n", "expected"),
    [
        ([5, 6, 5], 1, [5, 6, 5]),
        ([5, 6, 5, 7, 5], 2, [6, -1, 7, -1]),
        ([5, 6, 7, 5, 6], 3, [7, -1, -1]),
        ([5, 5, 5, 5], 3, [5, 5]),
        ([5, 6, 8, 6], 3, [-1, -1]),  # the first token of an n-gram counts too
        ([5, 6], 3, []),
        ([5], 2, []),
        ([-1, -1, 5, -1], 1, [-1, -1, 5, -1]),
        # Where there is no token nothing repeats, not even nothing.
        ([-1, -1, -1, 5], 2, [-1, -1, -1]),
        ([-1, -1, -1, 5], 3, [-1, -1]),
        ([-1, 5, -1], 2, [-1, -1]),
        ([-1, 5, 6, 5], 2, [-1, 6, -1]),
    ],
)
def test_tokens_that_would_repeat_an_n_gram_by_hand(array, ids, n, expected):
    assert numbers(repeating_tokens(array(ids, "int32"), n)).tolist() == expected
    assert numbers(repeating_tokens(array([[ids, ids]], "int32"), n)).tolist() == [[expected, expected]]


@given(st.lists(st.integers(-1, 3), max_size=12), st.integers(1, 4))
def test_exactly_those_tokens_repeat_an_n_gram_that_do(ids, n):
    def grams(ids):
        grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
        return [gram for gram in grams if -1 not in gram]

    repeating = set(repeating_tokens(np.array(ids, np.int32), n).tolist()) - {-1}
    assert repeating == {i for i in range(4) if set(grams(ids)) & set(grams([*ids, i])[len(grams(ids)) :])}


def test_softmax_and_its_logarithm(array):
    for logits in (np.log(P), np.log(P) + 500, np.log(P) - 500):
        np.testing.assert_allclose(numbers(softmax(array(logits))), P, rtol=1e-4)
        np.testing.assert_allclose(numbers(log_softmax(array(logits))), np.log(P), rtol=1e-4)
    with_impossible = array([-np.inf, 0.0, 0.0])
    np.testing.assert_allclose(numbers(softmax(with_impossible)), [0, 0.5, 0.5])
    np.testing.assert_allclose(numbers(log_softmax(with_impossible)), [-np.inf, *np.log([0.5, 0.5])], rtol=1e-6)


COUNTS = np.array([0, 1, 0, 2, 0, 0, 5])
FUNCTIONS = {
    "apply_temperature": lambda array, x: apply_temperature(x, 0.7),
    "top_k": lambda array, x: select_top_k(x, 3)[0],
    "top_k ids": lambda array, x: select_top_k(x, 3)[1],
    "keep_top_p": lambda array, x: keep_top_p(x, 0.6),
    "keep_min_p": lambda array, x: keep_min_p(x, 0.3),
    "keep_typical": lambda array, x: keep_typical(x, 0.6),
    "penalize_repetition": lambda array, x: penalize_repetition(
        x, array(np.broadcast_to(COUNTS, x.shape), "int32"), 1.3
    ),
    "penalize_counts": lambda array, x: penalize_counts(x, array(np.broadcast_to(COUNTS, x.shape), "int32"), 0.5, 0.25),
    "softmax": lambda array, x: softmax(x),
    "log_softmax": lambda array, x: log_softmax(x),
    "draw": lambda array, x: draw(x, array(np.full(x.shape[:-1], 0.6))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_are_worked_on_each_by_itself(array, name):
    logits = np.random.default_rng(0).normal(size=(3, 2, 7)).astype("float32")
    logits[0, 1, [2, 5]] = -np.inf
    logits[1, 0, [0, 3, 6]] = 4  # ties
    expected = numbers(FUNCTIONS[name](array, array(logits)))
    assert expected.shape[:2] == (3, 2)
    for a in range(3):
        np.testing.assert_allclose(numbers(FUNCTIONS[name](array, array(logits[a]))), expected[a], rtol=1e-6)
        for b in range(2):
            alone = FUNCTIONS[name](array, array(logits[a, b]))
            np.testing.assert_allclose(numbers(alone), expected[a, b], rtol=1e-6)
            assert isinstance(alone, np.ndarray | np.generic) == isinstance(array(0.0), np.ndarray)


def test_ids_are_worked_on_row_by_row(array):
    ids = np.random.default_rng(0).integers(-1, 4, (3, 2, 9))
    for function in (lambda x: count_tokens_per_text(x, 4), lambda x: repeating_tokens(x, 2)):
        expected = numbers(function(array(ids, "int32")))
        assert expected.max() > 0
        for a in range(3):
            assert numbers(function(array(ids[a], "int32"))).tolist() == expected[a].tolist()
            for b in range(2):
                assert numbers(function(array(ids[a, b], "int32"))).tolist() == expected[a, b].tolist()


def test_a_draw_among_the_likeliest_gives_a_place_among_them(array):
    logits, ids = select_top_k(array(np.log(P)), 2)
    places = numbers(draw(logits, array([0.5, 0.9])))
    assert places.tolist() == [0, 1]  # 4/7 and 3/7 of the tokens 1 and 3; 7/8 and 1/8 of the tokens 0 and 1
    assert np.take_along_axis(numbers(ids), places[:, None], -1)[:, 0].tolist() == [1, 1]


@pytest.mark.parametrize("row", [0, 1])
def test_draw_inverts_the_cumulative_sum(array, row):
    uniforms = (np.arange(1000) + 0.5) / 1000
    ids = draw(array(np.log(P)[[row] * 1000]), array(uniforms))
    counts = np.bincount(numbers(ids), minlength=4)
    np.testing.assert_allclose(counts / 1000, P[row], atol=0.002)


def test_draw_never_takes_what_cannot_come(array):
    impossible_ends = array([[-np.inf, 0.0, -np.inf, 0.0, -np.inf]])
    for uniform in (0.0, 0.25, 0.5, 0.75, np.nextafter(np.float32(1), np.float32(0))):
        assert int(draw(impossible_ends, array([uniform]))[0]) in (1, 3)


def test_a_draw_at_the_end_is_of_the_last_tokens_though_sums_are_rounded(array):
    logits = np.random.default_rng(0).normal(size=(200, 1000))
    ids = draw(array(logits), array(np.full(200, np.nextafter(np.float32(1), np.float32(0)))))
    assert numbers(ids).min() > 990


def test_arrays_of_numpy_are_drawn_from_without_keras():
    code = """
import sys
import numpy as np
from aigc_tf.generation.engines import numba_engine
from aigc_tf.generation import processors
from aigc_tf.models import graph
logits = processors.keep_top_p(processors.select_top_k(np.zeros((2, 9), np.float32), 3)[0], 0.5)
assert isinstance(processors.draw(logits, np.array([0.1, 0.9])), np.ndarray)
assert not {"keras", "tensorflow", "jax"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
