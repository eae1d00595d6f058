"""Files, the floor under the rooms: read text, find shipped data, write whole or not at all, one writer at a time."""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

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
_BESIDE = re.compile(r"\.[0-9a-f]{12}-")  # how names begin that are written to beside others
_being_written: set[str] = set()  # those of them that threads of this process are writing to
_held: dict[Path, tuple] = {}  # a folder that this process has locked -> the thread that did, and the file of the lock


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
    package = Path(__file__).parent
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
    """Give a path beside `path` for a file or a folder to be renamed when it is whole; what stays there is deleted."""
    path = Path(path)
    # Of this writer alone, be it a process or a thread. The suffix stays last: Keras decides by it what to write.
    temporary = path.with_name(f".{uuid.uuid4().hex[:12]}-{path.name}")
    _being_written.add(temporary.name)
    try:
        yield temporary
    finally:
        _being_written.discard(temporary.name)
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def delete_leftovers(folder) -> None:
    """Delete what killed processes had begun to write to a folder; for the one that has it locked.

    What another thread of this process is writing there stays.
    """
    for path in Path(folder).glob(".*-*"):
        if not _BESIDE.match(path.name) or path.name in _being_written:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
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

    The system takes the lock back from a process that is killed; what that had begun to write there is deleted now. A
    folder made for the lock goes again if it stays empty.

    Raises:
        BlockingIOError: another process or thread has it; the message says which.
    """
    folder = Path(folder)
    key = folder.resolve()
    if key in _held and _held[key][0] == threading.get_ident():
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = _open_locked(folder / LOCK)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
        _held[key] = threading.get_ident(), file
        delete_leftovers(folder)
        yield
    finally:
        _held.pop(key, None)
        is_own = not file.closed  # or this is a child: see _let_go_in_child
        if os.name == "posix" and is_own:
            Path(file.name).unlink(missing_ok=True)  # before it is released: see _open_locked
        file.close()
        if os.name != "posix":
            with contextlib.suppress(OSError):  # another process has just opened it
                Path(file.name).unlink()
        with contextlib.suppress(OSError):  # it is not empty
            for path in made:
                path.rmdir()


def _let_go_in_child() -> None:
    """Leave the locks to the process that was forked, which has them as long as its child would not."""
    for _, file in _held.values():
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def _open_locked(path: Path):
    while True:
        file = open(path, "ab+")  # noqa: SIM115 (whoever holds the lock closes it)
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                file.seek(2**20)  # a byte that nobody writes: who reads what the file says is not kept from it
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                file.seek(0)
                owner = file.read(200).decode("utf-8", "replace") or "another process"
                file.close()
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


def write_json(path, content: dict) -> None:
    """Write a dict as readable JSON, whole or not at all."""
    with write_beside(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
