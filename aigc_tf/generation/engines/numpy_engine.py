"""NumPy engine: a Transformer with a KV cache, or an LSTM with its state, computed from the weights alone."""

import math

import numpy as np

from ...models.weights import LstmWeights, TransformerWeights


def numpy_engine(weights: TransformerWeights | LstmWeights, num_rows: int):
    """Make `read` and `copy` of an `engine.Engine` for `num_rows` texts."""
    make = _lstm_engine if isinstance(weights, LstmWeights) else _transformer_engine
    return make(weights, num_rows)


def last_of_each_row(rows: np.ndarray) -> np.ndarray:
    """Return the index of the last token of each row, given the rows of the tokens."""
    return np.flatnonzero(np.append(rows[1:] != rows[:-1], True))


def _transformer_engine(weights: TransformerWeights, num_rows: int):
    context, dim = weights.position_embedding.shape
    num_blocks, num_heads = len(weights.blocks), weights.num_heads
    # The KV cache: the keys and values of the positions read.
    keys, values = np.zeros((2, num_blocks, num_rows, num_heads, context, dim // num_heads), np.float32)
    scale = np.float32((dim // num_heads) ** -0.5)
    used = 0  # positions

    def read(rows, positions, ids):
        nonlocal used
        used = max(used, int(positions.max()) + 1)
        x = weights.token_embedding[ids] + weights.position_embedding[positions]
        last = last_of_each_row(rows)
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


def _lstm_engine(weights: LstmWeights, num_rows: int):
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
        x = hidden[-1][rows[last_of_each_row(rows)]]
        for matrix, bias in weights.head:
            x = x @ matrix + bias
        return x

    def copy(parents):
        for state in (*hidden, *cell):
            state[:] = state[parents]

    return read, copy


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * x))  # without overflow
