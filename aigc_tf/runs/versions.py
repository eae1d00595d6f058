"""Versions: versions(), of the packages that a result depends on."""

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

from .. import __version__


def versions() -> dict[str, str]:
    """Return the versions that a result depends on, and the backend."""
    packages = ("keras", "tensorflow", "jax", "numpy", "jieba", "rjieba")
    found = {"aigc_tf": __version__, "python": platform.python_version(), "backend": _backend()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _backend() -> str:
    """Return the backend of Keras as Keras chooses it, without loading Keras."""
    if "keras" in sys.modules:
        return sys.modules["keras"].backend.backend()
    file = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "keras.json"
    try:
        configured = json.loads(file.read_text("utf-8")).get("backend")
    except (OSError, ValueError, AttributeError):
        configured = None
    return os.environ.get("KERAS_BACKEND") or configured or "tensorflow"
