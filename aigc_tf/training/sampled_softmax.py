"""Sampled softmax: training steps whose softmax covers only some tokens of the vocabulary, and which are faster."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..corpus.dataset import Batches
from ..runtime.backend import keras, tensorflow_for_data, uses_accelerator
from ..runtime.distribution import num_replicas
from ..runtime.keras_internals import source_of

if TYPE_CHECKING:
    from ..runtime.backend import tf

SAMPLED_FRACTION = 0.9  # of the steps; the last ones use the full softmax


def default_num_candidates(model: keras.Model, tokens_per_batch: int, vocab_size: int) -> int:
    """Choose `num_candidates` for a model on this device (see `train`)."""
    is_useful = num_replicas() == 1 and not uses_accelerator() and has_tied_head(model)
    number = max(tokens_per_batch, vocab_size // 8)
    return number if is_useful and 2 * number <= vocab_size else 0


def check_num_candidates(num_candidates: int, tokens_per_batch: int, vocab_size: int) -> None:
    """Refuse fewer candidates than a batch may have targets, or more than the vocabulary has tokens."""
    least = min(tokens_per_batch, vocab_size)
    if num_candidates and not least <= num_candidates <= vocab_size:
        raise ValueError(
            f"num_candidates must be 0, or from {least}, the tokens in a batch, to {vocab_size}, those in the "
            f"vocabulary, got {num_candidates}."
        )


def has_tied_head(model: keras.Model) -> bool:
    """Return whether a language model's head is its token embedding, as `sampled_softmax_model` needs."""
    return _tied_head(model) is not None


def sampled_softmax_model(model: keras.Model, num_candidates: int) -> keras.Model:
    """Build a model with the weights of a language model that predicts among candidates.

    The gradient approximates that of the full softmax, the better the more candidates there are. It is biased, as the
    targets of a batch are always candidates but are corrected as if they were drawn. A correction with probability 1
    for targets, and that of fewer draws for the others, halves the bias but does not learn better: 7.197 bits per
    character with it and 7.185 without, after 400 steps of an LSTM on the quatrains (means of 4 seeds).

    Args:
        model: a language model whose head is its token embedding.
        num_candidates: C.

    Returns:
        A `keras.Model` from ids `int32 (B, T)`, candidates `int32 (C,)` and the logarithm of each candidate's
        probability of being drawn, `float32 (C,)`, to logits `float32 (B, T, C)`.

    Raises:
        ValueError: the head is not the token embedding.

    Source:
        S. Jean et al., "On using very large target vocabulary for neural machine translation" (2015).
    """
    head = _tied_head(model)
    if head is None:
        raise ValueError(
            "num_candidates needs a model whose head is its token embedding, as transformer() and lstm() have. Set "
            "num_candidates=0."
        )
    candidates = keras.Input(batch_shape=(num_candidates,), dtype="int32", name="aigc_tf_candidates")
    log_expected = keras.Input(batch_shape=(num_candidates,), dtype="float32", name="aigc_tf_log_expected")
    logits = _CandidateLogits(head.operation)(head.input_tensors[0], candidates, log_expected)
    return keras.Model([model.inputs[0], candidates, log_expected], logits)


class _CandidateLogits(keras.layers.Layer):
    """The head of a model for the candidates.

    One layer with a name: Keras numbers unnamed operations, and a loaded model has such names from another process.
    """

    def __init__(self, embedding):
        super().__init__(name="aigc_tf_candidate_logits", dtype=embedding.dtype_policy, autocast=False)
        self.embedding, self.built = embedding, True

    def call(self, x, candidates, log_expected):
        logits = keras.ops.matmul(x, keras.ops.transpose(self.embedding(candidates)))
        return keras.ops.cast(logits, "float32") - log_expected


def _tied_head(model):
    """Return the graph node where the token embedding computes the logits; None if something else computes them."""
    if not getattr(model, "inputs", None):  # not a graph of layers
        return None
    head = source_of(model.outputs[0])
    if isinstance(head.operation, keras.layers.Identity):
        head = source_of(head.input_tensors[0])
    embedding = head.operation
    is_tied = isinstance(embedding, keras.layers.ReversibleEmbedding) and embedding.tie_weights
    if not is_tied or embedding.logit_soft_cap is not None:
        return None
    return head if (embedding.reverse_dtype or embedding.variable_dtype) == embedding.compute_dtype else None


def candidate_sampler(
    counts: np.ndarray, num_candidates: int, seed: int = 0
) -> Callable[["tf.data.Dataset | Batches", int], "tf.data.Dataset | Iterator"]:
    """Make a function that adds candidates to batches: the targets of a batch, and others drawn by their frequency.

    Args:
        counts: how often each token occurs, `int (V,)`.
        num_candidates: C; at least the number of targets in a batch.
        seed: the seed of the random numbers.

    Returns:
        A function from data of `(inputs, targets)`, and the number of its first batch, to data of the inputs of
        `sampled_softmax_model` and of the index of each target among the candidates, `int32 (B, T)`. The candidates
        of batch i depend only on its targets, the seed and i.
    """
    log_frequency = np.log((counts + 0.5) / (counts + 0.5).sum())
    log_expected = _log_expected(log_frequency, num_candidates)

    def draw(batch, targets):
        check_targets(targets, len(counts))
        # The largest values with Gumbel noise are a draw without replacement.
        keys = log_frequency + np.random.default_rng((seed % 2**64, batch)).gumbel(size=len(counts))
        keys[targets.ravel()] = np.inf
        candidates = np.sort(np.argpartition(-keys, num_candidates - 1)[:num_candidates])
        indices = np.empty(len(counts), np.int32)
        indices[candidates] = np.arange(num_candidates, dtype=np.int32)
        return candidates.astype(np.int32), log_expected[candidates], indices[targets]

    def add_candidates(data, first):
        if isinstance(data, Batches):
            return (
                ((inputs, candidates, expected), indices)
                for batch, (inputs, targets) in enumerate(data, first)
                for candidates, expected, indices in [draw(batch, targets)]
            )
        tf = tensorflow_for_data()

        def add_to_batch(batch, data):
            inputs, targets = data
            dtypes = [tf.int32, tf.float32, tf.int32]
            candidates, expected, indices = tf.numpy_function(draw, [batch, targets], dtypes, stateful=False)
            candidates.set_shape((num_candidates,))
            expected.set_shape((num_candidates,))
            indices.set_shape(targets.shape)
            return (inputs, candidates, expected), indices

        return data.enumerate(first).map(add_to_batch).prefetch(tf.data.AUTOTUNE)

    return add_candidates


def _log_expected(log_frequency: np.ndarray, num_candidates: int) -> np.ndarray:
    """Compute the log-probability of each token to be among this many distinct draws, `float32 (V,)`."""
    log_missed = np.log1p(-np.exp(log_frequency))  # in one draw
    low, high = 1.0, 1e12  # bounds of the number of draws that give so many distinct tokens
    for _ in range(100):
        draws = math.sqrt(low * high)
        low, high = (low, draws) if -np.expm1(draws * log_missed).sum() > num_candidates else (draws, high)
    return np.log(-np.expm1(high * log_missed)).astype(np.float32)


def check_targets(targets, vocab_size: int) -> None:
    """Refuse targets outside the vocabulary, where indexing would read another token or other memory."""
    if targets.size and not 0 <= (first := targets.min()) <= (last := targets.max()) < vocab_size:
        wrong = first if first < 0 else last
        raise ValueError(f"Targets must be from 0 to {vocab_size - 1}, the tokens of the vocabulary, got {wrong}.")
