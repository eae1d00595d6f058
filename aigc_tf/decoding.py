"""Decoding: logits after the newest tokens, each token read once, with a KV cache or an LSTM's carried state.

A decoder is a function from `(rows, positions, ids)`, `int64 (R,)` each, to logits `float32 (B', V)`: it reads
R tokens, token r at position `positions[r]` of the text in row `rows[r]`, and gives the logits after the last
token of each row that occurs, in the order of the rows. Rows rise, and positions rise within a row; so a batch
of prompts of any lengths is read in one call without padding, and later each row takes one token a call.

The arithmetic is NumPy's, over the weights of a model that `models.py` builds, told by its graph; `kernels.py`
does the same compiled, where numba is installed. Any other model is read through itself, window by window.
"""

import contextlib
import importlib.util
import json
import math
from collections.abc import Callable

import numpy as np

from .devices import keras
from .weights import LstmWeights, TransformerWeights, read_weights

Decoder = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def decoder(model, num_rows: int) -> tuple[Decoder, int | None]:
    """Make a decoder of a model for a number of texts. It computes in float32, whatever the model's precision.

    Args:
        model: ids `int32 (B, T)` to logits `float32 (B, T, V)`, causal.
        num_rows: how many texts it shall read at once.

    Returns:
        The decoder, and how many positions a text may have; None if it may go on for ever.
    """
    weights = None
    if isinstance(model, keras.Model):
        with contextlib.suppress(NotImplementedError):  # of a layer of the user's that cannot tell its configuration
            config = json.loads(model.to_json())["config"]
            weights = read_weights(config, lambda name: model.get_layer(name).get_weights())
    if weights is None:
        return _plain_decoder(model, num_rows), None
    return weights_decoder(weights, num_rows)


def weights_decoder(weights, num_rows: int, compiled: bool | None = None) -> tuple[Decoder, int | None]:
    """Make a decoder of weights that `read_weights` gave.

    Args:
        weights: the weights.
        num_rows: see `decoder`.
        compiled: use `kernels.py`; None does where numba is installed.

    Returns:
        See `decoder`.
    """
    if isinstance(weights, LstmWeights):
        return _lstm_decoder(weights, num_rows), None
    if compiled is None:
        compiled = importlib.util.find_spec("numba") is not None
    make = _compiled_transformer_decoder if compiled else _transformer_decoder
    return make(weights, num_rows), len(weights.position_embedding)


# --- the decoders --------------------------------------------------------------------------------------------


def _last_of_each_row(rows: np.ndarray) -> np.ndarray:
    """Return where each row's last token stands among the tokens."""
    return np.flatnonzero(np.append(rows[1:] != rows[:-1], True))


def _compiled_transformer_decoder(weights: TransformerWeights, num_rows: int) -> Decoder:
    from . import kernels

    decode = kernels.transformer_decoder(weights, num_rows)
    return lambda rows, positions, ids: decode(rows, positions, ids, _last_of_each_row(rows))


def _transformer_decoder(weights: TransformerWeights, num_rows: int) -> Decoder:
    (num_blocks, _, dim), context = weights.attention_norm.shape, len(weights.position_embedding)
    num_heads = weights.num_heads
    keys, values = np.zeros((2, num_blocks, num_rows, num_heads, context, dim // num_heads), np.float32)
    scale = np.float32((dim // num_heads) ** -0.5)

    def decode(rows, positions, ids):
        x = weights.token_embedding[ids] + weights.position_embedding[positions]
        last = _last_of_each_row(rows)
        texts = [(rows[end], slice(start, end + 1)) for start, end in zip([0, *last + 1], last, strict=False)]
        for i in range(num_blocks):
            y = _norm(x, weights.attention_norm[i])
            y = y @ weights.attention[i].T + weights.attention_bias[i]
            query, key, value = y.reshape(len(ids), 3, num_heads, -1).transpose(1, 0, 2, 3)
            keys[i, rows, :, positions], values[i, rows, :, positions] = key, value
            attended = np.empty_like(query)
            for row, tokens in texts:
                until = positions[tokens][-1] + 1
                scores = scale * query[tokens].transpose(1, 0, 2) @ keys[i, row, :, :until].transpose(0, 2, 1)
                scores = np.where(np.arange(until) <= positions[tokens, None], scores, -np.inf)
                scores = np.exp(scores - scores.max(-1, keepdims=True))
                scores /= scores.sum(-1, keepdims=True)
                attended[tokens] = (scores @ values[i, row, :, :until]).transpose(1, 0, 2)
            x = x + attended.reshape(len(ids), dim) @ weights.output[i].T + weights.output_bias[i]
            y = _norm(x, weights.mlp_norm[i]) @ weights.expand[i].T + weights.expand_bias[i]
            x = x + _gelu(y) @ weights.project[i].T + weights.project_bias[i]
        return _norm(x[last], weights.final_norm) @ weights.token_embedding.T

    return decode


def _norm(x: np.ndarray, scale_and_offset: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-5)) * scale_and_offset[0] + scale_and_offset[1]


def _gelu(x: np.ndarray) -> np.ndarray:
    return np.float32(0.5) * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))


def _lstm_decoder(weights: LstmWeights, num_rows: int) -> Decoder:
    hidden, cell = ([np.zeros((num_rows, len(bias) // 4), np.float32) for _, bias in weights.layers] for _ in range(2))

    def step(rows, ids):
        x = weights.token_embedding[ids]
        for i, (matrix, bias) in enumerate(weights.layers):
            gates = np.concatenate([x, hidden[i][rows]], axis=1) @ matrix.T + bias
            put, forget, candidate, out = np.split(gates, 4, axis=1)
            cell[i][rows] = _sigmoid(forget) * cell[i][rows] + _sigmoid(put) * np.tanh(candidate)
            x = hidden[i][rows] = _sigmoid(out) * np.tanh(cell[i][rows])

    def decode(rows, positions, ids):
        new = rows[positions == 0]
        for state in (*hidden, *cell):
            state[new] = 0
        order = np.arange(len(rows)) - np.searchsorted(rows, rows)  # the first token of each row, the second, ...
        for i in range(order.max() + 1):
            step(rows[order == i], ids[order == i])
        x = hidden[-1][rows[_last_of_each_row(rows)]]
        for matrix, bias in weights.head:
            x = x @ matrix.T + bias
        return x

    return decode


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * x))  # without overflow


def _plain_decoder(model, num_rows: int) -> Decoder:
    context = model.input_shape[1]
    texts = [[] for _ in range(num_rows)]

    def decode(rows, positions, ids):
        for row, position, i in zip(rows, positions, ids, strict=True):
            texts[row][position:] = [i]
        newest = [texts[row][-context:] for row in rows[_last_of_each_row(rows)]]
        # What stands right of the newest token does not matter: the model is causal.
        window = np.zeros((len(newest), context), np.int32)
        for row, text in enumerate(newest):
            window[row, : len(text)] = text
        logits = model.predict_on_batch(window)
        return np.array(logits)[np.arange(len(newest)), [len(text) - 1 for text in newest]]

    return decode
