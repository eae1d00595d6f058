"""Fast training: fast_training(), what is known to be faster than Keras alone, with the same result up to rounding."""

import contextlib
import os
import types
from collections.abc import Iterator

from .devices import freed_graphs, fused, keras, tf, uses_accelerator
from .numba_tools import numba_is_usable
from .recurrence import fast_recurrence

# 2 or 3 minutes of a CPU, in which it makes up for the time that it takes to compile.
_OPERATIONS_WORTH_FUSING = 3e13


@contextlib.contextmanager
def fast_training(model: keras.Model, num_tokens: float) -> Iterator[list[str]]:
    """Train as fast as is known for this device, as long as this is open.

    Args:
        model: the model, compiled; what it computes is the same but for rounding.
        num_tokens: how many it shall learn from.

    Returns:
        In words, what is done for it; nothing where Keras alone does as well.
    """
    if keras.backend.backend() == "tensorflow" and tf.distribute.has_strategy():  # several devices: Keras' own ways
        with freed_graphs():
            yield []
        return
    is_worth_fusing = 6 * model.count_params() * num_tokens > _OPERATIONS_WORTH_FUSING
    with (
        freed_graphs(),
        fast_recurrence(model) as has_own_loop,
        fast_passes(model) as has_passes,
        fused() if is_worth_fusing and not has_passes else contextlib.nullcontext() as is_fused,
    ):
        methods = {
            "LSTM layers in a loop of our own": has_own_loop,
            "elementwise operations in passes compiled by numba": has_passes,
            "elementwise operations fused by XLA": is_fused,
        }
        yield [words for words, is_used in methods.items() if is_used]


@contextlib.contextmanager
def fast_passes(model: keras.Model) -> Iterator[bool]:
    """Let a model, its loss and its optimizer compute in one pass over memory meanwhile what needs no product.

    Args:
        model: the model, compiled with a cross-entropy over logits. What is not one of Keras' own layers, with the
            settings that this package's models have, stays as it is.

    Returns:
        Whether it does: on a CPU with TensorFlow, if numba is there, and layers compute in float32 or bfloat16.
    """
    if not _serves(model):
        yield False
        return
    from . import passes

    replaced = []

    def replace(owner, name, function):
        setattr(owner, name, types.MethodType(function, owner))
        replaced.append((owner, name))

    for operation in getattr(model, "operations", []):  # a model that is no graph of layers has none
        if _is_gelu(operation):
            replace(operation, "call", lambda self, x: _gelu(x))
        elif _is_plain(operation, keras.layers.LayerNormalization, axis=[-1], center=True, scale=True):
            replace(operation, "call", lambda self, x: _layer_norm(x, self.gamma, self.beta, self.epsilon))
        elif _is_plain(operation, keras.layers.MultiHeadAttention):
            replace(operation, "_compute_attention", _compute_attention)
    replace(model, "train_step", _train_step)
    if _is_plain_adamw(model.optimizer):
        replace(model.optimizer, "_backend_apply_gradients", _apply_gradients)
    try:
        yield True
    finally:
        for owner, name in replaced:
            delattr(owner, name)
        passes.let_go_of_memory()


def _serves(model) -> bool:
    return (
        keras.backend.backend() == "tensorflow"
        and not uses_accelerator()
        and numba_is_usable()
        and model.compute_dtype in ("float32", "bfloat16")
        and _is_plain_loss(model.loss)
    )


def _is_plain_loss(loss) -> bool:
    plain = keras.losses.SparseCategoricalCrossentropy(from_logits=True).get_config()
    return type(loss) is keras.losses.SparseCategoricalCrossentropy and loss.get_config() == plain


def _is_gelu(operation) -> bool:
    return type(operation).__module__ == "keras.src.ops.nn" and getattr(operation, "approximate", False)


def _is_plain(operation, kind, **settings) -> bool:
    if type(operation) is not kind or operation.compute_dtype not in ("float32", "bfloat16"):
        return False
    config = operation.get_config()
    return all(config[name] == value for name, value in settings.items())


def _is_plain_adamw(optimizer) -> bool:
    unusual = ("amsgrad", "clipnorm", "clipvalue", "use_ema", "gradient_accumulation_steps", "loss_scale_factor")
    return type(optimizer) is keras.optimizers.AdamW and not any(getattr(optimizer, name) for name in unusual)


def _num_threads() -> int:
    """Return how many threads TensorFlow gives an operation."""
    chosen = tf.config.threading.get_intra_op_parallelism_threads() or int(os.environ.get("TF_NUM_INTRAOP_THREADS", 0))
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return chosen or len(cores)


def _pass(name: str, inputs: list, like: list, *settings) -> list:
    """Call a function of `passes` in a graph: results have the shapes and dtypes of the tensors `like`."""
    from . import passes

    function, num_threads = getattr(passes, name), _num_threads()
    dtypes = [t.dtype for t in like]
    outputs = tf.nest.flatten(
        tf.numpy_function(
            lambda *arrays: function(*arrays, *settings, num_threads),
            inputs,
            dtypes if len(dtypes) > 1 else dtypes[0],  # of a list of one, an eager call would return no list
            stateful=False,
        )
    )
    for output, tensor in zip(outputs, like, strict=True):
        output.set_shape(tensor.shape)
    return outputs


# --- layers and the loss ----------------------------------------------------------------------------------------


@tf.custom_gradient
def _gelu(x):
    (y,) = _pass("gelu", [x], [x])
    return y, lambda d_y: _pass("gelu_gradient", [x, d_y], [x])


def _layer_norm(x, gamma, beta, epsilon):
    @tf.custom_gradient
    def of(x, gamma, beta):
        (y,) = _pass("layer_norm", [x, gamma, beta], [x], epsilon)
        return y, lambda d_y: _pass("layer_norm_gradient", [x, gamma, d_y], [x, gamma, beta], epsilon)

    return of(x, *(tf.cast(tf.convert_to_tensor(v), tf.float32) for v in (gamma, beta)))


def _compute_attention(
    self, query, key, value, attention_mask=None, training=None, return_attention_scores=False, use_causal_mask=False
):
    """Attend as the layer does, whose masks are all causal; others it does by itself."""
    if attention_mask is not None or return_attention_scores or not use_causal_mask or query.shape[1] != key.shape[1]:
        return type(self)._compute_attention(
            self, query, key, value, attention_mask, training, return_attention_scores, use_causal_mask
        )
    query, key, value = (tf.transpose(x, (0, 2, 1, 3)) for x in (query, key, value))
    probabilities = _causal_softmax(tf.matmul(query, key, transpose_b=True), self._inverse_sqrt_key_dim)
    if self._dropout:
        probabilities = self._dropout_layer(probabilities, training=training)
    return tf.transpose(tf.matmul(probabilities, value), (0, 2, 1, 3)), None


def _causal_softmax(scores, scale):
    @tf.custom_gradient
    def of(scores):
        (probabilities,) = _pass("causal_softmax", [scores], [scores], scale)
        return probabilities, lambda d: _pass("causal_softmax_gradient", [probabilities, d], [scores], scale)

    return of(scores)


@tf.custom_gradient
def _cross_entropy(logits, targets):
    """Compute the mean cross-entropy of logits (N, V) and targets (N,), in nats."""
    nats, gradient = _pass("cross_entropy", [logits, targets], [tf.cast(targets, tf.float32), logits])

    def backward(d):
        return tf.cond(tf.equal(d, 1.0), lambda: gradient, lambda: gradient * tf.cast(d, gradient.dtype)), None

    return tf.reduce_mean(nats), backward


def _train_step(self, data):
    """Take a step whose logits stay in the dtype of the layers, and go into the loss as they are."""
    casts = [layer for layer in self.layers[-1:] if _is_plain(layer, keras.layers.Identity)]
    for layer in casts:
        layer.autocast = False
    self.compute_loss = types.MethodType(_compute_loss, self)
    try:
        return type(self).train_step(self, data)
    finally:
        for layer in casts:
            layer.autocast = True
        del self.compute_loss


def _compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
    loss = _cross_entropy(tf.reshape(y_pred, (-1, y_pred.shape[-1])), tf.reshape(tf.cast(y, tf.int32), (-1,)))
    return tf.add_n([loss, *self.losses])


# --- the optimizer ----------------------------------------------------------------------------------------------


def _apply_gradients(self, gradients, variables):
    """Take a step of AdamW, as the optimizer would, in one pass over the gradients and one over the weights.

    The norm is that of the gradients. Keras on TensorFlow takes that of a gather's before it adds them up, which is
    larger or smaller by some hundredths; with JAX it takes this one.
    """
    from . import passes

    numbers = [self._get_variable_index(v) for v in variables]
    kinds = [
        [v.value for v in variables],
        *([kept[i].value for i in numbers] for kept in (self._momentums, self._velocities)),
    ]
    decays = [float(self.weight_decay or 0) if self._use_weight_decay(v) else 0.0 for v in variables]
    settings = {name: getattr(self, name) for name in ("beta_1", "beta_2", "epsilon")}
    settings |= {"clip_norm": self.global_clipnorm or None, "num_threads": _num_threads()}

    def step(rate, iterations, *arrays):
        n = len(numbers)
        weights, gradients, momenta, velocities = (arrays[i * n : (i + 1) * n] for i in range(4))
        return passes.adamw(
            weights, gradients, momenta, velocities, decays, rate=float(rate), step=int(iterations) + 1, **settings
        )

    weights, momenta, velocities = ([tf.convert_to_tensor(v) for v in kind] for kind in kinds)
    gradients = [tf.convert_to_tensor(g) for g in gradients]
    inputs = [self.learning_rate, self.iterations.value, *weights, *gradients, *momenta, *velocities]
    new = tf.numpy_function(step, inputs, [tf.float32] * 3 * len(numbers), stateful=False)
    for variable, value in zip((v for kind in kinds for v in kind), new, strict=True):
        value.set_shape(variable.shape)
        variable.assign(value)
