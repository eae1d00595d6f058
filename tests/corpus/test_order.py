import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aigc_tf.corpus.order import shuffled

# From one window to more than a block of 32 bits needs, and around the powers of two where the width changes.
SIZES = [1, 2, 3, 255, 256, 257, 5000, 65535, 65536, 65538, 131073, 300_000, 5_000_000]


@pytest.mark.parametrize("num_windows", SIZES)
def test_the_order_is_that_of_tensorflow(num_windows):
    tf = pytest.importorskip("tensorflow")
    places = np.concatenate([np.arange(20), np.random.default_rng(0).integers(0, 20 * num_windows, 200)])
    epochs, index = np.divmod(places, num_windows)
    last = np.int64(num_windows - 1)
    for seed in (0, 77, 2**31 + 5, 2**40 + 3, 2**63 - 1):
        windows = shuffled(places, num_windows, seed)
        # The public function takes one at a time, and puts the first number of the key before the seed.
        one = tf.random.experimental.index_shuffle(index[-1], tf.constant([seed, epochs[-1]], tf.int64), last)
        assert one == windows[-1]
        keys = np.stack([np.full_like(epochs, 498247692), np.full_like(epochs, seed), epochs], axis=1)
        last_of_each = np.full_like(index, last)
        expected = tf.raw_ops.RandomIndexShuffle(index=index, seed=keys, max_index=last_of_each, rounds=4)
        np.testing.assert_array_equal(windows, expected)


@pytest.mark.parametrize("num_windows", [*SIZES[:-1], 4**8 + 1, 4**9 + 1])  # TensorFlow's repeats one of 4**k + 1
def test_each_epoch_has_every_window_once(num_windows):
    for epoch in (0, 3):
        windows = shuffled(np.arange(num_windows) + epoch * num_windows, num_windows, seed=1)
        assert (np.bincount(windows, minlength=num_windows) == 1).all()


@given(start=st.integers(0, 10**6), length=st.integers(0, 300), num_windows=st.integers(1, 500))
def test_a_place_has_its_window_whatever_is_asked_for_with_it(start, length, num_windows):
    places = np.arange(start, start + length)
    together = shuffled(places, num_windows, 5)
    assert together.tolist() == [shuffled(place[None], num_windows, 5)[0] for place in places]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(shuffled(np.arange(40) + 40 * epoch, 40, seed)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == len(orders)
    # Every window comes to every place about as often as to any other.
    first = shuffled(np.arange(0, 40 * 4000, 40), 40, seed=0)
    assert len(set(first.tolist())) == 40
