"""Candidates: steps of a training whose softmax runs over a part of the vocabulary, and so take less time."""

import math
from collections.abc import Callable

import numpy as np

from .devices import keras, tf

SHARE_OF_STEPS = 0.9  # the last ones run over all tokens


def has_tied_head(model: keras.Model) -> bool:
    """Tell whether a language model's head is its token embedding, as `candidate_model` needs."""
    return _tied_head(model) is not None


def candidate_model(model: keras.Model, number: int) -> keras.Model:
    """Extend a language model to one that predicts among candidates, with the same weights.

    Args:
        model: a language model whose head is its token embedding.
        number: C, how many candidates there are.

    Returns:
        A `keras.Model` from ids `int32 (B, T)`, candidates `int32 (C,)` and the logarithm of the probability that each
        of them is one, `float32 (C,)`, to logits `float32 (B, T, C)`, whose softmax has in expectation the gradient of
        that over all tokens.

    Raises:
        ValueError: the head is not the token embedding.

    Source:
        S. Jean et al., "On using very large target vocabulary for neural machine translation" (2015).
    """
    head = _tied_head(model)
    if head is None:
        raise ValueError(
            "num_candidates is for a model whose head is its token embedding, as transformer() and lstm() have."
        )
    candidates = keras.Input(batch_shape=(number,), dtype="int32")
    log_expected = keras.Input(batch_shape=(number,), dtype="float32")
    among = keras.ops.matmul(head.input_tensors[0], keras.ops.transpose(head.operation(candidates)))
    logits = keras.ops.cast(among, "float32") - log_expected
    return keras.Model([model.input, candidates, log_expected], logits)


def _tied_head(model):
    """Return the call of the token embedding that gives a model's logits, or None if something else gives them."""
    if not hasattr(model, "operations"):  # no graph of layers
        return None
    head = _source_of(model.output)
    if isinstance(head.operation, keras.layers.Identity):
        head = _source_of(head.input_tensors[0])
    embedding = head.operation
    return head if isinstance(embedding, keras.layers.ReversibleEmbedding) and embedding.tie_weights else None


def _source_of(tensor):
    """Return the call of a layer that a tensor of a graph comes from."""
    operation, node, _ = tensor._keras_history
    return operation._inbound_nodes[node]


def draw_candidates(counts: np.ndarray, number: int) -> Callable[[tf.data.Dataset, int], tf.data.Dataset]:
    """Draw candidates for batches: the tokens that a batch predicts, and others by their frequency.

    Args:
        counts: how often each token occurs, `int (V,)`.
        number: C, how many candidates to draw; not fewer than a batch has targets.

    Returns:
        A function from a dataset of `(inputs, targets)` and the number of its first batch to one of what
        `candidate_model` takes and the place of each target among the candidates, `int32 (B, T)`. What is drawn for
        batch i is a function of i alone.
    """
    log_frequency = np.log((counts + 0.5) / (counts + 0.5).sum())
    log_expected = _log_expected(log_frequency, number)

    def draw(batch, targets):
        # By noise of Gumbel, the largest of which are a draw without replacement.
        keys = log_frequency + np.random.default_rng(batch).gumbel(size=len(counts))
        keys[targets.ravel()] = np.inf
        candidates = np.sort(np.argpartition(-keys, number - 1)[:number])
        places = np.empty(len(counts), np.int32)
        places[candidates] = np.arange(number, dtype=np.int32)
        return candidates.astype(np.int32), log_expected[candidates], places[targets]

    def among_candidates(batch, data):
        inputs, targets = data
        kinds = [tf.int32, tf.float32, tf.int32]
        candidates, expected, places = tf.numpy_function(draw, [batch, targets], kinds, stateful=False)
        candidates.set_shape((number,))
        expected.set_shape((number,))
        places.set_shape(targets.shape)
        return (inputs, candidates, expected), places

    return lambda data, first: data.enumerate(first).map(among_candidates).prefetch(tf.data.AUTOTUNE)


def _log_expected(log_frequency: np.ndarray, number: int) -> np.ndarray:
    """Compute the logarithm of the probability of each token to be among so many different ones, float32 (V,)."""
    log_missed = np.log1p(-np.exp(log_frequency))  # in one draw
    low, high = 1.0, 1e12  # draws that give so many different tokens
    for _ in range(100):
        draws = math.sqrt(low * high)
        low, high = (low, draws) if -np.expm1(draws * log_missed).sum() > number else (draws, high)
    return np.log(-np.expm1(high * log_missed)).astype(np.float32)
