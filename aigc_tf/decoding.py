"""Decoding: logits after the newest tokens, each token read once, with a KV cache or an LSTM's carried state.

The arithmetic is NumPy's, over the weights of a model that `models.py` builds, told by its graph; `kernels.py`
does the same compiled, where numba is installed. Any other model is read through itself, window by window.
"""

import functools
import json
import math
import os
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .keras_internals import is_its_graph
from .ngram import Ngram
from .weights import LstmWeights, TransformerWeights, read_weights


class Decoder(NamedTuple):
    """What reads a number of texts, a row each.

    Attributes:
        read: from `(rows, positions, ids)`, `int64 (R,)` each, to logits `float32 (B', V)`: it reads R tokens, token
            r at position `positions[r]` of the text in row `rows[r]`, and gives the logits after the last token of
            each row that occurs, in the order of the rows. Rows rise, and positions rise within a row; so prompts
            of any lengths are read in one call without padding, and later each row takes one token a call.
        copy: from `int (num_rows,)`: let row r go on from what the row named there has read.
        num_positions: how many positions a text may have; None if it may go on for ever.
        write: where a loop of reading and choosing is compiled, from `(rows, positions, ids, pending, uniforms,
            choosing)`, a token of each row to read, what is pending of a character after it (`utf8.py`), uniforms
            `(R, steps)` and a `choice.Choosing`, to the tokens that follow, `int64 (R, steps)`, -1 after the end of
            document. The last of each row is not read.
    """

    read: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    copy: Callable[[np.ndarray], None]
    num_positions: int | None = None
    write: Callable | None = None


def decoder(model, num_rows: int, engine: str) -> Decoder:
    """Make a decoder of a model for a number of texts. It computes in float32, whatever the model's precision.

    Args:
        model: ids `int32 (B, T)` to logits `float32 (B, T, V)`, causal; or weights that `read_weights` gave.
        num_rows: how many texts it shall read at once.
        engine: "numpy"; "numba", for `kernels.py`; or "model", which any other model is read by in any case.

    Returns:
        A `Decoder`.
    """
    weights = None if engine == "model" else model_weights(model)
    if weights is None:
        return _plain_decoder(model, num_rows)
    if engine == "numba":
        from . import kernels

        read, copy, write = kernels.decoder(weights, num_rows)

        def read_all(rows, positions, ids):
            return read(rows, positions, ids, _last_of_each_row(rows))

        return Decoder(read_all, copy, _positions(weights), write)
    make = _lstm_decoder if isinstance(weights, LstmWeights) else _transformer_decoder
    return Decoder(*make(weights, num_rows), _positions(weights))


def _positions(weights) -> int | None:
    return None if isinstance(weights, LstmWeights) else len(weights.position_embedding)


_COMPARED = 16  # tokens

_read_before = weakref.WeakKeyDictionary()  # model -> its layers' settings, a watch over its variables, its weights
_reading = threading.Lock()  # on JAX a model that two threads compute at once has given its state away to one of them
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_reading.acquire, after_in_parent=_reading.release, after_in_child=_reading.release)


def model_weights(model) -> TransformerWeights | LstmWeights | None:
    """Read the weights of a model that `models.py` builds, or return None; the same object while they are equal."""
    if isinstance(model, TransformerWeights | LstmWeights):
        return model
    if not hasattr(model, "get_layer") or not is_its_graph(model):  # no Keras model, or a class that overrides its call
        return None
    with _reading:
        return _watched_weights(model)


def _watched_weights(model) -> TransformerWeights | LstmWeights | None:
    from .variables import LayerSettings, Watch

    settings, watch, weights = _read_before.get(model, (None, None, None))
    is_new = settings is None or not settings.is_current(model)
    if not is_new and watch.is_current(model):
        return weights
    if is_new and settings is not None:
        from .distribution import forget_compiled

        forget_compiled(model)
    settings, watch = LayerSettings(model), Watch(model)
    try:
        config = json.loads(json.dumps(model.get_config()))
    except (NotImplementedError, TypeError):  # a layer of the user's cannot tell its configuration, or not as JSON
        config = {}
    weights = read_weights(config, lambda name: [watch.array(variable) for variable in model.get_layer(name).weights])
    if weights is not None and is_new and not _agree(model, weights):
        warnings.warn(
            "The model has the layers and settings of one of ours, and computes something else: it is read through "
            "itself, slowly.",
            stacklevel=3,
        )
        weights = None
    _read_before[model] = settings, watch, weights
    return weights


def _agree(model, weights) -> bool:
    """Compare what a model makes of a few ids with what its weights give in NumPy, roughly: precisions may be low.

    The model reads a whole window, and what stands right of those ids must not matter to it.
    """
    from .distribution import predict

    length = model.input_shape[1] if isinstance(model.input_shape[1], int) else _COMPARED
    window = np.random.default_rng(0).integers(0, len(weights.token_embedding), length)
    ids = window[:_COMPARED]  # in NumPy a window of 1,024 would take several times as long as through the model
    expected = np.asarray(predict(model, window[None].astype(np.int32)))[0, len(ids) - 1].astype(np.float32)
    with np.errstate(all="ignore"):
        logits = decoder(weights, 1, "numpy").read(np.zeros(len(ids), np.int64), np.arange(len(ids)), ids)[0]
        # Where they are not finite, that is said when a token is chosen.
        size, error = np.sqrt(np.square(expected).mean()), np.abs(logits - expected)
        return not (error.mean() > 0.1 * size or error.max() > size)  # one token may be what another model changes


# --- the decoders --------------------------------------------------------------------------------------------


def _last_of_each_row(rows: np.ndarray) -> np.ndarray:
    """Return where each row's last token stands among the tokens."""
    return np.flatnonzero(np.append(rows[1:] != rows[:-1], True))


def _transformer_decoder(weights: TransformerWeights, num_rows: int):
    context, dim = weights.position_embedding.shape
    num_blocks, num_heads = len(weights.blocks), weights.num_heads
    keys, values = np.zeros((2, num_blocks, num_rows, num_heads, context, dim // num_heads), np.float32)
    scale = np.float32((dim // num_heads) ** -0.5)
    used = 0  # positions

    def read(rows, positions, ids):
        nonlocal used
        used = max(used, int(positions.max()) + 1)
        x = weights.token_embedding[ids] + weights.position_embedding[positions]
        last = _last_of_each_row(rows)
        texts = [(rows[end], slice(start, end + 1)) for start, end in zip([0, *last + 1], last, strict=False)]
        for i, block in enumerate(weights.blocks):
            y = _norm(x, block.attention_norm) @ block.attention + block.attention_bias
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
            x = x + attended.reshape(len(ids), dim) @ block.output + block.output_bias
            y = _gelu(_norm(x, block.mlp_norm) @ block.expand + block.expand_bias)
            x = x + y @ block.project + block.project_bias
        return _norm(x[last], weights.final_norm) @ weights.token_embedding.T

    def copy(parents):
        moved = np.flatnonzero(parents != np.arange(num_rows))
        for kept in (keys, values):
            kept[:, moved, :, :used] = kept[:, parents[moved], :, :used]

    return read, copy


def _norm(x: np.ndarray, scale_and_offset: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(1e-5)) * scale_and_offset[0] + scale_and_offset[1]


def _gelu(x: np.ndarray) -> np.ndarray:
    return np.float32(0.5) * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))


def _lstm_decoder(weights: LstmWeights, num_rows: int):
    hidden, cell = ([np.zeros((num_rows, len(bias) // 4), np.float32) for _, bias in weights.layers] for _ in range(2))

    def step(rows, ids):
        x = weights.token_embedding[ids]
        for i, (matrix, bias) in enumerate(weights.layers):
            gates = np.concatenate([x, hidden[i][rows]], axis=1) @ matrix + bias
            put, forget, candidate, out = np.split(gates, 4, axis=1)
            cell[i][rows] = _sigmoid(forget) * cell[i][rows] + _sigmoid(put) * np.tanh(candidate)
            x = hidden[i][rows] = _sigmoid(out) * np.tanh(cell[i][rows])

    def read(rows, positions, ids):
        new = rows[positions == 0]
        for state in (*hidden, *cell):
            state[new] = 0
        order = np.arange(len(rows)) - np.searchsorted(rows, rows)  # the first token of each row, the second, ...
        for i in range(order.max() + 1):
            step(rows[order == i], ids[order == i])
        x = hidden[-1][rows[_last_of_each_row(rows)]]
        for matrix, bias in weights.head:
            x = x @ matrix + bias
        return x

    def copy(parents):
        for state in (*hidden, *cell):
            state[:] = state[parents]

    return read, copy


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * x))  # without overflow


def _plain_decoder(model, num_rows: int) -> Decoder:
    context = model.input_shape[1]
    texts = [[] for _ in range(num_rows)]
    if isinstance(model, Ngram):
        compute = model.predict_on_batch
    else:
        from .distribution import predict

        compute = functools.partial(predict, model)

    def read(rows, positions, ids):
        for row, position, i in zip(rows, positions, ids, strict=True):
            texts[row][position:] = [i]
        newest = [texts[row][-context:] for row in rows[_last_of_each_row(rows)]]
        # What stands right of the newest token does not matter: the model is causal.
        window = np.zeros((len(newest), context), np.int32)
        for row, text in enumerate(newest):
            window[row, : len(text)] = text
        logits = compute(window)
        newest_logits = np.array(logits)[np.arange(len(newest)), [len(text) - 1 for text in newest]]
        return newest_logits.astype(np.float32)  # a model of the user's may give them in 16 bits

    def copy(parents):
        texts[:] = [list(texts[parent]) for parent in parents]

    return Decoder(read, copy)
