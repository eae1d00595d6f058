"""Candidates: steps of a training whose softmax runs over a part of the vocabulary, and so take less time."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..corpus.dataset import Batches
from ..runtime.backend import keras, tensorflow_for_data
from ..runtime.keras_internals import source_of

if TYPE_CHECKING:
    from ..runtime.backend import tf

SHARE_OF_STEPS = 0.9  # the last ones run over all tokens


def has_tied_head(model: keras.Model) -> bool:
    """Tell whether a language model's head is its token embedding, as `sampled_softmax_model` needs."""
    return _tied_head(model) is not None


def sampled_softmax_model(model: keras.Model, number: int) -> keras.Model:
    """Extend a language model to one that predicts among candidates, with the same weights.

    Args:
        model: a language model whose head is its token embedding.
        number: C, how many candidates there are.

    Returns:
        A `keras.Model` from ids `int32 (B, T)`, candidates `int32 (C,)` and the logarithm of the probability that each
        of them is one, `float32 (C,)`, to logits `float32 (B, T, C)`. The gradient of their softmax is near that of the
        softmax over all tokens, the nearer the larger C; it has a bias for each C below V, and the more so as the
        tokens that a batch predicts are candidates for certain, and are taken as if drawn like the others. Corrected
        for that (probability 1 for them, and that of fewer draws for the others) the bias is half, and a model learned
        no better: in 400 steps of an LSTM on the quatrains 7.197 bits per character, without 7.185 (means of 4 seeds).

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
    candidates = keras.Input(batch_shape=(number,), dtype="int32", name="aigc_tf_candidates")
    log_expected = keras.Input(batch_shape=(number,), dtype="float32", name="aigc_tf_log_expected")
    logits = _AmongCandidates(head.operation)(head.input_tensors[0], candidates, log_expected)
    return keras.Model([model.inputs[0], candidates, log_expected], logits)


class _AmongCandidates(keras.layers.Layer):
    """The head of a model for a part of the tokens.

    In one layer, with a name: Keras numbers operations without one, anew in each process, and a model that was loaded
    has names from another.
    """

    def __init__(self, embedding):
        super().__init__(name="aigc_tf_among_candidates", dtype=embedding.dtype_policy, autocast=False)
        self.embedding, self.built = embedding, True

    def call(self, x, candidates, log_expected):
        among = keras.ops.matmul(x, keras.ops.transpose(self.embedding(candidates)))
        return keras.ops.cast(among, "float32") - log_expected


def _tied_head(model):
    """Return the call of the token embedding that gives a model's logits, or None if something else gives them."""
    if not getattr(model, "inputs", None):  # no graph of layers
        return None
    head = source_of(model.outputs[0])
    if isinstance(head.operation, keras.layers.Identity):
        head = source_of(head.input_tensors[0])
    embedding = head.operation
    is_tied = isinstance(embedding, keras.layers.ReversibleEmbedding) and embedding.tie_weights
    if not is_tied or embedding.logit_soft_cap is not None:
        return None
    return head if (embedding.reverse_dtype or embedding.variable_dtype) == embedding.compute_dtype else None


def draw_candidates(
    counts: np.ndarray, number: int, seed: int = 0
) -> Callable[["tf.data.Dataset | Batches", int], "tf.data.Dataset | Iterator"]:
    """Draw candidates for batches: the tokens that a batch predicts, and others by their frequency.

    Args:
        counts: how often each token occurs, `int (V,)`.
        number: C, how many candidates to draw; not fewer than a batch has targets.
        seed: the seed of what is drawn.

    Returns:
        A function from data of `(inputs, targets)` and the number of its first batch to data of what
        `sampled_softmax_model` takes and the place of each target among the candidates, `int32 (B, T)`. What is
        drawn for batch i is a function of its targets, the seed and i alone.
    """
    log_frequency = np.log((counts + 0.5) / (counts + 0.5).sum())
    log_expected = _log_expected(log_frequency, number)

    def draw(batch, targets):
        check_targets(targets, len(counts))
        # By noise of Gumbel, the largest of which are a draw without replacement.
        keys = log_frequency + np.random.default_rng((seed % 2**64, batch)).gumbel(size=len(counts))
        keys[targets.ravel()] = np.inf
        candidates = np.sort(np.argpartition(-keys, number - 1)[:number])
        places = np.empty(len(counts), np.int32)
        places[candidates] = np.arange(number, dtype=np.int32)
        return candidates.astype(np.int32), log_expected[candidates], places[targets]

    def among_candidates(data, first):
        if isinstance(data, Batches):
            return (
                ((inputs, candidates, expected), places)
                for batch, (inputs, targets) in enumerate(data, first)
                for candidates, expected, places in [draw(batch, targets)]
            )
        tf = tensorflow_for_data()

        def add_candidates(batch, data):
            inputs, targets = data
            kinds = [tf.int32, tf.float32, tf.int32]
            candidates, expected, places = tf.numpy_function(draw, [batch, targets], kinds, stateful=False)
            candidates.set_shape((number,))
            expected.set_shape((number,))
            places.set_shape(targets.shape)
            return (inputs, candidates, expected), places

        return data.enumerate(first).map(add_candidates).prefetch(tf.data.AUTOTUNE)

    return among_candidates


def _log_expected(log_frequency: np.ndarray, number: int) -> np.ndarray:
    """Compute the logarithm of the probability of each token to be among so many different ones, float32 (V,)."""
    log_missed = np.log1p(-np.exp(log_frequency))  # in one draw
    low, high = 1.0, 1e12  # draws that give so many different tokens
    for _ in range(100):
        draws = math.sqrt(low * high)
        low, high = (low, draws) if -np.expm1(draws * log_missed).sum() > number else (draws, high)
    return np.log(-np.expm1(high * log_missed)).astype(np.float32)


def check_targets(targets, vocab_size: int) -> None:
    """Refuse an array of targets that are no tokens, where indexing would take another token or leave the array."""
    if targets.size and not 0 <= (first := targets.min()) <= (last := targets.max()) < vocab_size:
        wrong = first if first < 0 else last
        raise ValueError(f"Targets must be from 0 to {vocab_size - 1}, the tokens of the vocabulary, got {wrong}.")
