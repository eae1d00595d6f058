"""Optimizer: AdamW as `train` uses it, and models compiled with it."""

import math

from ..runtime.backend import keras, tf, uses_accelerator
from ..runtime.distribution import num_replicas
from ..runtime.keras_internals import clipping_problem
from .schedule import WarmupStableDecay


def compile_model(
    model: keras.Model,
    steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
    num_microbatches: int = 1,
) -> WarmupStableDecay:
    """Compile a model with the loss and the optimizer of `train`, and return its learning rate schedule."""
    schedule = WarmupStableDecay(learning_rate, steps, num_microbatches)
    compile_with_optimizer(model, adamw(schedule, weight_decay, clip_norm, num_microbatches))
    # Built here, as the first step would create its variables in another order than that of the checkpoints.
    model.optimizer.build(model.trainable_variables)
    return schedule


def compile_with_optimizer(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
    """Compile a model with the loss of `train`."""
    # Keras decides whether to use XLA, except on TensorFlow's CPU, where it would see GPUs hidden from TensorFlow.
    jit_compile = "auto" if keras.backend.backend() != "tensorflow" or uses_accelerator() else False
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=jit_compile)


def check_optimizer_settings(learning_rate: float, weight_decay: float, clip_norm: float | None = None) -> None:
    """Refuse settings with which nothing is learned, or weights become infinite."""
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be finite and above 0, got {learning_rate}.")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be finite and at least 0, got {weight_decay}.")
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise ValueError(f"clip_norm must be finite and above 0, or None, got {clip_norm}.")


def adamw(schedule, weight_decay: float, clip_norm: float | None, num_microbatches: int = 1) -> keras.optimizers.AdamW:
    """Make the optimizer of a training run (see `train`)."""
    settings = {"weight_decay": weight_decay, "beta_2": 0.95, "global_clipnorm": clip_norm}
    if num_microbatches > 1:
        settings["gradient_accumulation_steps"] = num_microbatches
    has_replicas = keras.backend.backend() == "tensorflow" and num_replicas() > 1
    optimizer = (GlobalClippingAdamW if has_replicas else keras.optimizers.AdamW)(schedule, **settings)
    if has_replicas and clip_norm and (problem := clipping_problem(keras.optimizers.AdamW())):
        raise RuntimeError(
            f"This version of Keras cannot clip the summed gradients of several devices: {problem}. Train on one "
            "device, without clip_norm, or with another version of Keras."
        )
    # By name, since the biases of attention have two axes. TensorFlow's names end with ":0".
    optimizer.exclude_from_weight_decay(var_names=["(bias|gamma|beta)(:0)?$"])
    return optimizer


class GlobalClippingAdamW(keras.optimizers.AdamW):
    """AdamW that clips the summed gradients of all devices; Keras on TensorFlow clips those of each device."""

    def _clip_gradients(self, gradients):
        context = tf.distribute.get_replica_context()
        sums = context.all_reduce(tf.distribute.ReduceOp.SUM, [tf.convert_to_tensor(g) for g in gradients])
        # The update sums over the devices again.
        return [g / context.num_replicas_in_sync for g in super()._clip_gradients(sums)]
