"""Passes: what a training computes number by number, in one pass over memory each, compiled for the CPU by numba.

A CPU that multiplies matrices in bfloat16 spends most of a training on moving numbers to and from memory: TensorFlow
passes over all of them for each addition, each conversion, each square. Here a row is read, computed in float32 in the
processor's cache, and written. Arrays are float32 or bfloat16, and all functions are of NumPy arrays.
"""

import math
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..sampled_softmax import check_targets
from . import fused_kernels

_f32 = np.float32
_WORTH_A_THREAD = 2**16  # numbers; handing over costs a tenth of a millisecond
_ALIGNMENT = 64  # of memory that TensorFlow takes without copying it


def cross_entropy(logits: np.ndarray, targets: np.ndarray, num_threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the cross-entropy of rows, and the gradient of its mean.

    Args:
        logits: (N, V).
        targets: the right one of each row, int32 (N,).
        num_threads: how many threads share the rows.

    Returns:
        The nats of each row, float32 (N,), and the gradient, like `logits`.

    Raises:
        ValueError: a target is none of the V.
    """
    check_targets(targets, logits.shape[1])
    nats, gradient = _empty(targets.shape, _f32), _empty_like(logits)
    share = _f32(1 / len(targets))
    _in_threads(fused_kernels.cross_entropy, num_threads, _bits(logits), targets, share, nats, _bits(gradient))
    return nats, gradient


def gelu(x: np.ndarray, num_threads: int) -> np.ndarray:
    """Compute the GELU, by tanh, of x of any shape."""
    y = _empty_like(x)
    _in_threads(fused_kernels.gelu, num_threads, _rows(x), _rows(y))
    return y


def gelu_gradient(x: np.ndarray, d_y: np.ndarray, num_threads: int) -> np.ndarray:
    """Compute the gradient of x from that of its GELU."""
    d_x = _empty_like(x)
    _in_threads(fused_kernels.gelu_gradient, num_threads, _rows(x), _rows(d_y), _rows(d_x))
    return d_x


def layer_norm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, epsilon: float, num_threads: int) -> np.ndarray:
    """Normalise x over its last axis, scale it by gamma and shift it by beta, both float32."""
    y = _empty_like(x)
    _in_threads(fused_kernels.layer_norm, num_threads, _rows(x), gamma, beta, _f32(epsilon), _rows(y))
    return y


def layer_norm_gradient(
    x: np.ndarray, gamma: np.ndarray, d_y: np.ndarray, epsilon: float, num_threads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the gradients of x, gamma and beta from that of the normalised x."""
    d_x = _empty_like(x)
    sums = [np.zeros((2, len(gamma)), _f32) for _ in range(num_threads)]
    _in_threads(
        fused_kernels.layer_norm_gradient, num_threads, _rows(x), gamma, _f32(epsilon), _rows(d_y), _rows(d_x), sums
    )
    return d_x, *np.sum(sums, axis=0)


def causal_softmax(scores: np.ndarray, scale: float, num_threads: int) -> np.ndarray:
    """Turn scores (..., T, T) of queries and keys to probabilities: a query sees no later key."""
    probabilities = _empty_like(scores)
    _in_threads(fused_kernels.causal_softmax, num_threads, _squares(scores), _f32(scale), _squares(probabilities))
    return probabilities


def causal_softmax_gradient(
    probabilities: np.ndarray, d_probabilities: np.ndarray, scale: float, num_threads: int
) -> np.ndarray:
    """Compute the gradient of the scores from that of their probabilities."""
    d_scores = _empty_like(probabilities)
    squares = (_squares(a) for a in (probabilities, d_probabilities, d_scores))
    _in_threads(fused_kernels.causal_softmax_gradient, num_threads, *squares, _f32(scale))
    return d_scores


def adamw(
    weights: list[np.ndarray],
    gradients: list[np.ndarray],
    momenta: list[np.ndarray],
    velocities: list[np.ndarray],
    decays: list[float],
    *,
    rate: float,
    step: int,
    beta_1: float,
    beta_2: float,
    epsilon: float,
    clip_norm: float | None,
    num_threads: int,
) -> list[np.ndarray]:
    """Take a step of AdamW with gradients clipped by their global norm, all in float32.

    Args:
        weights: the weights, of any shapes.
        gradients: likewise, and so the next two.
        momenta: the running means of the gradients.
        velocities: the running means of their squares.
        decays: of each array the share of the weights that goes, times the learning rate.
        rate: the learning rate.
        step: the number of this step, from 1 on.
        beta_1: the weight of the past in a momentum.
        beta_2: the weight of the past in a velocity.
        epsilon: what is added to the root of a velocity.
        clip_norm: the largest global norm of the gradients, or None.
        num_threads: how many threads share the work.

    Returns:
        The new weights, then the new momenta, then the new velocities.

    Source:
        I. Loshchilov and F. Hutter, "Decoupled weight decay regularization" (2019).
    """
    old = [[a.reshape(-1) for a in arrays] for arrays in (weights, gradients, momenta, velocities)]
    new = [[_empty(a.shape, _f32) for a in weights] for _ in range(3)]
    new_flat = [[a.reshape(-1) for a in arrays] for arrays in new]
    scale = 1.0
    if clip_norm is not None:
        sums = _in_parts(lambda i, part: fused_kernels.sum_of_squares(old[1][i][part]), old[1], num_threads)
        norm = math.sqrt(sum(sums))
        # As Keras does: a norm that is no number spoils all weights, and the training says so.
        scale = clip_norm / max(norm, clip_norm) + (norm - norm)
    settings = (beta_1, beta_2, rate * math.sqrt(1 - beta_2**step) / (1 - beta_1**step), epsilon, scale)
    settings = tuple(map(_f32, settings))

    def update(i, part):
        arrays = (a[i][part] for a in (*old, *new_flat))
        fused_kernels.adamw(*arrays, _f32(1 - rate * decays[i]), *settings)

    _in_parts(update, old[0], num_threads)
    return [a for arrays in new for a in arrays]


def let_go_of_memory() -> None:
    """Free the memory that is kept for the next results."""
    _idle.clear()


# --- memory and threads -----------------------------------------------------------------------------------------

# Memory from the system comes page by page, which takes as long as a pass over it: so what TensorFlow has let go of is
# used again. By size in bytes; a deque, which needs no lock: memory comes back in any thread, and amidst any line.
_idle: dict[int, deque[np.ndarray]] = {}


class _Loan:
    """Memory lent to an array: the base of that array and of all its views, so it lives as long as any of them."""

    def __init__(self, memory: np.ndarray):
        self.__array_interface__ = memory.__array_interface__


def _empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    idle = _idle.setdefault(size, deque())
    try:
        memory = idle.pop()
    except IndexError:
        memory = np.empty(size + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        memory = memory[start : start + size]
    loan = _Loan(memory)
    weakref.finalize(loan, idle.append, memory).atexit = False
    return np.asarray(loan).view(dtype).reshape(shape)


def _empty_like(x: np.ndarray) -> np.ndarray:
    return _empty(x.shape, x.dtype)


def _bits(x: np.ndarray) -> np.ndarray:
    """View bfloat16, which numba does not know, as the upper half of float32's bits."""
    return x.view(np.uint16) if x.dtype.itemsize == 2 else x


def _rows(x: np.ndarray) -> np.ndarray:
    return _bits(x).reshape(-1, x.shape[-1])


def _squares(x: np.ndarray) -> np.ndarray:
    return _bits(x).reshape(-1, *x.shape[-2:])


_helpers = ThreadPoolExecutor(thread_name_prefix="aigc_tf passes")


def _in_threads(kernel, num_threads: int, first: np.ndarray, *others) -> None:
    """Call a kernel for all rows of an array, in parts; of a list among the arguments each part has an element."""
    parts = max(1, min(num_threads, len(first), first.size // _WORTH_A_THREAD))
    cuts = [len(first) * i // parts for i in range(parts + 1)]

    def run(i):
        kernel(cuts[i], cuts[i + 1], first, *(other[i] if isinstance(other, list) else other for other in others))

    _all(run, parts)


def _in_parts(function, arrays: list[np.ndarray], num_threads: int) -> list:
    """Call a function, in threads, of the number of each array and of slices of it; return what it returns."""
    jobs = [
        (i, slice(start, start + 4 * _WORTH_A_THREAD))
        for i, array in enumerate(arrays)
        for start in range(0, len(array), 4 * _WORTH_A_THREAD)
    ]
    parts = num_threads if sum(map(len, arrays)) > _WORTH_A_THREAD else 1
    results = [None] * len(jobs)

    def run(part):
        for n in range(part, len(jobs), parts):
            results[n] = function(*jobs[n])

    _all(run, parts)
    return results


def _all(run, parts: int) -> None:
    helpers = [_helpers.submit(run, i) for i in range(1, parts)]
    run(0)
    for helper in helpers:
        helper.result()
