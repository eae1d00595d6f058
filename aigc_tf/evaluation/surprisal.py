"""Surprisal: how many bits each piece of a text costs a model."""

import math

import numpy as np

from ..corpus.tokenizer import Tokenizer
from ..models.contract import check_model
from ..models.ngram import Ngram
from ..models.weights import LstmWeights, TransformerWeights
from ..runtime.backend import keras
from ..runtime.distribution import predict
from .bits import weights_nats, window_batches


def surprisal(model: keras.Model | Ngram, tokenizer: Tokenizer, text: str) -> list[tuple[str, float]]:
    """Measure how surprising each piece of a text is to a model: -log2 of the probability it gave to the piece.

    The text is read as one whole document, as `evaluate` reads it: the sum of the bits is "bits_per_char" times the
    number of characters. A piece is a token; where the vocabulary spells a character in bytes, it is that character,
    with the bits of all its bytes.

    Args:
        model: a model from ids `int32 (B, T)` to logits `float32 (B, T, V)`, causal; an `Ngram`; or the result of
            `aigc_tf.load_writer`.
        tokenizer: the tokenizer the model was trained with.
        text: the text; it may be longer than the context.

    Returns:
        `list[tuple[str, float]]` of pieces and bits. The pieces joined are the text; the last one is empty and stands
        for the end of the document.

    Raises:
        ValueError: the text is empty, or the model and the tokenizer do not belong together.

    Example:
        >>> from aigc_tf.models.networks import lstm
        >>> tokenizer = Tokenizer.train(["春眠不觉晓，"])
        >>> [(piece, round(bits)) for piece, bits in surprisal(lstm(tokenizer.vocab_size, 4), tokenizer, "春晓")]
        [('春', 8), ('晓', 8), ('', 8)]
    """
    check_model(model, tokenizer)
    check_text(text)
    bits = _nats(model, tokenizer, text) / math.log(2)
    pieces, num_tokens = group_tokens(tokenizer, tokenizer.encode(text))
    starts = np.cumsum([0, *num_tokens])
    return list(zip([*pieces, ""], np.add.reduceat(bits, starts).tolist(), strict=True))


def check_text(text: str) -> None:
    """Refuse an empty text."""
    if not text:
        raise ValueError("The text to explain must have at least one character, got ''.")


def group_tokens(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], list[int]]:
    """Return the pieces that ids spell and the number of tokens of each: several where bytes spell a character."""
    pieces, num_tokens, pending = [], [], []

    def read():
        for i in ids:
            pending.append(i)
            yield i

    for piece in tokenizer.decode_stream(read()):
        pieces.append(piece)
        num_tokens.append(len(pending))
        pending.clear()
    return pieces, num_tokens


def _nats(model: keras.Model | Ngram, tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return -log p of each token of a text and of the end of the document, `float64` (N + 1,)."""
    if isinstance(model, Ngram):
        return model.nats(next(tokenizer.encode_documents([text])))
    nats = []
    # Window by window through the model itself, which is compiled once for all calls, in the shape that generation
    # uses too. A scorer would be compiled again at every call.
    for inputs, targets, counted in window_batches(tokenizer, [text], model.input_shape[1], batch_size=1):
        if isinstance(model, TransformerWeights | LstmWeights):
            nats.append(weights_nats(model, inputs, targets)[counted])
            continue
        logits = predict(model, inputs)
        losses = keras.ops.sparse_categorical_crossentropy(targets, logits, from_logits=True)
        nats.append(keras.ops.convert_to_numpy(losses)[counted])
    return np.concatenate(nats, dtype=np.float64)
