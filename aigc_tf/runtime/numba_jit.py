"""Numba: numba_jit(), which compiles functions for the CPU and caches their code on disk."""

import contextlib
import functools
import hashlib
import sys
from pathlib import Path

import numba
from numba.core.caching import FunctionCache, NullCache


def numba_jit(**options):
    """Compile a function when it is first called, and cache the code on disk if a folder is writable.

    Args:
        **options: the options of `numba.njit`.

    Returns:
        The decorator.
    """

    def decorate(function):
        dispatcher = numba.njit(nogil=True, error_model="numpy", **options)(function)
        dispatcher._cache = _cache(function)
        return dispatcher

    return decorate


def _cache(function):
    try:
        return _OnDisk(function)
    except (RuntimeError, OSError):  # neither this folder nor the user's cache folder is writable
        return _InMemory()


class _OnDisk(FunctionCache):
    """Numba's cache, but code is also renewed when a file changes whose functions may be inlined."""

    def __init__(self, function):
        super().__init__(function)
        self._cache_file._source_stamp = self._cache_file._source_stamp, _hash_of_kernels()

    def load_overload(self, signature, context):
        try:
            found = super().load_overload(signature, context)
        except Exception:  # a damaged file may raise anything: compile again
            found = None
            with contextlib.suppress(Exception):
                self.flush()  # so that the new code goes to a new index
        if found is None:
            _announce_once()
        return found

    def save_overload(self, signature, data):
        with contextlib.suppress(Exception):  # such as a full disk: the next process compiles again
            super().save_overload(signature, data)


class _InMemory(NullCache):
    def load_overload(self, signature, context):
        _announce_once()


@functools.cache
def _hash_of_kernels() -> str:
    """Hash all files of this package with functions that are compiled, and so may be inlined."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.parent.rglob("*.py"))]
    return hashlib.sha256(b"\0".join(source for source in sources if b"numba_jit import" in source)).hexdigest()


@functools.cache
def _announce_once() -> None:
    print("aigc_tf: compiling for this machine, once: up to half a minute on one core", file=sys.stderr, flush=True)
