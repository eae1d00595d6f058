"""Numba tools: whether numba can be used in this process, told without importing numba where it need not be."""

import functools
import importlib.util
import os
import sys
import threading
import warnings

# One call of compiled code at a time: not every threading layer of numba bears two, and each call uses all cores.
one_at_a_time = threading.Lock()

_forked = False


def numba_is_usable() -> bool:
    """Tell whether compiled code can run here; warn once where numba is installed and cannot be used."""
    return numba_problem() is None


def numba_problem() -> str | None:
    """Tell why compiled code cannot run here, None if it can."""
    if _forked:
        return (
            "this process was forked from one that had run code compiled by numba, whose threads do not live on in it"
        )
    return _problem_of_import()


@functools.cache
def _problem_of_import() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install numba"
    try:
        import numba
    except Exception as error:  # of any kind: it also runs native code, for other versions of NumPy among others
        problem = f"numba is installed, and its import fails: {' '.join(str(error).split())}"
    else:
        if not numba.config.DISABLE_JIT:
            return None
        problem = "NUMBA_DISABLE_JIT is set"
    warnings.warn(f"aigc_tf works without numba, and slower: {problem}", stacklevel=3)
    return problem


def _note_fork() -> None:
    """Note in a forked child that numba's threads are gone: where any were begun, or code of ours was running."""
    global _forked
    parallel = sys.modules.get("numba.np.ufunc.parallel")
    _forked = _forked or one_at_a_time.locked() or getattr(parallel, "_is_initialized", parallel is not None)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_note_fork)
