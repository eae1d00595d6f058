"""Device loop: a batch of texts written on a GPU or TPU, several tokens at a time in one compiled loop.

It does what `writer.write_steps` does on a CPU; what is compiled is in `device_steps.py`. Texts are aligned at their
newest token: all rows write the same column in a step, `column` is written next, and the text of a row starts at
column `starts[row]`. In the KV cache of a Transformer with T positions, the keys and values of column c are in slot
c modulo T. Rows and prompts are padded to powers of two, so that few shapes have to be compiled.

The state passed between the compiled functions is a dict: `logits` (B, V) after the newest token; `pending` (B,), the
state of an incomplete character (`corpus/utf8.py`); `cache`, the keys and values (B, H, T, D / H) or the hidden and
cell states (B, D) of each layer; and, if the settings need them, `counts` (2, B, V) of the tokens in the text and of
those written, and `text` (B, columns), the newest token at the right end.
"""

import weakref
from collections.abc import Iterator

import numpy as np

from ...models.weights import LstmWeights, TransformerWeights
from ...runtime.backend import keras, xla_jit
from .. import processors
from ..batch import RandomNumbers
from ..sampler import NOT_FINITE, Sampler
from ..settings import Settings
from .device_steps import NOT_FINITE_ID, StaticSettings, read_texts, write_tokens

ops = keras.ops

_FIRST_COLUMNS = 1024  # for tokens to be written; more are added as needed


def write_on_device(
    weights: TransformerWeights | LstmWeights,
    sampler: Sampler,
    prompts: list[list[int]],
    rng: RandomNumbers,
    max_new_tokens: int,
    finished: np.ndarray,
    *,
    chunk: int = 16,
    dtype: str = "float32",
    log_probabilities: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Continue texts on the device: yield the ids of each step, the end of document for a text that has ended.

    Args:
        weights: of the model. They are copied to the device once, and stay there as long as the object exists.
        sampler: chooses the tokens; without banned or forced words, as the loop does not know the bytes of tokens.
        prompts: the ids that each text starts with, at least one.
        rng: the random numbers to draw with, a row for each text.
        max_new_tokens: how many tokens each text may have.
        finished: `bool (rows,)`, the texts that get no more tokens; the caller may mark more between steps.
        chunk: how many tokens of each text the device writes before the caller gets them.
        dtype: of weights and cache, "float32" or "bfloat16"; tokens are chosen in float32.
        log_probabilities: float (rows,), to which those of the tokens by the model itself are added; or None.

    Returns:
        An iterator over `int64 (rows,)`.
    """
    num_rows = len(prompts)
    num_padded = _power_of_two(num_rows)
    column = longest = max(map(len, prompts))
    end = longest + max_new_tokens
    text = np.full((num_padded, min(end, longest + _FIRST_COLUMNS)), -1, np.int32)
    starts = np.full(num_padded, longest)
    for row, prompt in enumerate(prompts):
        starts[row] -= len(prompt)
        text[row, starts[row] : longest] = prompt
    active = np.arange(num_padded) < num_rows
    unread = active.copy()  # these are read from their start
    active[:num_rows] &= ~finished

    limit = np.inf if isinstance(weights, LstmWeights) else len(weights.position_embedding)
    s = sampler.settings
    static = StaticSettings(sampler.eos, s.top_k, s.no_repeat_ngram, log_probabilities is not None)
    on_device, settings = _weights_on_device(weights, dtype), _settings_on_device(sampler)
    state = _first_state(weights, sampler, text, longest, dtype)
    while column < end and active.any():
        full = active & (column - starts > limit)
        if full.any():
            starts[full] = column - max(1, limit // 2)
            unread |= full
        if unread.any():
            rows = np.resize(np.flatnonzero(unread), _power_of_two(unread.sum()))  # repeats rows, as padding
            # At least 2 columns, as 1 means to continue with the cache.
            window = min(max(2, limit), _power_of_two(column - starts[rows].min(), at_least=16))
            ids = np.pad(text, ((0, 0), (window, 0)))[rows, column : column + window]
            state = xla_jit(read_texts)(on_device, state, *_int32(np.maximum(ids, 0), starts[rows], column, rows))
            unread[:] = False
        # Up to the first token that exceeds the context of a row; that row is read again before its logits are used.
        until = min(end, column + chunk, starts[active].min() + limit + 1)
        if until > text.shape[1]:  # doubled, so that little is copied or compiled again
            text = np.pad(text, ((0, 0), (0, max(chunk, text.shape[1]))), constant_values=-1)
            if "text" in state:
                left = _columns_on_device(text) - state["text"].shape[1]
                state["text"] = ops.pad(state["text"], ((0, 0), (left, 0)), constant_values=-1)
        uniforms = np.zeros((num_padded, chunk), np.float32)
        # Rounding to float32 could give 1, which is out of range.
        drawn = rng.take(np.arange(num_rows), column - longest, chunk)
        uniforms[:num_rows] = np.minimum(drawn, np.nextafter(np.float32(1), np.float32(0)))
        arrays = uniforms, active, *_int32(starts, column, until - column)
        state, ids, scores = xla_jit(write_tokens, static)(
            on_device, state, settings, *map(ops.convert_to_tensor, arrays)
        )
        ids, scores = ops.convert_to_numpy(ids), ops.convert_to_numpy(scores)
        if (ids == NOT_FINITE_ID).any():
            raise ValueError(NOT_FINITE)
        for i in range(until - column):
            active[:num_rows] &= ~finished
            if not active.any():
                return
            text[:, column] = ids[:, i]
            column += 1
            if log_probabilities is not None:
                log_probabilities += np.where(finished, 0, scores[:num_rows, i])
            yield ids[:num_rows, i].astype(np.int64)
            active &= ids[:, i] != sampler.eos


def _power_of_two(number: int, at_least: int = 1) -> int:
    return max(at_least, 1 << (int(number) - 1).bit_length())


def _int32(*arrays) -> list:
    return [ops.convert_to_tensor(array, "int32") for array in arrays]


_NOT_ARRAYS = ("num_heads", "context")  # among the attributes of weights
_device_weights = weakref.WeakKeyDictionary()  # weights -> dtype -> the same as tensors


def _weights_on_device(weights, dtype: str) -> dict:
    kept = _device_weights.setdefault(weights, {})
    if dtype not in kept:
        arrays = {name: arrays for name, arrays in vars(weights).items() if name not in _NOT_ARRAYS}
        kept[dtype] = keras.tree.map_structure(lambda array: ops.convert_to_tensor(array, dtype), arrays)
    return kept[dtype]


_UNUSED = Settings(temperature=0, top_p=None)
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_NUMBERS = ("temperature", "typical_p", "top_p", "min_p", *_PENALTIES)


def _settings_on_device(sampler: Sampler) -> dict:
    """Return the tables of a sampler, and its numeric settings that are in use, as tensors."""
    used = {name: getattr(sampler.settings, name) for name in _NUMBERS}
    used = {name: np.float32(number) for name, number in used.items() if number != getattr(_UNUSED, name)}
    tables = {"biases": sampler.biases, "after": sampler.after.astype(np.int32).ravel(), "exempt": sampler.exempt}
    return keras.tree.map_structure(ops.convert_to_tensor, {**tables, **used})


def _first_state(weights, sampler: Sampler, text: np.ndarray, column: int, dtype: str) -> dict:
    num_rows, vocab_size = len(text), len(sampler.bias)
    if isinstance(weights, LstmWeights):
        shapes, dtype = [(num_rows, len(bias) // 4) for _, bias in weights.layers], "float32"
    else:
        context, dim = weights.position_embedding.shape
        shapes = [(num_rows, weights.num_heads, context, dim // weights.num_heads)] * len(weights.blocks)
    # The KV cache of a Transformer: keys and values of each block. Of an LSTM the hidden and cell states.
    cache = [(ops.zeros(shape, dtype), ops.zeros(shape, dtype)) for shape in shapes]
    pending = ops.zeros(num_rows, "int32")  # a prompt consists of whole characters
    state = {"logits": ops.zeros((num_rows, vocab_size), "float32"), "cache": cache, "pending": pending}
    if any(getattr(sampler.settings, name) != getattr(_UNUSED, name) for name in _PENALTIES):
        counts = processors.count_tokens_per_text(text[:, :column], vocab_size)
        state["counts"] = ops.convert_to_tensor(np.stack([counts, np.zeros_like(counts)]))
    if sampler.settings.no_repeat_ngram is not None:
        left = _columns_on_device(text) - column
        state["text"] = ops.convert_to_tensor(np.pad(text[:, :column], ((0, 0), (left, 0)), constant_values=-1))
    return state


def _columns_on_device(text: np.ndarray) -> int:
    """Return how many columns of ids are on the device, for `no_repeat_ngram`."""
    return _power_of_two(text.shape[1], at_least=16)
