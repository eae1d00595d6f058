"""Files: reading text and JSON, shipped data, and atomic writes."""

import contextlib
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .locks import LOCK, hold_lock, lock_leftover

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
_LOCK_OF_TEMPORARY = re.compile(r"(\.[0-9a-f]{12}-)\.lock")  # locks the paths with the same prefix: `temporary_path`


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
            if not file.closed:  # closed in a forked child: see locks.py
                with contextlib.suppress(OSError):
                    _delete(temporary)


def _delete_leftovers(folder: Path) -> None:
    """Delete what killed processes left unfinished in a folder, as far as it can be deleted."""
    for path in folder.glob(f".*-{LOCK}"):
        if match := _LOCK_OF_TEMPORARY.fullmatch(path.name):
            # A writer that is still running is an OSError too.
            with contextlib.suppress(OSError):
                with open(path, "rb+") as file:
                    lock_leftover(file)
                    for leftover in set(folder.glob(f"{match[1]}*")) - {path}:
                        _delete(leftover)
                    if os.name == "posix":  # before the lock is released: see locks.py
                        path.unlink()
                if os.name != "posix":
                    path.unlink()


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


def write_json(path, content: dict) -> None:
    """Write a dict as readable JSON, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(to_json(content, indent=1) + "\n", "utf-8")


def to_json(content, **layout) -> str:
    """Write as JSON what JSON can hold, and the numbers of NumPy, which users compute settings with."""
    return json.dumps(content, ensure_ascii=False, default=_python_number, **layout)


def _python_number(value):
    if not isinstance(value, np.number | np.bool_):
        raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
    return value.item()
