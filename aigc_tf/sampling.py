"""Sampling: pure functions from logits to logits, and one from logits to ids.

All work along the last axis, on any number of leading ones; a token that must not come has the logit
minus infinity. They are written with `keras.ops`, so they also run inside a compiled loop.
"""

from .devices import keras

ops = keras.ops


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
    return _keep(logits, _inverse(_descending_order(logits)) < k)


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
    order = _descending_order(logits)
    probabilities = ops.take_along_axis(ops.softmax(logits, axis=-1), order, axis=-1)
    before = ops.cumsum(probabilities, axis=-1) - probabilities
    # Back from the sorted order to that of the ids.
    return _keep(logits, ops.take_along_axis(before < p, _inverse(order), axis=-1))


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
    probabilities = ops.softmax(logits, axis=-1)
    cumulative = ops.cumsum(probabilities, axis=-1)
    # Scaled by the last sum, which rounding leaves beside 1; so the threshold stays below it, and a token of
    # probability 0 never adds to the sum, so it is never the first above the threshold.
    threshold = ops.expand_dims(ops.cast(uniforms, cumulative.dtype), -1) * cumulative[..., -1:]
    return ops.argmax(ops.cast(cumulative > threshold, "int32"), axis=-1)


def _keep(logits, kept):
    return ops.where(kept, logits, ops.cast(-float("inf"), logits.dtype))


def _descending_order(logits):
    """Sort token ids by falling logit, equal ones by rising id."""
    return ops.argsort(-logits, axis=-1)


def _inverse(permutation):
    """Invert permutations along the last axis: from "the id at each rank" to "the rank of each id"."""
    return ops.argsort(permutation, axis=-1)
