"""Files, the floor under the rooms: read text, find shipped data, write whole or not at all, one writer at a time."""

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
# How files that are no UTF-8 begin, what they are, and what to do.
_KINDS = (
    (b"PK\x03\x04", "a ZIP archive, as .docx, .xlsx and .epub are too", f"{_UNPACK[:-1]}; or: {_SAVE}"),
    (b"\xd0\xcf\x11\xe0", "an old Office document (.doc, .xls)", _SAVE),
    (b"%PDF", "a PDF", f"{_SAVE[:-1]}, for example: pdftotext old.pdf new.txt"),
    (b"\x1f\x8b", "compressed by gzip", _UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"\xff\xfe", "UTF-16", _UTF16),
    (b"\xfe\xff", "UTF-16", _UTF16),
)
_DEEPEST = 100  # lists and dicts in one another; those of a model have about ten
_TOO_DEEP = f"it is nested more than {_DEEPEST} levels deep"
LOCK = ".lock"
_TAKEN = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # the errors of a lock that another has
_DAY = 86400  # seconds, which no file takes to be written
_OF_A_WRITER = re.compile(r"(\.[0-9a-f]{12}-)\.lock")  # the lock on what begins with the same letters (see `beside`)
_held: dict[Path, tuple] = {}  # a lock that this process has -> the thread that took it, and its open file


def read_text(path) -> str:
    """Read a UTF-8 file, with or without a byte order mark; a file that is not UTF-8 is a `ValueError`."""
    try:
        # Not "utf-8-sig", which counts the offset of an error from after the byte order mark.
        return Path(path).read_text("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise not_utf8(path, error.object, error.object[error.start], error.start) from None


def not_utf8(path, start: bytes, byte: int, offset: int) -> ValueError:
    """Return the error that a file is not UTF-8: what it is, as its first bytes tell, or else which byte is wrong."""
    for first, what, way_out in _KINDS:
        if start.startswith(first):
            return ValueError(f"{path} must be UTF-8 text, but is {what}. {way_out}")
    return ValueError(
        f"{path} must be UTF-8 text, but byte {byte:#04x} at offset {offset} "
        "is not. Convert it first, for example: iconv -f GB18030 -t UTF-8 old.txt > new.txt"
    )


def from_json(text: str | bytes):
    """Read JSON as `json.loads` does, and refuse what is nested so deep that functions which follow it would fail."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [content]
    for _ in range(_DEEPEST):
        level = [inner for one in level if isinstance(one, dict | list) for inner in _inside(one)]
        if not level:
            return content
    raise ValueError(_TOO_DEEP)


def _inside(content: dict | list):
    return content.values() if isinstance(content, dict) else content


def shipped_file(name: str) -> Path:
    """Find a file of `data/`, both in an installed package and in a source checkout."""
    package = Path(__file__).parent.parent
    installed = package / "data" / name
    return installed if installed.exists() else package.parent / "data" / name


@contextlib.contextmanager
def write_beside(path) -> Iterator[Path]:
    """Give a path to write to, and rename what was written to `path` only when all went well."""
    with beside(path) as temporary:
        yield temporary
        sync(temporary)  # or a power failure after the renaming may leave an empty file of that name
        rename(temporary, Path(path))


@contextlib.contextmanager
def beside(path) -> Iterator[Path]:
    """Give a path beside `path` for a file or a folder to be renamed when it is whole; what stays there is deleted.

    A lock shows that its writer lives: what killed ones have left beside `path` is deleted first.
    """
    path = Path(path)
    _delete_leftovers(path.parent)
    # Of this writer alone, be it a process or a thread. The suffix stays last: Keras decides by it what to write.
    start = f".{uuid.uuid4().hex[:12]}-"
    temporary = path.with_name(start + path.name)
    with holding(path.with_name(start + LOCK), wait=True) as file:
        try:
            yield temporary
        finally:
            if not file.closed:  # or this is a child: see _let_go_in_child
                with contextlib.suppress(OSError):
                    _delete(temporary)


def _delete_leftovers(folder: Path) -> None:
    """Delete what killed processes had begun to write to a folder; what cannot be deleted stays."""
    for path in folder.glob(f".*-{LOCK}"):
        if own := _OF_A_WRITER.fullmatch(path.name):
            # A writer that lives is an OSError too.
            with contextlib.suppress(OSError):
                with open(path, "rb+") as file:
                    _lock_left(file)
                    for left in set(folder.glob(f"{own[1]}*")) - {path}:
                        _delete(left)
                    if os.name == "posix":  # before it is released: see _open_locked
                        path.unlink()
                if os.name != "posix":
                    path.unlink()


def _lock_left(file: IO) -> None:
    """Lock what a killed process of this machine has left, or of any if it is old: not all locks reach over the net."""
    is_old = time.time() - os.fstat(file.fileno()).st_mtime > _DAY
    try:
        _lock(file)
    except OSError as error:
        if error.errno in _TAKEN or not is_old:
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
    """Wait until a file that was written is on the disk."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


def rename(path: Path, new: Path) -> None:
    """Rename a file or a folder, replacing a file of the new name, and wait until the disk knows of it."""
    os.replace(path, new)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(Path(new).parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that keep no folder in memory
                raise
        finally:
            os.close(folder)


@contextlib.contextmanager
def locked(folder) -> Iterator[None]:
    """Keep a folder, which is made if need be, for this thread: others that lock it meanwhile get an error.

    The system takes the lock back from a process that is killed. A folder made for the lock goes again if it stays
    empty.

    Raises:
        BlockingIOError: another process or thread has it; the message says which.
    """
    lock = Path(folder, LOCK)
    if _held.get(lock.resolve(), (None,))[0] == threading.get_ident():
        yield
        return
    made = [path for path in lock.parents if not path.exists()]
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with holding(lock):
            yield
    finally:
        with contextlib.suppress(OSError):  # it is not empty
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def holding(lock: Path, wait: bool = False) -> Iterator[IO]:
    """Take a lock, whose file is made for it and deleted with it, and give that file."""
    file, key = _open_locked(lock, wait), lock.resolve()
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        _held[key] = threading.get_ident(), file
        yield file
    finally:
        _held.pop(key, None)
        is_own = not file.closed  # or this is a child: see _let_go_in_child
        if os.name == "posix" and is_own:
            lock.unlink(missing_ok=True)  # before it is released: see _open_locked
        file.close()
        if os.name != "posix":
            with contextlib.suppress(OSError):  # another process has just opened it
                lock.unlink()


def _let_go_in_child() -> None:
    """Leave the locks to the process that was forked, which has them as long as its child would not."""
    for _, file in _held.values():
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def _open_locked(path: Path, wait: bool) -> IO:
    while True:
        file = open(path, "ab+")  # noqa: SIM115 (whoever holds the lock closes it)
        try:
            _lock(file, wait)
        except OSError as error:
            if error.errno in _TAKEN:
                owner = b""
                with contextlib.suppress(OSError):  # where others may not read what is locked
                    file.seek(0)
                    owner = file.read(200)
                file.close()
                owner = owner.decode("utf-8", "replace") or "another process"
                raise BlockingIOError(
                    errno.EAGAIN,
                    f"A training is going on in this folder ({owner}). Wait for its end, or name another folder",
                    str(path.parent),
                ) from None
            return file  # a file system without locks, such as some that are mounted over the net: there is none then
        # Between the opening and the locking its owner may have deleted it: then the name is free, or another's.
        with contextlib.suppress(FileNotFoundError):
            if os.name != "posix" or os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


def _lock(file: IO, wait: bool = False) -> None:
    """Lock an open file until it is closed; an `OSError` if another has it, or its file system has no locks."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    file.seek(2**20)  # a byte that nobody writes: who reads what the file says is not kept from it
    while True:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            return
        except OSError as error:
            if not wait or error.errno != errno.EDEADLK:  # as it is after ten seconds
                raise


def write_json(path, content: dict) -> None:
    """Write a dict as readable JSON, whole or not at all."""
    with write_beside(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
