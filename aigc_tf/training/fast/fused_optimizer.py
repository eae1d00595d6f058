"""Fused optimizer: AdamW in one pass over the gradients and one over the weights."""

from ...runtime.backend import keras, num_threads, tf
from ...runtime.keras_internals import adamw_problem, adamw_state
from . import fused_ops


def can_fuse(optimizer) -> bool:
    """Return whether `FusedAdamW` can stand in for an optimizer."""
    return has_supported_settings(optimizer) and adamw_problem(optimizer) is None


def has_supported_settings(optimizer) -> bool:
    """Return whether an optimizer is AdamW without the settings that `FusedAdamW` does not support."""
    unsupported = ("amsgrad", "clipnorm", "clipvalue", "use_ema", "gradient_accumulation_steps", "loss_scale_factor")
    return (
        type(optimizer) is keras.optimizers.AdamW
        and optimizer.built
        and not any(getattr(optimizer, name) for name in unsupported)
    )


class FusedAdamW(keras.optimizers.Optimizer):
    """AdamW in one pass over the gradients and one over the weights, with the state of an optimizer of Keras.

    The global norm is that of the gradients. Keras on TensorFlow takes that of an embedding's gradient before its rows
    are summed by token, and so its norm differs by some hundredths; on JAX it is the same as here.
    """

    def __init__(self, adamw: keras.optimizers.AdamW):
        super().__init__(learning_rate=0.0)  # not used
        self.adamw = adamw

    @property
    def learning_rate(self):
        """The learning rate of the optimizer of Keras."""
        return self.adamw.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.adamw.learning_rate = learning_rate

    def apply(self, grads, trainable_variables=None):
        variables = list(trainable_variables)
        if not all(_is_supported_weight(v) and g is not None for v, g in zip(variables, grads, strict=True)):
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


def _is_supported_weight(variable) -> bool:
    return variable.dtype == "float32" and variable.constraint is None
