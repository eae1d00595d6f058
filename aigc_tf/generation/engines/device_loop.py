"""Loop: texts written on a GPU or TPU, where adjusting, choosing, appending and reading a token are one compiled loop.

It does what `generate.py` does over `Batch` on a CPU, in Keras operations compiled by XLA, on TensorFlow or JAX.
Batch are aligned at their newest token: all rows write the same column at a time, `now` is the column that is written
next, and the text of a row starts at the column `starts[row]`. Of a Transformer with T positions, the keys and values
of column c stand in slot c modulo T of the cache. Rows and prompts are padded to powers of two, so that others need
no other compilation.

The state that the compiled functions hand on is a dict: `logits` (B, V) after the newest token; `pending` (B,), what is
pending of a character (`utf8.py`); `cache`, the keys and values (B, H, T, D / H) or the hidden and cell states (B, D)
of each layer; and if the settings ask for them `counts` (2, B, V) of the tokens in the text and of those written, and
`text` (B, columns), the newest at the right end.
"""

import weakref
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ...models.weights import LstmWeights, TransformerWeights
from ...runtime.backend import keras, xla_jit
from .. import processors
from ..batch import Noise
from ..sampler import NOT_FINITE, Sampler
from ..settings import Settings

ops = keras.ops

_NO_NUMBER = -2  # instead of a token, where logits are not finite
_FIRST_COLUMNS = 1024  # of the text of ids, which grows


def steps(
    weights: TransformerWeights | LstmWeights,
    sampler: Sampler,
    prompts: list[list[int]],
    chance: Noise,
    max_new_tokens: int,
    over: np.ndarray,
    *,
    chunk: int = 16,
    dtype: str = "float32",
    log_probabilities: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Write texts on the device, and give the ids of each step, the end of document for a text that has ended.

    Args:
        weights: of the model; they are moved to the device once, and stay there while they exist.
        sampler: one without banned or forced words: the loop knows tokens, not how words are spelt in them.
        prompts: the ids that each text begins with, at least one.
        chance: the numbers to draw with, of as many rows.
        max_new_tokens: how many tokens each text may have.
        over: `bool (rows,)`, which texts are not written on; whoever reads the steps may mark more.
        chunk: how many tokens of each text the device writes before they are shown.
        dtype: of weights and cache, "float32" or "bfloat16"; tokens are chosen in float32.
        log_probabilities: where given, float (rows,), those that the model itself gives to the tokens are added to it.

    Returns:
        An iterator over ids, `int64 (rows,)`.
    """
    num_rows = len(prompts)
    num_padded = _power_of_two(num_rows)
    now = longest = max(map(len, prompts))
    end = longest + max_new_tokens
    text = np.full((num_padded, min(end, longest + _FIRST_COLUMNS)), -1, np.int32)
    starts = np.full(num_padded, longest)
    for row, prompt in enumerate(prompts):
        starts[row] -= len(prompt)
        text[row, starts[row] : longest] = prompt
    going = np.arange(num_padded) < num_rows
    unread = going.copy()  # from their start on
    going[:num_rows] &= ~over

    limit = np.inf if isinstance(weights, LstmWeights) else len(weights.position_embedding)
    s = sampler.settings
    rules = _Rules(sampler.eos, s.top_k, s.no_repeat_ngram, log_probabilities is not None)
    on_device, settings = _weights_on_device(weights, dtype), _settings_on_device(sampler)
    state = _first_state(weights, sampler, text, longest, dtype)
    while now < end and going.any():
        full = going & (now - starts > limit)
        if full.any():
            starts[full] = now - max(1, limit // 2)
            unread |= full
        if unread.any():
            rows = np.resize(np.flatnonzero(unread), _power_of_two(unread.sum()))  # again from the first, to pad
            window = min(max(2, limit), _power_of_two(now - starts[rows].min(), at_least=16))  # one means to go on
            ids = np.pad(text, ((0, 0), (window, 0)))[rows, now : now + window]
            state = xla_jit(_read_texts)(on_device, state, *_int32(np.maximum(ids, 0), starts[rows], now, rows))
            unread[:] = False
        # At the furthest to the token that is too much for a row; it is read anew before its logits are used.
        until = min(end, now + chunk, starts[going].min() + limit + 1)
        if until > text.shape[1]:  # twice as many columns, so that little is copied, or compiled, again
            text = np.pad(text, ((0, 0), (0, max(chunk, text.shape[1]))), constant_values=-1)
            if "text" in state:
                left = _columns_on_device(text) - state["text"].shape[1]
                state["text"] = ops.pad(state["text"], ((0, 0), (left, 0)), constant_values=-1)
        uniforms = np.zeros((num_padded, chunk), np.float32)
        # Rounded to float32 a number could become 1, at which nothing is drawn.
        drawn = chance.take(np.arange(num_rows), now - longest, chunk)
        uniforms[:num_rows] = np.minimum(drawn, np.nextafter(np.float32(1), np.float32(0)))
        arrays = uniforms, going, *_int32(starts, now, until - now)
        state, ids, scores = xla_jit(_write, rules)(on_device, state, settings, *map(ops.convert_to_tensor, arrays))
        ids, scores = ops.convert_to_numpy(ids), ops.convert_to_numpy(scores)
        if (ids == _NO_NUMBER).any():
            raise ValueError(NOT_FINITE)
        for i in range(until - now):
            going[:num_rows] &= ~over
            if not going.any():
                return
            text[:, now] = ids[:, i]
            now += 1
            if log_probabilities is not None:
                log_probabilities += np.where(over, 0, scores[:num_rows, i])
            yield ids[:num_rows, i].astype(np.int64)
            going &= ids[:, i] != sampler.eos


def _power_of_two(number: int, at_least: int = 1) -> int:
    return max(at_least, 1 << (int(number) - 1).bit_length())


def _int32(*arrays) -> list:
    return [ops.convert_to_tensor(array, "int32") for array in arrays]


# --- what stands on the device -------------------------------------------------------------------------------


class _Rules(NamedTuple):
    """What is compiled in, beside the shapes and which settings are used."""

    eos: int
    top_k: int | None
    no_repeat_ngram: int | None
    scored: bool


_NUMBERS_OF_A_MODEL = ("num_heads", "context")
_moved = weakref.WeakKeyDictionary()  # weights -> from a dtype to the same on the device


def _weights_on_device(weights, dtype: str) -> dict:
    kept = _moved.setdefault(weights, {})
    if dtype not in kept:
        arrays = {name: arrays for name, arrays in vars(weights).items() if name not in _NUMBERS_OF_A_MODEL}
        kept[dtype] = keras.tree.map_structure(lambda array: ops.convert_to_tensor(array, dtype), arrays)
    return kept[dtype]


_UNUSED = Settings(temperature=0, top_p=None)
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_NUMBERS = ("temperature", "typical_p", "top_p", "min_p", *_PENALTIES)


def _settings_on_device(sampler: Sampler) -> dict:
    """Return the sampler's tables, and those settings that are numbers and used."""
    used = {name: getattr(sampler.settings, name) for name in _NUMBERS}
    used = {name: np.float32(number) for name, number in used.items() if number != getattr(_UNUSED, name)}
    tables = {"biases": sampler.biases, "after": sampler.after.astype(np.int32).ravel(), "exempt": sampler.exempt}
    return keras.tree.map_structure(ops.convert_to_tensor, {**tables, **used})


def _first_state(weights, sampler: Sampler, text: np.ndarray, now: int, dtype: str) -> dict:
    num_rows, vocab_size = len(text), len(sampler.bias)
    if isinstance(weights, LstmWeights):
        shapes, dtype = [(num_rows, len(bias) // 4) for _, bias in weights.layers], "float32"
    else:
        context, dim = weights.position_embedding.shape
        shapes = [(num_rows, weights.num_heads, context, dim // weights.num_heads)] * len(weights.blocks)
    cache = [(ops.zeros(shape, dtype), ops.zeros(shape, dtype)) for shape in shapes]
    pending = ops.zeros(num_rows, "int32")  # a prompt is of whole characters
    state = {"logits": ops.zeros((num_rows, vocab_size), "float32"), "cache": cache, "pending": pending}
    if any(getattr(sampler.settings, name) != getattr(_UNUSED, name) for name in _PENALTIES):
        counts = processors.count_tokens(text[:, :now], vocab_size)
        state["counts"] = ops.convert_to_tensor(np.stack([counts, np.zeros_like(counts)]))
    if sampler.settings.no_repeat_ngram is not None:
        left = _columns_on_device(text) - now
        state["text"] = ops.convert_to_tensor(np.pad(text[:, :now], ((0, 0), (left, 0)), constant_values=-1))
    return state


def _columns_on_device(text: np.ndarray) -> int:
    """Return how many columns of ids the rule of repeated n-grams has on the device."""
    return _power_of_two(text.shape[1], at_least=16)


# --- what is compiled: writing -------------------------------------------------------------------------------


def _write(rules, weights, state, settings, uniforms, going, starts, now, count):
    """Write up to `count` tokens to the rows that are going (B,), fewer if all end.

    Returns:
        The state; ids `int32 (B, chunk)`, the end of document where nothing was written; and their log-probabilities
        `float32 (B, chunk)`, 0 where nothing was written or none are asked for.
    """

    def unfinished(i, going, *_):
        return (i < count) & ops.any(going)

    def step(i, going, ids, scores, state):
        shares = (settings.get(name) for name in ("typical_p", "top_p", "min_p"))
        adjusted, chance = _adjust(rules, settings, state), ops.take(uniforms, i, axis=1)
        chosen = processors.sample(adjusted, chance, settings.get("temperature"), rules.top_k, *shares)
        chosen = ops.where(ops.all(adjusted < float("inf"), axis=-1), ops.cast(chosen, "int32"), _NO_NUMBER)
        chosen = ops.where(going, chosen, rules.eos)[:, None]
        ids = ops.slice_update(ids, (0, i), chosen)
        if rules.scored:
            score = ops.take_along_axis(processors.log_softmax(state["logits"]), chosen, axis=-1)
            scores = ops.slice_update(scores, (0, i), ops.where(going[:, None], score, 0.0))
        logits, cache = _read(weights, state["cache"], chosen, starts, now + i + 1)
        pending = ops.take(settings["after"], state["pending"] * logits.shape[-1] + ops.maximum(chosen[:, 0], 0))
        read = {"logits": logits, "cache": cache, "pending": pending}
        if "counts" in state:
            read["counts"] = state["counts"] + ops.one_hot(chosen[:, 0], logits.shape[-1], dtype="int32")
        if "text" in state:
            read["text"] = ops.concatenate([state["text"][:, 1:], chosen], axis=1)
        return i + 1, going & (chosen[:, 0] != rules.eos), ids, scores, read

    ids, scores = ops.full(uniforms.shape, rules.eos, "int32"), ops.zeros(uniforms.shape, "float32")
    first = ops.convert_to_tensor(0, "int32")
    _, _, ids, scores, state = ops.while_loop(unfinished, step, (first, going, ids, scores, state))
    return state, ids, scores


def _adjust(rules, settings, state):
    """Do what `Sampler.adjust` does to the logits (B, V)."""
    logits = state["logits"] + ops.take(settings["biases"], state["pending"], axis=0)
    vocab_size = logits.shape[-1]
    if "text" in state:
        repeating = processors.repeating_tokens(state["text"], int(rules.no_repeat_ngram))
        repeating = (processors.count_tokens(repeating, vocab_size) > 0) & ~settings["exempt"]
        logits = ops.where(repeating, -float("inf"), logits)
    stuck = ops.all(logits == -float("inf"), axis=-1, keepdims=True)
    logits = ops.where(stuck & (ops.arange(vocab_size) == rules.eos), 0.0, logits)
    if "counts" in state:
        in_text, written = ops.unstack(ops.where(settings["exempt"], 0, state["counts"]), 2)
        if "repetition_penalty" in settings:
            logits = processors.penalize_repetition(logits, in_text, settings["repetition_penalty"])
        penalties = settings.get("presence_penalty", 0.0), settings.get("frequency_penalty", 0.0)
        logits = processors.penalize_counts(logits, written, *penalties)
    return logits


# --- what is compiled: reading -------------------------------------------------------------------------------


def _read_texts(weights, state, ids, starts, now, rows):
    """Read texts from their start on, which is in the newest columns `ids` (R, L), into some rows (R,) of the state."""
    logits, cache = _read(weights, state["cache"], ids, starts, now)
    read = {"logits": logits, "cache": cache}
    replaced = {name: state[name] for name in read}
    replaced = keras.tree.map_structure(lambda a, b: ops.scatter_update(a, rows[:, None], b), replaced, read)
    return {**state, **replaced}


def _read(weights, cache, ids, starts, now):
    """Read the columns `ids` (B, L) before `now`: one, after what the cache holds, or more, which are all there is.

    Returns:
        The logits after the last column, `float32 (B, V)`, and the cache.
    """
    return (_read_lstm if "layers" in weights else _read_transformer)(weights, cache, ids, starts, now)


def _read_transformer(weights, cache, ids, starts, now):
    num_rows, length = ids.shape
    num_heads, num_slots, head_dim = cache[0][0].shape[1:]
    columns = now - length + ops.arange(length)
    held = now - 1 - ops.mod(now - 1 - ops.arange(num_slots), num_slots)  # the column that each slot holds in the end
    seen = held if length == 1 else columns
    visible = ((seen <= columns[:, None]) & (seen >= starts[:, None, None]))[:, None]  # (B, 1, L, T) or (B, 1, L, L)
    positions = ops.clip(columns - starts[:, None], 0, num_slots - 1)  # before the start nothing is used
    x = _rows(weights["token_embedding"], ids) + _rows(weights["position_embedding"], positions)
    kept = []
    for block, old in zip(weights["blocks"], cache, strict=True):
        y = _linear(_norm(x, block.attention_norm), block.attention, block.attention_bias)
        y = ops.transpose(ops.reshape(y, (num_rows, length, 3, num_heads, head_dim)), (2, 0, 3, 1, 4))
        query, key, value = ops.unstack(ops.cast(y, old[0].dtype), 3)  # (B, H, L, D / H)
        if length == 1:
            at = (0, 0, ops.mod(now - 1, num_slots), 0)
            key, value = ops.slice_update(old[0], at, key), ops.slice_update(old[1], at, value)
            kept.append((key, value))
        else:
            order = ops.maximum(held - columns[0], 0)
            kept.append((ops.take(key, order, axis=2), ops.take(value, order, axis=2)))
        scores = ops.cast(ops.matmul(query, ops.swapaxes(key, 2, 3)), "float32") / head_dim**0.5
        scores = processors.softmax(
            ops.where(visible, scores, -1e9)
        )  # finite: before the start there is nothing to see
        y = ops.transpose(ops.matmul(ops.cast(scores, value.dtype), value), (0, 2, 1, 3))
        x = x + _linear(ops.reshape(y, (num_rows, length, -1)), block.output, block.output_bias)
        y = ops.gelu(_linear(_norm(x, block.mlp_norm), block.expand, block.expand_bias), approximate=True)
        x = x + _linear(y, block.project, block.project_bias)
    x, head = _norm(x[:, -1], weights["final_norm"]), weights["token_embedding"]
    # A product with its transpose would be slower: XLA makes that transpose in memory, before each loop.
    return ops.cast(ops.einsum("bd,vd->bv", ops.cast(x, head.dtype), head), "float32"), kept


def _read_lstm(weights, cache, ids, starts, now):
    num_rows, length = ids.shape

    def read(states, ids):
        x, new = _rows(weights["token_embedding"], ids), []
        for (matrix, bias), (hidden, cell) in zip(weights["layers"], states, strict=True):
            gates = _linear(ops.concatenate([x, hidden], axis=-1), matrix, bias)
            put, forget, candidate, out = ops.split(gates, 4, axis=-1)
            cell = ops.sigmoid(forget) * cell + ops.sigmoid(put) * ops.tanh(candidate)
            x = ops.sigmoid(out) * ops.tanh(cell)
            new.append((x, cell))
        return new

    def read_column(i, states):
        started = (now - length + i >= starts)[:, None]
        new = read(states, ops.take(ids, i, axis=1))
        return i + 1, keras.tree.map_structure(lambda a, b: ops.where(started, a, b), new, states)

    if length == 1:
        states = read(cache, ids[:, 0])
    else:
        states = keras.tree.map_structure(lambda old: ops.zeros((num_rows, old.shape[1]), old.dtype), cache)
        first = ops.min(starts) - (now - length)
        _, states = ops.while_loop(lambda i, _: i < length, read_column, (first, states))
    x = states[-1][0]
    for matrix, bias in weights["head"]:
        x = _linear(x, matrix, bias)
    return x, states


def _rows(table, ids):
    return ops.cast(ops.take(table, ids, axis=0), "float32")


def _linear(x, matrix, bias):
    """Multiply in the precision of the matrix; all else is float32."""
    return ops.cast(ops.matmul(ops.cast(x, matrix.dtype), matrix), "float32") + ops.cast(bias, "float32")


def _norm(x, scale_and_offset):
    scale, offset = ops.unstack(ops.cast(scale_and_offset, "float32"), 2)
    x = x - ops.mean(x, axis=-1, keepdims=True)
    return x * ops.rsqrt(ops.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale + offset
