"""Kernels: the decoders of `decoding.py` and the choice of a token, compiled for the CPU by numba.

A matrix is kept as `int16` with a float32 scale for each output, which rounds a weight by at most 1/65,534 of the
largest of its row and halves what is read for each token: reading weights is what limits a short batch.
"""

import math
import threading
import time
import weakref
from typing import NamedTuple

import numba
import numpy as np

from .weights import LstmWeights, TransformerWeights

_f32 = np.float32
_MAX_THREADS = numba.config.NUMBA_NUM_THREADS
_OUTPUTS = 32  # of a matrix that a thread computes at a time
# One call at a time: not every threading layer of numba bears two, and each call uses all cores anyway.
_one_at_a_time = threading.Lock()


def _compiled(**options):
    """Compile a function when it is first called, and keep the code on disk where there is a place for it."""

    def compile_lazily(function):
        try:
            return numba.njit(cache=True, nogil=True, error_model="numpy", **options)(function)
        except RuntimeError:  # neither this folder nor the user's own can be written
            return numba.njit(nogil=True, error_model="numpy", **options)(function)

    return compile_lazily


class _Threads:
    """Runs compiled functions in as many threads as are fastest just now.

    Beside other busy programs, threads that wait for one another at each matrix can be fifty times as slow as a
    single one, and many cores can be too many for a small model. So the numbers are tried in turn now and then; the
    result is the same to the bit.
    """

    PERIOD = 256  # calls between two trials

    def __init__(self):
        self._numbers = sorted({_MAX_THREADS, *(2**i for i in range(_MAX_THREADS.bit_length()))})
        self._calls = 0

    def run(self, function, *args):
        trial, again = divmod(self._calls % self.PERIOD, 2)
        if trial < len(self._numbers):
            if not trial and not again:
                self._seconds = [math.inf] * len(self._numbers)
            began = time.perf_counter()
            result = _run(self._numbers[trial], function, *args)
            self._seconds[trial] = min(self._seconds[trial], time.perf_counter() - began)
        else:
            result = _run(self._numbers[self._seconds.index(min(self._seconds))], function, *args)
        self._calls += 1
        return result


def _run(num_threads: int, function, *args):
    """Call a compiled function in a number of threads; the user's own numba code keeps its number."""
    before = numba.get_num_threads()
    if num_threads != before:
        numba.set_num_threads(num_threads)
    try:
        with _one_at_a_time:
            return function(*args)
    finally:
        if num_threads != before:
            numba.set_num_threads(before)


# --- a model's parts -----------------------------------------------------------------------------------------


class _Matrix(NamedTuple):
    """A matrix (outputs, inputs) or a stack of them, its scales, and the bias."""

    rounded: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


def _array(values: np.ndarray) -> np.ndarray:
    """Return values as an array of the one kind that functions are compiled for; a backend's may be read-only."""
    return np.require(values, _f32, "CW")


def _pack(matrix: np.ndarray, bias: np.ndarray) -> _Matrix:
    """Pack a matrix (inputs, outputs)."""
    matrix = np.ascontiguousarray(matrix.T)
    scale = np.maximum(np.abs(matrix).max(1), np.finfo(_f32).tiny) / _f32(2**15 - 1)
    with np.errstate(invalid="ignore"):  # where a weight is no number the scale is none, and tells
        return _Matrix(np.rint(matrix / scale[:, None]).astype(np.int16), scale, _array(bias))


def _pack_all(matrices, biases) -> _Matrix:
    return _Matrix(*map(np.stack, zip(*map(_pack, matrices, biases), strict=True)))


@_compiled(fastmath=True, inline="always")
def _exp(x):
    """Compute e^x from -87 to 88, to 4e-6 of it, in a form that runs in vectors; numba's own calls a function."""
    y = min(max(x, _f32(-87)), _f32(88)) * _f32(1.4426950408889634)
    whole = np.floor(y)
    f = y - whole
    p = _f32(1.8775767e-3)
    p = p * f + _f32(8.9893397e-3)
    p = p * f + _f32(5.5826318e-2)
    p = p * f + _f32(2.4015361e-1)
    p = p * f + _f32(6.9315308e-1)
    p = p * f + _f32(9.9999994e-1)
    return p * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@_compiled(parallel=True, fastmath=True)
def _linear(x, rounded, scale, bias, gelu):
    """Return x W^T + b, for 4 tokens and 4 outputs at a time: 16 sums in registers share what they read."""
    num_outputs, num_inputs = rounded.shape
    num_tokens = len(x)
    out = np.empty((num_tokens, num_outputs), _f32)
    fours = num_tokens // 4 * 4
    touched = np.empty((num_outputs + _OUTPUTS - 1) // _OUTPUTS, np.int32)
    for part in numba.prange(len(touched)):
        first, end = part * _OUTPUTS, min(num_outputs, (part + 1) * _OUTPUTS)
        if fours:  # Fetch the rows one after the other: memory is read ahead best in one stream.
            seen = np.int32(0)
            for o in range(first, end):
                for i in range(0, num_inputs, 32):
                    seen = np.int32(seen + np.int32(rounded[o, i]))
            touched[part] = seen
        end_of_fours = first + (end - first) // 4 * 4
        for t in range(0, fours, 4):
            for o in range(first, end_of_fours, 4):
                o1, o2, o3 = o + 1, o + 2, o + 3
                t1, t2, t3 = t + 1, t + 2, t + 3
                a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = _f32(0)
                c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = _f32(0)
                for i in range(num_inputs):
                    w0, w1, w2, w3 = (
                        _f32(rounded[o, i]),
                        _f32(rounded[o1, i]),
                        _f32(rounded[o2, i]),
                        _f32(rounded[o3, i]),
                    )
                    xi = x[t, i]
                    a0, a1, a2, a3 = a0 + xi * w0, a1 + xi * w1, a2 + xi * w2, a3 + xi * w3
                    xi = x[t1, i]
                    b0, b1, b2, b3 = b0 + xi * w0, b1 + xi * w1, b2 + xi * w2, b3 + xi * w3
                    xi = x[t2, i]
                    c0, c1, c2, c3 = c0 + xi * w0, c1 + xi * w1, c2 + xi * w2, c3 + xi * w3
                    xi = x[t3, i]
                    d0, d1, d2, d3 = d0 + xi * w0, d1 + xi * w1, d2 + xi * w2, d3 + xi * w3
                out[t, o], out[t, o1], out[t, o2], out[t, o3] = a0, a1, a2, a3
                out[t1, o], out[t1, o1], out[t1, o2], out[t1, o3] = b0, b1, b2, b3
                out[t2, o], out[t2, o1], out[t2, o2], out[t2, o3] = c0, c1, c2, c3
                out[t3, o], out[t3, o1], out[t3, o2], out[t3, o3] = d0, d1, d2, d3
        for o in range(first, end):
            for t in range(fours if o < end_of_fours else 0, num_tokens):
                total = _f32(0)
                for i in range(num_inputs):
                    total += x[t, i] * _f32(rounded[o, i])
                out[t, o] = total
        for t in range(num_tokens):
            # Numbers without a sign, as an index that might be negative keeps a loop from running in vectors.
            for o in range(np.uint64(first), np.uint64(end)):
                y = out[t, o] * scale[o] + bias[o]
                if gelu:
                    z = _f32(-2 * math.sqrt(2 / math.pi)) * (y + _f32(0.044715) * y * y * y)
                    y /= _f32(1) + _exp(z)
                out[t, o] = y
    return out


@_compiled(fastmath=True)
def _norm(x, scale_and_offset):
    out = np.empty_like(x)
    dim = x.shape[1]
    for t in range(len(x)):
        mean = variance = _f32(0)
        for d in range(dim):
            mean += x[t, d]
        mean /= dim
        for d in range(dim):
            variance += (x[t, d] - mean) ** 2
        factor = 1 / np.sqrt(variance / _f32(dim) + _f32(1e-5))
        for d in range(dim):
            out[t, d] = (x[t, d] - mean) * factor * scale_and_offset[0, d] + scale_and_offset[1, d]
    return out


@_compiled(fastmath=True)
def _round(vector, rounded):
    """Put a vector of floats into one of `int16`, and return its scale."""
    largest = _f32(0)
    for d in range(len(vector)):
        largest = max(largest, abs(vector[d]))
    scale = max(largest, _f32(1e-30)) / _f32(2**15 - 1)
    for d in range(len(vector)):
        rounded[d] = np.int16(np.rint(vector[d] / scale))
    return scale


@_compiled(parallel=True, fastmath=True)
def _attend(qkv, keys, values, scales, rows, positions):
    """Put the tokens' keys and values into the cache, and return what each token attends to.

    Keys lie (rows, H, D / H, T) and values (rows, H, T, D / H), so that both products run along what is contiguous;
    as reading them limits a large batch, they are `int16` with a scale for each, (2, rows, H, T).
    """
    num_heads, head_dim = values.shape[1], values.shape[3]
    dim = num_heads * head_dim
    for t in range(len(rows)):
        row, position = rows[t], positions[t]
        for h in range(num_heads):
            key, value = qkv[t, dim + h * head_dim :], qkv[t, 2 * dim + h * head_dim :]
            scales[0, row, h, position] = _round(key[:head_dim], keys[row, h, :, position])
            scales[1, row, h, position] = _round(value[:head_dim], values[row, h, position])
    out = np.zeros((len(rows) * num_heads, head_dim), _f32)
    # No views and no new arrays below: counting references to them would make the threads wait for each other.
    scores = np.zeros((len(rows) * num_heads, keys.shape[3]), _f32)
    for job in numba.prange(len(rows) * num_heads):
        t, h = job // num_heads, job % num_heads
        row, until = rows[t], positions[t] + 1
        for d in range(head_dim):
            q = qkv[t, h * head_dim + d] * _f32(1 / math.sqrt(head_dim))
            for s in range(until):
                scores[job, s] += q * _f32(keys[row, h, d, s])
        largest = _f32(-np.inf)
        for s in range(until):
            scores[job, s] *= scales[0, row, h, s]
            largest = max(largest, scores[job, s])
        total = _f32(0)
        for s in range(until):
            scores[job, s] = _exp(scores[job, s] - largest)
            total += scores[job, s]
        for s in range(until):
            share = scores[job, s] / total * scales[1, row, h, s]
            for d in range(head_dim):
                out[job, d] += share * _f32(values[row, h, s, d])
    return out.reshape(len(rows), dim)


# --- the decoders --------------------------------------------------------------------------------------------


@_compiled()
def _read_transformer(tokens, positions_table, norms, attention, output, mlp_norms, expand, project, final_norm, head,
                      keys, values, scales, rows, positions, ids, last):  # fmt: skip
    x = np.empty((len(ids), tokens.shape[1]), _f32)
    for t in range(len(ids)):
        x[t] = tokens[ids[t]] + positions_table[positions[t]]
    for i in range(len(norms)):
        y = _linear(_norm(x, norms[i]), attention.rounded[i], attention.scale[i], attention.bias[i], False)
        y = _attend(y, keys[i], values[i], scales[i], rows, positions)
        x += _linear(y, output.rounded[i], output.scale[i], output.bias[i], False)
        y = _linear(_norm(x, mlp_norms[i]), expand.rounded[i], expand.scale[i], expand.bias[i], True)
        x += _linear(y, project.rounded[i], project.scale[i], project.bias[i], False)
    return _linear(_norm(x[last], final_norm), head.rounded, head.scale, head.bias, False)


@_compiled(fastmath=True)
def _lstm_layer(x, matrix, scale, bias, hidden, cell, rows):
    """Take one step of a layer for the tokens x (R, inputs) of different rows; return the new hidden state (R, D)."""
    num_inputs, dim = x.shape[1], hidden.shape[1]
    joined = np.empty((len(rows), num_inputs + dim), _f32)
    for t in range(len(rows)):
        joined[t, :num_inputs] = x[t]
        joined[t, num_inputs:] = hidden[rows[t]]
    gates = _linear(joined, matrix, scale, bias, False)
    out = np.empty((len(rows), dim), _f32)
    for t in range(len(rows)):
        row = rows[t]
        for d in range(dim):
            put = 1 / (1 + _exp(-gates[t, d]))
            forget = 1 / (1 + _exp(-gates[t, dim + d]))
            candidate = 2 / (1 + _exp(-2 * gates[t, 2 * dim + d])) - 1
            kept = forget * cell[row, d] + put * candidate
            cell[row, d] = kept
            out[t, d] = (2 / (1 + _exp(-2 * kept)) - 1) / (1 + _exp(-gates[t, 3 * dim + d]))
        hidden[row] = out[t]
    return out


_packed = weakref.WeakKeyDictionary()  # weights -> what the kernels take


def decoder(weights: TransformerWeights | LstmWeights, num_rows: int):
    """Make the `read` and `copy` of a `decoding.Decoder`; `read` is also told where each row's last token stands."""
    make = _lstm_decoder if isinstance(weights, LstmWeights) else _transformer_decoder
    read, copy = make(weights, num_rows)
    threads = _Threads()

    def read_in_threads(rows, positions, ids, last):
        if len(ids) == len(last):
            return threads.run(read, rows, positions, ids, last)
        return _run(_MAX_THREADS, read, rows, positions, ids, last)  # a prompt is work enough for all

    return read_in_threads, copy


def _transformer_decoder(w: TransformerWeights, num_rows: int):
    vocab_size, dim = w.token_embedding.shape
    num_blocks, num_heads, context, head_dim = len(w.blocks), w.num_heads, len(w.position_embedding), dim // w.num_heads
    keys = np.zeros((num_blocks, num_rows, num_heads, head_dim, context), np.int16)
    values = np.zeros((num_blocks, num_rows, num_heads, context, head_dim), np.int16)
    scales = np.zeros((num_blocks, 2, num_rows, num_heads, context), _f32)
    if w not in _packed:
        b = [list(field) for field in zip(*w.blocks, strict=True)]
        _packed[w] = (
            _array(w.token_embedding),
            _array(w.position_embedding),
            np.stack(b[0]),
            _pack_all(b[1], b[2]),
            _pack_all(b[3], b[4]),
            np.stack(b[5]),
            _pack_all(b[6], b[7]),
            _pack_all(b[8], b[9]),
            _array(w.final_norm),
            _pack(w.token_embedding.T, np.zeros(vocab_size, _f32)),
        )
    packed = _packed[w]

    def read(rows, positions, ids, last):
        return _read_transformer(*packed, keys, values, scales, rows, positions, ids, last)

    def copy(parents):
        moved = np.flatnonzero(parents != np.arange(num_rows))
        keys[:, moved], values[:, moved] = keys[:, parents[moved]], values[:, parents[moved]]
        scales[:, :, moved] = scales[:, :, parents[moved]]

    return read, copy


def _lstm_decoder(w: LstmWeights, num_rows: int):
    if w not in _packed:
        _packed[w] = [_pack(*layer) for layer in w.layers], [_pack(*layer) for layer in w.head]
    layers, head = _packed[w]
    states = [np.zeros((2, num_rows, len(bias) // 4), _f32) for _, bias in w.layers]

    def step(rows, ids):
        x = w.token_embedding[ids]
        for layer, (hidden, cell) in zip(layers, states, strict=True):
            x = _lstm_layer(x, *layer, hidden, cell, rows)

    def read(rows, positions, ids, last):
        new = rows[positions == 0]
        order = np.arange(len(rows)) - np.searchsorted(rows, rows)  # the first token of each row, the second, ...
        for state in states:
            state[:, new] = 0
        for i in range(order.max() + 1):
            step(rows[order == i], ids[order == i])
        x = states[-1][0, rows[last]]
        for matrix in head:
            x = _linear(x, *matrix, False)
        return x

    def copy(parents):
        for state in states:
            state[:] = state[:, parents]

    return read, copy


# --- the choice of a token -----------------------------------------------------------------------------------


_WITH_INFINITY = {"nsz", "arcp", "contract", "reassoc"}  # fastmath, but minus infinity is a logit


@_compiled(fastmath=_WITH_INFINITY)
def _keep(odds, key, weight, target):
    """Set odds to 0 but for those of the largest keys, the fewest whose weights sum to the target; of equal, the first.

    The border is found by halving: some passes over the vocabulary in vectors are cheaper than sorting it.
    """
    low, high = _f32(np.inf), _f32(-np.inf)
    for i in range(len(key)):
        low, high = min(low, key[i] if key[i] > -np.inf else _f32(np.inf)), max(high, key[i])
    at_high, between = _f32(0), _f32(0)
    for i in range(len(key)):
        at_high += weight[i] if key[i] == high else _f32(0)
        between += _f32(1) if (key[i] >= low) & (key[i] < high) else _f32(0)
    if at_high >= target:
        low, between = high, _f32(0)
    # The keys from `low` on reach the target, those from `high` on do not; what is between gets fewer.
    while between > 1:
        middle = _f32((low + high) * _f32(0.5))
        if middle <= low or middle >= high:
            break
        total, below = _f32(0), _f32(0)
        for i in range(len(key)):
            total += weight[i] if key[i] >= middle else _f32(0)
            below += _f32(1) if (key[i] >= low) & (key[i] < middle) else _f32(0)
        if total >= target:
            low, between = middle, between - below
        else:
            high, between = middle, below
    border = _f32(np.inf)
    for i in range(len(key)):
        border = min(border, key[i] if key[i] >= low else _f32(np.inf))
    total = _f32(0)
    for i in range(len(key)):
        total += weight[i] if key[i] > border else _f32(0)
        odds[i] = odds[i] if key[i] >= border else _f32(0)
    for i in range(len(key)):
        if key[i] == border:
            odds[i] = odds[i] if total < target else _f32(0)
            total += weight[i]


@_compiled(fastmath=_WITH_INFINITY)
def _draw(odds, uniform):
    """Draw a token by inverting the cumulative sum; sums of blocks first, as they are taken in vectors."""
    sums = np.zeros((len(odds) + 255) // 256)
    for block in range(len(sums)):
        total = _f32(0)
        for i in range(256 * block, min(len(odds), 256 * (block + 1))):
            total += odds[i]
        sums[block] = total
    left = uniform * sums.sum()
    block = 0
    while block < len(sums) - 1 and left >= sums[block]:
        left -= sums[block]
        block += 1
    while sums[block] == 0:  # where rounding led beyond the last
        block -= 1
    token = 0
    for i in range(256 * block, min(len(odds), 256 * (block + 1))):
        if odds[i] > 0:
            token = i
            left -= odds[i]
            if left < 0:
                break
    return token


def choose(logits, uniforms, temperature, top_k, typical_p, top_p, min_p) -> np.ndarray:
    """Draw a token from each row (V,) as the functions of `sampling.py` do one after the other.

    Args:
        logits: `float32 (R, V)`.
        uniforms: `float64 (R,)`, uniform in [0, 1).
        temperature: above 0.
        top_k: V for all tokens.
        typical_p: 1 for all tokens.
        top_p: 1 for all tokens.
        min_p: 0 for all tokens.

    Returns:
        Token ids, `int64 (R,)`.
    """
    shares = _f32(typical_p), _f32(top_p), _f32(min_p)
    with _one_at_a_time:
        return _choose(logits, uniforms, _f32(temperature), top_k, *shares)


@_compiled(parallel=True, fastmath=_WITH_INFINITY)
def _choose(logits, uniforms, temperature, top_k, typical_p, top_p, min_p):
    num_rows, vocab_size = logits.shape
    ids = np.empty(num_rows, np.int64)
    for row in numba.prange(num_rows):
        scaled, odds = np.empty(vocab_size, _f32), np.empty(vocab_size, _f32)
        largest = _f32(-np.inf)
        for i in range(vocab_size):
            largest = max(largest, logits[row, i])
        for i in range(vocab_size):
            scaled[i] = (logits[row, i] - largest) / temperature
            odds[i] = _exp(scaled[i]) if scaled[i] > -87 else _f32(0)  # less is nothing beside the largest, 1
        if top_k < vocab_size:
            _keep(odds, logits[row], np.ones(vocab_size, _f32), _f32(top_k))
        if typical_p < 1:
            total, expected = _f32(0), _f32(0)
            for i in range(vocab_size):
                total += odds[i]
                expected += odds[i] * scaled[i] if odds[i] > 0 else _f32(0)
            expected /= total
            for i in range(vocab_size):
                scaled[i] = -abs(scaled[i] - expected) if odds[i] > 0 else _f32(-np.inf)
            _keep(odds, scaled, odds.copy(), _f32(typical_p * total))
        if top_p < 1:
            weight = odds.copy()
            _keep(odds, weight, weight, _f32(top_p * weight.sum()))
        if min_p > 0:
            border = _f32(min_p * odds.max())
            for i in range(vocab_size):
                odds[i] = odds[i] if odds[i] >= border else _f32(0)
        ids[row] = _draw(odds, uniforms[row])
    return ids
