"""Kernels: the decoders of `decoding.py` compiled for the CPU by numba, over weights of 16 bits.

A matrix is kept as `int16` with a float32 scale for each output, which rounds a weight by at most 1/65,534 of the
largest of its row and halves what is read for each token: reading weights is what limits a short batch.
"""

import math
import threading
from typing import NamedTuple

import numba
import numpy as np

from .weights import TransformerWeights

_f32 = np.float32
# One call at a time: not every threading layer of numba bears two, and each call uses all cores anyway.
_one_at_a_time = threading.Lock()


def _compiled(**options):
    """Compile a function when it is first called, and keep the code on disk where there is a place for it."""

    def compile_lazily(function):
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # neither this folder nor the user's own can be written
            return numba.njit(nogil=True, **options)(function)

    return compile_lazily


class _Matrix(NamedTuple):
    """A matrix (outputs, inputs) or a stack of them, its scales, and the bias."""

    rounded: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


def _pack(matrix: np.ndarray, bias: np.ndarray) -> _Matrix:
    if matrix.shape[-2] % 2:  # the kernel takes outputs by two
        matrix, bias = (np.concatenate([x, np.zeros_like(x[..., :1, :])], axis=-2) for x in (matrix, bias[..., None]))
        bias = bias[..., 0]
    scale = np.maximum(np.abs(matrix).max(-1), np.finfo(_f32).tiny) / _f32(2**15 - 1)
    return _Matrix(np.rint(matrix / scale[..., None]).astype(np.int16), scale, np.ascontiguousarray(bias))


@_compiled(parallel=True, fastmath=True)
def _linear(x, rounded, scale, bias, gelu):
    """Return x W^T + b, for 4 tokens and 2 outputs at a time: 8 sums in registers share what they read."""
    num_outputs, num_inputs = rounded.shape
    num_tokens = len(x)
    out = np.empty((num_tokens, num_outputs), _f32)
    for pair in numba.prange(num_outputs // 2):
        o, p = 2 * pair, 2 * pair + 1
        fours = num_tokens // 4 * 4
        for t in range(0, fours, 4):
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = _f32(0)
            for i in range(num_inputs):
                a, b = _f32(rounded[o, i]), _f32(rounded[p, i])
                a0 += x[t, i] * a
                a1 += x[t + 1, i] * a
                a2 += x[t + 2, i] * a
                a3 += x[t + 3, i] * a
                b0 += x[t, i] * b
                b1 += x[t + 1, i] * b
                b2 += x[t + 2, i] * b
                b3 += x[t + 3, i] * b
            out[t, o], out[t + 1, o], out[t + 2, o], out[t + 3, o] = a0, a1, a2, a3
            out[t, p], out[t + 1, p], out[t + 2, p], out[t + 3, p] = b0, b1, b2, b3
        for q in (o, p):
            for t in range(fours, num_tokens):
                a0 = _f32(0)
                for i in range(num_inputs):
                    a0 += x[t, i] * _f32(rounded[q, i])
                out[t, q] = a0
            for t in range(num_tokens):
                y = out[t, q] * scale[q] + bias[q]
                if gelu:
                    y /= 1 + np.exp(_f32(-2 * math.sqrt(2 / math.pi)) * (y + _f32(0.044715) * y * y * y))
                out[t, q] = y
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


@_compiled(parallel=True, fastmath=True)
def _attend(qkv, keys, values, rows, positions):
    """Put the tokens' keys and values into the cache (rows, H, T, D / H), and return what each token attends to."""
    num_heads, head_dim = keys.shape[1], keys.shape[3]
    dim = num_heads * head_dim
    for t in range(len(rows)):
        for h in range(num_heads):
            for d in range(head_dim):
                keys[rows[t], h, positions[t], d] = qkv[t, dim + h * head_dim + d]
                values[rows[t], h, positions[t], d] = qkv[t, 2 * dim + h * head_dim + d]
    out = np.zeros((len(rows), dim), _f32)
    for job in numba.prange(len(rows) * num_heads):
        t, h = job // num_heads, job % num_heads
        query, attended = qkv[t, h * head_dim : (h + 1) * head_dim], out[t, h * head_dim : (h + 1) * head_dim]
        until = positions[t] + 1
        scores = np.empty(until, _f32)
        for s in range(until):
            score = _f32(0)
            for d in range(head_dim):
                score += query[d] * keys[rows[t], h, s, d]
            scores[s] = score * _f32(1 / math.sqrt(head_dim))
        largest = scores.max()
        total = _f32(0)
        for s in range(until):
            scores[s] = np.exp(scores[s] - largest)
            total += scores[s]
        for s in range(until):
            share = scores[s] / total
            for d in range(head_dim):
                attended[d] += share * values[rows[t], h, s, d]
    return out


@_compiled()
def _read(tokens, positions_table, norms, attention, output, mlp_norms, expand, project, final_norm, head,
          keys, values, rows, positions, ids, last):  # fmt: skip
    x = np.empty((len(ids), tokens.shape[1]), _f32)
    for t in range(len(ids)):
        x[t] = tokens[ids[t]] + positions_table[positions[t]]
    for i in range(len(norms)):
        y = _linear(_norm(x, norms[i]), attention.rounded[i], attention.scale[i], attention.bias[i], False)
        y = _attend(y, keys[i], values[i], rows, positions)
        x += _linear(y, output.rounded[i], output.scale[i], output.bias[i], False)
        y = _linear(_norm(x, mlp_norms[i]), expand.rounded[i], expand.scale[i], expand.bias[i], True)
        x += _linear(y, project.rounded[i], project.scale[i], project.bias[i], False)
    return _linear(_norm(x[last], final_norm), head.rounded, head.scale, head.bias, False)


def transformer_decoder(w: TransformerWeights, num_rows: int):
    """Make a decoder of a Transformer's weights, as `decoding.decoder` describes it."""
    (num_blocks, _, dim), context = w.attention_norm.shape, len(w.position_embedding)
    vocab_size = len(w.token_embedding)
    keys, values = np.zeros((2, num_blocks, num_rows, w.num_heads, context, dim // w.num_heads), _f32)
    packed = (
        w.token_embedding,
        w.position_embedding,
        w.attention_norm,
        _pack(w.attention, w.attention_bias),
        _pack(w.output, w.output_bias),
        w.mlp_norm,
        _pack(w.expand, w.expand_bias),
        _pack(w.project, w.project_bias),
        w.final_norm,
        _pack(w.token_embedding, np.zeros(vocab_size, _f32)),
    )

    def decode(rows, positions, ids, last):
        with _one_at_a_time:
            return _read(*packed, keys, values, rows, positions, ids, last)[:, :vocab_size]

    return decode
