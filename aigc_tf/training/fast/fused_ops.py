"""Fused operations: the elementwise operations of training on a CPU, each in one pass over memory.

A CPU that multiplies matrices in bfloat16 spends most of a training step on moving numbers to and from memory:
TensorFlow reads and writes all of them for each addition, conversion and square. Here each row is read once, computed
in float32 in the processor's cache, and written. All functions take NumPy arrays in float32 or bfloat16.
"""

import math
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..sampled_softmax import check_targets
from . import fused_kernels

_f32 = np.float32
_MIN_THREAD_SIZE = 2**16  # numbers per thread; starting its part takes a tenth of a millisecond
_ALIGNMENT = 64  # bytes; TensorFlow uses memory aligned so without copying it


def cross_entropy(logits: np.ndarray, targets: np.ndarray, num_threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Compute the cross-entropy of rows, and the gradient of its mean.

    Args:
        logits: (N, V).
        targets: the target of each row, int32 (N,).
        num_threads: the number of threads that share the rows.

    Returns:
        The cross-entropy of each row in nats, float32 (N,), and the gradient, shaped like `logits`.

    Raises:
        ValueError: a target is not below V.
    """
    check_targets(targets, logits.shape[1])
    nats, gradient = _empty(targets.shape, _f32), _empty_like(logits)
    share = _f32(1 / len(targets))
    _in_threads(fused_kernels.cross_entropy, num_threads, _bits(logits), targets, share, nats, _bits(gradient))
    return nats, gradient


def gelu(x: np.ndarray, num_threads: int) -> np.ndarray:
    """Compute the GELU of x, of any shape, in its tanh form."""
    y = _empty_like(x)
    _in_threads(fused_kernels.gelu, num_threads, _rows(x), _rows(y))
    return y


def gelu_gradient(x: np.ndarray, d_y: np.ndarray, num_threads: int) -> np.ndarray:
    """Compute the gradient of x from the gradient of its GELU."""
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
    """Compute the gradients of x, gamma and beta from the gradient of the output."""
    d_x = _empty_like(x)
    sums = [np.zeros((2, len(gamma)), _f32) for _ in range(num_threads)]
    _in_threads(
        fused_kernels.layer_norm_gradient, num_threads, _rows(x), gamma, _f32(epsilon), _rows(d_y), _rows(d_x), sums
    )
    return d_x, *np.sum(sums, axis=0)


def causal_softmax(scores: np.ndarray, scale: float, num_threads: int) -> np.ndarray:
    """Turn attention scores (..., T, T) into probabilities; a query sees no later key."""
    probabilities = _empty_like(scores)
    _in_threads(fused_kernels.causal_softmax, num_threads, _matrices(scores), _f32(scale), _matrices(probabilities))
    return probabilities


def causal_softmax_gradient(
    probabilities: np.ndarray, d_probabilities: np.ndarray, scale: float, num_threads: int
) -> np.ndarray:
    """Compute the gradient of the scores from the gradient of their probabilities."""
    d_scores = _empty_like(probabilities)
    matrices = (_matrices(a) for a in (probabilities, d_probabilities, d_scores))
    _in_threads(fused_kernels.causal_softmax_gradient, num_threads, *matrices, _f32(scale))
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
        gradients: their gradients; these and the next two have the shapes of the weights.
        momenta: the running means of the gradients.
        velocities: the running means of the squared gradients.
        decays: the weight decay of each array.
        rate: the learning rate.
        step: the number of this step, from 1.
        beta_1: the decay rate of the momenta.
        beta_2: the decay rate of the velocities.
        epsilon: a small number added to the square root of a velocity.
        clip_norm: the largest global norm of the gradients, or None.
        num_threads: the number of threads that share the work.

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
        # As in Keras: a norm that is not finite makes all weights NaN, which training detects.
        scale = clip_norm / max(norm, clip_norm) + (norm - norm)
    settings = (beta_1, beta_2, rate * math.sqrt(1 - beta_2**step) / (1 - beta_1**step), epsilon, scale)
    settings = tuple(map(_f32, settings))

    def update(i, part):
        arrays = (a[i][part] for a in (*old, *new_flat))
        fused_kernels.adamw(*arrays, _f32(1 - rate * decays[i]), *settings)

    _in_parts(update, old[0], num_threads)
    return [a for arrays in new for a in arrays]


def release_buffers() -> None:
    """Free the memory that is kept for later results."""
    _free_buffers.clear()


# --- memory and threads -----------------------------------------------------------------------------------------

# The system maps new memory page by page, which takes as long as a pass over it; so buffers that TensorFlow has freed
# are reused. By size in bytes. A deque needs no lock: a buffer may come back in any thread, at any time.
_free_buffers: dict[int, deque[np.ndarray]] = {}


class _BufferInUse:
    """The base of an array in a buffer, and of all its views: it lives as long as any of them."""

    def __init__(self, buffer: np.ndarray):
        self.__array_interface__ = buffer.__array_interface__


def _empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    free = _free_buffers.setdefault(size, deque())
    try:
        buffer = free.pop()
    except IndexError:
        buffer = np.empty(size + _ALIGNMENT, np.uint8)
        start = -buffer.ctypes.data % _ALIGNMENT
        buffer = buffer[start : start + size]
    base = _BufferInUse(buffer)
    weakref.finalize(base, free.append, buffer).atexit = False
    return np.asarray(base).view(dtype).reshape(shape)


def _empty_like(x: np.ndarray) -> np.ndarray:
    return _empty(x.shape, x.dtype)


def _bits(x: np.ndarray) -> np.ndarray:
    """View bfloat16, which numba lacks, as the upper half of the bits of float32."""
    return x.view(np.uint16) if x.dtype.itemsize == 2 else x


def _rows(x: np.ndarray) -> np.ndarray:
    return _bits(x).reshape(-1, x.shape[-1])


def _matrices(x: np.ndarray) -> np.ndarray:
    return _bits(x).reshape(-1, *x.shape[-2:])


_pool = ThreadPoolExecutor(thread_name_prefix="aigc_tf fused ops")


def _in_threads(kernel, num_threads: int, first: np.ndarray, *others) -> None:
    """Call a kernel for all rows of an array, split among threads; each thread gets one element of a list argument."""
    parts = max(1, min(num_threads, len(first), first.size // _MIN_THREAD_SIZE))
    cuts = [len(first) * i // parts for i in range(parts + 1)]

    def run(i):
        kernel(cuts[i], cuts[i + 1], first, *(other[i] if isinstance(other, list) else other for other in others))

    _run_parts(run, parts)


def _in_parts(function, arrays: list[np.ndarray], num_threads: int) -> list:
    """Call a function in threads with the index of each array and slices of it, and return the results."""
    jobs = [
        (i, slice(start, start + 4 * _MIN_THREAD_SIZE))
        for i, array in enumerate(arrays)
        for start in range(0, len(array), 4 * _MIN_THREAD_SIZE)
    ]
    parts = num_threads if sum(map(len, arrays)) > _MIN_THREAD_SIZE else 1
    results = [None] * len(jobs)

    def run(part):
        for n in range(part, len(jobs), parts):
            results[n] = function(*jobs[n])

    _run_parts(run, parts)
    return results


def _run_parts(run, parts: int) -> None:
    futures = [_pool.submit(run, i) for i in range(1, parts)]
    run(0)
    for future in futures:
        future.result()
