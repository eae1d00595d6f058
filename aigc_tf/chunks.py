"""Chunks: work on many documents, some at a time, in this process or in several."""

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

_CHUNK_CHARS = 500_000


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents into lists of about `_CHUNK_CHARS` characters."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= _CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def map_chunks(function, documents: Iterable[str], processes: int) -> Iterator:
    """Apply a function to chunks of documents, in order, in this process or in several."""
    if processes == 1:
        yield from map(function, _chunks(documents))
        return
    # "spawn" because a fork of a process that runs TensorFlow's threads can hang.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, _chunks(documents))
