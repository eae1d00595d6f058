"""Training: train(), from a model and data to the best weights on held-out documents."""

import contextlib
import math
import signal
import sys
import threading
import time
from pathlib import Path

from .devices import keras, tf
from .evaluation import evaluate_scorer, scorer
from .fast_training import fast_training
from .tokenizer import Tokenizer, check_vocabulary


def train(
    model: keras.Model,
    train_data: tf.data.Dataset,
    tokenizer: Tokenizer,
    valid_documents: list[str],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
    validations: int = 10,
    run_dir=None,
    progress: bool = True,
) -> dict[str, list[float]]:
    """Train a language model, and leave it with the weights that predicted the held-out documents best.

    AdamW with a linear warm-up over a twentieth of the steps and a cosine decay to a tenth of
    `learning_rate`; weight decay on matrices and embeddings, not on biases and norms; gradients clipped by
    their global norm. A model built under a mixed precision policy trains in mixed precision. Ctrl-C ends
    the training early, after a last validation, and keeps what was learned.

    Args:
        model: ids `int32 (B, T)` to logits `float32 (B, T, V)`, causal.
        train_data: endless batches of `(inputs, targets)`, `int32 (B, T)` (see `make_dataset`).
        tokenizer: the tokenizer of both.
        valid_documents: the held-out documents.
        steps: how many batches to learn from.
        learning_rate: the highest learning rate.
        weight_decay: the share of each weight that goes per step, times the learning rate.
        clip_norm: the largest global norm of the gradients.
        validations: how often to evaluate on the held-out documents, the end included.
        run_dir: a folder for `log.csv` and TensorBoard's `tensorboard/`, or None.
        progress: show the progress on standard output.

    Returns:
        `dict[str, list[float]]`, one value a validation: "step", "loss" (training nats per token since
        the last one), "bits_per_char" (held out), "learning_rate", "tokens_per_second" (validation
        excluded).

    Raises:
        ValueError: a setting is out of range, model and tokenizer do not belong together, or the loss is no
            longer a number.
    """
    check_vocabulary(model, tokenizer)
    if steps < 1 or validations < 1:
        raise ValueError(f"steps and validations must be at least 1, got {steps} and {validations}.")
    if not valid_documents:
        raise ValueError("Training needs at least one held-out document to choose the best weights by, got none.")
    steps_per_validation = math.ceil(steps / validations)
    schedule = compile_model(model, steps, learning_rate, weight_decay, clip_norm)
    tokens_per_step = math.prod(train_data.element_spec[0].shape)
    display = _Display() if progress else _NoDisplay()
    validation = _Validation(scorer(model), tokenizer, valid_documents, schedule, steps, tokens_per_step, display)
    callbacks = [validation]
    if run_dir is not None:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        callbacks += [
            keras.callbacks.CSVLogger(Path(run_dir, "log.csv")),
            keras.callbacks.TensorBoard(Path(run_dir, "tensorboard"), write_graph=False),
        ]
    with _ctrl_c_stops(validation), fast_training(model, steps * tokens_per_step) as methods:
        if methods:
            display.line(f"on this CPU with {' and '.join(methods)}")
        model.fit(
            train_data,
            epochs=math.ceil(steps / steps_per_validation),
            steps_per_epoch=steps_per_validation,
            callbacks=callbacks,
            shuffle=False,  # the data has its order; Keras would warn that it does not shuffle it
            verbose=0,
        )
    return validation.history


def compile_model(
    model: keras.Model, steps: int, learning_rate: float = 1e-3, weight_decay: float = 0.1, clip_norm: float = 1.0
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Give a model the loss and the optimizer that `train` uses, and return the schedule of its learning rate."""
    schedule = _schedule(learning_rate, steps)
    model.compile(_optimizer(schedule, weight_decay, clip_norm), _loss())
    return schedule


def _schedule(learning_rate: float, steps: int):
    warmup_steps = max(1, steps // 20)
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warmup_steps), alpha=0.1, warmup_target=learning_rate, warmup_steps=warmup_steps
    )


def _optimizer(schedule, weight_decay: float, clip_norm: float):
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=weight_decay, beta_2=0.95, global_clipnorm=clip_norm)
    # By name, since the biases of attention have two axes. TensorFlow's names end with ":0".
    optimizer.exclude_from_weight_decay(var_names=["(bias|gamma|beta)(:0)?$"])
    return optimizer


def _loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@contextlib.contextmanager
def _ctrl_c_stops(validation: "_Validation"):
    """Turn the first Ctrl-C into an end of training after the step in hand; the second is the usual one."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return

    def stop(signum, frame):
        signal.signal(signal.SIGINT, previous)
        validation.is_interrupted = True

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class _Validation(keras.callbacks.Callback):
    """Stop after the last step; after each Keras epoch evaluate, keep the best weights, show where it stands."""

    def __init__(self, scoring, tokenizer, documents, schedule, steps, tokens_per_step, display):
        super().__init__()
        self.scoring, self.tokenizer, self.documents = scoring, tokenizer, documents
        self.schedule, self.steps, self.tokens_per_step = schedule, steps, tokens_per_step
        self.display = display
        self.history = {k: [] for k in ("step", "loss", "bits_per_char", "learning_rate", "tokens_per_second")}
        self.best_weights = None
        self.step = 0
        self.is_interrupted = False

    def on_train_begin(self, logs=None):
        self.began = time.perf_counter()
        self.seconds_validating = 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch_began, self.epoch_first_step = time.perf_counter(), self.step

    def on_train_batch_begin(self, batch, logs=None):
        self.step += 1
        # fit() ends an epoch early when told so before a batch ends.
        if self.step == self.steps or self.is_interrupted:
            self.model.stop_training = True

    def on_train_batch_end(self, batch, logs=None):
        self.display.live(f"{self._position()}  loss {logs['loss']:.3f}  {self._speed_and_time_left()}")

    def on_epoch_end(self, epoch, logs=None):
        ended = time.perf_counter()
        self._check_is_number("loss", logs["loss"])
        num_tokens = (self.step - self.epoch_first_step) * self.tokens_per_step
        logs["val_bits_per_char"] = evaluate_scorer(self.scoring, self.tokenizer, self.documents)["bits_per_char"]
        self._check_is_number("bits per character on the held-out documents", logs["val_bits_per_char"])
        logs["learning_rate"] = self._learning_rate()
        logs["tokens_per_second"] = num_tokens / (ended - self.epoch_began)
        self.seconds_validating += time.perf_counter() - ended
        is_best = logs["val_bits_per_char"] < min(self.history["bits_per_char"], default=math.inf)
        if is_best:
            self.best_weights = self.model.get_weights()
        self.history["step"].append(float(self.step))
        self.history["bits_per_char"].append(logs["val_bits_per_char"])
        for name in ("loss", "learning_rate", "tokens_per_second"):
            self.history[name].append(logs[name])
        self.display.line(
            f"{self._position()}  loss {logs['loss']:.3f}  held-out bits/char {logs['val_bits_per_char']:.3f}"
            f"{' (best)' if is_best else '       '}  {self._speed_and_time_left()}"
        )

    def on_train_end(self, logs=None):
        self.model.set_weights(self.best_weights)

    def _check_is_number(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError(
                f"The {name} became {value} at step {self.step} with a learning rate of "
                f"{self._learning_rate():.3g}. Train again with a lower one."
            )

    def _learning_rate(self) -> float:
        return float(self.schedule(self.step - 1))

    def _position(self) -> str:
        return f"step {self.step:>{len(str(self.steps))}}/{self.steps}"

    def _speed_and_time_left(self) -> str:
        seconds = time.perf_counter() - self.began
        tokens_per_second = self.step * self.tokens_per_step / (seconds - self.seconds_validating)
        left = round(seconds / self.step * (self.steps - self.step))
        return f"{tokens_per_second:,.0f} tokens/s  {left // 60}:{left % 60:02d} left"


class _Display:
    """Show lines that stay, and in a terminal or a notebook one in between that is overwritten."""

    def __init__(self):
        self.is_live = sys.stdout.isatty() or "ipykernel" in sys.modules
        self.last_shown, self.width = 0.0, 0

    def live(self, text: str) -> None:
        if self.is_live and time.perf_counter() - self.last_shown > 0.2:
            self.last_shown = time.perf_counter()
            self._show(text, "\r")

    def line(self, text: str) -> None:
        self._show(text, "\n")

    def _show(self, text: str, end: str) -> None:
        print(text.ljust(self.width), end=end, flush=True)
        self.width = len(text) if end == "\r" else 0


class _NoDisplay:
    def live(self, text: str) -> None: ...

    def line(self, text: str) -> None: ...
