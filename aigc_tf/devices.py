"""Backend and device: `keras` and `tf`, loaded quietly. Every room that needs them takes them from here."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def hidden_native_stderr() -> Iterator[None]:
    """Hide what native code writes to file descriptor 2; show it after all if the block fails."""
    try:
        sys.stderr.flush()
        original = os.dup(2)
    except (OSError, AttributeError):  # no standard error at all, as under pythonw: nothing to hide
        yield
        return
    with tempfile.TemporaryFile() as hidden:
        os.dup2(hidden.fileno(), 2)
        try:
            yield
        except BaseException:
            hidden.seek(0)
            os.write(original, hidden.read())
            raise
        finally:
            os.dup2(original, 2)
            os.close(original)


def _load_backend():
    """Import Keras and TensorFlow without TensorFlow's start-up lines.

    TensorFlow writes some of them whatever TF_CPP_MIN_LOG_LEVEL says. A user who sets it to 0 wants to see
    everything, and does.
    """
    quiet = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2") != "0"
    with hidden_native_stderr() if quiet else contextlib.nullcontext():
        import keras
        import tensorflow as tf

        # Looking for devices is when TensorFlow reports a missing GPU driver.
        tf.config.list_physical_devices()
        if keras.backend.backend() != "tensorflow":
            # TensorFlow only feeds data then: the accelerator belongs to the other backend.
            tf.config.set_visible_devices([], "GPU")
    return keras, tf


keras, tf = _load_backend()
