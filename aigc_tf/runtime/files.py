"""Files: reading text and JSON, shipped data, atomic writes, and locks."""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

_UNPACK = "Unpack it first, and name the folder."
_SAVE = "Save its text as a .txt file in UTF-8."
_UTF16 = "Convert it first, for example: iconv -f UTF-16 -t UTF-8 old.txt > new.txt"
# Files that are not UTF-8: their first bytes, what they are, and the way out.
_NOT_TEXT = (
    (b"PK\x03\x04", "a ZIP archive, such as .docx, .xlsx and .epub", f"{_UNPACK[:-1]}; or: {_SAVE}"),
    (b"\xd0\xcf\x11\xe0", "an old Office document (.doc, .xls)", _SAVE),
    (b"%PDF", "a PDF", f"{_SAVE[:-1]}, for example: pdftotext old.pdf new.txt"),
    (b"\x1f\x8b", "compressed by gzip", _UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"\xff\xfe", "UTF-16", _UTF16),
    (b"\xfe\xff", "UTF-16", _UTF16),
)
_MAX_DEPTH = 100  # of nested lists and dicts; a model's configuration has about ten
_TOO_DEEP = f"it is nested more than {_MAX_DEPTH} levels deep"
LOCK = ".lock"
_LOCKED_BY_ANOTHER = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_DAY = 86400  # seconds, more than writing any file takes
_LOCK_OF_TEMPORARY = re.compile(r"(\.[0-9a-f]{12}-)\.lock")  # locks the paths with the same prefix: `temporary_path`
_held: dict[Path, tuple] = {}  # each lock of this process -> the thread that took it, and the open file


def read_text(path) -> str:
    """Read a UTF-8 file, with or without a byte order mark; a file that is not UTF-8 is a `ValueError`."""
    try:
        # Not "utf-8-sig", which counts the offset of an error from after the byte order mark.
        return Path(path).read_text("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise not_utf8_error(path, error.object, error.object[error.start], error.start) from None


def not_utf8_error(path, start: bytes, byte: int, offset: int) -> ValueError:
    """Return the error for a file that is not UTF-8. It names the kind of file, or else the first wrong byte."""
    for first, what, way_out in _NOT_TEXT:
        if start.startswith(first):
            return ValueError(f"{path} must be UTF-8 text, but is {what}. {way_out}")
    return ValueError(
        f"{path} must be UTF-8 text, but byte {byte:#04x} at offset {offset} "
        "is not. Convert it first, for example: iconv -f GB18030 -t UTF-8 old.txt > new.txt"
    )


def parse_json(text: str | bytes):
    """Parse JSON like `json.loads`, but refuse nesting so deep that recursive functions would fail on it."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [content]
    for _ in range(_MAX_DEPTH):
        level = [child for one in level if isinstance(one, dict | list) for child in _children(one)]
        if not level:
            return content
    raise ValueError(_TOO_DEEP)


def _children(content: dict | list):
    return content.values() if isinstance(content, dict) else content


def shipped_file(name: str) -> Path:
    """Return the path of a file of `data/`, in an installed package or a source checkout."""
    package = Path(__file__).parent.parent
    installed = package / "data" / name
    return installed if installed.exists() else package.parent / "data" / name


@contextlib.contextmanager
def atomic_write(path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` if the block succeeds."""
    with temporary_path(path) as temporary:
        yield temporary
        sync(temporary)  # otherwise a power failure after the renaming could leave an empty file
        rename(temporary, Path(path))


@contextlib.contextmanager
def temporary_path(path) -> Iterator[Path]:
    """Yield a path in the folder of `path`, for a file or folder that the block renames once it is complete.

    Whatever is still there at the end is deleted. A lock marks the path as in use, so that the next writer can delete
    what killed processes left in the folder.
    """
    path = Path(path)
    _delete_leftovers(path.parent)
    # A name for this writer alone, be it a process or a thread. It keeps the suffix, by which Keras picks the format.
    prefix = f".{uuid.uuid4().hex[:12]}-"
    temporary = path.with_name(prefix + path.name)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(hold_lock(path.with_name(prefix + LOCK), wait=True))
        except OSError as error:
            error.filename = str(path)  # the path that the caller knows, not the lock's
            raise
        try:
            yield temporary
        finally:
            if not file.closed:  # closed in a forked child: see _release_in_child
                with contextlib.suppress(OSError):
                    _delete(temporary)


def _delete_leftovers(folder: Path) -> None:
    """Delete what killed processes left unfinished in a folder, as far as it can be deleted."""
    for path in folder.glob(f".*-{LOCK}"):
        if match := _LOCK_OF_TEMPORARY.fullmatch(path.name):
            # A writer that is still running is an OSError too.
            with contextlib.suppress(OSError):
                with open(path, "rb+") as file:
                    _lock_leftover(file)
                    for leftover in set(folder.glob(f"{match[1]}*")) - {path}:
                        _delete(leftover)
                    if os.name == "posix":  # before the lock is released: see _open_locked
                        path.unlink()
                if os.name != "posix":
                    path.unlink()


def _lock_leftover(file: IO) -> None:
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


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(file: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


def rename(path: Path, new: Path) -> None:
    """Rename a file or folder, replacing a file of the new name, and wait until that is on the disk."""
    os.replace(path, new)
    if os.name == "posix":  # other systems cannot open a folder
        folder = os.open(Path(new).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system has nothing to sync for a folder
                raise
        finally:
            os.close(folder)


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


def write_json(path, content: dict) -> None:
    """Write a dict as readable JSON, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
