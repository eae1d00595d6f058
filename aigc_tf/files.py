"""Files, the floor under the rooms: read text, find shipped data, write whole or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path


def read_text(path) -> str:
    """Read a UTF-8 file, with or without a byte order mark; a file that is not UTF-8 is a `ValueError`."""
    try:
        # Not "utf-8-sig", which counts the offset of an error from after the byte order mark.
        return Path(path).read_text("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be UTF-8 text, but byte {error.object[error.start]:#04x} at offset {error.start} "
            "is not. Convert it first, for example: iconv -f GB18030 -t UTF-8 old.txt > new.txt"
        ) from None


def shipped_file(name: str) -> Path:
    """Find a file of `data/`, both in an installed package and in a source checkout."""
    package = Path(__file__).parent
    installed = package / "data" / name
    return installed if installed.exists() else package.parent / "data" / name


@contextlib.contextmanager
def write_beside(path) -> Iterator[Path]:
    """Give a path to write to, and rename what was written to `path` only when all went well."""
    path = Path(path)
    # The suffix stays last: Keras decides by it what to write.
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # or a power failure after the renaming may leave an empty file of that name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content: dict) -> None:
    """Write a dict as readable JSON, whole or not at all."""
    with write_beside(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", "utf-8")
