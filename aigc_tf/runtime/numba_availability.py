"""Numba availability: whether compiled code can run in this process, checked without importing numba if possible."""

import functools
import importlib.util
import os
import sys
import threading
import warnings

# One parallel call at a time: not every threading layer of numba supports two, and each call uses all cores.
numba_lock = threading.Lock()

_forked = False


def numba_is_usable() -> bool:
    """Return whether compiled code can run here; warn once if numba is installed but cannot be used."""
    return numba_problem() is None


def numba_problem() -> str | None:
    """Return why compiled code cannot run here, or None if it can."""
    if _forked:
        return (
            "this process was forked from one that had run code compiled by numba, whose threads do not survive a fork"
        )
    return _problem_of_import()


@functools.cache
def _problem_of_import() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install numba"
    try:
        import numba

        if not numba.config.DISABLE_JIT:
            return None
        problem = "NUMBA_DISABLE_JIT is set"
    except Exception as error:  # any kind: it loads native code, perhaps for another version of NumPy
        problem = f"numba is installed, and its import fails: {' '.join(str(error).split())}"
    warnings.warn(f"aigc_tf runs without numba, and more slowly: {problem}", stacklevel=3)
    return problem


def _note_fork() -> None:
    """Note in a forked child that numba's threads are gone, if any had been started or compiled code was running."""
    global _forked
    parallel = sys.modules.get("numba.np.ufunc.parallel")
    _forked = _forked or numba_lock.locked() or getattr(parallel, "_is_initialized", parallel is not None)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_note_fork)
