"""Evaluation: bits per character on whole documents, and what simple baselines reach on them."""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ..corpus.dataset import count_tokens, make_store, sample_tokens
from ..corpus.documents import check_documents, documents_sha256
from ..corpus.tokenizer import Tokenizer
from ..generation.engines.engine import make_engine
from ..generation.processors import log_softmax
from ..models.contract import check_model
from ..models.ngram import Ngram, kneser_ney_from_ids
from ..models.weights import LstmWeights, TransformerWeights
from ..runtime.backend import keras
from ..runtime.distribution import predict

VALIDATION_TOKENS = 200_000  # of the held-out documents, in a training: a standard error of some 0.3 %
FINAL_TOKENS = 1_000_000  # after it
_LOGITS_BYTES = 2**25  # of one batch: larger ones are no faster on a CPU
_BASELINE_ORDER = 5  # the usual one; 6 gains nothing on the shipped poems, and 1.5 % on statutes
_BASELINE_TOKENS = 10_000_000  # of a larger text slices of so many tokens count
_ROW_TOKENS = 1_000_000  # predicted in one go


def evaluate(model: keras.Model | Ngram, tokenizer: Tokenizer, documents: list[str]) -> dict[str, float]:
    """Measure how well a model predicts whole documents.

    Each document is read on its own, from its begin; every token and the end of the document is predicted
    exactly once. One longer than the context T is read in windows that overlap by half, and a token counts
    where it has more context: always at least T / 2 tokens, unless the document begins within them. Only
    bits per character can be compared between vocabularies.

    Args:
        model: ids `int32 (B, T)` to logits `float32 (B, T, V)`, causal; an `Ngram`, which needs no windows; or what
            `aigc_tf.load_writer` gives, which is read a token at a time: the model itself is faster on many documents.
        tokenizer: the tokenizer the model was trained with.
        documents: the documents, held out from training.

    Returns:
        `dict[str, float]`: "bits_per_char" (the bits of all tokens, end of document among them, per
        character of the documents), "nats_per_token", "perplexity" (per token), "tokens_per_char", and the
        numbers "tokens", "chars" and "documents".

    Raises:
        ValueError: there is no document, or the model and the tokenizer do not fit.

    Example:
        >>> from aigc_tf.models.networks import lstm
        >>> tokenizer = Tokenizer.train(["春眠不觉晓，"])
        >>> figures = evaluate(lstm(tokenizer.vocab_size, context=4), tokenizer, ["春晓，"])
        >>> round(figures["bits_per_char"]), figures["tokens"]
        (11, 4.0)
    """
    check_model(model, tokenizer)
    if isinstance(model, Ngram):
        _require_documents(documents)
        counts, nats = _ngram_nats(model, tokenizer, documents)
        return _figures(nats, int(counts.sum()), documents)
    if isinstance(model, TransformerWeights | LstmWeights):
        _require_documents(documents)
        context = model.input_shape[1]
        given = batches(tokenizer, documents, context, batch_rows(context, tokenizer.vocab_size))
        return _measure(lambda inputs, targets: weights_nats(model, inputs, targets), given, documents)
    check_documents(documents)
    scoring = scorer(model)
    return evaluate_scorer(scoring, scorer_batches(scoring, tokenizer, documents), documents)


def sample_documents(documents: list[str], tokenizer: Tokenizer, max_tokens: int) -> list[str]:
    """Choose documents of about so many tokens in all, by a hash of each: always the same ones of the same documents.

    Args:
        documents: the documents.
        tokenizer: the tokenizer that counts.
        max_tokens: how many tokens are enough; of a document that has more characters than that its begin is taken.

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


def scorer(model: keras.Model) -> keras.Model:
    """Extend a language model to one from ids and targets `int32 (B, T)` to nats `float32 (B, T)`.

    Whoever evaluates a model again and again makes its scorer once, as it is compiled once.
    """
    ids = keras.Input(model.input_shape[1:], dtype="int32")
    targets = keras.Input(model.input_shape[1:], dtype="int32")
    nats = keras.ops.sparse_categorical_crossentropy(targets, model(ids), from_logits=True)
    return keras.Model([ids, targets], nats)


def scorer_batches(
    scoring: keras.Model, tokenizer: Tokenizer, documents: list[str]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield what `evaluate_scorer` evaluates on: whoever does so again and again keeps them in a list."""
    context = scoring.input_shape[0][1]
    return batches(tokenizer, documents, context, batch_rows(context, tokenizer.vocab_size))


def batch_rows(context: int, vocab_size: int) -> int:
    """Choose how many windows to evaluate at a time."""
    return max(1, min(64, _LOGITS_BYTES // (4 * context * vocab_size)))


def evaluate_scorer(
    scoring: keras.Model, given: Iterable, documents: list[str], progress: Callable[[int], None] = lambda done: None
) -> dict[str, float]:
    """Do what `evaluate` does, given the model's scorer, the batches of the documents, and who counts those done."""
    return _measure(lambda *batch: predict(scoring, list(batch)), given, documents, progress)


def weights_nats(weights: TransformerWeights | LstmWeights, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Compute what a scorer does from weights alone: from ids and targets `int32 (B, T)` to nats `float64 (B, T)`."""
    rows = np.arange(len(inputs))
    read, nats = make_engine(weights, len(rows), "numpy").read, np.zeros(inputs.shape)
    for position in np.flatnonzero((targets != Tokenizer.PAD).any(0)):
        log_p = log_softmax(read(rows, np.full(len(rows), position), inputs[:, position].astype(np.int64)))
        nats[:, position] = -log_p[rows, targets[:, position]]
    return nats


def _measure(compute, given: Iterable, documents: list[str], progress=lambda done: None) -> dict[str, float]:
    """Sum up the nats that `compute` gives for the inputs and targets of batches."""
    _require_documents(documents)
    nats, num_tokens = 0.0, 0
    for done, (inputs, targets, counted) in enumerate(given):
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


def baselines(
    tokenizer: Tokenizer, train_documents: list[str] | np.ndarray, valid_documents: list[str]
) -> dict[str, float]:
    """Compute what models without a neural network reach, as a scale for a model's figure.

    Args:
        tokenizer: the tokenizer of the model to compare with.
        train_documents: the documents to count in, or the ids of a store (`make_store`, `open_store`).
        valid_documents: the documents to predict.

    Returns:
        `dict[str, float]` of bits per character on `valid_documents`: "uniform" (all V tokens alike),
        "frequency" (each token as often as in training, one added to every count; with `unit="char"` the
        character frequencies) and "5-gram" (see `kneser_ney`; of more than 10 million tokens it counts as many, in
        slices that lie evenly over the text).

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
    ngram = kneser_ney_from_ids(sample_tokens(ids, _BASELINE_TOKENS), tokenizer.vocab_size, _BASELINE_ORDER)
    valid_counts, ngram_nats = _ngram_nats(ngram, tokenizer, valid_documents)
    train_counts = count_tokens(ids, tokenizer.vocab_size)
    train_counts[tokenizer.BOS] = 0
    frequency_bits = -(valid_counts * np.log2((train_counts + 1) / (train_counts + 1).sum())).sum()
    num_chars = sum(map(len, valid_documents))
    return {
        "uniform": float(valid_counts.sum() * math.log2(tokenizer.vocab_size) / num_chars),
        "frequency": float(frequency_bits / num_chars),
        f"{_BASELINE_ORDER}-gram": float(ngram_nats / math.log(2) / num_chars),
    }


def _ngram_nats(ngram: Ngram, tokenizer: Tokenizer, documents: Iterable[str]) -> tuple[np.ndarray, float]:
    """Return how often each token and end of the documents is predicted, `int64 (V,)`, and the nats of all."""
    counts, nats = np.zeros(tokenizer.vocab_size, np.int64), 0.0
    for ids in _rows(tokenizer.encode_documents(documents)):
        counts += np.bincount(ids, minlength=tokenizer.vocab_size)
        nats += float(ngram.nats(ids)[ids[1:] != tokenizer.BOS].sum())
    counts[tokenizer.BOS] = 0
    return counts, nats


def _rows(encoded: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Put documents one after the other, in rows of about a million tokens."""
    row, size = [], 0
    for ids in encoded:
        row.append(ids)
        size += len(ids)
        if size >= _ROW_TOKENS:
            yield np.concatenate(row)
            row, size = [], 0
    if row:
        yield np.concatenate(row)


def _windows(ids: np.ndarray, context: int) -> Iterator[tuple[int, int]]:
    """Yield where each window begins, and from where on its predictions count: each exactly once."""
    num_predictions = len(ids) - 1
    counted = 0
    while counted < num_predictions:
        # A window that is not the first keeps half of its tokens as context for the other half.
        start = 0 if counted == 0 else max(0, min(counted - context // 2, num_predictions - context))
        yield start, counted
        counted = start + context


def batches(
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
