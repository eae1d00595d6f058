"""Device steps: the compiled functions of `device_loop.py`, which read and write a batch of texts in Keras operations.

They run on TensorFlow and JAX, compiled by XLA.
"""

from typing import NamedTuple

from ...runtime.backend import keras
from .. import processors

ops = keras.ops

NOT_FINITE_ID = -2  # instead of a token, where logits are not finite


class StaticSettings(NamedTuple):
    """The settings that are compiled in; others are tensors."""

    eos: int
    top_k: int | None
    no_repeat_ngram: int | None
    scored: bool


# --- writing -------------------------------------------------------------------------------------------------


def write_tokens(static, weights, state, settings, uniforms, active, starts, column, count):
    """Write up to `count` tokens to the active rows (B,), fewer if all end.

    Returns:
        The state; ids `int32 (B, chunk)`, the end of document where nothing was written; and their log-probabilities
        `float32 (B, chunk)`, 0 where nothing was written or if they are not wanted.
    """

    def unfinished(i, active, *_):
        return (i < count) & ops.any(active)

    def step(i, active, ids, scores, state):
        shares = (settings.get(name) for name in ("typical_p", "top_p", "min_p"))
        processed, uniform = process(static, settings, state), ops.take(uniforms, i, axis=1)
        chosen = processors.sample(processed, uniform, settings.get("temperature"), static.top_k, *shares)
        chosen = ops.where(ops.all(processed < float("inf"), axis=-1), ops.cast(chosen, "int32"), NOT_FINITE_ID)
        chosen = ops.where(active, chosen, static.eos)[:, None]
        ids = ops.slice_update(ids, (0, i), chosen)
        if static.scored:
            score = ops.take_along_axis(processors.log_softmax(state["logits"]), chosen, axis=-1)
            scores = ops.slice_update(scores, (0, i), ops.where(active[:, None], score, 0.0))
        logits, cache = read_columns(weights, state["cache"], chosen, starts, column + i + 1)
        pending = ops.take(settings["after"], state["pending"] * logits.shape[-1] + ops.maximum(chosen[:, 0], 0))
        new_state = {"logits": logits, "cache": cache, "pending": pending}
        if "counts" in state:
            new_state["counts"] = state["counts"] + ops.one_hot(chosen[:, 0], logits.shape[-1], dtype="int32")
        if "text" in state:
            new_state["text"] = ops.concatenate([state["text"][:, 1:], chosen], axis=1)
        return i + 1, active & (chosen[:, 0] != static.eos), ids, scores, new_state

    ids, scores = ops.full(uniforms.shape, static.eos, "int32"), ops.zeros(uniforms.shape, "float32")
    first = ops.convert_to_tensor(0, "int32")
    _, _, ids, scores, state = ops.while_loop(unfinished, step, (first, active, ids, scores, state))
    return state, ids, scores


def process(static, settings, state):
    """Do what `Sampler.process` does to the logits (B, V) of a state."""
    logits = state["logits"] + ops.take(settings["biases"], state["pending"], axis=0)
    vocab_size = logits.shape[-1]
    if "text" in state:
        repeating = processors.repeating_tokens(state["text"], int(static.no_repeat_ngram))
        repeating = (processors.count_tokens_per_text(repeating, vocab_size) > 0) & ~settings["exempt"]
        logits = ops.where(repeating, -float("inf"), logits)
    stuck = ops.all(logits == -float("inf"), axis=-1, keepdims=True)
    logits = ops.where(stuck & (ops.arange(vocab_size) == static.eos), 0.0, logits)
    if "counts" in state:
        in_text, written = ops.unstack(ops.where(settings["exempt"], 0, state["counts"]), 2)
        if "repetition_penalty" in settings:
            logits = processors.penalize_repetition(logits, in_text, settings["repetition_penalty"])
        penalties = settings.get("presence_penalty", 0.0), settings.get("frequency_penalty", 0.0)
        logits = processors.penalize_counts(logits, written, *penalties)
    return logits


# --- reading -------------------------------------------------------------------------------------------------


def read_texts(weights, state, ids, starts, column, rows):
    """Read whole texts, whose newest columns are `ids` (R, L), into some rows (R,) of the state."""
    logits, cache = read_columns(weights, state["cache"], ids, starts, column)
    new = {"logits": logits, "cache": cache}
    old = {name: state[name] for name in new}
    updated = keras.tree.map_structure(lambda a, b: ops.scatter_update(a, rows[:, None], b), old, new)
    return {**state, **updated}


def read_columns(weights, cache, ids, starts, column):
    """Read the columns `ids` (B, L) before `column`: the newest one, with the cache (L = 1), or whole texts (L > 1).

    Returns:
        The logits after the last column, `float32 (B, V)`, and the cache.
    """
    return (_read_lstm if "layers" in weights else _read_transformer)(weights, cache, ids, starts, column)


def _read_transformer(weights, cache, ids, starts, column):
    num_rows, length = ids.shape
    num_heads, num_slots, head_dim = cache[0][0].shape[1:]
    columns = column - length + ops.arange(length)
    # The column that each slot of the cache holds afterwards.
    held = column - 1 - ops.mod(column - 1 - ops.arange(num_slots), num_slots)
    seen = held if length == 1 else columns
    visible = ((seen <= columns[:, None]) & (seen >= starts[:, None, None]))[:, None]  # (B, 1, L, T) or (B, 1, L, L)
    positions = ops.clip(columns - starts[:, None], 0, num_slots - 1)  # what is read before a start is not used
    x = _rows(weights["token_embedding"], ids) + _rows(weights["position_embedding"], positions)
    kept = []
    for block, old in zip(weights["blocks"], cache, strict=True):
        y = _linear(_norm(x, block.attention_norm), block.attention, block.attention_bias)
        y = ops.transpose(ops.reshape(y, (num_rows, length, 3, num_heads, head_dim)), (2, 0, 3, 1, 4))
        query, key, value = ops.unstack(ops.cast(y, old[0].dtype), 3)  # (B, H, L, D / H)
        if length == 1:
            at = (0, 0, ops.mod(column - 1, num_slots), 0)
            key, value = ops.slice_update(old[0], at, key), ops.slice_update(old[1], at, value)
            kept.append((key, value))
        else:
            order = ops.maximum(held - columns[0], 0)
            kept.append((ops.take(key, order, axis=2), ops.take(value, order, axis=2)))
        scores = ops.cast(ops.matmul(query, ops.swapaxes(key, 2, 3)), "float32") / head_dim**0.5
        # Finite instead of minus infinity, as before the start of a text nothing is visible.
        scores = processors.softmax(ops.where(visible, scores, -1e9))
        y = ops.transpose(ops.matmul(ops.cast(scores, value.dtype), value), (0, 2, 1, 3))
        x = x + _linear(ops.reshape(y, (num_rows, length, -1)), block.output, block.output_bias)
        y = ops.gelu(_linear(_norm(x, block.mlp_norm), block.expand, block.expand_bias), approximate=True)
        x = x + _linear(y, block.project, block.project_bias)
    x, head = _norm(x[:, -1], weights["final_norm"]), weights["token_embedding"]
    # A product with the transpose would be slower, as XLA transposes in memory before each loop.
    return ops.cast(ops.einsum("bd,vd->bv", ops.cast(x, head.dtype), head), "float32"), kept


def _read_lstm(weights, cache, ids, starts, column):
    num_rows, length = ids.shape

    def step(states, ids):
        x, new = _rows(weights["token_embedding"], ids), []
        for (matrix, bias), (hidden, cell) in zip(weights["layers"], states, strict=True):
            gates = _linear(ops.concatenate([x, hidden], axis=-1), matrix, bias)
            put, forget, candidate, out = ops.split(gates, 4, axis=-1)
            cell = ops.sigmoid(forget) * cell + ops.sigmoid(put) * ops.tanh(candidate)
            x = ops.sigmoid(out) * ops.tanh(cell)
            new.append((x, cell))
        return new

    def read_column(i, states):
        started = (column - length + i >= starts)[:, None]
        new = step(states, ops.take(ids, i, axis=1))
        return i + 1, keras.tree.map_structure(lambda a, b: ops.where(started, a, b), new, states)

    if length == 1:
        states = step(cache, ids[:, 0])
    else:
        states = keras.tree.map_structure(lambda old: ops.zeros((num_rows, old.shape[1]), old.dtype), cache)
        first = ops.min(starts) - (column - length)
        _, states = ops.while_loop(lambda i, _: i < length, read_column, (first, states))
    x = states[-1][0]
    for matrix, bias in weights["head"]:
        x = _linear(x, matrix, bias)
    return x, states


def _rows(table, ids):
    return ops.cast(ops.take(table, ids, axis=0), "float32")


def _linear(x, matrix, bias):
    """Multiply in the precision of the matrix; everything else is float32."""
    return ops.cast(ops.matmul(ops.cast(x, matrix.dtype), matrix), "float32") + ops.cast(bias, "float32")


def _norm(x, scale_and_offset):
    scale, offset = ops.unstack(ops.cast(scale_and_offset, "float32"), 2)
    x = x - ops.mean(x, axis=-1, keepdims=True)
    return x * ops.rsqrt(ops.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale + offset
