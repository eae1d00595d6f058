"""Schedule: the learning rate of each training step."""

from ..runtime.backend import keras

_WARMUP, _DECAY = 0.05, 0.3  # fractions of the steps


@keras.saving.register_keras_serializable("aigc_tf")
class WarmupStableDecay(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate schedule: linear warm-up, a constant rate, linear decay to zero.

    Args:
        learning_rate: the peak learning rate.
        steps: the number of training steps.
        num_microbatches: the microbatches of a step: Keras counts each of them as a step.

    Source:
        S. Hu et al., "MiniCPM: unveiling the potential of small language models with scalable training strategies"
        (2024).
    """

    def __init__(self, learning_rate: float, steps: int, num_microbatches: int = 1):
        self.learning_rate, self.steps, self.num_microbatches = learning_rate, steps, num_microbatches

    def __call__(self, step):
        step = keras.ops.cast(step // self.num_microbatches, "float32")
        warmup = (step + 1) / max(1, self.steps * _WARMUP)
        decay = (self.steps - step) / max(1, self.steps * _DECAY)
        return self.learning_rate * keras.ops.minimum(1.0, keras.ops.minimum(warmup, decay))

    def get_config(self) -> dict:
        """Return the arguments, for Keras' files."""
        return {name: getattr(self, name) for name in ("learning_rate", "steps", "num_microbatches")}
