"""Store: documents as one long array of token ids, in memory or in a folder on disk."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ..runtime.files import parse_json, rename, temporary_path, write_json
from .tokenizer import Tokenizer

_FORMAT = {"format": "aigc_tf token store", "version": 1}
_TOKENS, _MANIFEST = "tokens.bin", "manifest.json"
_BLOCK = 2**20  # tokens of a store that are looked at in one go
_NUM_SLICES = 100  # of a sample


def make_store(documents: Iterable[str], tokenizer: Tokenizer, path=None, processes: int = 1) -> np.ndarray:
    """Encode documents into a token store: one long array of ids, on disk or in memory.

    Each document is framed by the ids for begin and end of document. On disk, the store is a folder with the ids in
    `tokens.bin`, and their number, type, hash and the tokenizer's fingerprint in `manifest.json`. The folder appears
    only when it is complete.

    Args:
        documents: the documents, or a generator of them: with a `path`, only a chunk at a time is in memory.
        tokenizer: the tokenizer.
        path: the folder to create, or None for a store in memory.
        processes: how many processes encode (see `Tokenizer.train`).

    Returns:
        The ids, `uint16` or `uint32`, shape (tokens,); with a `path`, memory-mapped as by `open_store`.

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
    """Open a token store made by `make_store`, without reading it into memory.

    Args:
        path: the folder.
        tokenizer: the tokenizer it was made with.

    Returns:
        The ids, memory-mapped read-only, `uint16` or `uint32`, shape (tokens,).

    Raises:
        FileNotFoundError: there is no store at `path`.
        ValueError: the store belongs to another tokenizer, or its size or dtype is not that of its manifest. The hash
            is not checked, as that would mean reading all ids.
    """
    path = Path(path)
    if not (path / _MANIFEST).is_file():
        raise FileNotFoundError(f"{path} is no token store: it has no {_MANIFEST}. Make one with make_store.")
    try:
        manifest = parse_json((path / _MANIFEST).read_text("utf-8"))
        if any(manifest.get(key) != value for key, value in _FORMAT.items()):
            raise ValueError(f"it must contain {_FORMAT}")
        dtype, num_tokens, made_with = manifest["dtype"], int(manifest["tokens"]), manifest["tokenizer"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
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
    for _, block in blocks_of(ids):
        counts += np.bincount(block, minlength=vocab_size)
    return counts


def sample_tokens(ids: np.ndarray, num_tokens: int) -> np.ndarray:
    """Take about `num_tokens` of a store, in slices spread evenly over it; or all, if it has no more."""
    if len(ids) <= num_tokens:
        return ids
    size = max(1, num_tokens // _NUM_SLICES)
    starts = np.linspace(0, len(ids) - size, _NUM_SLICES).astype(np.int64)
    return np.concatenate([ids[start : start + size] for start in starts])


def blocks_of(ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the start and the ids of each block of a store, which may be larger than the memory."""
    for start in range(0, len(ids), _BLOCK):
        yield start, ids[start : start + _BLOCK]


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
