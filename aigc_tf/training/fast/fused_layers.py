"""Fused layers: norms, GELU, causal attention and the loss, each in one pass over memory.

A function `replace_...` takes a layer of a graph and the arguments it is called with, and returns the output of the
fused layer, or None if this layer is not replaced.
"""

import functools
import math

from ...runtime.backend import keras, num_threads, tf
from ...runtime.keras_internals import attention_dropout, attention_problem, is_masked
from . import fused_ops
from .lstm_loop import has_default_settings


def _fused_op(name: str, inputs: list, like: list, *settings) -> list:
    """Call a function of `fused_ops` in a graph; the results have the shapes and dtypes of the tensors `like`."""
    function, threads = getattr(fused_ops, name), num_threads()
    dtypes = [t.dtype for t in like]
    outputs = tf.nest.flatten(
        tf.numpy_function(
            lambda *arrays: function(*arrays, *settings, threads),
            inputs,
            dtypes if len(dtypes) > 1 else dtypes[0],  # an eager call returns no list for a list of one
            stateful=False,
        )
    )
    for output, tensor in zip(outputs, like, strict=True):
        output.set_shape(tensor.shape)
    return outputs


def skip_logits_cast(last, operation, args, kwargs):
    """Leave the logits in the dtype of the layers, which the fused loss takes."""
    if operation is last and has_default_settings(operation, keras.layers.Identity, any_dtype=True):
        return args[0] if args[0].dtype in ("float32", "bfloat16") else None
    return None


@functools.cache
def _gelu_class() -> type:
    x = keras.Input((1,))
    return type(keras.Model(x, keras.ops.gelu(x)).operations[-1])


def replace_gelu(operation, args, kwargs):
    is_gelu = type(operation) is _gelu_class() and getattr(operation, "approximate", False)
    if not is_gelu or args[0].dtype not in ("float32", "bfloat16"):
        return None
    return _FusedGelu(name=f"aigc_tf_{operation.name}", dtype=args[0].dtype)(args[0])


class _FusedGelu(keras.layers.Layer):
    def call(self, x):
        return _gelu(x)

    def compute_output_shape(self, input_shape):
        return input_shape


def replace_layer_norm(operation, args, kwargs):
    if not has_default_settings(operation, keras.layers.LayerNormalization, "axis", "epsilon"):
        return None
    is_supported = operation.axis == [-1] and operation.gamma is not None and operation.beta is not None
    is_supported = is_supported and len(args) == 1 and not kwargs and args[0].dtype == operation.compute_dtype
    return _FusedLayerNorm(operation)(args[0]) if is_supported else None


class _FusedLayerNorm(keras.layers.Layer):
    def __init__(self, layer):
        super().__init__(name=f"aigc_tf_{layer.name}", dtype=layer.dtype_policy, autocast=False)
        self.layer, self.built = layer, True

    def call(self, x):
        return _layer_norm(x, self.layer.gamma, self.layer.beta, self.layer.epsilon)

    def compute_output_shape(self, input_shape):
        return input_shape


def replace_attention(operation, args, kwargs):
    """Replace self-attention with a causal mask and no other."""
    free = ("num_heads", "key_dim", "value_dim", "dropout", "attention_axes")
    if not has_default_settings(operation, keras.layers.MultiHeadAttention, *free) or attention_problem(operation):
        return None
    inputs = [*args, *(kwargs.pop(name) for name in ("value", "key") if name in kwargs)]
    is_supported = kwargs == {"use_causal_mask": True} and len(inputs) > 1 and len(inputs[0].shape) == 3
    is_supported = is_supported and all(x is inputs[0] for x in inputs) and not is_masked(inputs[0])
    return _FusedAttention(operation)(inputs[0]) if is_supported else None


class _FusedAttention(keras.layers.Layer):
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
    (y,) = _fused_op("gelu", [x], [x])
    return y, lambda d_y: _fused_op("gelu_gradient", [x, d_y], [x])


def _layer_norm(x, gamma, beta, epsilon):
    @tf.custom_gradient
    def of(x, gamma, beta):
        (y,) = _fused_op("layer_norm", [x, gamma, beta], [x], epsilon)
        return y, lambda d_y: _fused_op("layer_norm_gradient", [x, gamma, d_y], [x, gamma, beta], epsilon)

    return of(x, *(tf.cast(tf.convert_to_tensor(v), tf.float32) for v in (gamma, beta)))


def _causal_softmax(scores, scale):
    @tf.custom_gradient
    def of(scores):
        (probabilities,) = _fused_op("causal_softmax", [scores], [scores], scale)
        return probabilities, lambda d: _fused_op("causal_softmax_gradient", [probabilities, d], [scores], scale)

    return of(scores)


@tf.custom_gradient
def _cross_entropy(logits, targets):
    """Compute the mean cross-entropy of logits (N, V) and targets (N,), in nats."""
    nats, gradient = _fused_op("cross_entropy", [logits, targets], [tf.cast(targets, tf.float32), logits])

    def backward(d):
        return tf.cond(tf.equal(d, 1.0), lambda: gradient, lambda: gradient * tf.cast(d, gradient.dtype)), None

    return tf.reduce_mean(nats), backward


class FusedLossModel(keras.Model):
    """A graph with the fused loss, which takes logits in the dtype of the layers."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        is_weighted = sample_weight is not None or is_masked(y_pred)
        if is_weighted or y_pred.dtype not in (tf.float32, tf.bfloat16):
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        loss = _cross_entropy(tf.reshape(y_pred, (-1, y_pred.shape[-1])), tf.reshape(tf.cast(y, tf.int32), (-1,)))
        return tf.add_n([loss, *self.losses])
