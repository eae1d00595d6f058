"""Dataset: documents, or a store of token ids, as batches of windows to train on."""

import bisect
import hashlib
from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..runtime.backend import tensorflow_for_data
from .order import shuffled
from .store import blocks_of, count_tokens, make_store
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..runtime.backend import tf

_ENDLESS = np.iinfo(np.int64).max  # the end of batches without one, as tf.data has it


def make_dataset(
    documents: list[str] | np.ndarray,
    tokenizer: Tokenizer,
    context: int,
    batch_size: int,
    seed: int | None = None,
    start_step: int = 0,
) -> "tf.data.Dataset | Batches":
    """Cut documents into windows of next-token prediction, full and of one shape.

    The documents form one long array, `BOS document EOS BOS document EOS ...`. A window starts with a document, so that
    positions mean the same in training and in generation; the next window starts with the first document that did not
    fit whole.

    With a seed the dataset is endless: each epoch shuffles the windows anew, and batch i depends only on the seed and
    i, so that training can resume at any step. Without a seed it is one epoch in order, of known length; windows that
    do not fill a batch are left out.

    Args:
        documents: documents, or the ids of a store (`make_store`, `open_store`).
        tokenizer: the tokenizer.
        context: T, tokens in a window.
        batch_size: B, windows in a batch.
        seed: the seed of the order, or None.
        start_step: the number of batches to skip, at no cost.

    Returns:
        A `tf.data.Dataset` of `(inputs, targets)`, each `int32` of shape (B, T), with
        `targets[:, :-1] == inputs[:, 1:]`. Four more attributes are for `train`: `seed`; `from_step(k)`, the same data
        from batch k on; `identity()`, a dict that tells it from other data; `counts()`, how often each token occurs.
        Where TensorFlow is not installed, `Batches`: the same in NumPy arrays.

    Raises:
        ValueError: the documents do not fill one window, or without a seed one batch; or a setting is out of range.

    Example:
        >>> documents = ["春眠不觉晓，", "处处闻啼鸟。"]
        >>> tokenizer = Tokenizer.train(documents)
        >>> dataset = make_dataset(documents, tokenizer, context=7, batch_size=2)
        >>> inputs, targets = next(iter(dataset))
        >>> inputs, targets = np.array(inputs), np.array(targets)
        >>> [tokenizer.decode(row) for row in inputs], tokenizer.decode(targets[0])
        (['春眠不觉晓，', '处处闻啼鸟。'], '春眠不觉晓，')
    """
    _require_positive(context=context, batch_size=batch_size)
    if start_step < 0:
        raise ValueError(f"start_step must be at least 0, got {start_step}.")
    if seed is not None:
        seed = as_seed(seed)
    tokens = documents if isinstance(documents, np.ndarray) else make_store(documents, tokenizer)
    starts = _window_starts(tokens, tokenizer.BOS, context)
    num_windows = len(starts)
    if seed is None and num_windows < batch_size:
        raise ValueError(
            f"The corpus has {num_windows} windows of {context} tokens, but one batch needs {batch_size}. "
            "Add text, or lower `context` or `batch_size`."
        )
    offsets = np.arange(context + 1)

    def rows_of(places: np.ndarray) -> np.ndarray:
        windows = places if seed is None else shuffled(places, num_windows, seed)
        return tokens[starts[windows][:, None] + offsets].astype(np.int32)

    end = num_windows // batch_size if seed is None else None
    data = batches_of(rows_of, batch_size, context, start_step, end)
    data.from_step = lambda step: make_dataset(tokens, tokenizer, context, batch_size, seed, start_step + step)
    data.seed = seed
    data.counts = lambda: count_tokens(tokens, tokenizer.vocab_size)
    data.identity = lambda: {
        "tokens": hashlib.sha256(tokens).hexdigest(),
        "order's seed": seed,
        "first batch": start_step,
    }
    return data


def batches_of(
    rows_of: Callable[[np.ndarray], np.ndarray], batch_size: int, context: int, start: int = 0, end: int | None = None
) -> "tf.data.Dataset | Batches":
    """Make batches of rows, with tf.data where TensorFlow is installed.

    Args:
        rows_of: a function from positions, `int64 (B,)`, to rows of tokens, `int32 (B, T + 1)`. Batch i has the
            positions from i * B to (i + 1) * B - 1.
        batch_size: B.
        context: T.
        start: the number of the first batch.
        end: the number after that of the last batch; None for endless batches.
    """
    end = _ENDLESS if end is None else end
    tf = tensorflow_for_data()
    if tf is None:
        return Batches(rows_of, (batch_size, context), start, end)

    def inputs_and_targets(step):
        rows = tf.numpy_function(lambda step: rows_of(_places(step, batch_size)), [step], tf.int32, stateful=False)
        rows.set_shape((batch_size, context + 1))
        return rows[:, :-1], rows[:, 1:]

    options = tf.data.Options()
    # There is one function to run, and nothing to tune. TensorFlow's tuner may miss that an iterator ends, and lets the
    # end of training wait until it wakes: 20 seconds after half a minute.
    options.autotune.enabled = False
    return tf.data.Dataset.range(start, end).map(inputs_and_targets).prefetch(tf.data.AUTOTUNE).with_options(options)


class Batches:
    """Batches where TensorFlow is not installed: what `train` needs of a `tf.data.Dataset`, and nothing else.

    Iterating yields `(inputs, targets)`, NumPy arrays `int32 (B, T)`, from the beginning each time.

    Attributes:
        shape: (B, T).
    """

    def __init__(self, rows_of, shape: tuple[int, int], start: int, end: int):
        self._rows_of, self._start, self._end = rows_of, start, end
        self.shape = shape

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for step in range(self._start, self._end):
            rows = self._rows_of(_places(step, self.shape[0]))
            yield rows[:, :-1], rows[:, 1:]

    def cardinality(self) -> int:
        """Count the batches, -1 if they are endless."""
        return -1 if self._end == _ENDLESS else max(0, self._end - self._start)

    def rebatch(self, batch_size: int, drop_remainder: bool) -> "Batches":
        """Divide each batch into batches of `batch_size`, which divides B."""
        parts = self.shape[0] // batch_size
        end = _ENDLESS if self._end == _ENDLESS else parts * self._end
        return Batches(self._rows_of, (batch_size, self.shape[1]), parts * self._start, end)


def _places(step: int, batch_size: int) -> np.ndarray:
    return np.arange(step * batch_size, (step + 1) * batch_size)


def _window_starts(tokens: np.ndarray, bos: int, context: int) -> np.ndarray:
    """Find where each window of context + 1 tokens begins (see `make_dataset`), `int64` (windows,)."""
    if len(tokens) < context + 1:
        raise ValueError(
            f"The corpus has {len(tokens)} tokens, but one window needs context + 1 = {context + 1}. "
            "Add text or lower `context`."
        )
    # The end of the row is a boundary too.
    begins = [start + np.flatnonzero(block == bos) for start, block in blocks_of(tokens)]
    boundaries = np.concatenate([*begins, [len(tokens)]])
    if boundaries[0] > 0:
        boundaries = np.append(0, boundaries)
    # Where a window begins with a document, the last boundary up to which every document is whole, all its tokens
    # being targets by then: the window after it begins there, unless the first document is longer than a window.
    whole = np.searchsorted(boundaries, boundaries + context + 1, side="right") - 1
    # Without lists: a billion tokens have millions of windows, and a list takes 40 bytes for each number.
    boundaries, whole, starts, i = memoryview(boundaries), memoryview(whole), array("q"), 0
    while (start := boundaries[i]) + context + 1 <= len(tokens):
        if whole[i] > i:
            starts.append(start)
            i = whole[i]
            continue
        # One window every `context` tokens, up to the one that reaches the end of the document.
        end = start + -(-(boundaries[i + 1] - start - context - 1) // context) * context
        starts.extend(range(start, end, context))
        start = end
        if start + context + 1 > len(tokens):
            break
        starts.append(start)
        i = bisect.bisect_right(boundaries, start + context + 1, lo=i + 1) - 1
    if start < len(tokens) - 1:
        starts.append(len(tokens) - context - 1)  # the rest, and tokens before it to fill the window
    return np.frombuffer(starts, np.int64)


def as_seed(seed) -> int:
    """Return a whole number of any type as an `int`; refuse one that is no seed for TensorFlow."""
    try:
        fits = 0 <= seed < 2**63 and seed == int(seed)
    except TypeError:
        fits = False
    if not fits:
        raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed!r}.")
    return int(seed)


def _require_positive(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
