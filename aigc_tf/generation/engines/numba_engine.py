"""Numba engine: a Transformer with a KV cache, or an LSTM with its state, compiled for the CPU, in 16-bit integers."""

import math
import os
import time
import weakref

import numba
import numpy as np

from ...models.weights import LstmWeights, TransformerWeights
from ...runtime.cores import usable_cores
from ...runtime.numba_availability import numba_lock, numba_problem
from ...runtime.numba_jit import numba_jit
from .int16 import as_float32, dot, exp, linear, pack, padded_width, round_vector
from .numba_sampling import NOT_FINITE_ID, sample_compiled

_f32 = np.float32


class _Threads:
    """Runs compiled functions in as many threads as are fastest at the moment.

    While other programs are busy, threads that wait for one another at each matrix can be fifty times as slow as a
    single thread, and a small model may not need all cores. So every `PERIOD` seconds each number of threads is timed.
    Results do not depend on it, to the bit.
    """

    PERIOD = 2.0  # seconds between two trials

    def __init__(self, limit: int):
        self.limit = limit
        self._numbers = sorted({limit, *(2**i for i in range(limit.bit_length()))})
        self._next_trial = 0.0

    def run(self, function, *args, steps=1):
        began = time.perf_counter()
        if began >= self._next_trial:
            self._next_trial = began + self.PERIOD
            self._seconds = {number: [] for number in self._numbers}  # per step, of two calls each
        trial = next((number for number in self._numbers if len(self._seconds[number]) < 2), None)
        if trial is None:
            return _run(min(self._numbers, key=lambda number: min(self._seconds[number])), function, *args)
        result = _run(trial, function, *args)
        self._seconds[trial].append((time.perf_counter() - began) / steps)
        return result


def _max_threads() -> int:
    """Return how many threads may be used: by the cores of this process, and by what the user has set."""
    omp = os.environ.get("OMP_NUM_THREADS", "")
    limits = [numba.get_num_threads(), usable_cores(), *([int(omp)] if omp.isdecimal() and int(omp) else [])]
    return max(1, min(limits))


_threads = weakref.WeakKeyDictionary()  # weights -> `_Threads`, whose timings serve the next text too


def _threads_for(weights) -> _Threads:
    limit = _max_threads()
    if weights not in _threads or _threads[weights].limit != limit:
        _threads[weights] = _Threads(limit)
    return _threads[weights]


def _run(num_threads: int, function, *args):
    """Call a compiled function in a number of threads, and restore the number for other numba code."""
    if problem := numba_problem():  # a stream that was started before a fork
        raise RuntimeError(f"This text cannot be continued: {problem}. Start it again.")
    before = numba.get_num_threads()
    if num_threads != before:
        numba.set_num_threads(num_threads)
    try:
        with numba_lock:
            return function(*args)
    finally:
        if num_threads != before:
            numba.set_num_threads(before)


# --- a model's parts -----------------------------------------------------------------------------------------


@numba_jit(fastmath=True)
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


@numba_jit(parallel=True, fastmath=True)
def _attend(qkv, cache, scales, rows, positions):
    """Put the keys and values of tokens into the cache, and return the attention output of each token.

    Keys and values are (2, rows, H, T, D / H padded), quantised to `int16` with a scale for each vector.
    """
    num_heads, num_positions, width = cache.shape[2:]
    dim = qkv.shape[1] // 3
    head_dim = dim // num_heads
    num_jobs = len(rows) * num_heads
    query, query_scale = np.zeros((num_jobs, width), np.int16), np.empty(num_jobs, _f32)
    for job in range(num_jobs):
        t, h = job // num_heads, job % num_heads
        row, position, heads = rows[t], positions[t], qkv[t, h * head_dim :]
        query_scale[job] = round_vector(heads[:head_dim], query[job]) * _f32(1 / math.sqrt(head_dim))
        for k in range(2):
            vector = heads[(k + 1) * dim : (k + 1) * dim + head_dim]
            scales[k, row, h, position] = round_vector(vector, cache[k, row, h, position])
    out, scores = np.zeros((num_jobs, head_dim), _f32), np.empty((num_jobs, num_positions), _f32)
    for job in numba.prange(num_jobs):
        # No views and no new arrays here: counting references to them would make the threads wait for one another.
        t, h = job // num_heads, job % num_heads
        row, until = rows[t], positions[t] + 1
        first = (row * num_heads + h) * num_positions * width
        largest = _f32(-np.inf)
        for s in range(until):
            score = _f32(dot(query, job * width, cache, first + s * width, width)[0])
            scores[job, s] = score * query_scale[job] * scales[0, row, h, s]
            largest = max(largest, scores[job, s])
        total = _f32(0)
        for s in range(until):
            scores[job, s] = exp(scores[job, s] - largest)
            total += scores[job, s]
        for s in range(until):
            scores[job, s] *= scales[1, row, h, s] / total
        fours = until // 4 * 4
        for s in range(0, fours, 4):  # read and write `out` once for four values
            a, b, c, d = scores[job, s], scores[job, s + 1], scores[job, s + 2], scores[job, s + 3]
            for i in range(np.uint64(head_dim)):
                out[job, i] += (
                    a * _f32(cache[1, row, h, s, i])
                    + b * _f32(cache[1, row, h, s + 1, i])
                    + c * _f32(cache[1, row, h, s + 2, i])
                    + d * _f32(cache[1, row, h, s + 3, i])
                )
        for s in range(fours, until):
            for i in range(np.uint64(head_dim)):
                out[job, i] += scores[job, s] * _f32(cache[1, row, h, s, i])
    return out.reshape(len(rows), dim)


# --- the models ----------------------------------------------------------------------------------------------


@numba_jit()
def _read_transformer(tokens, positions_table, norms, attention, output, mlp_norms, expand, project, final_norm, head,
                      cache, scales, rows, positions, ids, last):  # fmt: skip
    x = np.empty((len(ids), tokens.shape[1]), _f32)
    for t in range(len(ids)):
        x[t] = tokens[ids[t]] + positions_table[positions[t]]
    for i in range(len(norms)):
        y = linear(_norm(x, norms[i]), attention.rounded[i], attention.scale[i], attention.bias[i], False)
        y = _attend(y, cache[i], scales[i], rows, positions)
        x += linear(y, output.rounded[i], output.scale[i], output.bias[i], False)
        y = linear(_norm(x, mlp_norms[i]), expand.rounded[i], expand.scale[i], expand.bias[i], True)
        x += linear(y, project.rounded[i], project.scale[i], project.bias[i], False)
    return linear(_norm(x[last], final_norm), head.rounded[0], head.scale[0], head.bias[0], False)


@numba_jit()
def _write_transformer(weights, cache, scales, rows, positions, ids, pending, uniforms, args):
    """Read a token of each row, choose one, read that, and so on; return the tokens chosen, -1 after the end."""
    written = np.full(uniforms.shape, -1, np.int64)
    active, newest, pending = np.arange(len(rows)), ids, pending.copy()
    for step in range(uniforms.shape[1]):
        logits = _read_transformer(
            *weights, cache, scales, rows[active], positions[active] + step, newest, np.arange(len(active))
        )
        newest = sample_compiled(logits, uniforms[:, step][active], pending, args)
        for i in range(len(active)):
            written[active[i], step] = newest[i]
            pending[i] = args.after[pending[i], max(newest[i], 0)]
        left = (newest != args.eos) & (newest != NOT_FINITE_ID)
        active, newest, pending = active[left], newest[left], pending[left]
        if len(active) == 0:
            break
    return written


@numba_jit(fastmath=True)
def _lstm_layer(x, rounded, scale, bias, hidden, cell, rows):
    """Take one step of a layer with inputs x (R, inputs) of different rows; return the new hidden states (R, D)."""
    num_inputs, dim = x.shape[1], hidden.shape[1]
    joined = np.empty((len(rows), num_inputs + dim), _f32)
    for t in range(len(rows)):
        joined[t, :num_inputs] = x[t]
        joined[t, num_inputs:] = hidden[rows[t]]
    gates = linear(joined, rounded[0], scale[0], bias[0], False)
    out = np.empty((len(rows), dim), _f32)
    for t in range(len(rows)):
        row = rows[t]
        for d in range(dim):
            put = 1 / (1 + exp(-gates[t, d]))
            forget = 1 / (1 + exp(-gates[t, dim + d]))
            candidate = 2 / (1 + exp(-2 * gates[t, 2 * dim + d])) - 1
            kept = forget * cell[row, d] + put * candidate
            cell[row, d] = kept
            out[t, d] = (2 / (1 + exp(-2 * kept)) - 1) / (1 + exp(-gates[t, 3 * dim + d]))
        hidden[row] = out[t]
    return out


_packed = weakref.WeakKeyDictionary()  # weights -> the same, quantised


def numba_engine(weights: TransformerWeights | LstmWeights, num_rows: int):
    """Make the functions of an `engine.Engine`; its `read` also takes the index of each row's last token."""
    make = _lstm_engine if isinstance(weights, LstmWeights) else _transformer_engine
    read, copy, write = make(weights, num_rows)
    threads = _threads_for(weights)

    def read_in_threads(rows, positions, ids, last):
        if len(ids) == len(last):
            return threads.run(read, rows, positions, ids, last)
        return _run(threads.limit, read, rows, positions, ids, last)  # a prompt is enough work for all

    def write_in_threads(rows, positions, ids, pending, uniforms, args):
        return threads.run(write, rows, positions, ids, pending, uniforms, args, steps=uniforms.shape[1])

    return read_in_threads, copy, write and write_in_threads


def _transformer_engine(w: TransformerWeights, num_rows: int):
    vocab_size, dim = w.token_embedding.shape
    num_blocks, num_heads, context = len(w.blocks), w.num_heads, len(w.position_embedding)
    # The KV cache: keys and values, each vector with its scale.
    cache = np.zeros((num_blocks, 2, num_rows, num_heads, context, padded_width(dim // num_heads)), np.int16)
    scales = np.zeros((num_blocks, 2, num_rows, num_heads, context), _f32)
    if w not in _packed:
        b = [list(field) for field in zip(*w.blocks, strict=True)]
        _packed[w] = (
            as_float32(w.token_embedding),
            as_float32(w.position_embedding),
            np.stack(b[0]),
            pack(*zip(b[1], b[2], strict=True)),
            pack(*zip(b[3], b[4], strict=True)),
            np.stack(b[5]),
            pack(*zip(b[6], b[7], strict=True)),
            pack(*zip(b[8], b[9], strict=True)),
            as_float32(w.final_norm),
            pack((w.token_embedding.T, np.zeros(vocab_size, _f32))),
        )
    packed = _packed[w]
    used = 0  # positions

    def read(rows, positions, ids, last):
        nonlocal used
        used = max(used, int(positions.max()) + 1)
        return _read_transformer(*packed, cache, scales, rows, positions, ids, last)

    def copy(parents):
        moved = np.flatnonzero(parents != np.arange(num_rows))
        for kept in (cache, scales):
            kept[:, :, moved, :, :used] = kept[:, :, parents[moved], :, :used]

    def write(rows, positions, ids, pending, uniforms, args):
        nonlocal used
        used = max(used, int(positions.max()) + uniforms.shape[1])
        return _write_transformer(packed, cache, scales, rows, positions, ids, pending, uniforms, args)

    return read, copy, write


def _lstm_engine(w: LstmWeights, num_rows: int):
    if w not in _packed:
        _packed[w] = [pack(layer) for layer in w.layers], [pack(layer) for layer in w.head]
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
            x = linear(x, *(stack[0] for stack in matrix), False)
        return x

    def copy(parents):
        for state in states:
            state[:] = state[:, parents]

    return read, copy, None
