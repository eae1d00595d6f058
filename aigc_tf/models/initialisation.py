"""Initialisation: initialise(), first values of the token embedding from counts of the training text."""

import math

import numpy as np

from ..corpus.store import make_store, sample_tokens
from ..corpus.tokenizer import Tokenizer
from ..models.contract import check_model
from ..runtime.backend import keras

_DISTANCE = 2  # at most, between two neighbours
_MAX_TOKENS = 3_000_000  # of a longer text, slices with as many tokens are counted
_NOISE = 0.3  # relative to the counted part
# Relative to the values that are replaced: a Transformer learns more with 2 and 4 than with 1, an LSTM more with 1 and
# 2 than with 0.5.
_SCALE = 2.0
_OVERSAMPLING, _ITERATIONS = 16, 3  # of the randomised decomposition


def initialise(
    model: keras.Model, tokenizer: Tokenizer, documents: list[str] | np.ndarray, seed: int = 0
) -> keras.Model:
    """Initialise the token embedding so that tokens with similar neighbours lie close together.

    Call it before training: a model that starts from random vectors spends its first minutes learning what counting
    shows in seconds. Each token gets its row of the largest factors of the matrix of positive pointwise mutual
    information, max(0, log(n(a, b) n / (n(a) n(b)))), of tokens at most 2 apart on either side. All rows have the same
    norm, on average twice that of the values they replace, plus some noise. All other weights stay as they are.

    Args:
        model: a fresh model with a layer `token_embedding`, as `transformer` and `lstm` build it.
        tokenizer: its tokenizer.
        documents: the training documents, or the ids of a store (`make_store`, `open_store`).
        seed: the seed of the noise.

    Returns:
        The same model.

    Raises:
        ValueError: the model and the tokenizer do not belong together, the model has no `token_embedding`, or there is
            no document.

    Example:
        >>> from aigc_tf.models.networks import lstm
        >>> documents = ["春眠不觉晓，", "春晓，"]
        >>> tokenizer = Tokenizer.train(documents)
        >>> model = initialise(lstm(tokenizer.vocab_size, context=4), tokenizer, documents)
        >>> model.get_layer("token_embedding").get_weights()[0].shape
        (265, 128)

    Source:
        O. Levy and Y. Goldberg, "Neural word embedding as implicit matrix factorization" (2014); decomposition
        after N. Halko, P. Martinsson and J. Tropp, "Finding structure with randomness" (2011).
    """
    check_model(model, tokenizer)
    try:
        embedding = model.get_layer("token_embedding")
    except ValueError:
        raise ValueError(
            "initialise needs a layer named token_embedding. Build the model with transformer or lstm."
        ) from None
    ids = documents if isinstance(documents, np.ndarray) else make_store(documents, tokenizer)
    if not len(ids):
        raise ValueError("initialise needs at least one document, got none.")
    before = embedding.get_weights()[0]
    counted = _factors(_mutual_information(sample_tokens(ids, _MAX_TOKENS), len(before)), before.shape[1])
    norms = np.linalg.norm(counted, axis=1, keepdims=True)
    rows = np.divide(counted, norms, out=np.zeros_like(counted), where=norms > 1e-6 * norms.max())
    noise = np.random.default_rng(seed).standard_normal(before.shape, np.float32)
    rows = math.sqrt(before.shape[1]) * rows + _NOISE * noise
    embedding.set_weights([_SCALE * before.std() * rows])
    return model


def _mutual_information(ids: np.ndarray, vocab_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Compute the positive pointwise mutual information of neighbours, symmetric (V, V): columns and values by row."""
    ids = ids.astype(np.min_scalar_type(vocab_size**2))  # mostly four bytes, as there are many pairs
    pairs = [ids[:-d] * vocab_size + ids[d:] for d in range(1, _DISTANCE + 1)]
    pairs += [ids[d:] * vocab_size + ids[:-d] for d in range(1, _DISTANCE + 1)]
    pairs, counts = np.unique(np.concatenate(pairs), return_counts=True)
    rows, columns = np.divmod(pairs.astype(np.int64), vocab_size)
    totals = np.bincount(rows, counts, vocab_size)
    information = np.log(counts * totals.sum() / (totals[rows] * totals[columns]))
    positive = information > 0
    rows, columns = rows[positive], columns[positive]
    ends = np.searchsorted(rows, np.arange(1, vocab_size))
    return list(zip(np.split(columns, ends), np.split(information[positive].astype(np.float32), ends), strict=True))


def _factors(matrix: list[tuple[np.ndarray, np.ndarray]], width: int) -> np.ndarray:
    """Return the largest factors of a symmetric matrix (V, V): singular vectors times roots of values, (V, width)."""
    vocab_size = len(matrix)
    rank = min(width + _OVERSAMPLING, vocab_size)

    def times(x):
        return np.array([values @ x[columns] for columns, values in matrix])

    basis = np.random.default_rng(0).standard_normal((vocab_size, rank)).astype(np.float32)
    for _ in range(_ITERATIONS):
        basis, _ = np.linalg.qr(times(times(basis)))
    left, values, _ = np.linalg.svd(times(basis).T, full_matrices=False)
    factors = np.zeros((vocab_size, width), np.float32)
    kept = min(width, rank)
    factors[:, :kept] = (basis @ left)[:, :kept] * np.sqrt(values[:kept])
    return factors
