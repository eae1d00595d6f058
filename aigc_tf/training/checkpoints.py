"""Checkpoints: the whole state of a training run in one file, from which it resumes as if never interrupted."""

import json
import os
import re
import shutil
import textwrap
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..runtime.files import rename, temporary_path, to_json

CHECKPOINTS = "checkpoints"  # the folder, in that of a run
_FORMAT = {"format": "aigc_tf checkpoint", "version": 1}
_RECORD = "record"
# The second number is the checksum of the file, which gets this name when it is complete.
_NAME = re.compile(r"step-\d{10}-([0-9a-f]{8})\.npz")


def list_checkpoints(folder) -> list[Path]:
    """List the checkpoints of a folder, oldest first.

    Args:
        folder: the folder, which need not exist.

    Returns:
        Their files, without those that a killed process left unfinished.
    """
    return sorted(path for path in Path(folder).glob("step-*.npz") if _NAME.fullmatch(path.name))


def write_checkpoint(folder, step: int, arrays: dict[str, list[np.ndarray]], record: dict, keep: int) -> Path:
    """Write a checkpoint, and delete the oldest ones.

    Args:
        folder: the folder of the checkpoints, created if it does not exist.
        step: how many steps have been trained.
        arrays: lists of arrays by name.
        record: everything else, as JSON can hold it.
        keep: how many checkpoints to keep, including this one.

    Returns:
        The file, such as `step-0000001200-9f86d081.npz`. It appears only when it is complete and on the disk.

    Raises:
        OSError: it cannot be written. Nothing of it is left, and earlier checkpoints are kept.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = to_json({**_FORMAT, "numbers": {kind: len(values) for kind, values in arrays.items()}, **record})
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
    """Delete the checkpoints of a run folder, which a finished run no longer needs.

    Files that cannot be deleted do no harm: the same run, started again, ends immediately.
    """
    shutil.rmtree(Path(run_dir, CHECKPOINTS), ignore_errors=True)


def read_newest(
    folder, warn: Callable[[str], None]
) -> tuple[dict[str, list[np.ndarray]], dict, Path] | tuple[None, None, None]:
    """Read the newest undamaged checkpoint.

    Args:
        folder: the folder of the checkpoints.
        warn: called with a warning about each damaged checkpoint, which is skipped.

    Returns:
        Its arrays and record as given to `write_checkpoint`, and its file; `(None, None, None)` if there is none.
    """
    for path in reversed(list_checkpoints(folder)):
        if _checksum(path) != _NAME.fullmatch(path.name).group(1):
            warn(f"warning: {path} is damaged, and skipped")
            continue
        with np.load(path) as entries:
            record = json.loads(entries[_RECORD].tobytes())
            if any(record.get(name) != value for name, value in _FORMAT.items()):
                raise ValueError(f"{path} cannot be read by this version: it must contain {_FORMAT}.")
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
    """Refuse to resume a checkpoint of another training run.

    Args:
        path: the checkpoint.
        before: the identity of the run in its record.
        now: the identity of this run.
        warn: called with a warning about layer settings that only one of them has, which are ignored: another version
            of Keras added or removed them.

    Raises:
        ValueError: they differ; the message says where.
    """
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
            f"{path} belongs to another training run: {'; '.join(differences[:3])}{more}. Train with the settings it "
            "was begun with, or name another folder."
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
