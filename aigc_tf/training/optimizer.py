"""Optimization: the optimizer and the learning rate of a training."""

import math

from ..runtime.backend import keras, tf
from ..runtime.distribution import num_replicas
from ..runtime.keras_internals import clipping_problem

_WARMUP, _DECAY = 0.05, 0.3  # shares of the steps


@keras.saving.register_keras_serializable("aigc_tf")
class WarmupStableDecay(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that rises in a straight line, stays, and falls in a straight line.

    Args:
        learning_rate: the highest.
        steps: the number of steps in all; after the last it would be zero.
        num_microbatches: how many times Keras asks in a step, for each microbatch.

    Source:
        S. Hu et al., "MiniCPM: unveiling the potential of small language models with scalable training strategies"
        (2024).
    """

    def __init__(self, learning_rate: float, steps: int, num_microbatches: int = 1):
        self.learning_rate, self.steps, self.num_microbatches = learning_rate, steps, num_microbatches

    def __call__(self, step):
        step = keras.ops.cast(step // self.num_microbatches, "float32")
        risen = (step + 1) / max(1, self.steps * _WARMUP)
        left = (self.steps - step) / max(1, self.steps * _DECAY)
        return self.learning_rate * keras.ops.minimum(1.0, keras.ops.minimum(risen, left))

    def get_config(self) -> dict:
        """Tell the arguments, for Keras' files."""
        return {name: getattr(self, name) for name in ("learning_rate", "steps", "num_microbatches")}


def check_optimization(learning_rate: float, weight_decay: float, clip_norm: float | None = None) -> None:
    """Refuse settings with which nothing is learned, or which make weights infinite."""
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be finite and above 0, got {learning_rate}.")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be finite and at least 0, got {weight_decay}.")
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise ValueError(f"clip_norm must be finite and above 0, or None, got {clip_norm}.")


def adamw(schedule, weight_decay: float, clip_norm: float | None, num_microbatches: int = 1) -> keras.optimizers.AdamW:
    """Make the optimizer of a training (see `train`)."""
    settings = {"weight_decay": weight_decay, "beta_2": 0.95, "global_clipnorm": clip_norm}
    if num_microbatches > 1:
        settings["gradient_accumulation_steps"] = num_microbatches
    is_shared = keras.backend.backend() == "tensorflow" and num_replicas() > 1
    optimizer = (ClippedTogether if is_shared else keras.optimizers.AdamW)(schedule, **settings)
    if is_shared and clip_norm and (problem := clipping_problem(keras.optimizers.AdamW())):
        raise RuntimeError(
            f"The gradients of several devices cannot be clipped together with this Keras: {problem}. Train on one "
            "device, without clip_norm, or with another version of Keras."
        )
    # By name, since the biases of attention have two axes. TensorFlow's names end with ":0".
    optimizer.exclude_from_weight_decay(var_names=["(bias|gamma|beta)(:0)?$"])
    return optimizer


class ClippedTogether(keras.optimizers.AdamW):
    """Clip the sum of all devices' gradients, where Keras on TensorFlow would clip each device's own."""

    def _clip_gradients(self, gradients):
        context = tf.distribute.get_replica_context()
        together = context.all_reduce(tf.distribute.ReduceOp.SUM, [tf.convert_to_tensor(g) for g in gradients])
        # The update adds them up once more.
        return [g / context.num_replicas_in_sync for g in super()._clip_gradients(together)]
