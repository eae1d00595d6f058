"""The engine: logits after the newest tokens, each token read once, with a KV cache or an LSTM's carried state.

The arithmetic is NumPy's, over the weights of a model of ours (`numpy_engine.py`), or the same compiled, where numba is
installed (`numba_engine.py`). Any other model is read through itself, window by window (`model_engine.py`).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ...models.weights import LstmWeights
from .model_engine import model_engine
from .numpy_engine import last_of_each_row, numpy_engine
from .weight_cache import model_weights


class Engine(NamedTuple):
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
            `(R, steps)` and a `choice.SamplingArgs`, to the tokens that follow, `int64 (R, steps)`, -1 after the end of
            document. The last of each row is not read.
    """

    read: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    copy: Callable[[np.ndarray], None]
    num_positions: int | None = None
    write: Callable | None = None


def make_engine(model, num_rows: int, engine: str) -> Engine:
    """Make an engine that reads a number of texts with a model. It computes in float32, whatever the model's precision.

    Args:
        model: ids `int32 (B, T)` to logits `float32 (B, T, V)`, causal; or weights that `read_weights` gave.
        num_rows: how many texts it shall read at once.
        engine: "numpy"; "numba", for `numba_engine.py`; or "model", which any other model is read by in any case.

    Returns:
        An `Engine`.
    """
    weights = None if engine == "model" else model_weights(model)
    if weights is None:
        return Engine(*model_engine(model, num_rows))
    if engine == "numba":
        from . import numba_engine

        read, copy, write = numba_engine.numba_engine(weights, num_rows)

        def read_all(rows, positions, ids):
            return read(rows, positions, ids, last_of_each_row(rows))

        return Engine(read_all, copy, _positions(weights), write)
    return Engine(*numpy_engine(weights, num_rows), _positions(weights))


def _positions(weights) -> int | None:
    return None if isinstance(weights, LstmWeights) else len(weights.position_embedding)
