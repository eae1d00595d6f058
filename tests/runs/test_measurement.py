import time
import types

from aigc_tf.runs.measurement import _StepTimer


def test_a_step_is_timed_until_the_device_has_done_it():
    class Loss:
        """A loss that the device is still computing, as JAX gives it."""

        def __float__(self):
            time.sleep(0.01)
            return 1.0

    timer = _StepTimer(seconds=0.05, steps_in_block=2)
    timer.set_model(types.SimpleNamespace(stop_training=False))
    while not timer.model.stop_training:
        timer.on_train_batch_begin(0)
        timer.on_train_batch_end(0, {"loss": Loss()})
    assert min(timer.step_seconds) >= 0.005
