"""Saving: a run folder, model and tokenizer with all there is to know of how they were made."""

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import time
import warnings
from pathlib import Path

from . import __version__
from .files import write_beside, write_json
from .tokenizer import Tokenizer, check_vocabulary
from .weights import read_file

_MODEL, _TOKENIZER, _RUN = "model.keras", "tokenizer.json", "run.json"
_FORMAT = {"format": "aigc_tf run", "version": 1}


def save(path, model, tokenizer: Tokenizer, **record) -> None:
    """Write a run folder: `model.keras`, `tokenizer.json` and `run.json`.

    The files of an earlier run in the folder are replaced at the end, when all of the new ones are
    written. `model.keras` holds the weights without the optimizer, and loads in plain Keras too. Where several
    hosts train together, the first one writes.

    Args:
        path: the folder; it is made if need be, and other files in it stay.
        model: the `keras.Model`.
        tokenizer: its tokenizer.
        **record: what else `run.json` shall tell, such as `settings`, `data` and `figures`: anything that
            JSON can hold.

    Raises:
        ValueError: model and tokenizer do not belong together.
    """
    from .devices import keras
    from .distribution import is_first_host

    check_vocabulary(model, tokenizer)
    if not is_first_host():
        return
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        # Nothing is renamed before everything is written; run.json, which vouches for the others by their
        # hashes, is renamed last.
        run_file = stack.enter_context(write_beside(path / _RUN))
        tokenizer_file = stack.enter_context(write_beside(path / _TOKENIZER))
        model_file = stack.enter_context(write_beside(path / _MODEL))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy keyword")
            # The same graph as a model that was never compiled: no optimizer state in the file.
            keras.Model(model.input, model.output, name=model.name).save(model_file)
        tokenizer.save(tokenizer_file)
        run = {
            **_FORMAT,
            "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "model": {"name": model.name, "parameters": model.count_params(), "context": model.input_shape[1]},
            "tokenizer": {"unit": tokenizer.unit, "vocab_size": tokenizer.vocab_size},
            **record,
            "versions": versions(),
            "sha256": {_MODEL: _sha256(model_file), _TOKENIZER: _sha256(tokenizer_file)},
        }
        write_json(run_file, run)


def load(path):
    """Load the model and the tokenizer of a run folder.

    Args:
        path: the folder that `save` wrote.

    Returns:
        The `keras.Model`, not compiled, and the tokenizer.

    Raises:
        FileNotFoundError: there is no such folder, or it is no run folder.
        ValueError: the files do not belong together, or are damaged.
    """
    from .devices import keras

    path = _checked_folder(path)
    return keras.models.load_model(path / _MODEL, compile=False), Tokenizer.load(path / _TOKENIZER)


def load_writer(path):
    """Load from a run folder what `generate` needs, without loading Keras or TensorFlow.

    That takes a fraction of a second. A model that `aigc_tf` did not build is loaded as `load` does it.

    Args:
        path: the folder that `save` wrote.

    Returns:
        The weights, which stand in `generate`, `generate_batch` and `stream` where a model stands, and the tokenizer.

    Raises:
        FileNotFoundError: there is no such folder, or it is no run folder.
        ValueError: the files do not belong together, or are damaged.
    """
    path = _checked_folder(path)
    weights = read_file(path / _MODEL)
    return (weights, Tokenizer.load(path / _TOKENIZER)) if weights else load(path)


def _checked_folder(path) -> Path:
    """Refuse a folder whose files are not those that its record tells of."""
    path = Path(path)
    for name, expected in read_run(path)["sha256"].items():
        if not (path / name).is_file():
            raise FileNotFoundError(f"The run folder {path} lacks its {name}.")
        if _sha256(path / name) != expected:
            raise ValueError(f"{path / name} is not the file that {_RUN} tells of: damaged, or of another run.")
    return path


def read_run(path) -> dict:
    """Read what `run.json` of a run folder tells: settings, data, figures, versions.

    Args:
        path: the folder that `save` wrote.

    Returns:
        `dict`, as JSON has it.

    Raises:
        FileNotFoundError: there is no such folder, or it is no run folder.
        ValueError: `run.json` is damaged or of another version.
    """
    file = Path(path) / _RUN
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is no run folder: there is no {file}. Name a folder that `train` or `save` wrote."
        )
    try:
        run = json.loads(file.read_text("utf-8"))
        if any(run.get(key) != value for key, value in _FORMAT.items()) or "sha256" not in run:
            raise ValueError(f"it must say {_FORMAT}")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read by this version: {error}.") from None
    return run


def versions() -> dict[str, str]:
    """Tell the versions that a result depends on, and the backend."""
    from .devices import keras

    packages = ("keras", "tensorflow", "jax", "numpy", "jieba", "rjieba")
    found = {"aigc_tf": __version__, "python": platform.python_version(), "backend": keras.backend.backend()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        digest = hashlib.sha256()
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()
