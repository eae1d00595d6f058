"""Fast training: fast_training(), what is known to be faster than Keras alone, with the same result up to rounding.

What is trained is another graph with the same weights. Where a layer's own way is slow, a layer of ours stands in it,
and computes the same with the variables of the one that it holds. Neither the model nor Keras is changed.
"""

import contextlib
import functools
import math
from collections.abc import Iterator

from ...runtime.backend import freed_graphs, fused, keras, num_threads, tf, uses_accelerator
from ...runtime.keras_internals import (
    adamw_problem,
    adamw_state,
    attention_dropout,
    attention_problem,
    has_masks,
    inner_layers,
    is_keras_own,
    is_masked,
    source_of,
)
from ...runtime.numba_tools import numba_problem
from .lstm_loop import OwnLoop, is_plain, own_loop

# 2 or 3 minutes of a CPU, in which it makes up for the time that it takes to compile.
_OPERATIONS_WORTH_FUSING = 3e13


@contextlib.contextmanager
def fast_training(model: keras.Model, num_tokens: float) -> Iterator[tuple[keras.Model, list[str]]]:
    """Train as fast as is known for this device, as long as this is open.

    Args:
        model: the model, compiled.
        num_tokens: how many it shall learn from.

    Returns:
        The model to train, which is `model` itself where Keras alone does as well, and else another one with the same
        weights and optimizer, compiled: what it computes is the same but for rounding. And in words, what is done.
    """
    with freed_graphs():
        if keras.backend.backend() != "tensorflow" or uses_accelerator() or tf.distribute.has_strategy():
            yield model, []
            return
        problem = passes_problem(model)
        trained = fast_model(model, with_passes=problem is None)
        is_worth_fusing = 6 * model.count_params() * num_tokens > _OPERATIONS_WORTH_FUSING
        with fused() if is_worth_fusing and problem else contextlib.nullcontext() as is_fused:
            methods = {
                "LSTM layers in a loop of our own": any(isinstance(layer, OwnLoop) for layer in trained.layers),
                "elementwise operations in passes compiled by numba": not problem,
                "elementwise operations fused by XLA": is_fused,
                f"elementwise operations by TensorFlow ({problem})": problem and not is_fused,
            }
            lacking = [] if problem else _lacking(model)
            try:
                yield trained, [*(words for words, is_so in methods.items() if is_so), *lacking]
            finally:
                if not problem:
                    from . import fused_ops

                    fused_ops.let_go_of_memory()


def passes_problem(model: keras.Model) -> str | None:
    """Tell why a compiled model does not train by the passes of numba on a CPU with TensorFlow; None if it does."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True).get_config()
    if not _is_graph(model):
        return f"{type(model).__name__} is no graph of Keras' own"
    if type(model.loss) is not keras.losses.SparseCategoricalCrossentropy or model.loss.get_config() != loss:
        return "the loss is not the mean cross-entropy of logits"
    if has_masks(model):
        return "a layer passes on a mask"
    return numba_problem()


def _lacking(model) -> list[str]:
    """Tell what a model's attention or optimizer lacks of what passes use of Keras beyond its public interface."""
    attentions = [layer for layer in inner_layers(model) if type(layer) is keras.layers.MultiHeadAttention]
    of_attention = next(filter(None, map(attention_problem, attentions)), None)
    of_optimizer = adamw_problem(model.optimizer) if _is_usual_adamw(model.optimizer) else None
    problems = {"attention": of_attention, "AdamW": of_optimizer}
    return [f"{name} as Keras has it ({problem})" for name, problem in problems.items() if problem]


def _is_graph(model) -> bool:
    return is_keras_own(model) and bool(getattr(model, "inputs", None))


def fast_model(model: keras.Model, with_passes: bool) -> keras.Model:
    """Build the model to train in place of another one; see `fast_training`.

    Args:
        model: the model, compiled.
        with_passes: whether norms, GELU, the softmax of attention, the loss and AdamW are computed in one pass over
            memory each. What is not one of Keras' own layers, with settings that this package's models have, stays.

    Returns:
        The compiled model, or `model` itself if nothing in it would be another.
    """
    if not _is_graph(model):
        return model
    last = source_of(model.outputs[0]).operation
    stand_ins = [own_loop]
    if with_passes:
        stand_ins += [functools.partial(_without_cast, last), _gelu_pass, _norm_pass, _attention_pass]
    num_replaced = 0

    def call(operation, *args, **kwargs):
        nonlocal num_replaced
        given = {name: value for name, value in kwargs.items() if value is not None and name != "training"}
        for stand_in in stand_ins:
            output = stand_in(operation, args, given.copy())
            if output is not None:
                num_replaced += 1
                return output
        return operation(*args, **kwargs)

    graph = (_WithPasses if with_passes else keras.Model)(
        *(xs if len(xs) > 1 else xs[0] for xs in (model.inputs, model.outputs)), name=model.name
    )
    trained = keras.models.clone_model(graph, clone_function=lambda layer: layer, call_function=call)
    if not with_passes and not num_replaced:
        return model
    optimizer = model.optimizer
    if with_passes and _is_plain_adamw(optimizer):
        optimizer = _OnePassAdamW(optimizer)
    trained.compile(optimizer, model.loss, jit_compile=False, auto_scale_loss=False)
    return trained


def _pass(name: str, inputs: list, like: list, *settings) -> list:
    """Call a function of `fused_ops` in a graph: results have the shapes and dtypes of the tensors `like`."""
    from . import fused_ops

    function, threads = getattr(fused_ops, name), num_threads()
    dtypes = [t.dtype for t in like]
    outputs = tf.nest.flatten(
        tf.numpy_function(
            lambda *arrays: function(*arrays, *settings, threads),
            inputs,
            dtypes if len(dtypes) > 1 else dtypes[0],  # of a list of one, an eager call would return no list
            stateful=False,
        )
    )
    for output, tensor in zip(outputs, like, strict=True):
        output.set_shape(tensor.shape)
    return outputs


# --- layers and the loss: each takes the call of a layer in a graph, and gives the output of what stands in it, or None


def _without_cast(last, operation, args, kwargs):
    """Leave the logits in the dtype of the layers: the loss takes them as they are."""
    if operation is last and is_plain(operation, keras.layers.Identity, any_dtype=True):
        return args[0] if args[0].dtype in ("float32", "bfloat16") else None
    return None


@functools.cache
def _kind_of_gelu() -> type:
    x = keras.Input((1,))
    return type(keras.Model(x, keras.ops.gelu(x)).operations[-1])


def _gelu_pass(operation, args, kwargs):
    is_gelu = type(operation) is _kind_of_gelu() and getattr(operation, "approximate", False)
    if not is_gelu or args[0].dtype not in ("float32", "bfloat16"):
        return None
    return _Gelu(name=f"aigc_tf_{operation.name}", dtype=args[0].dtype)(args[0])


class _Gelu(keras.layers.Layer):
    def call(self, x):
        return _gelu(x)

    def compute_output_shape(self, input_shape):
        return input_shape


def _norm_pass(operation, args, kwargs):
    if not is_plain(operation, keras.layers.LayerNormalization, "axis", "epsilon") or operation.axis != [-1]:
        return None
    is_served = len(args) == 1 and not kwargs and args[0].dtype == operation.compute_dtype
    return _Norm(operation)(args[0]) if is_served and operation.gamma is not None is not operation.beta else None


class _Norm(keras.layers.Layer):
    def __init__(self, layer):
        super().__init__(name=f"aigc_tf_{layer.name}", dtype=layer.dtype_policy, autocast=False)
        self.layer, self.built = layer, True

    def call(self, x):
        return _layer_norm(x, self.layer.gamma, self.layer.beta, self.layer.epsilon)

    def compute_output_shape(self, input_shape):
        return input_shape


def _attention_pass(operation, args, kwargs):
    """Attend to oneself, with a causal mask alone."""
    free = ("num_heads", "key_dim", "value_dim", "dropout", "attention_axes")
    if not is_plain(operation, keras.layers.MultiHeadAttention, *free) or attention_problem(operation):
        return None
    inputs = [*args, *(kwargs.pop(name) for name in ("value", "key") if name in kwargs)]
    is_served = kwargs == {"use_causal_mask": True} and len(inputs) > 1 and len(inputs[0].shape) == 3
    is_served = is_served and all(x is inputs[0] for x in inputs) and not is_masked(inputs[0])
    return _CausalAttention(operation)(inputs[0]) if is_served else None


class _CausalAttention(keras.layers.Layer):
    def __init__(self, layer):
        super().__init__(name=f"aigc_tf_{layer.name}", dtype=layer.dtype_policy)
        self.layer, self.built = layer, True

    def call(self, x, training=None):
        parts = (self.layer.query_dense, self.layer.key_dense, self.layer.value_dense)
        query, key, value = (tf.transpose(part(x), (0, 2, 1, 3)) for part in parts)
        probabilities = _causal_softmax(tf.matmul(query, key, transpose_b=True), 1 / math.sqrt(self.layer.key_dim))
        if self.layer.dropout:
            probabilities = attention_dropout(self.layer)(probabilities, training=training)
        return self.layer.output_dense(tf.transpose(tf.matmul(probabilities, value), (0, 2, 1, 3)))

    def compute_output_shape(self, input_shape):
        return input_shape


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


class _WithPasses(keras.Model):
    """A graph whose loss takes logits in the dtype of the layers."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        is_weighted = sample_weight is not None or is_masked(y_pred)
        if is_weighted or y_pred.dtype not in (tf.float32, tf.bfloat16):
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        loss = _cross_entropy(tf.reshape(y_pred, (-1, y_pred.shape[-1])), tf.reshape(tf.cast(y, tf.int32), (-1,)))
        return tf.add_n([loss, *self.losses])


# --- the optimizer ----------------------------------------------------------------------------------------------


def _is_plain_adamw(optimizer) -> bool:
    return _is_usual_adamw(optimizer) and adamw_problem(optimizer) is None


def _is_usual_adamw(optimizer) -> bool:
    unusual = ("amsgrad", "clipnorm", "clipvalue", "use_ema", "gradient_accumulation_steps", "loss_scale_factor")
    return (
        type(optimizer) is keras.optimizers.AdamW
        and optimizer.built
        and not any(getattr(optimizer, name) for name in unusual)
    )


class _OnePassAdamW(keras.optimizers.Optimizer):
    """Take the steps of an AdamW optimizer, with its state, in one pass over the gradients and one over the weights.

    The norm is that of the gradients. Keras on TensorFlow takes that of a gather's before it adds them up, which is
    larger or smaller by some hundredths; with JAX it takes this one.
    """

    def __init__(self, adamw: keras.optimizers.AdamW):
        super().__init__(learning_rate=0.0)  # not used
        self.adamw = adamw

    @property
    def learning_rate(self):
        """The learning rate, which is that of the optimizer it stands for."""
        return self.adamw.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.adamw.learning_rate = learning_rate

    def apply(self, grads, trainable_variables=None):
        from . import fused_ops

        variables = list(trainable_variables)
        if not all(_is_plain_weight(v) and g is not None for v, g in zip(variables, grads, strict=True)):
            self.adamw.apply(grads, variables)
            return
        momenta, velocities, decays = adamw_state(self.adamw, variables)
        kinds = [[v.value for v in kind] for kind in (variables, momenta, velocities)]
        settings = {name: getattr(self.adamw, name) for name in ("beta_1", "beta_2", "epsilon")}
        settings |= {"clip_norm": self.adamw.global_clipnorm or None, "num_threads": num_threads()}
        n = len(variables)

        def step(rate, iterations, *arrays):
            weights, gradients, momenta, velocities = (arrays[i * n : (i + 1) * n] for i in range(4))
            return fused_ops.adamw(
                weights, gradients, momenta, velocities, decays, rate=float(rate), step=int(iterations) + 1, **settings
            )

        weights, momenta, velocities = ([tf.convert_to_tensor(v) for v in kind] for kind in kinds)
        gradients = [tf.convert_to_tensor(g) for g in grads]
        inputs = [self.adamw.learning_rate, self.adamw.iterations.value]
        inputs += [*weights, *gradients, *momenta, *velocities]
        new = tf.numpy_function(step, inputs, [tf.float32] * 3 * n, stateful=False)
        for variable, value in zip((v for kind in kinds for v in kind), new, strict=True):
            value.set_shape(variable.shape)
            variable.assign(value)
        self.adamw.iterations.assign_add(1)


def _is_plain_weight(variable) -> bool:
    return variable.dtype == "float32" and variable.constraint is None
