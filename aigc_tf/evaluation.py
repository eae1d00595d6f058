"""Evaluation: bits per character on whole documents, and what simple baselines reach on them."""

import math
from collections.abc import Iterator

import numpy as np

from .devices import keras
from .tokenizer import Tokenizer

_LOGITS_BYTES = 2**25  # of one batch: larger ones are no faster on a CPU


def evaluate(model: keras.Model, tokenizer: Tokenizer, documents: list[str]) -> dict[str, float]:
    """Measure how well a model predicts whole documents.

    Each document is read on its own, from its begin; every token and the end of the document is predicted
    exactly once. One longer than the context T is read in windows that overlap by half, and a token counts
    where it has more context: always at least T / 2 tokens, unless the document begins within them. Only
    bits per character can be compared between vocabularies.

    Args:
        model: ids `int32 (B, T)` to logits `float32 (B, T, V)`, causal.
        tokenizer: the tokenizer the model was trained with.
        documents: the documents, held out from training.

    Returns:
        `dict[str, float]`: "bits_per_char" (the bits of all tokens, end of document among them, per
        character of the documents), "nats_per_token", "perplexity" (per token), "tokens_per_char", and the
        numbers "tokens", "chars" and "documents".

    Raises:
        ValueError: there is no document, or the model and the tokenizer do not fit.

    Example:
        >>> from aigc_tf.models import lstm
        >>> tokenizer = Tokenizer.train(["春眠不觉晓，"])
        >>> figures = evaluate(lstm(tokenizer.vocab_size, context=4), tokenizer, ["春晓，"])
        >>> round(figures["bits_per_char"], 2), figures["tokens"]
        (10.73, 4.0)
    """
    check_vocabulary(model, tokenizer)
    return evaluate_scorer(scorer(model), tokenizer, documents)


def check_vocabulary(model: keras.Model, tokenizer: Tokenizer) -> None:
    """Refuse a model and a tokenizer that do not belong together."""
    if model.output_shape[-1] != tokenizer.vocab_size:
        raise ValueError(
            f"Model and tokenizer must have the same vocabulary size, got {model.output_shape[-1]} "
            f"and {tokenizer.vocab_size}. Build the model with tokenizer.vocab_size."
        )


def scorer(model: keras.Model) -> keras.Model:
    """Extend a language model to one from ids and targets `int32 (B, T)` to nats `float32 (B, T)`.

    Whoever evaluates a model again and again makes its scorer once, as it is compiled once.
    """
    ids = keras.Input(model.input_shape[1:], dtype="int32")
    targets = keras.Input(model.input_shape[1:], dtype="int32")
    nats = keras.ops.sparse_categorical_crossentropy(targets, model(ids), from_logits=True)
    return keras.Model([ids, targets], nats)


def evaluate_scorer(scoring: keras.Model, tokenizer: Tokenizer, documents: list[str]) -> dict[str, float]:
    """Do what `evaluate` does, given the model's scorer."""
    context = scoring.input_shape[0][1]
    if not documents:
        raise ValueError("An evaluation needs at least one document, got none.")
    batch_size = max(1, min(64, _LOGITS_BYTES // (4 * context * tokenizer.vocab_size)))
    nats, num_tokens = 0.0, 0
    for inputs, targets, counted in _batches(tokenizer, documents, context, batch_size):
        nats += float(scoring.predict_on_batch([inputs, targets])[counted].sum(dtype=np.float64))
        num_tokens += int(counted.sum())
    num_chars = sum(map(len, documents))
    nats_per_token = nats / num_tokens
    return {
        "bits_per_char": nats / math.log(2) / num_chars,
        "nats_per_token": nats_per_token,
        "perplexity": math.exp(min(nats_per_token, 700.0)),
        "tokens_per_char": num_tokens / num_chars,
        "tokens": float(num_tokens),
        "chars": float(num_chars),
        "documents": float(len(documents)),
    }


def baselines(tokenizer: Tokenizer, train_documents: list[str], valid_documents: list[str]) -> dict[str, float]:
    """Compute what two models that look at no context reach, as a scale for a model's figure.

    Args:
        tokenizer: the tokenizer of the model to compare with.
        train_documents: the documents to count in.
        valid_documents: the documents to predict.

    Returns:
        `dict[str, float]` of bits per character on `valid_documents`: "uniform" (all V tokens alike) and
        "frequency" (each token as often as in training, one added to every count; with `unit="char"` the
        character frequencies).

    Raises:
        ValueError: there is no document to predict.

    Example:
        >>> tokenizer = Tokenizer.train(["春眠不觉晓，"])
        >>> {name: round(bits, 2) for name, bits in baselines(tokenizer, ["春眠不觉晓，"], ["春晓，"]).items()}
        {'uniform': 10.73, 'frequency': 9.45}
    """
    if not valid_documents:
        raise ValueError("A baseline needs at least one document to predict, got none.")
    counts, num_predicted = np.ones(tokenizer.vocab_size), np.zeros(tokenizer.vocab_size)
    for ids in tokenizer.encode_documents(train_documents):
        np.add.at(counts, ids[1:], 1)
    for ids in tokenizer.encode_documents(valid_documents):
        np.add.at(num_predicted, ids[1:], 1)
    num_chars = sum(map(len, valid_documents))
    frequency_bits = -(num_predicted * np.log2(counts / counts.sum())).sum()
    return {
        "uniform": float(num_predicted.sum() * math.log2(tokenizer.vocab_size) / num_chars),
        "frequency": float(frequency_bits / num_chars),
    }


def _windows(ids: np.ndarray, context: int) -> Iterator[tuple[int, int]]:
    """Yield where each window begins, and from where on its predictions count: each exactly once."""
    num_predictions = len(ids) - 1
    counted = 0
    while counted < num_predictions:
        # A window that is not the first keeps half of its tokens as context for the other half.
        start = 0 if counted == 0 else max(0, min(counted - context // 2, num_predictions - context))
        yield start, counted
        counted = start + context


def _batches(
    tokenizer: Tokenizer, documents: list[str], context: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (inputs, targets, counted), each (B, T), all of one shape: rows are filled up with padding."""
    rows = [(ids, *window) for ids in tokenizer.encode_documents(documents) for window in _windows(ids, context)]
    for first in range(0, len(rows), batch_size):
        inputs, targets = np.full((2, batch_size, context), tokenizer.PAD, np.int32)
        counted = np.zeros((batch_size, context), bool)
        for row, (ids, start, counted_from) in enumerate(rows[first : first + batch_size]):
            window = ids[start : start + context + 1]
            inputs[row, : len(window) - 1] = window[:-1]
            targets[row, : len(window) - 1] = window[1:]
            counted[row, counted_from - start : len(window) - 1] = True
        yield inputs, targets, counted
