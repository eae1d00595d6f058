"""Measurement: the seconds and watts of training steps, and the seconds of an evaluation, on this device."""

import statistics
import time

import numpy as np

from ..corpus.dataset import batches_of
from ..evaluation.bits import batch_rows, make_scorer
from ..runtime.backend import keras
from ..runtime.distribution import predict
from ..runtime.hardware import gpu_watts, processor_joules
from ..training.fast.fast_training import fast_training
from ..training.loop import choose_steps_per_execution, feed, phases
from ..training.optimizer import compile_model

_WARMUP_BLOCKS = 3  # of steps: the first compiles, the next two still warm up


def seconds_and_watts_of_steps(
    model, vocab_size: int, context: int, batch_size: int, steps: int, num_candidates: int, seconds: float
) -> tuple[float, float | None]:
    """Run training steps on random ids, and return the seconds per step and the power read meanwhile."""
    ids = np.random.default_rng(0).integers(0, vocab_size, (batch_size, context + 1), dtype=np.int32)
    data = batches_of(lambda places: ids, batch_size, context)
    compile_model(model, steps=1_000_000)
    parts = phases(model, 1000, num_candidates, np.ones(vocab_size))
    step_seconds, watts, end_before, steps_in_block = 0.0, None, 0, choose_steps_per_execution()
    for phase in parts:
        timer = _StepTimer(seconds / len(parts), steps_in_block)
        with fast_training(phase.model, steps * batch_size * context) as (trained, _):
            batches = feed(phase.prepare(data, 0))
            trained.steps_per_execution = steps_in_block
            trained.fit(batches, steps_per_epoch=1_000_000, callbacks=[timer], shuffle=False, verbose=0)
        step_seconds += statistics.median(timer.step_seconds) * (phase.end - end_before) / 1000
        watts = timer.watts if timer.watts is not None else watts
        end_before = phase.end
    return step_seconds, watts


def seconds_per_evaluated_token(model, vocab_size: int, context: int, seconds: float) -> float:
    """Evaluate random ids as a validation does, in full windows, and return the seconds per token."""
    scoring = make_scorer(model)
    text = np.random.default_rng(0).integers(0, vocab_size, 64 * context, dtype=np.int32).reshape(64, context)
    rows = text[: batch_rows(context, vocab_size)]
    predict(scoring, [rows, rows])  # the first compiles
    began, done = time.perf_counter(), 0
    while not done or time.perf_counter() - began < seconds / 10:
        predict(scoring, [rows, rows])
        done += rows.size
    return (time.perf_counter() - began) / done


class _StepTimer(keras.callbacks.Callback):
    """Time the steps after the first few, and stop training when the time is over."""

    def __init__(self, seconds: float, steps_in_block: int):
        super().__init__()
        self.seconds, self.steps_in_block = seconds, steps_in_block
        self.step_seconds, self.num_blocks, self.watts = [], 0, None

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])  # waits for the device: JAX returns before it has computed anything
        now = time.perf_counter()
        self.num_blocks += 1
        if self.num_blocks == _WARMUP_BLOCKS:
            self.began, self.joules = now, processor_joules()
        elif self.num_blocks > _WARMUP_BLOCKS:
            self.step_seconds.append((now - self.last) / self.steps_in_block)
            if now - self.began >= self.seconds:
                self._read_power(now - self.began)
                self.model.stop_training = True
        self.last = now

    def _read_power(self, seconds: float) -> None:
        joules = processor_joules()
        if joules is not None and self.joules is not None and joules > self.joules:
            self.watts = (joules - self.joules) / seconds
        if (reading := gpu_watts()) is not None:
            self.watts = (self.watts or 0.0) + reading
