"""Bits per character: how well a model predicts whole documents."""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ..corpus.documents import check_documents, documents_sha256
from ..corpus.tokenizer import Tokenizer
from ..generation.engines.engine import make_engine
from ..generation.processors import log_softmax
from ..models.contract import check_model
from ..models.ngram import Ngram
from ..models.weights import LstmWeights, TransformerWeights
from ..runtime.backend import keras
from ..runtime.distribution import predict

VALIDATION_TOKENS = 200_000  # of the held-out documents, during training: a standard error of some 0.3 %
FINAL_TOKENS = 1_000_000  # after training
_LOGITS_BYTES = 2**25  # of one batch: larger ones are no faster on a CPU
_ROW_TOKENS = 1_000_000  # that an n-gram model predicts in one go


def evaluate(model: keras.Model | Ngram, tokenizer: Tokenizer, documents: list[str]) -> dict[str, float]:
    """Measure how well a model predicts whole documents, in bits per character: the lower, the better.

    Bits per character can be compared between models with different vocabularies, the figures per token cannot.

    Each document is read on its own, from its beginning; every token and the end of the document are predicted exactly
    once. A document longer than the context T is read in windows that overlap by half, so that every token is
    predicted from at least T / 2 tokens, or from all that come before it.

    Args:
        model: a model from ids `int32 (B, T)` to logits `float32 (B, T, V)`, causal; an `Ngram`, which needs no
            windows; or the result of `aigc_tf.load_writer`, which reads one token at a time and is slower than the
            model itself on many documents.
        tokenizer: the tokenizer the model was trained with.
        documents: the documents, held out from training.

    Returns:
        `dict[str, float]`: "bits_per_char" (the bits of all tokens, including the end of each document, divided by the
        number of characters), "nats_per_token", "perplexity" (per token), "tokens_per_char", and the totals "tokens",
        "chars" and "documents".

    Raises:
        ValueError: there is no document, or the model and the tokenizer do not belong together.

    Example:
        >>> from aigc_tf.models.networks import lstm
        >>> tokenizer = Tokenizer.train(["春眠不觉晓，"])
        >>> figures = evaluate(lstm(tokenizer.vocab_size, context=4), tokenizer, ["春晓，"])
        >>> round(figures["bits_per_char"]), figures["tokens"]
        (11, 4.0)
    """
    check_model(model, tokenizer)
    _require_documents(documents)
    if isinstance(model, Ngram):
        counts, nats = ngram_nats(model, tokenizer, documents)
        return _figures(nats, int(counts.sum()), documents)
    batches = window_batches(tokenizer, documents, model.input_shape[1])
    if isinstance(model, TransformerWeights | LstmWeights):
        return _sum_up(lambda inputs, targets: weights_nats(model, inputs, targets), batches, documents)
    return evaluate_with_scorer(make_scorer(model), batches, documents)


def sample_documents(documents: list[str], tokenizer: Tokenizer, max_tokens: int) -> list[str]:
    """Choose documents of about `max_tokens` tokens in all by a hash of each: always the same of the same documents.

    Args:
        documents: the documents.
        tokenizer: the tokenizer that counts.
        max_tokens: how many tokens are enough; a document with more characters than that is cut to as many.

    Returns:
        `list[str]` in the order given; all documents if they have no more tokens.
    """
    order = sorted(range(len(documents)), key=lambda i: documents_sha256([documents[i]]))
    encoded = tokenizer.encode_documents(documents[i][:max_tokens] for i in order)
    chosen, num_tokens = [], 0
    for i, ids in zip(order, encoded, strict=True):
        chosen.append(i)
        num_tokens += len(ids)
        if num_tokens >= max_tokens:
            break
    return [documents[i][:max_tokens] for i in sorted(chosen)]


def make_scorer(model: keras.Model) -> keras.Model:
    """Extend a language model to one from ids and targets `int32 (B, T)` to nats `float32 (B, T)`.

    It is compiled at its first use: make it once for repeated evaluations of a model.
    """
    ids = keras.Input(model.input_shape[1:], dtype="int32")
    targets = keras.Input(model.input_shape[1:], dtype="int32")
    nats = keras.ops.sparse_categorical_crossentropy(targets, model(ids), from_logits=True)
    return keras.Model([ids, targets], nats)


def evaluate_with_scorer(
    scorer: keras.Model, batches: Iterable, documents: list[str], progress: Callable[[int], None] = lambda done: None
) -> dict[str, float]:
    """Evaluate as `evaluate` does, given the scorer of a model and the `window_batches` of the documents.

    `progress` is called with the number of batches done.
    """
    return _sum_up(lambda *batch: predict(scorer, list(batch)), batches, documents, progress)


def weights_nats(weights: TransformerWeights | LstmWeights, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Compute what a scorer computes, from weights alone: ids and targets `int32 (B, T)` to nats `float64 (B, T)`."""
    rows = np.arange(len(inputs))
    read, nats = make_engine(weights, len(rows), "numpy").read, np.zeros(inputs.shape)
    for position in np.flatnonzero((targets != Tokenizer.PAD).any(0)):
        log_p = log_softmax(read(rows, np.full(len(rows), position), inputs[:, position].astype(np.int64)))
        nats[:, position] = -log_p[rows, targets[:, position]]
    return nats


def _sum_up(compute, batches: Iterable, documents: list[str], progress=lambda done: None) -> dict[str, float]:
    """Add up the nats that `compute` returns for the inputs and targets of each batch."""
    _require_documents(documents)
    nats, num_tokens = 0.0, 0
    for done, (inputs, targets, counted) in enumerate(batches):
        progress(done)
        nats += float(compute(inputs, targets)[counted].sum(dtype=np.float64))
        num_tokens += int(counted.sum())
    return _figures(nats, num_tokens, documents)


def _require_documents(documents: list[str]) -> None:
    check_documents(documents)
    if not any(documents):
        raise ValueError("An evaluation needs at least one document that is not empty, got none.")


def _figures(nats: float, num_tokens: int, documents: list[str]) -> dict[str, float]:
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


def ngram_nats(ngram: Ngram, tokenizer: Tokenizer, documents: Iterable[str]) -> tuple[np.ndarray, float]:
    """Return how often each token is predicted in documents, `int64 (V,)`, and the nats of all predictions."""
    counts, nats = np.zeros(tokenizer.vocab_size, np.int64), 0.0
    for ids in _rows(tokenizer.encode_documents(documents)):
        counts += np.bincount(ids, minlength=tokenizer.vocab_size)
        nats += float(ngram.nats(ids)[ids[1:] != tokenizer.BOS].sum())
    counts[tokenizer.BOS] = 0
    return counts, nats


def _rows(encoded: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Concatenate documents to rows of about a million tokens."""
    row, size = [], 0
    for ids in encoded:
        row.append(ids)
        size += len(ids)
        if size >= _ROW_TOKENS:
            yield np.concatenate(row)
            row, size = [], 0
    if row:
        yield np.concatenate(row)


def batch_rows(context: int, vocab_size: int) -> int:
    """Choose how many windows to evaluate at a time."""
    return max(1, min(64, _LOGITS_BYTES // (4 * context * vocab_size)))


def window_batches(
    tokenizer: Tokenizer, documents: list[str], context: int, batch_size: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the windows of documents as batches of one shape: the last rows are padding.

    Args:
        tokenizer: the tokenizer.
        documents: the documents.
        context: T, the length of a window.
        batch_size: B, by default chosen by `batch_rows`.

    Returns:
        An iterator over inputs `int32 (B, T)`, targets `int32 (B, T)`, and which predictions count, `bool (B, T)`.
    """
    batch_size = batch_size or batch_rows(context, tokenizer.vocab_size)
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


def _windows(ids: np.ndarray, context: int) -> Iterator[tuple[int, int]]:
    """Yield the start of each window, and the first prediction in it that counts: each counts exactly once."""
    num_predictions = len(ids) - 1
    counted = 0
    while counted < num_predictions:
        # Every window but the first keeps half of its tokens as context for the other half.
        start = 0 if counted == 0 else max(0, min(counted - context // 2, num_predictions - context))
        yield start, counted
        counted = start + context
