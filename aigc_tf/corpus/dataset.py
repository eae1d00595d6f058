"""Dataset: documents -> a store of token ids -> windows as a tf.data.Dataset."""

import bisect
import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..runtime.files import parse_json, rename, temporary_path, write_json
from .tokenizer import Tokenizer

if TYPE_CHECKING:  # a store needs NumPy alone
    from ..runtime.backend import tf

_FORMAT = {"format": "aigc_tf token store", "version": 1}
_TOKENS, _MANIFEST = "tokens.bin", "manifest.json"
_BLOCK = 2**20  # tokens of a store that are looked at in one go
_NUM_SLICES = 100  # of a sample


def make_store(documents: Iterable[str], tokenizer: Tokenizer, path=None, processes: int = 1) -> np.ndarray:
    """Encode documents into a token store, one long row of ids, on disk or in memory.

    On disk it is a folder of `tokens.bin`, the documents one after the other, each framed by begin and end
    of document, as uint16 or uint32; and `manifest.json` with their numbers, hashes and the tokenizer's
    fingerprint. The folder appears when it is complete.

    Args:
        documents: the documents, also from a generator: for a store on disk one chunk at a time is in memory.
        tokenizer: the tokenizer.
        path: the folder to make, or None for memory.
        processes: how many processes encode (see `Tokenizer.train`).

    Returns:
        The ids, `uint16` or `uint32`, shape (tokens,); those on disk memory-mapped as by `open_store`.

    Raises:
        FileExistsError: `path` exists already.
    """
    dtype = _dtype(tokenizer)
    encoded = (ids.astype(dtype) for ids in tokenizer.encode_documents(documents, processes))
    if path is None:
        row = bytearray()
        for ids in encoded:
            row += ids.tobytes()
        return np.frombuffer(row, dtype)
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already. Name another folder, or delete it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_path(path) as folder:
        folder.mkdir()
        digest, num_tokens, num_documents = hashlib.sha256(), 0, 0
        with open(folder / _TOKENS, "wb") as file:
            for ids in encoded:
                file.write(ids.tobytes())
                digest.update(ids.tobytes())
                num_tokens += len(ids)
                num_documents += 1
            file.flush()
            os.fsync(file.fileno())
        manifest = {
            **_FORMAT,
            "dtype": dtype.name,
            "tokens": num_tokens,
            "documents": num_documents,
            "sha256": digest.hexdigest(),
            "tokenizer": tokenizer.fingerprint,
        }
        write_json(folder / _MANIFEST, manifest)
        rename(folder, path)
    return open_store(path, tokenizer)


def open_store(path, tokenizer: Tokenizer) -> np.ndarray:
    """Open a token store that `make_store` made, without reading it into memory.

    Args:
        path: the folder.
        tokenizer: the tokenizer it was made with.

    Returns:
        The ids, memory-mapped read-only, `uint16` or `uint32`, shape (tokens,).

    Raises:
        FileNotFoundError: there is no store at `path`.
        ValueError: the store belongs to another tokenizer, or is of another size or dtype than it says. That its ids
            are those that were written is not looked at, as it would take reading them.
    """
    path = Path(path)
    if not (path / _MANIFEST).is_file():
        raise FileNotFoundError(f"{path} is no token store: it has no {_MANIFEST}. Make one with make_store.")
    try:
        manifest = parse_json((path / _MANIFEST).read_text("utf-8"))
        if any(manifest.get(key) != value for key, value in _FORMAT.items()):
            raise ValueError(f"it must say {_FORMAT}")
        dtype, num_tokens, made_with = (manifest[key] for key in ("dtype", "tokens", "tokenizer"))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path / _MANIFEST} cannot be read by this version: {error}.") from None
    if made_with != tokenizer.fingerprint:
        raise ValueError(f"The token store {path} was made with another tokenizer. Make it anew.")
    if dtype != _dtype(tokenizer).name:
        raise ValueError(f"The token store {path} must be of {_dtype(tokenizer).name}, but says {dtype}. Make it anew.")
    if num_tokens * np.dtype(dtype).itemsize != (path / _TOKENS).stat().st_size:
        raise ValueError(f"{path / _TOKENS} does not have the {num_tokens} ids of its manifest. Make it anew.")
    return np.memmap(path / _TOKENS, dtype, mode="r") if num_tokens else np.empty(0, dtype)  # nothing cannot be mapped


def count_tokens(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Count how often each token occurs in a store, `int64 (V,)`."""
    counts = np.zeros(vocab_size, np.int64)
    for _, block in _blocks(ids):
        counts += np.bincount(block, minlength=vocab_size)
    return counts


def sample_tokens(ids: np.ndarray, num_tokens: int) -> np.ndarray:
    """Take about `num_tokens` of a store that has more, in slices that lie evenly over it; of another, all."""
    if len(ids) <= num_tokens:
        return ids
    size = max(1, num_tokens // _NUM_SLICES)
    starts = np.linspace(0, len(ids) - size, _NUM_SLICES).astype(np.int64)
    return np.concatenate([ids[start : start + size] for start in starts])


def _blocks(ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield where each block of a store begins, and its ids: a store on disk may be larger than the memory."""
    for start in range(0, len(ids), _BLOCK):
        yield start, ids[start : start + _BLOCK]


def make_dataset(
    documents: list[str] | np.ndarray,
    tokenizer: Tokenizer,
    context: int,
    batch_size: int,
    seed: int | None = None,
    start_step: int = 0,
) -> "tf.data.Dataset":
    """Cut documents into windows of next-token prediction, full and of one shape.

    The documents stand in one row, `BOS document EOS BOS document EOS ...`. A window begins where a
    document begins, so that the positions of a model mean what they mean when it writes; the next one begins
    with the first document that did not fit whole.

    With a seed the dataset is endless, for training with `steps_per_epoch`: each pass shuffles the windows
    anew, and batch i is a function of (seed, i) alone, so a run can go on at any step. Without one it is a
    single pass in order, of known length; windows that do not fill a batch are left out.

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

    Raises:
        ValueError: the documents do not fill one window, or without a seed one batch; or a setting is out of range.

    Example:
        >>> documents = ["春眠不觉晓，", "处处闻啼鸟。"]
        >>> tokenizer = Tokenizer.train(documents)
        >>> dataset = make_dataset(documents, tokenizer, context=7, batch_size=2)
        >>> inputs, targets = next(iter(dataset))
        >>> [tokenizer.decode(row) for row in inputs.numpy()], tokenizer.decode(targets[0].numpy())
        (['春眠不觉晓，', '处处闻啼鸟。'], '春眠不觉晓，')
    """
    from ..runtime.backend import tf

    _require_positive(context=context, batch_size=batch_size)
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

    def window_at(position):
        if seed is None:
            return position
        epoch, index = position // num_windows, position % num_windows
        last = tf.constant(num_windows - 1, tf.int64)
        return tf.random.experimental.index_shuffle(index, tf.stack([tf.cast(seed, tf.int64), epoch]), last)

    def gather(windows):
        return tokens[starts[windows][:, None] + offsets].astype(np.int32)

    def inputs_and_targets(windows):
        rows = tf.numpy_function(gather, [windows], tf.int32, stateful=False)
        rows.set_shape((batch_size, context + 1))
        return rows[:, :-1], rows[:, 1:]

    stop = num_windows if seed is None else np.iinfo(np.int64).max
    dataset = (
        tf.data.Dataset.range(start_step * batch_size, stop)
        .map(window_at)
        .batch(batch_size, drop_remainder=True)
        .map(inputs_and_targets)
        .prefetch(tf.data.AUTOTUNE)
    )
    dataset.from_step = lambda step: make_dataset(tokens, tokenizer, context, batch_size, seed, start_step + step)
    dataset.seed = seed
    dataset.counts = lambda: count_tokens(tokens, tokenizer.vocab_size)
    dataset.identity = lambda: {
        "tokens": hashlib.sha256(tokens).hexdigest(),
        "order's seed": seed,
        "first batch": start_step,
    }
    return dataset


def _window_starts(tokens: np.ndarray, bos: int, context: int) -> np.ndarray:
    """Find where each window of context + 1 tokens begins (see `make_dataset`), `int64` (windows,)."""
    if len(tokens) < context + 1:
        raise ValueError(
            f"The corpus has {len(tokens)} tokens, but one window needs context + 1 = {context + 1}. "
            "Add text or lower `context`."
        )
    # A document that ends with the row fits whole, as one before another document does.
    begins = [start + np.flatnonzero(block == bos) for start, block in _blocks(tokens)]
    boundaries = np.concatenate([*begins, [len(tokens)]])
    if boundaries[0] > 0:
        boundaries = np.append(0, boundaries)
    # Where a window begins with a document, the last boundary up to which every document is whole, all its tokens
    # being targets by then: the window after it begins there, unless the first document is longer than a window.
    whole = np.searchsorted(boundaries, boundaries + context + 1, side="right") - 1
    # Plain numbers, of which a loop over a billion tokens takes millions; lists of them would take 40 bytes each.
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
        starts.append(len(tokens) - context - 1)  # what is left, filled up from before
    return np.frombuffer(starts, np.int64)


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def as_seed(seed) -> int:
    """Return a seed of any type of whole numbers as Python's own; refuse one that TensorFlow cannot hold."""
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
