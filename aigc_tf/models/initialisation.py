"""Initialisation: initialise(), first values of the token embedding, counted in the text to learn from."""

import math

import numpy as np

from ..corpus.dataset import make_store, sample_tokens
from ..corpus.tokenizer import Tokenizer
from ..models.contract import check_model
from ..runtime.backend import keras

_DISTANCE = 2  # how far two tokens may be apart to be neighbours
_MAX_TOKENS = 3_000_000  # of a larger text slices of so many tokens count
_NOISE = 0.3  # what chance adds, as a share of what was counted
# Times the values that are replaced: a Transformer learns more with 2 and 4 than with 1, an LSTM with 1 and 2 than with
# 0.5.
_SCALE = 2.0
_OVERSAMPLING, _ITERATIONS = 16, 3  # of the randomised decomposition


def initialise(
    model: keras.Model, tokenizer: Tokenizer, documents: list[str] | np.ndarray, seed: int = 0
) -> keras.Model:
    """Begin a model's training with an embedding in which tokens with like neighbours lie close together.

    A model that starts from random vectors spends its first minutes on what counting tells in seconds. So each
    token gets its row of the largest factors of the matrix of positive pointwise mutual information between
    tokens at most 2 apart, on either side: log(n(a, b) n / (n(a) n(b))), where that is above 0. All rows have
    the same norm, on the average twice that of the values they replace, and some noise. All other weights stay.

    Args:
        model: a fresh model with a layer `token_embedding`, as `transformer` and `lstm` build it.
        tokenizer: its tokenizer.
        documents: the documents to learn from, or the ids of a store (`make_store`, `open_store`).
        seed: the seed of the noise.

    Returns:
        The model.

    Raises:
        ValueError: the model and the tokenizer do not fit, the model has no `token_embedding`, or there is no
            document.

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
        raise ValueError("An initialisation is for a model with a layer named token_embedding.") from None
    ids = documents if isinstance(documents, np.ndarray) else make_store(documents, tokenizer)
    if not len(ids):
        raise ValueError("An initialisation needs at least one document, got none.")
    before = embedding.get_weights()[0]
    counted = _factors(_mutual_information(sample_tokens(ids, _MAX_TOKENS), len(before)), before.shape[1])
    norms = np.linalg.norm(counted, axis=1, keepdims=True)
    rows = np.divide(counted, norms, out=np.zeros_like(counted), where=norms > 1e-6 * norms.max())
    noise = np.random.default_rng(seed).standard_normal(before.shape, np.float32)
    rows = math.sqrt(before.shape[1]) * rows + _NOISE * noise
    embedding.set_weights([_SCALE * before.std() * rows])
    return model


def _mutual_information(ids: np.ndarray, vocab_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Compute the positive pointwise mutual information of neighbours, symmetric (V, V): of each row places, values."""
    ids = ids.astype(np.min_scalar_type(vocab_size**2))  # of four bytes mostly, as the pairs are many
    pairs = [ids[:-d] * vocab_size + ids[d:] for d in range(1, _DISTANCE + 1)]
    pairs += [ids[d:] * vocab_size + ids[:-d] for d in range(1, _DISTANCE + 1)]
    pairs, counts = np.unique(np.concatenate(pairs), return_counts=True)
    places = np.stack(np.divmod(pairs.astype(np.int64), vocab_size), axis=1)
    totals = np.bincount(places[:, 0], counts, vocab_size)
    information = np.log(counts * totals.sum() / (totals[places[:, 0]] * totals[places[:, 1]]))
    positive = information > 0
    rows, columns = places[positive].T
    ends = np.searchsorted(rows, np.arange(1, vocab_size))
    return list(zip(np.split(columns, ends), np.split(information[positive].astype(np.float32), ends), strict=True))


def _factors(matrix: list[tuple[np.ndarray, np.ndarray]], width: int) -> np.ndarray:
    """Return the largest factors of a symmetric matrix (V, V), left singular vectors times roots, (V, width)."""
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
