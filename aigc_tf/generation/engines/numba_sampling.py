"""Numba sampling: the choice of a token, as in `generation/processors.py` (top-k, top-p, ...), compiled for the CPU."""

from typing import NamedTuple

import numba
import numpy as np

from ...runtime.numba_availability import numba_lock
from ...runtime.numba_jit import numba_jit
from .int16 import exp

NOT_FINITE_ID = -2  # instead of a token, where logits are not finite
_f32 = np.float32
_BLOCK = 32  # logits, of which first only the largest is compared
_WITH_INFINITY = {"nsz", "arcp", "contract", "reassoc"}  # fastmath, except that logits may be minus infinity


class SamplingArgs(NamedTuple):
    """How tokens are chosen.

    Attributes:
        bias: `float32 (8, V)`, added to the logits, by the state of an incomplete character (`corpus/utf8.py`).
        after: `int8 (8, V)`, the state after each token.
        eos: the token for a row that allows no token.
        temperature: `float32`; 0 takes the likeliest token.
        top_k: V for all tokens.
        typical_p: `float32`; 1 for all tokens.
        top_p: `float32`; 1 for all tokens.
        min_p: `float32`; 0 for all tokens.
    """

    bias: np.ndarray
    after: np.ndarray
    eos: int
    temperature: np.float32
    top_k: int
    typical_p: np.float32
    top_p: np.float32
    min_p: np.float32


def sample(logits: np.ndarray, uniforms: np.ndarray, pending: np.ndarray, args: SamplingArgs) -> np.ndarray:
    """Draw a token from each row as `processors.sample` does.

    Args:
        logits: `float32 (R, V)`.
        uniforms: `float64 (R,)`, uniform in [0, 1).
        pending: `int64 (R,)`, the state of the newest character of each row.
        args: the settings.

    Returns:
        Token ids, `int64 (R,)`; `NOT_FINITE_ID` for a row with NaN or infinity.
    """
    with numba_lock:
        return sample_compiled(logits, uniforms, pending, args)


@numba_jit(parallel=True, fastmath=_WITH_INFINITY)
def sample_compiled(logits, uniforms, pending, args):
    """Do what `sample` does, callable from compiled code."""
    bias, _, eos, temperature, top_k, typical_p, top_p, min_p = args
    num_rows, vocab_size = logits.shape
    ids = np.empty(num_rows, np.int64)
    for row in numba.prange(num_rows):
        scaled = np.empty(vocab_size, _f32)
        largest, are_numbers = _f32(-np.inf), True
        for i in range(vocab_size):
            scaled[i] = logits[row, i] + bias[pending[row], i]
            largest = max(largest, scaled[i])
            are_numbers &= scaled[i] == scaled[i]
        if not are_numbers or largest == np.inf:
            ids[row] = NOT_FINITE_ID
        elif largest == -np.inf:
            ids[row] = eos
        elif temperature == 0:
            ids[row] = scaled.argmax()
        else:
            candidates = _candidates(scaled, top_k)
            odds = _filter_odds(scaled[candidates], largest, temperature, top_k, typical_p, top_p, min_p)
            ids[row] = candidates[_draw(odds, uniforms[row])]
    return ids


@numba_jit(fastmath=_WITH_INFINITY)
def _candidates(scores, top_k):
    """Return the `top_k` likeliest tokens and a few others, in the order of their ids.

    If the largest scores of k blocks are above a border, at least k scores are above it.
    """
    num_blocks = len(scores) // _BLOCK
    if top_k >= num_blocks:
        return np.arange(len(scores))
    largest = np.empty(num_blocks, _f32)
    for block in range(num_blocks):
        largest[block] = scores[block * _BLOCK]
        for i in range(np.uint64(block * _BLOCK), np.uint64((block + 1) * _BLOCK)):
            largest[block] = max(largest[block], scores[i])
    border = _border(largest, np.ones(num_blocks, _f32), _f32(top_k))
    if (largest >= border).sum() < top_k:  # in the other blocks all are minus infinity
        return np.arange(len(scores))
    candidates, count = np.empty(len(scores), np.int64), 0
    for block in range(num_blocks + 1):
        if block == num_blocks or largest[block] >= border:
            for i in range(block * _BLOCK, min(len(scores), (block + 1) * _BLOCK)):
                candidates[count] = i
                count += scores[i] >= border
    return candidates[:count]


@numba_jit(fastmath=_WITH_INFINITY)
def _filter_odds(scores, largest, temperature, top_k, typical_p, top_p, min_p):
    """Apply top-k, temperature, typical, top-p and min-p; return unnormalised probabilities, 0 for what is left out.

    Changes the scores in place.
    """
    size = len(scores)
    odds = np.empty(size, _f32)
    if top_k < size:
        kept = np.ones(size, _f32)
        _keep(kept, scores, np.ones(size, _f32), _f32(top_k))
        for i in range(size):
            scores[i] = scores[i] if kept[i] > 0 else _f32(-np.inf)
    for i in range(size):
        scores[i] = (scores[i] - largest) / temperature
        odds[i] = exp(scores[i]) if scores[i] > -87 else _f32(0)  # less is negligible against the largest, 1
    if typical_p < 1:
        total, expected = _f32(0), _f32(0)
        for i in range(size):
            total += odds[i]
            expected += odds[i] * scores[i] if odds[i] > 0 else _f32(0)
        expected /= total
        for i in range(size):
            scores[i] = -abs(scores[i] - expected) if odds[i] > 0 else _f32(-np.inf)
        _keep(odds, scores, odds.copy(), _f32(typical_p * total))
    if top_p < 1:
        weight = odds.copy()
        _keep(odds, weight, weight, _f32(top_p * weight.sum()))
    if min_p > 0:
        border = _f32(min_p * odds.max())
        for i in range(size):
            odds[i] = odds[i] if odds[i] >= border else _f32(0)
    return odds


@numba_jit(fastmath=_WITH_INFINITY)
def _border(key, weight, target):
    """Return the largest key such that the weights of all keys at least as large sum to the target or more.

    It is found by bisection: a few vectorised passes over the vocabulary are cheaper than sorting it.
    """
    low, high = _f32(np.inf), _f32(-np.inf)
    for i in range(len(key)):
        low, high = min(low, key[i] if key[i] > -np.inf else _f32(np.inf)), max(high, key[i])
    at_high, between = _f32(0), _f32(0)
    for i in range(len(key)):
        at_high += weight[i] if key[i] == high else _f32(0)
        between += _f32(1) if (key[i] >= low) & (key[i] < high) else _f32(0)
    if at_high >= target:
        low, between = high, _f32(0)
    # Keys of at least `low` reach the target, those of at least `high` do not; `between` counts those in between.
    while between > 1:
        middle = _f32((low + high) * _f32(0.5))
        if middle <= low or middle >= high:
            break
        total, below = _f32(0), _f32(0)
        for i in range(len(key)):
            total += weight[i] if key[i] >= middle else _f32(0)
            below += _f32(1) if (key[i] >= low) & (key[i] < middle) else _f32(0)
        if total >= target:
            low, between = middle, between - below
        else:
            high, between = middle, below
    border = _f32(np.inf)
    for i in range(len(key)):
        border = min(border, key[i] if key[i] >= low else _f32(np.inf))
    return border


@numba_jit(fastmath=_WITH_INFINITY)
def _keep(odds, key, weight, target):
    """Set all odds to 0 except for the fewest largest keys that reach the target; of equal keys the first."""
    border = _border(key, weight, target)
    total = _f32(0)
    for i in range(len(key)):
        total += weight[i] if key[i] > border else _f32(0)
        odds[i] = odds[i] if key[i] >= border else _f32(0)
    for i in range(len(key)):
        if key[i] == border:
            odds[i] = odds[i] if total < target else _f32(0)
            total += weight[i]


@numba_jit(fastmath=_WITH_INFINITY)
def _draw(odds, uniform):
    """Draw a token by inverting the cumulative sum, by blocks first, whose sums vectorise."""
    sums = np.zeros((len(odds) + 255) // 256)
    for block in range(len(sums)):
        total = _f32(0)
        for i in range(256 * block, min(len(odds), 256 * (block + 1))):
            total += odds[i]
        sums[block] = total
    left = uniform * sums.sum()
    block = 0
    while block < len(sums) - 1 and left >= sums[block]:
        left -= sums[block]
        block += 1
    while block > 0 and sums[block] == 0:  # where rounding led past the last possible token
        block -= 1
    token = 0
    for i in range(256 * block, min(len(odds), 256 * (block + 1))):
        if odds[i] > 0:
            token = i
            left -= odds[i]
            if left < 0:
                break
    return token
