"""Parallel: applying a function to chunks of documents, in this process or in several."""

import contextlib
import pickle
import queue
import signal
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

_CHUNK_CHARS = 500_000
# A worker imports this module and what it is sent, but not the user's script: so the script needs no
# `if __name__ == "__main__":`, and does not run twice. A fork is no alternative: TensorFlow's threads can hang in it.
_WORKER = "import sys; sys.path[:] = {path!r}; from aigc_tf.corpus.parallel import _work; _work()"


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
    """Apply a function to chunks of documents, in order, in this process or in several.

    Documents are read as they are needed, with several processes at most two chunks per process ahead. If a worker
    process cannot be started or dies, perhaps for lack of memory, its chunks are processed here, with a warning.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}.")
    if processes == 1:
        yield from map(function, _chunks(documents))
        return
    workers, failures, is_over = [], [], threading.Event()
    idle = queue.SimpleQueue()  # idle workers, and the function itself in place of those that failed

    def apply(chunk):
        worker = idle.get()
        try:
            return worker(chunk)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            if worker is function or is_over.is_set():
                raise
            failures.append(error)
            worker = function
            return worker(chunk)
        finally:
            idle.put(worker)

    def result(future):
        chunk_result = future.result()
        while failures:
            warnings.warn(f"A worker process failed ({failures.pop()!r}): this process does its work.", stacklevel=3)
        return chunk_result

    with ThreadPoolExecutor(processes) as threads:
        try:
            for _ in range(processes):
                try:
                    workers.append(_Worker(function))
                    idle.put(workers[-1])
                except OSError as error:
                    failures.append(error)
                    idle.put(function)
            waiting = deque()
            for chunk in _chunks(documents):
                waiting.append(threads.submit(apply, chunk))
                if len(waiting) >= 2 * processes:
                    yield result(waiting.popleft())
            while waiting:
                yield result(waiting.popleft())
        finally:
            is_over.set()
            threads.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.end()


class _Worker:
    """A function that another process computes."""

    def __init__(self, function):
        command = [sys.executable or "python", "-c", _WORKER.format(path=sys.path)]
        self._unsent = pickle.dumps(function)
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, chunk: list[str]):
        self._process.stdin.write(self._unsent + pickle.dumps(chunk))
        self._process.stdin.flush()
        self._unsent = b""
        result, error = pickle.load(self._process.stdout)
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what is still unwritten is not needed any more
                pipe.close()


def _work() -> None:
    """Run a worker: read a function, then chunks, and write the result for each, until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    with contextlib.suppress(EOFError, BrokenPipeError):
        function = pickle.load(source)
        while True:
            chunk = pickle.load(source)
            try:
                result = function(chunk), None
            except Exception as error:
                result = None, error
            pickle.dump(result, sink)
            sink.flush()
