"""Numba: numba_jit(), by which functions are compiled for the CPU by numba, and their code is kept on disk."""

import contextlib
import functools
import hashlib
import sys
from pathlib import Path

import numba
from numba.core.caching import FunctionCache, NullCache


def numba_jit(**options):
    """Compile a function when it is first called, and keep the code on disk where there is a place for it.

    Args:
        **options: those of `numba.njit`.

    Returns:
        The decorator.
    """

    def compile_lazily(function):
        dispatcher = numba.njit(nogil=True, error_model="numpy", **options)(function)
        dispatcher._cache = _cache(function)
        return dispatcher

    return compile_lazily


def _cache(function):
    try:
        return _OnDisk(function)
    except (RuntimeError, OSError):  # neither this folder nor the user's own can be written
        return _InMemory()


class _OnDisk(FunctionCache):
    """Numba's own cache, which renews a function's code with the function's file alone, though others are inlined."""

    def __init__(self, function):
        super().__init__(function)
        self._cache_file._source_stamp = self._cache_file._source_stamp, _hash_of_kernels()

    def load_overload(self, signature, context):
        try:
            found = super().load_overload(signature, context)
        except Exception:  # a damaged file, of which any error may come: there is no code
            found = None
            with contextlib.suppress(Exception):
                self.flush()  # what is saved now stands in a new index
        if found is None:
            _say_once()
        return found

    def save_overload(self, signature, data):
        with contextlib.suppress(Exception):  # such as a full disk: it is compiled again another time
            super().save_overload(signature, data)


class _InMemory(NullCache):
    def load_overload(self, signature, context):
        _say_once()


@functools.cache
def _hash_of_kernels() -> str:
    """Hash all files of this package whose code may be compiled, or inlined where it is."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.parent.rglob("*.py"))]
    return hashlib.sha256(b"\0".join(source for source in sources if b"numba_jit import" in source)).hexdigest()


@functools.cache
def _say_once() -> None:
    print("aigc_tf: compiling for this machine, once: up to half a minute of one core", file=sys.stderr, flush=True)
