"""Fused kernels: the loops of `fused_ops` over the rows from `first` to before `last`, compiled by numba.

Arrays are float32, or bfloat16 as its bits in `uint16`. Sums and functions are computed in float32.
"""

import math

import numba
import numpy as np
from numba.extending import overload, register_jitable

from ...generation.engines.int16 import exp
from ...runtime.numba_jit import numba_jit

_f32, _u32 = np.float32, np.uint32
# All optimisations but those that assume finite numbers: infinity and NaN must be kept.
_FAST = {"reassoc", "nsz", "arcp", "contract", "afn"}
_SATURATED = _f32(8)  # beyond it the GELU is x or 0 to all digits; within it float32 does not overflow
_GELU_SCALE, _GELU_CUBIC = _f32(math.sqrt(2 / math.pi)), _f32(0.044715)


def _load(array, i):
    """Read an element as float32."""


def _rounded(array, x):
    """Round x to the dtype of an array."""


@overload(_load, inline="always")
def _load_in_numba(array, i):
    if array.dtype == numba.uint16:
        return lambda array, i: _u32(_u32(array[i]) << _u32(16)).view(np.float32)
    return lambda array, i: array[i]


@overload(_rounded, inline="always")
def _rounded_in_numba(array, x):
    def to_bfloat16(array, x):
        bits = _f32(x).view(np.uint32)
        return np.uint16((bits + _u32(0x7FFF) + ((bits >> _u32(16)) & _u32(1))) >> _u32(16))

    return to_bfloat16 if array.dtype == numba.uint16 else lambda array, x: x


@register_jitable(inline="always")
def _largest(x, n, work):
    """Return the largest of the first n elements of x, by comparing halves, which numba can vectorise."""
    half = (n + 1) // 2
    for j in range(n - half):
        work[j] = max(x[j], x[half + j])
    if n - half < half:
        work[half - 1] = x[half - 1]
    n = half
    while n > 1:
        half = (n + 1) // 2
        for j in range(n - half):
            work[j] = max(work[j], work[half + j])
        n = half
    return work[0]


@numba_jit(fastmath=_FAST)
def cross_entropy(first, last, logits, targets, share, nats, gradient):
    num_logits = logits.shape[1]
    x, work = np.empty(num_logits, np.float32), np.empty(num_logits, np.float32)
    for row in range(first, last):
        source, out, target = logits[row], gradient[row], targets[row]
        for j in range(num_logits):  # a loop of its own, as fast as memory
            x[j] = _load(source, j)
        largest, target_logit = _largest(x, num_logits, work), x[target]
        total = _f32(0)
        for j in range(num_logits):
            odds = exp(x[j] - largest)
            x[j] = odds
            total += odds
        nats[row] = largest + np.log(total) - target_logit
        scale = share / total
        for j in range(num_logits):
            out[j] = _rounded(out, x[j] * scale)
        out[target] = _rounded(out, x[target] * scale - share)


@register_jitable(inline="always")
def _exp_minus_2z(v):
    """Compute exp(-2 z), where the GELU is x (1 + tanh(z)) / 2 = x / (1 + exp(-2 z))."""
    return exp(_f32(-2) * _GELU_SCALE * v * (_f32(1) + _GELU_CUBIC * v * v))


@numba_jit(fastmath=_FAST)
def gelu(first, last, x, y):
    for row in range(first, last):
        source, out = x[row], y[row]
        for j in range(x.shape[1]):
            v = _load(source, j)
            out[j] = _rounded(out, v / (_f32(1) + _exp_minus_2z(min(max(v, -_SATURATED), _SATURATED))))


@numba_jit(fastmath=_FAST)
def gelu_gradient(first, last, x, d_y, d_x):
    for row in range(first, last):
        source, given, out = x[row], d_y[row], d_x[row]
        for j in range(x.shape[1]):
            v = min(max(_load(source, j), -_SATURATED), _SATURATED)
            odds = _exp_minus_2z(v)
            share = _f32(1) / (_f32(1) + odds)
            slope = _f32(2) * _GELU_SCALE * (_f32(1) + _f32(3) * _GELU_CUBIC * v * v)
            # Not 1 - share, which rounds to more than zero.
            out[j] = _rounded(out, _load(given, j) * (share + v * share * (odds * share) * slope))


@register_jitable(inline="always")
def _centred(source, n, out):
    """Write a row minus its mean to `out`, and return its variance."""
    total, squares = _f32(0), _f32(0)
    for j in range(n):
        out[j] = _load(source, j)
        total += out[j]
    mean = total / _f32(n)
    for j in range(n):
        out[j] -= mean
        squares += out[j] * out[j]
    return squares / _f32(n)


@numba_jit(fastmath=_FAST)
def layer_norm(first, last, x, gamma, beta, epsilon, y):
    n = x.shape[1]
    v = np.empty(n, np.float32)
    for row in range(first, last):
        out = y[row]
        scale = _f32(1) / np.sqrt(_centred(x[row], n, v) + epsilon)
        for j in range(n):
            out[j] = _rounded(out, v[j] * scale * gamma[j] + beta[j])


@numba_jit(fastmath=_FAST)
def layer_norm_gradient(first, last, x, gamma, epsilon, d_y, d_x, sums):
    n = x.shape[1]
    v, d_v = np.empty(n, np.float32), np.empty(n, np.float32)
    for row in range(first, last):
        given, out = d_y[row], d_x[row]
        scale = _f32(1) / np.sqrt(_centred(x[row], n, v) + epsilon)
        total, product = _f32(0), _f32(0)
        for j in range(n):
            v[j] *= scale
            d = _load(given, j)
            sums[0, j] += d * v[j]
            sums[1, j] += d
            d_v[j] = d * gamma[j]
            total += d_v[j]
            product += d_v[j] * v[j]
        mean, slope = total / _f32(n), product / _f32(n)
        for j in range(n):
            out[j] = _rounded(out, scale * (d_v[j] - mean - v[j] * slope))


@numba_jit(fastmath=_FAST)
def causal_softmax(first, last, scores, scale, probabilities):
    length = scores.shape[1]
    x, work = np.empty(length, np.float32), np.empty(length, np.float32)
    for square in range(first, last):
        for query in range(length):
            source, out, n = scores[square, query], probabilities[square, query], query + 1
            for j in range(n):
                x[j] = scale * _load(source, j)
            largest, total = _largest(x, n, work), _f32(0)
            for j in range(n):
                odds = exp(x[j] - largest)
                x[j] = odds
                total += odds
            for j in range(n):
                out[j] = _rounded(out, x[j] / total)
            for j in range(n, length):
                out[j] = _rounded(out, _f32(0))


@numba_jit(fastmath=_FAST)
def causal_softmax_gradient(first, last, probabilities, d_probabilities, d_scores, scale):
    length = probabilities.shape[1]
    for square in range(first, last):
        for query in range(length):
            p, d_p = probabilities[square, query], d_probabilities[square, query]
            out, n = d_scores[square, query], query + 1
            mean = _f32(0)
            for j in range(n):
                mean += _load(p, j) * _load(d_p, j)
            for j in range(n):
                out[j] = _rounded(out, scale * _load(p, j) * (_load(d_p, j) - mean))
            for j in range(n, length):
                out[j] = _rounded(out, _f32(0))


@numba_jit(fastmath=_FAST)
def sum_of_squares(x):
    total = _f32(0)  # vectorised as several sums; sums of blocks would not be
    for j in range(len(x)):
        total += x[j] * x[j]
    return total


@numba_jit(fastmath={"nsz", "arcp", "contract", "afn"})
def adamw(weights, gradients, momenta, velocities, new_weights, new_momenta, new_velocities,
           kept, beta_1, beta_2, rate, epsilon, scale):  # fmt: skip
    for j in range(len(weights)):
        g = gradients[j] * scale
        m = momenta[j] + (g - momenta[j]) * (_f32(1) - beta_1)
        v = velocities[j] + (g * g - velocities[j]) * (_f32(1) - beta_2)
        new_momenta[j], new_velocities[j] = m, v
        new_weights[j] = weights[j] * kept - rate * m / (np.sqrt(v) + epsilon)
