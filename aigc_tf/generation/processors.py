"""Processors: temperature, top-k, top-p, min-p, typical sampling and penalties, as pure functions on logits.

All work along the last axis, with any number of leading axes. A token that must not come has the logit minus infinity.
NumPy arrays give NumPy arrays, without loading Keras; Keras tensors give tensors, so the functions also run inside a
compiled loop. Texts are ids `int (..., T)`, the newest at the right end, -1 where there is no token.
"""

import math

import numpy as np


def library_of(x):
    """Return the module that handles an array, `numpy` or `keras.ops`, which share the functions used here."""
    if isinstance(x, (np.ndarray, np.generic)):
        return np
    from ..runtime.backend import keras

    return keras.ops


def apply_temperature(logits, temperature: float):
    """Divide logits by a temperature: below 1 sharpens the distribution, above 1 flattens it.

    Args:
        logits: (..., V), float; at least one above minus infinity.
        temperature: above 0. (For 0 use argmax.)

    Returns:
        Logits (..., V), the largest of them 0, so that none overflows except to minus infinity.
    """
    with np.errstate(over="ignore"):
        return (logits - library_of(logits).max(logits, axis=-1, keepdims=True)) / temperature


def select_top_k(logits, k: int):
    """Keep only the k most likely tokens; of equal ones at the border, those with the lowest ids.

    Args:
        logits: (..., V), float.
        k: how many tokens to keep, at least 1; all if there are fewer.

    Returns:
        Their logits (..., k) and their ids `int32 (..., k)`, by ascending id. The other functions work on these
        shorter rows as well; `draw` then returns an index into them.

    Example:
        >>> logits, ids = select_top_k(np.array([[1.0, 3.0, 2.0]]), 2)
        >>> logits.tolist(), ids.tolist()
        ([[3.0, 2.0]], [[1, 2]])
    """
    ops = library_of(logits)
    k = min(k, logits.shape[-1])
    if ops is np:
        border = np.partition(logits, -k, axis=-1)[..., -k, None]
        kept = logits >= border
        if np.count_nonzero(kept) > kept[..., 0].size * k:  # some are equal to the border
            above = logits > border
            at = kept & ~above
            kept = above | (at & (np.cumsum(at, axis=-1) <= k - above.sum(axis=-1, keepdims=True)))
        ids = np.nonzero(kept)[-1].reshape(*logits.shape[:-1], k).astype(np.int32)
    else:
        ids = ops.sort(ops.cast(ops.top_k(logits, k)[1], "int32"), axis=-1)
    return ops.take_along_axis(logits, ids, axis=-1), ids


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
    ops = library_of(logits)
    descending = ops.flip(ops.sort(logits, axis=-1), axis=-1)
    return _keep_likeliest(logits, descending, _count_to_reach(softmax(descending), p))


def keep_min_p(logits, p: float):
    """Keep the tokens that are at least p times as likely as the most likely one.

    Args:
        logits: (..., V), float.
        p: from 0, which keeps all, to 1, which keeps the most likely.

    Returns:
        Logits (..., V), minus infinity for the rest.

    Source:
        M. Nguyen et al., "Turning up the heat: min-p sampling for creative and coherent LLM outputs" (2024).
    """
    ops = library_of(logits)
    odds = ops.exp(logits - ops.max(logits, axis=-1, keepdims=True))
    return ops.where(odds >= p, logits, -float("inf"))


def keep_typical(logits, p: float):
    """Keep the fewest tokens whose probabilities sum to at least p, those of surprisal nearest to the entropy first.

    Args:
        logits: (..., V), float.
        p: above 0 and at most 1; the most typical token is always kept.

    Returns:
        Logits (..., V), minus infinity for the rest.

    Source:
        C. Meister et al., "Locally typical sampling" (2023).
    """
    ops = library_of(logits)
    log_probabilities = log_softmax(logits)
    probabilities = ops.exp(log_probabilities)
    possible = probabilities > 0
    surprisal = ops.where(possible, -log_probabilities, 0.0)
    entropy = ops.sum(probabilities * surprisal, axis=-1, keepdims=True)
    distance = ops.where(possible, ops.absolute(surprisal - entropy), float("inf"))
    order = ops.argsort(distance, axis=-1)
    count = _count_to_reach(ops.take_along_axis(probabilities, order, axis=-1), p)
    typical = _keep_likeliest(-distance, -ops.take_along_axis(distance, order, axis=-1), count)
    return ops.where(typical > -float("inf"), logits, -float("inf"))


def count_tokens_per_text(ids, vocab_size: int):
    """Count how often each token occurs in each text.

    Args:
        ids: `int (..., T)`; -1 is not counted.
        vocab_size: V.

    Returns:
        Counts, `int32 (..., V)`.

    Example:
        >>> count_tokens_per_text(np.array([[-1, 2, 0, 2]]), 3).tolist()
        [[1, 0, 2]]
    """
    ops = library_of(ids)
    if ops is np:
        rows = ids.reshape(math.prod(ids.shape[:-1]), ids.shape[-1])
        width = vocab_size + 1  # the first column counts -1
        places = np.arange(len(rows))[:, None] * width + rows + 1
        counts = np.bincount(places.ravel(), minlength=len(rows) * width)
        return counts.reshape(*ids.shape[:-1], width)[..., 1:].astype(np.int32)
    same = ops.expand_dims(ids, -1) == ops.arange(vocab_size, dtype=ids.dtype)
    return ops.sum(ops.cast(same, "int32"), axis=-2)


def penalize_repetition(logits, counts, penalty: float):
    """Multiply the log-probability of tokens that occur in the text by a penalty: 2 squares the probability.

    The published form divides positive logits and multiplies negative ones, so it depends on a constant that may be
    added to all logits. Log-probabilities are never positive.

    Args:
        logits: (..., V), float.
        counts: how often each token occurs in the text, (..., V).
        penalty: above 0; 1 changes nothing, more makes tokens of the text less likely.

    Returns:
        Log-probabilities (..., V), not normalised.

    Source:
        N. S. Keskar et al., "CTRL: a conditional transformer language model" (2019), here on log-probabilities.
    """
    ops = library_of(logits)
    log_probabilities = log_softmax(logits)
    return ops.where(counts > 0, log_probabilities * penalty, log_probabilities)


def penalize_counts(logits, counts, presence: float, frequency: float):
    """Lower the logits of tokens that occur in the text, once and for each occurrence.

    Args:
        logits: (..., V), float.
        counts: how often each token occurs in the text, (..., V).
        presence: subtracted once.
        frequency: subtracted once for each occurrence.

    Returns:
        Logits (..., V).
    """
    ops = library_of(logits)
    counts = counts.astype(logits.dtype) if ops is np else ops.cast(counts, logits.dtype)
    return logits - (presence * ops.minimum(counts, 1) + frequency * counts)


def repeating_tokens(ids, n: int):
    """Find the tokens that would complete an n-gram that the text already contains.

    Args:
        ids: the text, `int (..., T)`.
        n: how many tokens make an n-gram, at least 1.

    Returns:
        For each n-gram of the text its last token if the text ends in its first n - 1 tokens, else -1:
        `int (..., max(0, T - n + 1))`.

    Example:
        >>> repeating_tokens(np.array([[5, 6, 7, 5, 6]]), 3).tolist()
        [[7, -1, -1]]
    """
    ops = library_of(ids)
    length = ids.shape[-1]
    windows = max(0, length - n + 1)
    matching = ids[..., length - windows :]  # the last token of each n-gram
    for i in range(n - 1 if windows else 0):
        newest = ids[..., length - n + 1 + i, None]
        matching = ops.where((ids[..., i : i + windows] == newest) & (newest >= 0), matching, -1)
    return matching


def draw(logits, uniforms):
    """Draw one token from each distribution, by inverting its cumulative sum.

    Args:
        logits: (..., V), float; minus infinity has probability 0.
        uniforms: (...), float, uniform in [0, 1). They are the only randomness, so equal numbers draw equal tokens
            on every backend.

    Returns:
        Token ids, `int32` (...).

    Example:
        >>> from keras import ops
        >>> logits = ops.log(ops.array([[0.25, 0.5, 0.25]]))
        >>> [int(draw(logits, ops.array([u]))[0]) for u in (0.0, 0.24, 0.26, 0.74, 0.76)]
        [0, 0, 1, 1, 2]
    """
    ops = library_of(logits)
    probabilities = softmax(logits)
    # XLA sums in a tree, so by rounding a sum may rise where 0 is added, and fall where more is: so only possible
    # tokens count. The largest sum, which rounding leaves near 1, scales the threshold so that it stays below it.
    cumulative = ops.where(probabilities > 0, ops.cumsum(probabilities, axis=-1), 0.0)
    threshold = ops.expand_dims(uniforms, -1) * ops.max(cumulative, axis=-1, keepdims=True)
    return ops.argmax(ops.where(cumulative > threshold, 1, 0), axis=-1)


def sample(logits, uniforms, temperature=None, k=None, typical_p=None, top_p=None, min_p=None):
    """Choose a token from each row: apply the settings in the order of the arguments, then draw.

    Args:
        logits: (..., V), float.
        uniforms: (...), float, uniform in [0, 1).
        temperature: None takes the likeliest token.
        k: see `select_top_k`; None for all tokens, as for the following.
        typical_p: see `keep_typical`.
        top_p: see `keep_top_p`.
        min_p: see `keep_min_p`.

    Returns:
        Ids, int (...).

    Example:
        >>> sample(np.array([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]), np.array([0.5, 0.5])).tolist()
        [1, 0]
    """
    if temperature is None:
        return library_of(logits).argmax(logits, axis=-1)
    logits = apply_temperature(logits, temperature)
    ids = None
    if k is not None:
        logits, ids = select_top_k(logits, k)
    for keep, share in ((keep_typical, typical_p), (keep_top_p, top_p), (keep_min_p, min_p)):
        if share is not None:
            logits = keep(logits, share)
    drawn = draw(logits, uniforms)
    return drawn if ids is None else library_of(logits).take_along_axis(ids, drawn[..., None], axis=-1)[..., 0]


def softmax(logits):
    """Turn logits into probabilities.

    Args:
        logits: (..., V), float; at least one above minus infinity.

    Returns:
        Probabilities (..., V), which sum to 1.
    """
    ops = library_of(logits)
    odds = ops.exp(logits - ops.max(logits, axis=-1, keepdims=True))
    return odds / ops.sum(odds, axis=-1, keepdims=True)


def log_softmax(logits):
    """Turn logits into log-probabilities.

    Args:
        logits: (..., V), float; at least one above minus infinity.

    Returns:
        Log-probabilities (..., V), none above 0.
    """
    ops = library_of(logits)
    logits = logits - ops.max(logits, axis=-1, keepdims=True)
    return logits - ops.log(ops.sum(ops.exp(logits), axis=-1, keepdims=True))


def _count_to_reach(ordered, p: float):
    """Count how many of the first probabilities of each row it takes to sum to at least p, at least one: (..., 1)."""
    ops = library_of(ordered)
    before = ops.cumsum(ordered, axis=-1) - ordered
    return ops.maximum(1, ops.sum(ops.where(before < p, 1, 0), axis=-1, keepdims=True))


def _keep_likeliest(logits, descending, count):
    """Keep the `count` (..., 1) largest logits of each row, given them sorted; of equal ones those of lowest ids."""
    ops = library_of(logits)
    border = ops.take_along_axis(descending, count - 1, axis=-1)
    above, at = logits > border, logits == border
    places_left = count - ops.sum(ops.where(above, 1, 0), axis=-1, keepdims=True)
    kept = above | (at & (ops.cumsum(ops.where(at, 1, 0), axis=-1) <= places_left))
    return ops.where(kept, logits, -float("inf"))
