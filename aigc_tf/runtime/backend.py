"""Backend and device: `keras` and `tf`, loaded quietly. All other files import them from here."""

import contextlib
import functools
import gc
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator

from .cores import usable_cores
from .keras_internals import forget_retracing, registered_gradients

# What TensorFlow's libraries log, such as "I0000 00:00:1795749208.239711    4558 port.cc:153] oneDNN ...".
_LOG_LINE = re.compile(rb"[IWEF]\d{4} .*\.cc:\d+\]|\d{4}-\d\d-\d\d .*\.cc:\d+\]|WARNING: All log messages before absl")


@contextlib.contextmanager
def hidden_native_logs() -> Iterator[None]:
    """Hide the log lines that native code writes to file descriptor 2; show them after all if the block fails.

    What other threads write there meanwhile is shown at the end.
    """
    try:
        sys.stderr.flush()
        original = os.dup(2)
    except (OSError, AttributeError):  # no standard error at all, as under pythonw: nothing to hide
        yield
        return
    try:
        hidden = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
    except OSError:  # no place for one: then nothing is hidden
        os.close(original)
        yield
        return
    with hidden:
        os.dup2(hidden.fileno(), 2)
        has_failed = True
        try:
            yield
            has_failed = False
        finally:
            os.dup2(original, 2)
            os.close(original)
            hidden.seek(0)
            for line in hidden:
                if has_failed or not _LOG_LINE.match(line):
                    os.write(2, line)


# What `xla_fusion` lets XLA fuse on a CPU: elementwise operations and sums. Matrix products stay with oneDNN, which is
# faster. TensorFlow reads these flags when it is loaded; without `xla_fusion` they change nothing.
_FUSION_FLAGS = "--tf_xla_cpu_global_jit --tf_xla_ops_to_cluster=FUSIBLE --tf_xla_max_cluster_size=60"


def _load_backend():
    """Import Keras and, where it computes with TensorFlow, TensorFlow, without its start-up lines.

    TensorFlow writes some of them whatever TF_CPP_MIN_LOG_LEVEL says. A user who sets it to 0 wants to see
    everything, and does.
    """
    if "tensorflow" not in sys.modules:
        os.environ.setdefault("TF_XLA_FLAGS", _FUSION_FLAGS)
    _require_supported(os.environ.get("KERAS_BACKEND") or "tensorflow")
    try:
        with _quiet_start():
            import keras

            _require_supported(keras.backend.backend())  # which may come from ~/.keras/keras.json
            if keras.backend.backend() != "tensorflow":
                return keras, None
            import tensorflow as tf

            # Looking for devices is when TensorFlow reports a missing GPU driver.
            tf.config.list_physical_devices()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]  # the package of a module such as tensorflow.python
        if missing in ("torch", "openvino"):
            _require_supported(missing)
        if missing not in ("tensorflow", "jax"):
            raise
        raise ModuleNotFoundError(
            f"aigc_tf needs {missing} here, which is not installed. Install tensorflow, or install jax and set "
            "KERAS_BACKEND=jax before Python starts.",
            name=missing,
        ) from None
    return keras, tf


def _require_supported(backend: str) -> None:
    if backend not in ("tensorflow", "jax"):
        raise ValueError(
            f"aigc_tf runs on TensorFlow or JAX, got Keras' backend {backend!r}. Set KERAS_BACKEND=tensorflow or =jax."
        )


def _quiet_start():
    quiet = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2") != "0"
    return hidden_native_logs() if quiet else contextlib.nullcontext()


keras, tf = _load_backend()  # tf is None where JAX computes


@functools.cache
def tensorflow_for_data():
    """Import TensorFlow for tf.data; where JAX computes it gets no GPU. Return None where it is not installed."""
    if tf is not None:
        return tf
    if importlib.util.find_spec("tensorflow") is None:
        return None
    with _quiet_start():
        import tensorflow

        with contextlib.suppress(RuntimeError):  # it has been used before: then it has its devices
            tensorflow.config.set_visible_devices([], "GPU")
    return tensorflow


def uses_gpu() -> bool:
    """Return whether the backend computes on a GPU."""
    if keras.backend.backend() == "jax":
        # Asked for GPUs alone, JAX raises an error where there are none.
        return any(name.startswith(("gpu", "cuda")) for name in keras.distribution.list_devices())
    return bool(tf.config.list_logical_devices("GPU"))


def uses_accelerator() -> bool:
    """Return whether the backend computes on a GPU or TPU."""
    if keras.backend.backend() == "jax":
        return any(not name.startswith("cpu") for name in keras.distribution.list_devices())
    return any(tf.config.list_logical_devices(kind) for kind in ("GPU", "TPU"))


def num_threads(kind: str = "intra") -> int:
    """Return how many threads TensorFlow has, as it was told, or else one for each core.

    Args:
        kind: "intra" for those that share an operation, "inter" for those that compute operations side by side.
    """
    named = os.environ.get(f"TF_NUM_{kind.upper()}OP_THREADS", "").strip()
    # TensorFlow passes over what is no number there, too.
    told = getattr(tf.config.threading, f"get_{kind}_op_parallelism_threads")()
    return told or (int(named) if named.isdecimal() else 0) or usable_cores()


def gpu_bytes_in_use() -> int:
    """Count the memory of the first GPU that arrays of this process hold."""
    if keras.backend.backend() == "jax":
        import jax

        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use", 0)
    return tf.config.experimental.get_memory_info("GPU:0")["current"]


@functools.cache
def xla_jit(function, *static):
    """Compile a function of tensors for the device, by XLA, on TensorFlow or JAX.

    Args:
        function: of `static` and then, by position, of tensors or nests of them, the second of which it may use up:
            JAX gives its memory to the result.
        *static: what is compiled in, hashable.

    Returns:
        The function of the tensors. It is traced once for each kind of them: their nests, shapes and dtypes.
    """
    function = functools.partial(function, *static)
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function, donate_argnums=1)
    function = tf.function(function, jit_compile=True, autograph=False)
    forget_retracing(function)  # there are many kinds, each traced once
    return function


@contextlib.contextmanager
def xla_fusion() -> Iterator[bool]:
    """Let XLA fuse elementwise operations in graphs that TensorFlow builds for a CPU; yield whether this is possible.

    A training graph takes 5 to 15 seconds longer to compile, and then runs 10% to 50% faster.
    """
    on_cpu = keras.backend.backend() == "tensorflow" and not uses_accelerator()
    if not on_cpu or os.environ.get("TF_XLA_FLAGS") != _FUSION_FLAGS:
        yield False
        return
    before = tf.config.optimizer.get_jit()
    tf.config.optimizer.set_jit("autoclustering")
    try:
        yield True
    finally:
        tf.config.optimizer.set_jit(before == "autoclustering")


@contextlib.contextmanager
def free_graphs_afterwards() -> Iterator[None]:
    """Free the graphs of a training run, which TensorFlow would keep until the process ends.

    In each run, the optimizer's sum over replicas registers a gradient function that holds the graph of the whole
    step: 20 to 40 MB for a tiny model. `clear_session` would not free it, but reset the user's dtype policy.
    """
    gradient_functions = registered_gradients() if tf else {}
    before = set(gradient_functions)
    try:
        yield
    finally:
        for name in set(gradient_functions) - before:
            if name.startswith("CustomGradient-"):
                del gradient_functions[name]
        gc.collect()
