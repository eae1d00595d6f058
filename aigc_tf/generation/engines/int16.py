"""Int16: matrix products in 16-bit integers, compiled for the CPU by numba.

A matrix is quantised to `int16` with a float32 scale per output, and its input with a scale per token. Both are scaled
to a Euclidean norm of 46,000, or less where a number would not fit into 16 bits. So by the Cauchy-Schwarz inequality no
sum of products exceeds 32 bits (including what rounding adds to the norms), and a weight is rounded by a
hundred-thousandth of the norm of its row. CPUs multiply and add such integers in pairs, twice as many at a time as
floats, and read half as much memory.
"""

import itertools
from typing import NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, register_jitable

from ...runtime.numba_jit import numba_jit

_f32 = np.float32
_WIDTH = 64  # rows are padded with zeros to a multiple of this
_OUTPUTS = 32  # that a thread computes at a time
_NORM, _LARGEST = 46_000, 2**15 - 1
_TINY = np.finfo(_f32).tiny


# --- packing -------------------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """A stack of matrices, quantised (matrices, outputs, padded inputs), with their scales and biases."""

    rounded: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


def as_float32(values: np.ndarray) -> np.ndarray:
    """Return values as a contiguous, writable float32 array, the one kind that functions are compiled for."""
    return np.require(values, _f32, "CW")


@register_jitable
def padded_width(num_inputs: int) -> int:
    """Return the padded width of rows of so many numbers."""
    return -(-num_inputs // _WIDTH) * _WIDTH


def pack(*matrices_and_biases: tuple[np.ndarray, np.ndarray]) -> Matrix:
    """Quantise matrices (inputs, outputs) of one shape, and pack them with their biases into a stack."""
    matrices, biases = zip(*matrices_and_biases, strict=True)
    num_inputs, num_outputs = matrices[0].shape
    rounded = _zeros((len(matrices), num_outputs, padded_width(num_inputs)))
    scale = np.empty((len(matrices), num_outputs), _f32)
    # A part at a time, which stays in the CPU's cache.
    for (i, matrix), first in itertools.product(enumerate(matrices), range(0, num_outputs, _WIDTH)):
        outputs = slice(first, first + _WIDTH)
        part = matrix[:, outputs]
        scale[i, outputs] = _scale(part)
        with np.errstate(invalid="ignore"):  # a weight of NaN makes the scale NaN, which shows
            rounded[i, outputs, :num_inputs] = np.rint(part / scale[i, outputs]).T
    return Matrix(rounded, scale, np.stack(biases))


def _scale(matrix: np.ndarray) -> np.ndarray:
    """Return the scale of each output, computed as in `round_vector`."""
    largest = np.abs(matrix).max(axis=0)
    unit = np.ldexp(_f32(1), np.frexp(largest)[1] - 1)
    norm = np.linalg.norm(matrix / unit, axis=0)
    return np.maximum(norm / _f32(_NORM) * unit, largest / _f32(_LARGEST)) + _TINY


def _zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Make an array aligned to the lines of the CPU's cache: unaligned reads take half as long again."""
    raw = np.zeros(2 * np.prod(shape) + _WIDTH, np.uint8)
    start = -raw.ctypes.data % _WIDTH
    return raw[start : start + 2 * np.prod(shape)].view(np.int16).reshape(shape)


# --- products ------------------------------------------------------------------------------------------------


def _sums_of_products(num_rows: int, num_others: int, lanes: int):
    """Make a function for the dot products of each of `num_rows` rows with each of `num_others` rows.

    It is written in LLVM's own instructions, on vectors of `lanes` numbers, as LLVM does not find those for pairs of
    products by itself where rows share what they read.

    Returns:
        The function, from `(a, i, b, j, width)` to a tuple of `int32`. Its rows are consecutive stretches of `width`
        numbers of the `int16` array `a` from index i, and of `b` from index j; `width` is a multiple of `lanes`.
    """

    @intrinsic
    def sums_of_products(typing, a, i, b, j, width):
        signature = types.UniTuple(types.int32, num_rows * num_others)(a, i, b, j, width)
        return signature, generate

    def generate(context, builder, signature, arguments):
        index, int32 = ir.IntType(64), ir.IntType(32)
        _, i, _, j, width = arguments
        a, b = (context.make_array(signature.args[k])(context, builder, arguments[k]).data for k in (0, 2))
        numbers, products = ir.VectorType(ir.IntType(16), lanes), ir.VectorType(int32, lanes)
        halves = ir.VectorType(int32, lanes // 2)
        undefined = ir.Constant(products, ir.Undefined)
        even, odd = (ir.Constant(halves, list(range(k, lanes, 2))) for k in (0, 1))

        def begin(data, start, row):
            return builder.gep(data, [builder.add(start, builder.mul(width, index(row)))])

        def load(row, at):
            vector = builder.load(builder.bitcast(builder.gep(row, [at]), numbers.as_pointer()), align=2)
            return builder.sext(vector, products)

        rows = [begin(a, i, row) for row in range(num_rows)]
        others = [begin(b, j, row) for row in range(num_others)]
        sums = [cgutils.alloca_once_value(builder, ir.Constant(halves, None)) for _ in range(num_rows * num_others)]
        with cgutils.for_range_slice(builder, index(0), width, index(lanes), index) as (at, _):
            loaded = [load(row, at) for row in others]
            for n, total in enumerate(sums):
                if n % num_others == 0:
                    row = load(rows[n // num_others], at)
                product = builder.mul(row, loaded[n % num_others])
                pair = builder.add(*(builder.shuffle_vector(product, undefined, k) for k in (even, odd)))
                builder.store(builder.add(builder.load(total), pair), total)
        return context.make_tuple(builder, signature.return_type, [_sum(builder, builder.load(s)) for s in sums])

    return sums_of_products


def _sum(builder, vector):
    while (length := vector.type.count // 2) > 0:
        halves = (ir.Constant(ir.VectorType(ir.IntType(32), length), list(range(k, k + length))) for k in (0, length))
        vector = builder.add(
            *(builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), half) for half in halves)
        )
    return builder.extract_element(vector, ir.IntType(32)(0))


dot = _sums_of_products(1, 1, lanes=64)
_dot_4x2 = _sums_of_products(4, 2, lanes=16)  # eight sums and their operands fit into the registers


@numba_jit(fastmath=True, inline="always")
def round_vector(vector, rounded):
    """Quantise a vector of floats into one of `int16`, which is as long or longer, and return its scale.

    Numbers are divided by a power of two near the largest before they are squared, so they neither vanish nor overflow.
    """
    square = largest = _f32(0)
    for d in range(len(vector)):
        largest = max(largest, abs(vector[d]))
    bits = _f32(max(largest, _TINY)).view(np.int32)
    unit = np.int32(bits & np.int32(0x7F800000)).view(np.float32)  # the sign and the fraction are 0
    per_unit = _f32(1) / unit
    for d in range(len(vector)):
        square += (vector[d] * per_unit) ** 2
    scale = max(np.sqrt(square) / _f32(_NORM) * unit, largest / _f32(_LARGEST)) + _TINY
    factor = _f32(1) / scale
    for d in range(len(vector)):
        rounded[d] = np.int16(np.rint(vector[d] * factor))
    return scale


@numba_jit(parallel=True, fastmath=True)
def linear(x, rounded, scale, bias, gelu):
    """Return x W^T + b, or its GELU, (tokens, outputs)."""
    num_outputs, width = rounded.shape
    num_tokens = len(x)
    tokens, token_scale = np.zeros((num_tokens, width), np.int16), np.empty(num_tokens, _f32)
    for t in range(num_tokens):
        token_scale[t] = round_vector(x[t], tokens[t])
    out = np.empty((num_tokens, num_outputs), _f32)
    fours = num_tokens // 4 * 4
    for part in numba.prange((num_outputs + _OUTPUTS - 1) // _OUTPUTS):
        first, end = part * _OUTPUTS, min(num_outputs, (part + 1) * _OUTPUTS)
        end_of_twos = first + (end - first) // 2 * 2
        for t in range(0, fours, 4):
            for o in range(first, end_of_twos, 2):
                a, b, c, d, e, f, g, h = _dot_4x2(tokens, t * width, rounded, o * width, width)
                out[t, o], out[t, o + 1], out[t + 1, o], out[t + 1, o + 1] = a, b, c, d
                out[t + 2, o], out[t + 2, o + 1], out[t + 3, o], out[t + 3, o + 1] = e, f, g, h
        for o in range(first, end):
            for t in range(fours if o < end_of_twos else 0, num_tokens):
                out[t, o] = dot(tokens, t * width, rounded, o * width, width)[0]
        for t in range(num_tokens):
            # Unsigned, as an index that might be negative keeps a loop from being vectorised.
            for o in range(np.uint64(first), np.uint64(end)):
                y = out[t, o] * (scale[o] * token_scale[t]) + bias[o]
                if gelu:
                    z = _f32(-2 * (2 / np.pi) ** 0.5) * (y + _f32(0.044715) * y * y * y)
                    y /= _f32(1) + exp(z)
                out[t, o] = y
    return out


@numba_jit(fastmath=True, inline="always")
def exp(x):
    """Compute e^x for x from -87 to 88, to a relative error of 4e-6, so that it vectorises, unlike `np.exp`."""
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
