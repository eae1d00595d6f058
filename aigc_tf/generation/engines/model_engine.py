"""Model engine: reads texts with any model, without a KV cache, by calling it on a whole window for each token."""

import functools

import numpy as np

from ...models.ngram import Ngram
from .numpy_engine import last_of_each_row


def model_engine(model, num_rows: int):
    """Make `read` and `copy` of an `engine.Engine` for `num_rows` texts."""
    context = model.input_shape[1]
    texts = [[] for _ in range(num_rows)]
    if isinstance(model, Ngram):
        compute = model.predict_on_batch
    else:
        from ...runtime.distribution import predict

        compute = functools.partial(predict, model)

    def read(rows, positions, ids):
        for row, position, i in zip(rows, positions, ids, strict=True):
            texts[row][position:] = [i]
        newest = [texts[row][-context:] for row in rows[last_of_each_row(rows)]]
        # What follows the newest token does not matter, as the model is causal.
        window = np.zeros((len(newest), context), np.int32)
        for row, text in enumerate(newest):
            window[row, : len(text)] = text
        logits = compute(window)
        newest_logits = np.array(logits)[np.arange(len(newest)), [len(text) - 1 for text in newest]]
        return newest_logits.astype(np.float32)  # a user's model may return 16 bits

    def copy(parents):
        texts[:] = [list(texts[parent]) for parent in parents]

    return read, copy
