"""Session: where a training stands, from step to step, and what is done on the way."""

import contextlib
import csv
import io
import math
import signal
import sys
import threading
import time

import numpy as np

from ..evaluation.bits import VALIDATION_TOKENS, evaluate_with_scorer, make_scorer, sample_documents, window_batches
from ..runtime.backend import keras
from ..runtime.distribution import hosts_are_to_stop, is_first_host, num_hosts
from ..runtime.files import atomic_write
from .checkpoints import CHECKPOINTS, read_newest, require_same, write_checkpoint
from .logs import TensorBoardLog

# A checkpoint by the minute takes at most this share of the time: one that took long is followed by a longer wait.
_CHECKPOINTS_SHARE = 0.02


@contextlib.contextmanager
def signals_stop(course: "Session"):
    """Turn the first Ctrl-C into an end of training after the step in hand; the second is the usual one.

    Where there are checkpoints, a SIGTERM, by which many systems announce that they will take the machine away, writes
    a last one before it ends the process. Of several hosts, each of these ends all processes at the same step, so that
    none is left waiting for another.
    """
    if threading.current_thread() is not threading.main_thread():  # signals reach that one only
        yield
        return
    is_alone = num_hosts() == 1

    def stop(signum, frame):
        signal.signal(signum, previous[signum])
        if is_alone:
            course.received = signum
        else:
            signal.raise_signal(signal.SIGTERM)  # see `hosts_are_to_stop`

    signals = [signal.SIGINT, signal.SIGTERM] if course.folder and is_alone else [signal.SIGINT]
    previous = {signum: signal.signal(signum, stop) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if course.received == signal.SIGTERM:
        if is_alone:
            signal.raise_signal(signal.SIGTERM)
        sys.exit(128 + signal.SIGTERM)  # as a shell says it; JAX says good-bye to the other hosts


class Session(keras.callbacks.Callback):
    """Where a training stands: evaluate at times, keep the best weights and checkpoints, show it, stop it."""

    folder = None

    def __init__(
        self,
        model,
        tokenizer,
        documents,
        schedule,
        display,
        *,
        steps,
        steps_per_validation,
        tokens_per_step,
        num_microbatches,
    ):
        super().__init__()
        self.language_model = model
        self.scorer = make_scorer(model)
        self.documents = sample_documents(documents, tokenizer, VALIDATION_TOKENS)
        self.batches = list(window_batches(tokenizer, self.documents, model.input_shape[1]))
        self.schedule, self.display = schedule, display
        self.steps, self.steps_per_validation = steps, steps_per_validation
        self.tokens_per_step, self.num_microbatches = tokens_per_step, num_microbatches
        self.history = {k: [] for k in ("step", "loss", "bits_per_char", "learning_rate", "tokens_per_second")}
        self.best_weights = []
        self.step, self.phase_end = 0, steps
        self.began = None
        self.seconds_aside = self.seconds_writing = 0.0
        self.has_told = False
        self.received = None  # the signal to stop by
        self.looks = 0
        self.arrays = None  # of the checkpoint to go on after, or of the `fit` before
        self.newest_checkpoint = None

    # --- checkpoints ---

    def keep_in(self, run_dir, identity, minutes, steps, keep) -> None:
        """Keep logs and checkpoints in a folder, and go on after the newest that is there."""
        folder, writes = run_dir / CHECKPOINTS, is_first_host()
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
        arrays, record, path = read_newest(folder, self.display.line)
        if path:
            require_same(path, record["identity"], identity, self.display.line)
            self.step, self.history = record["step"], record["history"]
            self.arrays, self.best_weights, self.newest_checkpoint = arrays, arrays["best"], path
            self.display.line(f"goes on after step {self.step:,}, kept in {path}")
        if writes:
            self.run_dir, self.folder = run_dir, folder
            self.identity, self.every_minutes, self.every_steps, self.keep = identity, minutes, steps, keep
            self._write_log()
            self.tensorboard = TensorBoardLog(run_dir / "tensorboard", self.display)

    def tell(self, methods: list[str]) -> None:
        """Show what is done to be fast, unless it was shown before."""
        if methods and not self.has_told:
            self.display.line(f"trains with {', '.join(methods)}")
        self.has_told = True

    def _variables(self) -> dict:
        trained, model = self.model, self.language_model  # on JAX the first brings the weights of both up to date
        return {
            "variables": model.variables,  # weights, and the states of what draws at random
            "optimizer": model.optimizer.variables,
            "metrics": trained.metrics_variables,  # the sum of the losses since the last validation
        }

    def on_epoch_begin(self, epoch, logs=None):
        if self.arrays:
            variables = self._variables()
            for kind in (kind for kind in variables if kind in self.arrays):  # several hosts do it in the same order
                for variable, value in zip(variables[kind], self.arrays[kind], strict=True):
                    variable.assign(value)
            self.arrays = None
        self.first_step = self.step
        if self.began is None:
            self.began = self.interval_began = self.checkpoint_ended = self.looked = time.perf_counter()
            self.begin_step = self.interval_first_step = self.step

    def keep_metrics(self) -> None:
        """Let the sum of the losses go on in the next `fit`, which would begin with none."""
        self.arrays = {"metrics": [keras.ops.convert_to_numpy(v) for v in self._variables()["metrics"]]}

    def _write_checkpoint(self) -> None:
        began = time.perf_counter()
        arrays = {kind: [keras.ops.convert_to_numpy(v) for v in vs] for kind, vs in self._variables().items()}
        for value in arrays["variables"]:
            self._check_is_number("sum of the weights", float(np.sum(value, dtype=np.float64)))
        record = {"step": self.step, "history": self.history, "identity": self.identity}
        with self._told_what_is_kept("the checkpoint", self.folder):
            self.newest_checkpoint = write_checkpoint(
                self.folder, self.step, {**arrays, "best": self.best_weights}, record, self.keep
            )
        self.checkpoint_ended = time.perf_counter()
        self.seconds_writing = self.checkpoint_ended - began
        self.seconds_aside += self.seconds_writing

    def _is_checkpoint_due(self) -> bool:
        if self.folder is None:
            return False
        wait = max(60 * (self.every_minutes or math.inf), self.seconds_writing / _CHECKPOINTS_SHARE)
        is_by_step = self.every_steps is not None and self._passed(self.every_steps)
        return is_by_step or self.step == self.steps or time.perf_counter() - self.checkpoint_ended > wait

    @contextlib.contextmanager
    def _told_what_is_kept(self, what: str, path):
        try:
            yield
        except OSError as error:
            reason = f"{error.strerror}: {what} of step {self.step} cannot be written. {self._last_good()}"
            raise OSError(error.errno, f"{reason} Make room, and train again: it goes on there", str(path)) from None

    def _last_good(self) -> str:
        kept = self.newest_checkpoint
        return f"The last good checkpoint is {kept}." if kept else "There is none before it."

    # --- steps ---

    def on_train_batch_end(self, batch, logs=None):
        # Of a block of steps, which an accelerator takes without a look from Python, the last.
        self.step_before, self.step = self.step, self.first_step + (batch + 1) // self.num_microbatches
        self.looks += 1
        if hosts_are_to_stop(self.looks):
            self.received = signal.SIGTERM
        if self._passed(self.steps_per_validation) or self.step == self.steps:
            self._validate(logs)
        elif time.perf_counter() - self.looked > 0.2:  # each look waits for the device
            self._check_is_number("loss", float(logs["loss"]))
            self.display.live(f"{self._position()}  loss {logs['loss']:.3f}  {self._speed_and_time_left()}")
            self.looked = time.perf_counter()
        if self.step == self.phase_end:
            self.model.reset_metrics()  # the next phase begins with none, also where it goes on after a checkpoint
        if self._is_checkpoint_due() or (self.received and self.folder):
            self._write_checkpoint()
        if self.received:
            self.model.stop_training = True
            # After the checkpoint: a training that goes on does not know of this validation.
            if self.received == signal.SIGINT and self.history["step"][-1:] != [self.step]:
                self._validate(logs)

    def _passed(self, every: int) -> bool:
        """Tell whether a step that is a multiple of `every` was among the last."""
        return self.step // every > self.step_before // every

    def _validate(self, logs) -> None:
        ended, loss = time.perf_counter(), float(logs["loss"])
        self._check_is_number("loss", loss)
        trained = self.model  # on JAX this brings the weights up to date
        bits = evaluate_with_scorer(self.scorer, self.batches, self.documents, self._show_validation)["bits_per_char"]
        self._check_is_number("bits per character on the held-out documents", bits)
        is_best = bits < min(self.history["bits_per_char"], default=math.inf)
        if is_best:
            self.best_weights = self.language_model.get_weights()
        num_tokens = (self.step - self.interval_first_step) * self.tokens_per_step
        speed = num_tokens / (ended - self.interval_began)
        row = {
            "step": float(self.step),
            "loss": loss,
            "bits_per_char": bits,
            "learning_rate": self._learning_rate(),
            "tokens_per_second": speed,
        }
        for name, value in row.items():
            self.history[name].append(value)
        self.seconds_aside += time.perf_counter() - ended
        self.display.line(
            f"{self._position()}  loss {loss:.3f}  held-out bits/char {bits:.3f}"
            f"{' (best)' if is_best else '       '}  {self._speed_and_time_left()}"
        )
        if self.folder:
            self._write_log()
            self.tensorboard.write({name: row[name] for name in list(row)[1:]}, self.step)
        trained.reset_metrics()
        self.interval_began, self.interval_first_step = time.perf_counter(), self.step

    def _show_validation(self, done: int) -> None:
        self.display.live(f"{self._position()}  validating {done / len(self.batches):.0%}")

    def _write_log(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([list(self.history), *zip(*self.history.values(), strict=True)])
        log = self.run_dir / "log.csv"
        with self._told_what_is_kept("the log", log), atomic_write(log) as temporary:
            temporary.write_text(text.getvalue(), "utf-8")

    def _check_is_number(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            kept = f" {self._last_good()}" if self.newest_checkpoint else ""
            raise ValueError(
                f"The {name} became {value} at step {self.step} with a learning rate of "
                f"{self._learning_rate():.3g}.{kept} Train again with a lower one."
            )

    def _learning_rate(self) -> float:
        return float(self.schedule((self.step - 1) * self.num_microbatches))

    def _position(self) -> str:
        return f"step {self.step:>{len(str(self.steps))}}/{self.steps}"

    def _speed_and_time_left(self) -> str:
        seconds, done = time.perf_counter() - self.began, self.step - self.begin_step
        tokens_per_second = done * self.tokens_per_step / (seconds - self.seconds_aside)
        left = round(seconds / done * (self.steps - self.step))
        return f"{tokens_per_second:,.0f} tokens/s  {left // 60}:{left % 60:02d} left"
