"""Sampling: pure functions from logits to logits, and one from logits to ids.

All work along the last axis, on any number of leading ones; a token that must not come has the logit
minus infinity. They take NumPy arrays and give NumPy arrays, without loading Keras; tensors of Keras they
give back as such, so they also run inside a compiled loop.
"""

import numpy as np


def _ops(x):
    """Return the library that an array belongs to, `numpy` or `keras.ops`: both know the functions used here."""
    if isinstance(x, (np.ndarray, np.generic)):
        return np
    from .devices import keras

    return keras.ops


def apply_temperature(logits, temperature: float):
    """Divide logits by a temperature: below 1 the likely gets likelier, above 1 the odds level out.

    Args:
        logits: (..., V), float.
        temperature: above 0. (For 0 take `ops.argmax`.)

    Returns:
        Logits (..., V).
    """
    return logits / temperature


def keep_top_k(logits, k: int):
    """Keep the k most likely tokens; of equal ones at the border, those with the lowest ids.

    Args:
        logits: (..., V), float.
        k: how many tokens to keep, at least 1.

    Returns:
        Logits (..., V), minus infinity for the rest.

    Example:
        >>> from keras import ops
        >>> ops.convert_to_numpy(keep_top_k(ops.array([[1.0, 3.0, 2.0]]), 2)).tolist()
        [[-inf, 3.0, 2.0]]
    """
    return _keep_likeliest(logits, k)


def keep_top_p(logits, p: float):
    """Keep the fewest most likely tokens whose probabilities sum to at least p.

    Args:
        logits: (..., V), float.
        p: above 0 and at most 1; the most likely token is always kept.

    Returns:
        Logits (..., V), minus infinity for the rest.

    Source:
        A. Holtzman et al., "The curious case of neural text degeneration" (2020).
    """
    ops = _ops(logits)
    probabilities = ops.flip(ops.sort(softmax(logits), axis=-1), axis=-1)
    before = ops.cumsum(probabilities, axis=-1) - probabilities
    return _keep_likeliest(logits, ops.sum(ops.where(before < p, 1, 0), axis=-1, keepdims=True))


def draw(logits, uniforms):
    """Draw one token from each distribution, by inverting its cumulative sum.

    Args:
        logits: (..., V), float; minus infinity has probability 0.
        uniforms: (...), float, uniform in [0, 1): the only source of chance, so equal numbers draw equal
            tokens on every backend.

    Returns:
        Token ids, `int32` (...).

    Example:
        >>> from keras import ops
        >>> logits = ops.log(ops.array([[0.25, 0.5, 0.25]]))
        >>> [int(draw(logits, ops.array([u]))[0]) for u in (0.0, 0.24, 0.26, 0.74, 0.76)]
        [0, 0, 1, 1, 2]
    """
    ops = _ops(logits)
    cumulative = ops.cumsum(softmax(logits), axis=-1)
    # Scaled by the last sum, which rounding leaves beside 1; so the threshold stays below it, and a token of
    # probability 0 never adds to the sum, so it is never the first above the threshold.
    threshold = ops.expand_dims(uniforms, -1) * cumulative[..., -1:]
    return ops.argmax(ops.where(cumulative > threshold, 1, 0), axis=-1)


def softmax(logits):
    """Turn logits into probabilities.

    Args:
        logits: (..., V), float; at least one above minus infinity.

    Returns:
        Probabilities (..., V), which sum to 1.
    """
    ops = _ops(logits)
    odds = ops.exp(logits - ops.max(logits, axis=-1, keepdims=True))
    return odds / ops.sum(odds, axis=-1, keepdims=True)


def _keep_likeliest(logits, count):
    """Keep the `count` largest logits of each row, an integer or (..., 1); of equal ones, those of the lowest ids."""
    ops = _ops(logits)
    vocab_size = logits.shape[-1]
    falling = ops.flip(ops.sort(logits, axis=-1), axis=-1)
    index = ops.broadcast_to(ops.minimum(count, vocab_size) - 1, (*logits.shape[:-1], 1))
    border = ops.take_along_axis(falling, index, axis=-1)
    above, at = logits > border, logits == border
    places_left = count - ops.sum(ops.where(above, 1, 0), axis=-1, keepdims=True)
    kept = above | (at & (ops.cumsum(ops.where(at, 1, 0), axis=-1) <= places_left))
    return ops.where(kept, logits, -float("inf"))
