"""Engine: the protocol of all engines but the device loop, and make_engine(), which makes one by name.

The weights of a model that `aigc_tf` built are computed with in NumPy (`numpy_engine.py`), or compiled by numba
(`numba_engine.py`). Any other model is called itself, on a whole window for each token (`model_engine.py`).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ...models.weights import LstmWeights
from .model_engine import model_engine
from .numpy_engine import last_of_each_row, numpy_engine
from .weight_cache import cached_weights


class Engine(NamedTuple):
    """Functions that read a fixed number of texts, a row for each.

    Attributes:
        read: from `(rows, positions, ids)`, each `int64 (R,)`, to logits `float32 (B', V)`. Reads R tokens, token r at
            position `positions[r]` of the text in row `rows[r]`, and returns the logits after the last token of each
            row that occurs, in the order of the rows. Rows are ascending, and so are positions within a row. So prompts
            of any lengths are read in one call without padding, and later each row takes one token per call.
        copy: from `parents`, `int (num_rows,)`: replaces what row r has read with what row `parents[r]` has read.
        num_positions: how many positions a text may have; None for no limit.
        write: None unless a loop of reading and choosing is compiled. From `(rows, positions, ids, pending, uniforms,
            args)`: a token of each row to read, the state of an incomplete character after it (`corpus/utf8.py`),
            uniform random numbers `(R, steps)` and `numba_sampling.SamplingArgs`. Returns the tokens that follow,
            `int64 (R, steps)`, -1 after the end of document. The last of each row is not read.
    """

    read: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    copy: Callable[[np.ndarray], None]
    num_positions: int | None = None
    write: Callable | None = None


def make_engine(model, num_rows: int, engine: str) -> Engine:
    """Make an engine for a model. Logits are float32, whatever the precision of the model.

    Args:
        model: from ids `int32 (B, T)` to logits `float32 (B, T, V)`, causal; or weights that `read_weights` returned.
        num_rows: how many texts it reads at a time.
        engine: "numpy", "numba" or "model". A model that `aigc_tf` did not build is read by "model" in any case.

    Returns:
        An `Engine`.
    """
    weights = None if engine == "model" else cached_weights(model)
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
