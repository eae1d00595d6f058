"""Order: the shuffled order of training windows in every epoch, computed from the seed and the position alone."""

import functools

import numpy as np

_SMALL = 2**16  # windows, up to which a whole epoch is computed in one go
_BLOCK = 2**12  # positions of a longer epoch that are
_KEY = 498247692  # the first of three keys; the seed and the epoch are the others
_ROUND = 0xFFFFFFFC


def shuffled(places: np.ndarray, num_windows: int, seed: int) -> np.ndarray:
    """Return which window comes at each position of an endless sequence of epochs, each a shuffle of all windows.

    The order equals that of `tf.random.experimental.index_shuffle`, so it is the same with and without TensorFlow.
    Only for 4**k + 1 windows it differs: that function repeats one of them and omits another.

    Args:
        places: positions, `int64 (B,)`, from 0; position p is in epoch p // num_windows.
        num_windows: the number of windows.
        seed: the seed. Its last 32 bits count, and those of the epoch; with up to 65,536 windows the last eight.

    Returns:
        Indices of windows, `int64 (B,)`.

    Example:
        >>> shuffled(np.arange(6), 3, seed=1).tolist()
        [0, 2, 1, 0, 1, 2]

    Source:
        R. Beaulieu et al., "The SIMON and SPECK families of lightweight block ciphers" (2013), with four rounds;
        J. Black and P. Rogaway, "Ciphers with arbitrary finite domains" (2002), for numbers other than powers of two.
    """
    if num_windows == 1:
        return np.zeros_like(places)
    pieces, within = np.divmod(places, num_windows if num_windows <= _SMALL else _BLOCK)
    compute = _epoch if num_windows <= _SMALL else _block
    windows = np.empty_like(places)
    for piece in np.unique(pieces):
        here = pieces == piece
        windows[here] = compute(int(piece), num_windows, seed)[within[here]]
    return windows


@functools.lru_cache(maxsize=8)
def _epoch(epoch: int, num_windows: int, seed: int) -> np.ndarray:
    """Compute a whole epoch of few windows."""
    cipher = _encrypt(np.arange(_SMALL, dtype=np.uint16), np.uint16(epoch % 2**8), seed, 8).astype(np.intp)
    # A number beyond the windows is encrypted again until it is within; each round doubles how often `follow` does it.
    follow = np.where(np.arange(_SMALL) < num_windows, np.arange(_SMALL), cipher)
    windows = cipher[:num_windows]
    while (windows >= num_windows).any():
        windows, follow = follow[windows], follow[follow]
    return windows


@functools.lru_cache(maxsize=4)
def _block(block: int, num_windows: int, seed: int) -> np.ndarray:
    """Compute some positions of epochs of many windows."""
    epochs, numbers = np.divmod(np.arange(block * _BLOCK, (block + 1) * _BLOCK).astype(np.uint64), num_windows)
    half_bits = -(-(num_windows - 1).bit_length() // 2)
    beyond = np.arange(_BLOCK)
    while len(beyond):
        numbers[beyond] = _encrypt(numbers[beyond], epochs[beyond], seed, half_bits)
        beyond = beyond[numbers[beyond] >= num_windows]
    return numbers.astype(np.int64)


def _encrypt(numbers: np.ndarray, epochs: np.ndarray, seed: int, half_bits: int) -> np.ndarray:
    """Permute the numbers of twice `half_bits`, in four rounds; `epochs` are of the same dtype."""
    mask = 2**half_bits - 1

    def rotated(half, places):
        return (half << places | half >> (half_bits - places)) & mask

    def round_of(left, right, key):
        return right, left ^ (rotated(right, 1) & rotated(right, 8)) ^ rotated(right, 2) ^ key

    first, second, third = _KEY & mask, seed & mask & 0xFFFFFFFF, epochs & mask
    fourth = rotated(third, half_bits - 3) ^ rotated(third, half_bits - 4) ^ ((_ROUND & mask) ^ 1 ^ first)
    left, right = numbers >> half_bits, numbers & mask
    for key in (first, second, third, fourth):
        left, right = round_of(left, right, key)
    return left << half_bits | right
