"""Baselines: bits per character of models without a neural network, for comparison."""

import math

import numpy as np

from ..corpus.documents import check_documents
from ..corpus.store import count_tokens, make_store, sample_tokens
from ..corpus.tokenizer import Tokenizer
from ..models.ngram import kneser_ney_from_ids
from .bits import ngram_nats

_ORDER = 5  # the usual one; 6 gains nothing on the shipped poems, and 1.5 % on statutes
_MAX_TOKENS = 10_000_000  # of a longer text, the n-grams are counted in slices


def baselines(
    tokenizer: Tokenizer, train_documents: list[str] | np.ndarray, valid_documents: list[str]
) -> dict[str, float]:
    """Compute the bits per character of models without a neural network, to compare a model's figure with.

    "5-gram" is the one to beat.

    Args:
        tokenizer: the tokenizer of the model to compare with.
        train_documents: the documents to count in, or the ids of a store (`make_store`, `open_store`).
        valid_documents: the documents to predict.

    Returns:
        `dict[str, float]` of bits per character on `valid_documents`: "uniform" (all V tokens equally likely),
        "frequency" (each token as likely as in the training documents, with one added to every count; with
        `unit="char"` the frequencies of characters) and "5-gram" (see `kneser_ney`; of more than 10 million tokens, as
        many are counted, in slices spread evenly over the text).

    Raises:
        ValueError: there is no document to count in, or none to predict.

    Example:
        >>> tokenizer = Tokenizer.train(["春眠不觉晓，"])
        >>> {name: round(bits, 2) for name, bits in baselines(tokenizer, ["春眠不觉晓，"], ["春晓，"]).items()}
        {'uniform': 10.73, 'frequency': 9.45, '5-gram': 3.44}
    """
    check_documents(train_documents)
    check_documents(valid_documents)
    if not len(train_documents) or not any(valid_documents):
        raise ValueError(
            "Baselines need at least one document to count in and at least one that is not empty to predict, "
            f"got {len(train_documents)} and {len(valid_documents)}."
        )
    is_store = isinstance(train_documents, np.ndarray)
    ids = train_documents if is_store else make_store(train_documents, tokenizer)
    ngram = kneser_ney_from_ids(sample_tokens(ids, _MAX_TOKENS), tokenizer.vocab_size, _ORDER)
    valid_counts, nats = ngram_nats(ngram, tokenizer, valid_documents)
    train_counts = count_tokens(ids, tokenizer.vocab_size)
    train_counts[tokenizer.BOS] = 0
    frequency_bits = -(valid_counts * np.log2((train_counts + 1) / (train_counts + 1).sum())).sum()
    num_chars = sum(map(len, valid_documents))
    return {
        "uniform": float(valid_counts.sum() * math.log2(tokenizer.vocab_size) / num_chars),
        "frequency": float(frequency_bits / num_chars),
        f"{_ORDER}-gram": float(nats / math.log(2) / num_chars),
    }
