"""Locks: folders and files that one process or thread uses at a time."""

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

LOCK = ".lock"
_LOCKED_BY_ANOTHER = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_held: dict[Path, tuple] = {}  # each lock of this process -> the thread that took it, and the open file
_DAY = 86400  # seconds, more than writing any file takes


@contextlib.contextmanager
def locked(folder) -> Iterator[None]:
    """Lock a folder for this thread, creating the folder if needed; it may be locked again by the same thread.

    The system releases the lock of a process that is killed. A folder created for the lock is removed again if it stays
    empty.

    Raises:
        BlockingIOError: another process or thread holds the lock; the message says which.
    """
    lock = Path(folder, LOCK)
    if _held.get(lock.resolve(), (None,))[0] == threading.get_ident():
        yield
        return
    created = [path for path in lock.parents if not path.exists()]
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with hold_lock(lock):
            yield
    finally:
        with contextlib.suppress(OSError):  # it is not empty
            for path in created:
                path.rmdir()


@contextlib.contextmanager
def hold_lock(lock: Path, wait: bool = False) -> Iterator[IO]:
    """Take a lock and yield its file, which is created for the lock and deleted with it."""
    file, key = _open_locked(lock, wait), lock.resolve()
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        _held[key] = threading.get_ident(), file
        yield file
    finally:
        _held.pop(key, None)
        is_own = not file.closed  # closed in a forked child: see _release_in_child
        if os.name == "posix" and is_own:
            lock.unlink(missing_ok=True)  # before the lock is released: see _open_locked
        file.close()
        if os.name != "posix":
            with contextlib.suppress(OSError):  # another process has just opened it
                lock.unlink()


def _release_in_child() -> None:
    """Leave the locks to the parent of a fork: a child that kept the files open would keep the locks too."""
    for _, file in _held.values():
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def _open_locked(path: Path, wait: bool) -> IO:
    while True:
        file = open(path, "ab+")  # noqa: SIM115 (hold_lock closes it)
        try:
            _lock(file, wait)
        except OSError as error:
            if error.errno in _LOCKED_BY_ANOTHER:
                owner = b""
                with contextlib.suppress(OSError):  # where others may not read what is locked
                    file.seek(0)
                    owner = file.read(200)
                file.close()
                owner = owner.decode("utf-8", "replace") or "another process"
                raise BlockingIOError(
                    errno.EAGAIN,
                    f"A training is running in this folder ({owner}). Wait until it ends, or choose another folder",
                    str(path.parent),
                ) from None
            return file  # a file system without locks, such as some network mounts: continue without one
        # The owner may have deleted the file after it was opened here: then the lock is on a file without a name.
        with contextlib.suppress(FileNotFoundError):
            if os.name != "posix" or os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


def _lock(file: IO, wait: bool = False) -> None:
    """Lock an open file until it is closed; an `OSError` if it is locked or its file system has no locks."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    file.seek(2**20)  # a byte that is never written, so that the content stays readable
    while True:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            return
        except OSError as error:
            if not wait or error.errno != errno.EDEADLK:  # LK_LOCK gives up after ten seconds
                raise


def lock_leftover(file: IO) -> None:
    """Lock what a killed process left; what another machine left, only when old, as not all locks reach over NFS."""
    is_old = time.time() - os.fstat(file.fileno()).st_mtime > _DAY
    try:
        _lock(file)
    except OSError as error:
        if error.errno in _LOCKED_BY_ANOTHER or not is_old:
            raise
        return  # a file system without locks
    file.seek(0)
    owner = file.read(200)
    if owner and not is_old and not owner.endswith(f" on {socket.gethostname()}".encode()):
        raise BlockingIOError
