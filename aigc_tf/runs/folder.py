"""Run folder: save(), load(), load_writer(), read_run(): a model, its tokenizer, and how they were made."""

import contextlib
import hashlib
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from ..corpus.tokenizer import Tokenizer
from ..models.contract import check_model
from ..models.keras_file import check_keras_file, read_keras_file
from ..models.weights import LstmWeights, TransformerWeights
from ..runtime.files import parse_json, rename, sync, temporary_path, to_json, write_json
from ..runtime.keras_internals import computes_its_graph
from .versions import versions

_MODEL, _TOKENIZER, _RUN = "model.keras", "tokenizer.json", "run.json"
_SAVING = ".saving"  # in a run folder, a folder of complete files that are being moved to their places
_FORMAT = {"format": "aigc_tf run", "version": 1}
_OWN_KEYS = (*_FORMAT, "saved", "model", "tokenizer", "versions", "sha256")  # what `save` itself writes to `run.json`
_READ_ATTEMPTS = 9  # of a run that is being replaced


def save(path, model, tokenizer: Tokenizer, **record) -> None:
    """Write a run folder: `model.keras`, `tokenizer.json` and `run.json`.

    The files of an earlier run in the folder are replaced in one step, when all new ones are written: killed at any
    moment, it leaves one run or the other complete. `model.keras` holds the weights without the optimizer, and loads
    in plain Keras too. If several hosts train together, the first one writes.

    Args:
        path: the folder, which is created if it does not exist; other files in it stay.
        model: the `keras.Model`.
        tokenizer: its tokenizer.
        **record: what else to write to `run.json`, such as `settings`, `data` and `figures`: anything that JSON can
            hold, under names that `save` does not use itself; `settings` must be a dict.

    Raises:
        ValueError: model and tokenizer do not belong together, `read_run` would refuse `record`, or the model comes
            from `load_writer` or from a class that overrides `call`.
    """
    from ..runtime.backend import keras
    from ..runtime.distribution import is_first_host

    if isinstance(model, TransformerWeights | LstmWeights):
        raise ValueError(
            "save needs a keras.Model, got the weights that load_writer returns. Load it with aigc_tf.load."
        )
    check_model(model, tokenizer)
    run = {
        **_FORMAT,
        "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "model": {"name": model.name, "parameters": model.count_params(), "context": model.input_shape[1]},
        "tokenizer": {"unit": tokenizer.unit, "vocab_size": tokenizer.vocab_size},
        "versions": versions(),
        "sha256": dict.fromkeys((_MODEL, _TOKENIZER), ""),  # filled in below
    }
    run = _with_record(run, record)
    if not computes_its_graph(model):
        raise ValueError(
            f"save writes the graph of a model, but {type(model).__name__} overrides call(), which would be lost. "
            "Make what it does a layer of the graph: keras.Model(ids, layer(ids))."
        )
    if not is_first_host():
        return
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with temporary_path(path / _SAVING) as folder:
        folder.mkdir()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy keyword")
            # The same graph as a model that was never compiled: no optimizer state in the file.
            keras.Model(model.inputs[0], model.outputs[0], name=model.name).save(folder / _MODEL)
        sync(folder / _MODEL)
        tokenizer.save(folder / _TOKENIZER)
        run["sha256"] = {name: _sha256(folder / name) for name in (_MODEL, _TOKENIZER)}
        write_json(folder / _RUN, run)
        for attempt in range(100):
            _finish_saving(path)  # what a killed process or another thread has begun
            try:
                rename(folder, path / _SAVING)  # from here on the new run is the one that is loaded
                break
            except OSError:  # another thread was faster
                if attempt == 99 or not (path / _SAVING).exists():
                    raise
        _finish_saving(path)


def add_to_run(path, **record) -> None:
    """Add to the `run.json` of a run folder.

    Args:
        path: the folder that `save` wrote.
        **record: as for `save`; entries of the same names are replaced.

    Raises:
        FileNotFoundError: there is no such folder, or it is not a run folder.
        ValueError: `run.json` is damaged or of another version, or `read_run` would refuse `record`.
    """
    from ..runtime.distribution import is_first_host

    if is_first_host():
        _finish_saving(Path(path))
        write_json(Path(path) / _RUN, _with_record(read_run(path), record))


def _with_record(run: dict, record: dict) -> dict:
    """Return the content of `run.json` with a record added, or refuse one that could not be read again."""
    if taken := sorted(record.keys() & {*_OWN_KEYS}):
        raise ValueError(
            f"The names {', '.join(_OWN_KEYS)} of {_RUN} are reserved, got {', '.join(taken)}. Use others."
        )
    run = {**run, **record}
    try:
        _check_run(parse_json(to_json(run).encode()))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{_RUN} cannot hold what was given: {error}.") from None
    return run


def _finish_saving(path: Path) -> None:
    """Move the files of a run that was written to their places; until then `_file` finds them where they are."""
    for name in (_MODEL, _TOKENIZER, _RUN):
        with contextlib.suppress(FileNotFoundError):  # it was moved before
            rename(path / _SAVING / name, path / name)
    with contextlib.suppress(OSError):  # it was removed before, or holds the next run
        (path / _SAVING).rmdir()


def _file(path: Path, name: str) -> Path:
    """Find a file of a run, even if the process that moved it to its place was killed."""
    moving = path / _SAVING / name
    return moving if moving.is_file() else path / name


def has_run(path: Path) -> bool:
    """Check whether a folder holds a run."""
    return _file(path, _RUN).is_file()


def load(path):
    """Load the model and the tokenizer of a run folder.

    Args:
        path: the folder that `save` wrote.

    Returns:
        The `keras.Model`, not compiled, and the tokenizer.

    Raises:
        FileNotFoundError: there is no such folder, or it is not a run folder.
        ValueError: the files do not belong together, or are damaged.
    """
    return _read_consistently(path, _load)


def _load(path: Path):
    from ..runtime.backend import keras

    file = _file(path, _MODEL)
    try:
        model = keras.models.load_model(file, compile=False, safe_mode=True)  # safe_mode: the file cannot run code
    except (MemoryError, OSError):
        raise
    except Exception as error:  # of any kind, as Keras builds what the file's configuration says
        reason = str(error) or type(error).__name__
        raise ValueError(f"Keras {keras.__version__} cannot load {file}: {reason}.") from error
    return model, Tokenizer.load(_file(path, _TOKENIZER))


def load_writer(path):
    """Load the weights that `generate` needs from a run folder, without loading Keras or TensorFlow.

    That takes a fraction of a second. A model that `aigc_tf` did not build is loaded as by `load`.

    Args:
        path: the folder that `save` wrote.

    Returns:
        The weights, which `generate`, `generate_batch`, `stream`, `evaluate` and `surprisal` take in place of a
        model, and the tokenizer.

    Raises:
        FileNotFoundError: there is no such folder, or it is not a run folder.
        ValueError: the files do not belong together, or are damaged.
    """
    return _read_consistently(path, _load_writer)


def _load_writer(path: Path):
    weights = read_keras_file(_file(path, _MODEL))
    return (weights, Tokenizer.load(_file(path, _TOKENIZER))) if weights else _load(path)


def _read_consistently(path, read: Callable[[Path], tuple]) -> tuple:
    """Check and read a run folder, and read it again if a save has replaced the run meanwhile."""
    path = Path(path)
    for attempt in range(_READ_ATTEMPTS):
        before = _stamps(path)
        is_last = attempt == _READ_ATTEMPTS - 1
        try:
            _check_folder(path)
            found = read(path)
        except (ValueError, OSError):
            if is_last or _stamps(path) == before:
                raise
        else:
            if is_last or _stamps(path) == before:
                return found
    raise AssertionError("the last attempt returns or raises")


def _stamps(path: Path) -> list:
    """Return what changes when a save replaces the run in a folder."""
    stamps = []
    for file in (path / _SAVING, path / _SAVING / _RUN, path / _RUN):
        with contextlib.suppress(OSError):
            status = file.stat()
            stamps.append((str(file), status.st_ino, status.st_mtime_ns))
    return stamps


def _check_folder(path: Path) -> None:
    """Refuse a folder whose files differ from their hashes in `run.json`, or a model file that reads other files."""
    expected = read_run(path)["sha256"]
    for name in (_MODEL, _TOKENIZER):
        if not _file(path, name).is_file():
            raise FileNotFoundError(f"The run folder {path} has no {name}. Save the run again.")
        if _sha256(_file(path, name)) != expected[name]:
            raise ValueError(f"{path / name} does not have the hash in {_RUN}: it is damaged, or of another run.")
    check_keras_file(_file(path, _MODEL))


def read_run(path) -> dict:
    """Read the `run.json` of a run folder: settings, data, figures, versions.

    Args:
        path: the folder that `save` wrote.

    Returns:
        `dict`, as JSON has it.

    Raises:
        FileNotFoundError: there is no such folder, or it is not a run folder.
        ValueError: `run.json` is damaged or of another version.
    """
    file = _file(Path(path), _RUN)
    if not file.is_file():
        below = sorted(str(found.parent) for found in Path(path).glob(f"*/{_RUN}"))[:9]
        way = (
            f"Name one of the run folders in it: {', '.join(below)}"
            if below
            else "Name a folder that `train` or `save` wrote"
        )
        raise FileNotFoundError(f"{path} is not a run folder: there is no {file}. {way}.")
    try:
        run = parse_json(file.read_text("utf-8"))
        _check_run(run)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read by this version: {error}.") from None
    return run


def _check_run(run) -> None:
    """Refuse a `run.json` of another format, or with settings that are not a dict or hold no documents out."""
    if not isinstance(run, dict) or any(run.get(key) != value for key, value in _FORMAT.items()):
        raise ValueError(f"it must contain {_FORMAT}")
    hashes = run.get("sha256")
    if not isinstance(hashes, dict) or set(hashes) != {_MODEL, _TOKENIZER}:
        raise ValueError(f"its sha256 must be of {_MODEL} and {_TOKENIZER}, and of nothing else")
    settings = run.get("settings", {})
    if not isinstance(settings, dict):
        raise ValueError(f"settings must be a dict, got {settings!r}")
    fraction = settings.get("valid_fraction", 0.5)
    if not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise ValueError(f"valid_fraction in its settings must be between 0 and 1, got {fraction!r}")


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()
