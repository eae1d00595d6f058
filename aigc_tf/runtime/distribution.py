"""Distribution: use_devices(), on which devices to train, how they share the work, in which precision."""

import re
import weakref

import numpy as np

from .backend import keras, tf
from .keras_internals import forget_retracing

# Which axis of a weight is divided where a model is too large for a device: one of heads, of the middle of a block or
# of a layer's units. What is not named, such as norms, is on each device whole.
_SPLIT_AXES = [
    (r"block_\d+_attention/(query|key|value)/(kernel|bias)", -2),
    (r"block_\d+_attention/attention_output/kernel", 0),
    (r"block_\d+_mlp_expand/(kernel|bias)", -1),
    (r"block_\d+_mlp_project/kernel", 0),
    (r"lstm_\d+/lstm_cell/(kernel|recurrent_kernel|bias)", -1),
    (r"token_embedding/embeddings|position_embedding/embeddings|head/kernel", -1),
]


def use_devices(
    count: int | None = None,
    *,
    model_parallel: int = 1,
    precision: str = "auto",
    coordinator: str | None = None,
    num_hosts: int = 1,
    host: int = 0,
) -> str:
    """Choose the devices to train on. Call it before a model is built; nothing else in a script changes.

    Several devices share each batch: each has a copy of the model, and their gradients are summed. A model that does
    not fit into one device is split across `model_parallel` of them. TensorFlow supports several GPUs; TPUs, split
    models and several hosts need JAX (`KERAS_BACKEND=jax`, extra `[jax]`).

    Args:
        count: the number of devices on all hosts together; None takes all. 1, on one host, undoes an earlier choice.
        model_parallel: the number of devices that one model is split across. `count`, the number of attention heads
            and the widths of the model must be multiples of it.
        precision: the dtype policy of models built from now on: "float32", "mixed_bfloat16", "mixed_float16", or "auto"
            for the fastest that the device supports well: bfloat16 on TPUs and on GPUs of compute capability 8.0 and
            above, float16 with loss scaling on those of 7.x (such as the T4), else float32.
        coordinator: for several hosts, the address of host 0 and a free port there, such as "10.0.0.1:1234". Each host
            starts the same script with its own `host`, and sees the same files.
        num_hosts: the number of hosts.
        host: the number of this host, from 0.

    Returns:
        The devices and the precision, in words.

    Raises:
        ValueError: there are fewer devices, a number is no multiple of another, or the backend does not support it.

    Example:
        >>> use_devices(1, precision="float32")
        'CPU, float32'
    """
    if model_parallel < 1 or num_hosts < 1 or not 0 <= host < num_hosts:
        raise ValueError(
            "model_parallel and num_hosts must be at least 1, and host from 0 to num_hosts - 1, got "
            f"{model_parallel}, {num_hosts} and {host}."
        )
    is_jax = keras.backend.backend() == "jax"
    if not is_jax and (model_parallel > 1 or num_hosts > 1):
        raise ValueError(
            "A model split across devices, and several hosts, need JAX: pip install jax, and set "
            "KERAS_BACKEND=jax before Python starts."
        )
    if model_parallel > 1 and num_hosts > 1:
        raise ValueError("model_parallel > 1 supports one host only. Set num_hosts=1, or model_parallel=1.")
    if num_hosts > 1:
        if coordinator is None:
            raise ValueError(
                'Several hosts need a coordinator, the address of host 0 and a free port: "10.0.0.1:1234".'
            )
        keras.distribution.initialize(coordinator, num_hosts, host)
    devices = keras.distribution.list_devices() if is_jax else _tensorflow_devices()
    count = len(devices) if count is None else count
    if not 1 <= count <= len(devices):
        raise ValueError(f"count must be from 1 to the number of devices here, {len(devices)}, got {count}.")
    if count % model_parallel:
        raise ValueError(f"count must be a multiple of model_parallel, got {count} and {model_parallel}.")
    precision = resolve_precision(precision)
    devices = devices[:count]
    if is_jax:
        _distribute_jax(devices, model_parallel)
    else:
        _distribute_tensorflow(devices)
    keras.config.set_dtype_policy(precision)
    kind = re.split("[:/]", devices[0].removeprefix("/device:"))[0].upper()
    shared = f"{count} x {kind}" if count > 1 else kind
    divided = f", a model divided among {model_parallel}" if model_parallel > 1 else ""
    hosts = f", {num_hosts} hosts" if num_hosts > 1 else ""
    return f"{shared}{hosts}{divided}, {precision}"


def resolve_precision(precision: str) -> str:
    """Resolve "auto" to what the device computes best in, and refuse what no model here computes in."""
    if precision not in ("auto", "float32", "mixed_bfloat16", "mixed_float16"):
        raise ValueError(f"precision must be auto, float32, mixed_bfloat16 or mixed_float16, got {precision!r}.")
    return native_precision() if precision == "auto" else precision


def native_precision() -> str:
    """Name the dtype policy that the device computes best in (see `use_devices`)."""
    if keras.backend.backend() == "jax":
        import jax

        device = jax.local_devices()[0]
        if device.platform == "tpu":
            return "mixed_bfloat16"
        capability = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
        # NVIDIA's is a number such as "8.0"; AMD's is a name such as "gfx90a".
        is_number = re.fullmatch(r"\d+(\.\d+)?", str(capability))
        return _precision_of(float(capability)) if is_number else "float32"
    if tf.config.list_logical_devices("TPU"):
        return "mixed_bfloat16"
    gpus = tf.config.list_physical_devices("GPU")
    details = tf.config.experimental.get_device_details(gpus[0]) if gpus else {}
    return _precision_of(*details["compute_capability"]) if "compute_capability" in details else "float32"


def _precision_of(capability: float, minor: int = 0) -> str:
    return "mixed_bfloat16" if capability >= 8 else "mixed_float16" if capability >= 7 else "float32"


def num_replicas() -> int:
    """Count the models that share a batch: 1, unless `use_devices` says otherwise."""
    if keras.backend.backend() == "jax":
        distribution = keras.distribution.distribution()
        if distribution is None:
            return 1
        mesh = distribution.device_mesh
        return mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)]
    return tf.distribute.get_strategy().num_replicas_in_sync


def num_hosts() -> int:
    """Count the processes that train together."""
    if keras.backend.backend() != "jax":
        return 1
    import jax

    return jax.process_count()


def is_first_host() -> bool:
    """Return whether this process is the one that writes files and shows progress."""
    if keras.backend.backend() != "jax":
        return True
    import jax

    return jax.process_index() == 0


def rows_of_host(array: np.ndarray) -> np.ndarray:
    """Return the rows of a batch that this host computes: all of them, if it is the only one."""
    if num_hosts() == 1:
        return array
    import jax

    rows = len(array) // num_hosts()
    return array[jax.process_index() * rows : (jax.process_index() + 1) * rows]


def should_stop_all_hosts(check: int) -> bool:
    """Return whether one of several hosts received a SIGTERM; all hosts get the same answer at the same check.

    With several hosts JAX handles that signal, so it does not end the process.

    Args:
        check: the number of this check; it must increase by one each time.
    """
    if num_hosts() == 1:
        return False
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(check)


def check_distribution(model: keras.Model, batch_size: int) -> None:
    """Refuse what would fail in the middle of training, or go wrong silently.

    Args:
        model: the model to train.
        batch_size: B, the windows in a step.

    Raises:
        ValueError: the devices do not share such a batch evenly; the model was built for other devices (on JAX; Keras
            refuses it on TensorFlow); or Keras' distribution is set with TensorFlow, where it trains on one device
            without a word.
    """
    if keras.backend.backend() == "tensorflow" and keras.distribution.distribution() is not None:
        raise ValueError(
            "keras.distribution does nothing on TensorFlow: it trains on one device. Use aigc_tf.use_devices, or JAX "
            "(KERAS_BACKEND=jax)."
        )
    replicas = num_replicas()
    if batch_size % replicas:
        raise ValueError(
            f"A batch of {batch_size} windows cannot be shared by {replicas} devices. Take a batch_size that is a "
            f"multiple of {replicas}, or fewer devices."
        )
    if keras.backend.backend() == "jax":
        distribution = keras.distribution.distribution()
        count = distribution.device_mesh.devices.size if distribution else 1
        if (count_of_model := len(model.variables[0].value.sharding.device_set)) != count:
            raise ValueError(
                f"The model was built for {count_of_model} devices, and use_devices has chosen {count} since. Build "
                "models after use_devices."
            )


def predict(model: keras.Model, inputs) -> np.ndarray:
    """Compute a model's output for one batch, the same on one device and on several.

    Args:
        model: the model.
        inputs: an array, or a list of them for a model of several inputs, of any number of rows.

    Returns:
        The output, an array of as many rows.
    """
    if keras.backend.backend() == "jax" and keras.distribution.distribution():
        weights, states = ([v.value for v in vs] for vs in (model.trainable_variables, model.non_trainable_variables))
        return np.asarray(_jax_function(model)(weights, states, inputs))
    if keras.backend.backend() == "tensorflow":
        model.make_predict_function()
        forget_retracing(model.predict_function)  # every evaluation compiles one, once for each shape
    # On TensorFlow each of several devices computes all rows, and Keras puts all that they give in one.
    return model.predict_on_batch(inputs)[: len(inputs[0] if isinstance(inputs, list) else inputs)]


def forget_compiled(model: keras.Model) -> None:
    """Let the next `predict` compile a model anew, as the settings of its layers have changed."""
    model.predict_function = None
    _jax_functions.pop(model, None)


_jax_functions = weakref.WeakKeyDictionary()


def _jax_function(model):
    """Compile a model for all devices, with a result that each of them, and so each host, has whole."""
    if model not in _jax_functions:
        import jax

        mesh = keras.distribution.distribution().device_mesh.backend_mesh
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        reference = weakref.ref(model)

        def call(weights, states, inputs):
            return reference().stateless_call(weights, states, inputs)[0]

        _jax_functions[model] = jax.jit(call, out_shardings=everywhere)
    return _jax_functions[model]


def _tensorflow_devices() -> list[str]:
    for kind in ("GPU", "CPU"):
        if devices := tf.config.list_logical_devices(kind):
            return [device.name for device in devices]
    raise ValueError("TensorFlow shows no device.")


def _distribute_tensorflow(devices: list[str]) -> None:
    strategy = tf.distribute.MirroredStrategy(devices) if len(devices) > 1 else None
    tf.distribute.experimental_set_strategy(strategy)


def _distribute_jax(devices: list[str], model_parallel: int) -> None:
    if len(devices) == 1:
        distribution = None
    elif model_parallel == 1:
        distribution = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)  # see `feed`
    else:
        shape = (len(devices) // model_parallel, model_parallel)
        mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), np.array(devices).reshape(shape))
        distribution = _ShapeCheckedModelParallel(layout_map=keras.distribution.LayoutMap(mesh), batch_dim_name="batch")
    keras.distribution.set_distribution(distribution)


class _ShapeCheckedModelParallel(keras.distribution.ModelParallel):
    """Keras' model parallelism by the shapes of variables, not by their names alone, and with an error that says."""

    def get_variable_layout(self, variable):
        axes = [None] * len(variable.shape)
        parts = self.device_mesh.shape[1]
        for pattern, axis in _SPLIT_AXES:
            if re.search(f"(^|/)({pattern})$", variable.path):  # the optimizer's moments are laid out as their weights
                if variable.shape[axis] % parts:
                    raise ValueError(
                        f"A model split across {parts} devices needs multiples of {parts} as its number of heads and "
                        f"its widths, got the shape {tuple(variable.shape)} of {variable.path}."
                    )
                axes[axis] = "model"
        return keras.distribution.TensorLayout(axes, self.device_mesh)
