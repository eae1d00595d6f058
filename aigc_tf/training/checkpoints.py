"""Checkpoints: all of a training's state in one file, from which it goes on as if it had never stopped."""

import json
import os
import re
import shutil
import textwrap
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..runtime.files import rename, temporary_path

CHECKPOINTS = "checkpoints"  # the folder, in that of a run
_FORMAT = {"format": "aigc_tf checkpoint", "version": 1}
_RECORD = "record"
# The second number is the file's checksum: a name is given in one stroke, when all is written.
_NAME = re.compile(r"step-\d{10}-([0-9a-f]{8})\.npz")


def list_checkpoints(folder) -> list[Path]:
    """List the checkpoints of a folder, oldest first.

    Args:
        folder: the folder; there need not be one.

    Returns:
        Their files. Those that a killed process did not finish are not among them.
    """
    return sorted(path for path in Path(folder).glob("step-*.npz") if _NAME.fullmatch(path.name))


def write_checkpoint(folder, step: int, arrays: dict[str, list[np.ndarray]], record: dict, keep: int) -> Path:
    """Write a checkpoint, and delete those before the last few.

    Args:
        folder: where they are; it is made if need be.
        step: how many steps the training has done.
        arrays: lists of arrays by name.
        record: what else there is to know, anything that JSON can hold.
        keep: how many checkpoints to keep, this one among them.

    Returns:
        The file, such as `step-0000001200-9f86d081.npz`. It appears when it is complete and on the disk.

    Raises:
        OSError: it cannot be written; no part of it is left, and those before it are.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**_FORMAT, "numbers": {kind: len(values) for kind, values in arrays.items()}, **record})
    entries = {f"{kind}-{i}": values[i] for kind, values in arrays.items() for i in range(len(values))}
    with temporary_path(folder / "step.npz") as unfinished:
        with open(unfinished, "wb") as file:
            np.savez(file, **{_RECORD: np.frombuffer(text.encode(), np.uint8)}, **entries)
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"step-{step:010}-{_checksum(unfinished)}.npz"
        rename(unfinished, path)
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def delete_checkpoints(run_dir) -> None:
    """Delete the checkpoints of a run folder, as a training that is done needs none.

    What cannot be deleted stays, and does no harm: the same training, called again, is done at once.
    """
    shutil.rmtree(Path(run_dir, CHECKPOINTS), ignore_errors=True)


def read_newest(
    folder, warn: Callable[[str], None]
) -> tuple[dict[str, list[np.ndarray]], dict, Path] | tuple[None, None, None]:
    """Read the newest checkpoint that is whole.

    Args:
        folder: where they are.
        warn: what to do with a line on each one that is damaged, and skipped.

    Returns:
        Its arrays and its record as they were given to `write_checkpoint`, and its file; three times None if there
        is none.
    """
    for path in reversed(list_checkpoints(folder)):
        if _checksum(path) != _NAME.fullmatch(path.name).group(1):
            warn(f"warning: {path} is damaged, and skipped")
            continue
        with np.load(path) as entries:
            record = json.loads(entries[_RECORD].tobytes())
            if any(record.get(name) != value for name, value in _FORMAT.items()):
                raise ValueError(f"{path} cannot be read by this version: it must say {_FORMAT}.")
            arrays = {kind: [entries[f"{kind}-{i}"] for i in range(n)] for kind, n in record["numbers"].items()}
        return arrays, record, path
    return None, None, None


def _checksum(path: Path) -> str:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"


def require_same(path: Path, before: dict, now: dict, warn: Callable[[str], None]) -> None:
    """Refuse to go on with a training that is not the one of a checkpoint.

    Args:
        path: the checkpoint.
        before: what tells that training from others, as its record has it.
        now: the same of this one. A list is compared item by item, and so is a dict.
        warn: what to do with a line on what layers have now and did not have then, or the other way round: settings
            that another version of Keras has brought, or taken away.

    Raises:
        ValueError: they are not the same; it names what differs.
    """
    now = json.loads(json.dumps(now, default=str))
    layers, layers_now = before.get("model", {}), now.get("model", {})
    shared = {name: layers[name].keys() & layers_now[name].keys() for name in layers.keys() & layers_now.keys()}
    only_one = {key for name in shared for key in (layers[name].keys() ^ layers_now[name].keys())}
    if only_one:
        warn(f"warning: another version of Keras? Not compared are the layers' {', '.join(sorted(only_one))}")
        layers, layers_now = (
            {name: {k: v for k, v in config.items() if k in shared.get(name, config)} for name, config in of.items()}
            for of in (layers, layers_now)
        )
    differences = list(_differences("", {**before, "model": layers}, {**now, "model": layers_now}))
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"{path} is of another training: {'; '.join(differences[:3])}{more}. Go on with what it was begun with, or "
            "name another folder."
        )


def _differences(name: str, before, now):
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(f"{name} {key}".strip(), before.get(key), now.get(key))
    elif before != now:
        is_hash = isinstance(before, str) and isinstance(now, str) and len(before) == len(now) == 64
        was, is_ = (
            textwrap.shorten(json.dumps(value, ensure_ascii=False), 60, placeholder="...") for value in (before, now)
        )
        yield f"{name} differs" if is_hash else f"{name} was {was}, is {is_}"
