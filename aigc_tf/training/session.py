"""Session: the callback that carries the state of a training run from step to step."""

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
from ..runtime.distribution import is_first_host, num_hosts, should_stop_all_hosts
from ..runtime.files import atomic_write
from .checkpoints import CHECKPOINTS, read_newest, require_same, write_checkpoint
from .logs import TensorBoardLog

# Checkpoints by the minute take at most this fraction of the time: after one that took long, the wait is longer.
_MAX_CHECKPOINT_FRACTION = 0.02


@contextlib.contextmanager
def stop_on_signals(session: "Session"):
    """Let the first Ctrl-C stop training after the current step; the second interrupts as usual.

    Where there are checkpoints, so does a SIGTERM, which many systems send before they take a machine away: a last
    checkpoint is written, and then the process ends. With several hosts, a signal to one of them ends all processes
    at the same step, so that none waits for another.
    """
    if threading.current_thread() is not threading.main_thread():  # only that one can handle signals
        yield
        return
    is_single_host = num_hosts() == 1

    def stop(signum, frame):
        signal.signal(signum, previous[signum])
        if is_single_host:
            session.stop_signal = signum
        else:
            signal.raise_signal(signal.SIGTERM)  # see `should_stop_all_hosts`

    signals = [signal.SIGINT, signal.SIGTERM] if session.folder and is_single_host else [signal.SIGINT]
    previous = {signum: signal.signal(signum, stop) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if session.stop_signal == signal.SIGTERM:
        if is_single_host:
            signal.raise_signal(signal.SIGTERM)
        sys.exit(128 + signal.SIGTERM)  # the exit code that shells give; JAX disconnects from the other hosts


class Session(keras.callbacks.Callback):
    """The state of a training run: it validates, keeps the best weights, writes checkpoints and shows the progress."""

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
        self.started = None
        self.seconds_excluded = self.checkpoint_seconds = 0.0  # excluded from tokens per second
        self.has_shown_optimisations = False
        self.stop_signal = None  # the signal received
        self.num_signal_checks = 0
        self.values_to_restore = None  # by the next `fit`: those of a checkpoint, or the metrics of the previous `fit`
        self.newest_checkpoint = None

    # --- checkpoints ---

    def open_run_dir(self, run_dir, identity, minutes, steps, keep) -> None:
        """Write logs and checkpoints to a folder from now on, and resume from the newest checkpoint in it."""
        folder, writes = run_dir / CHECKPOINTS, is_first_host()
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
        arrays, record, path = read_newest(folder, self.display.line)
        if path:
            require_same(path, record["identity"], identity, self.display.line)
            self.step, self.history = record["step"], record["history"]
            self.values_to_restore, self.best_weights, self.newest_checkpoint = arrays, arrays["best"], path
            self.display.line(f"resumes after step {self.step:,} from {path}")
        if writes:
            self.run_dir, self.folder = run_dir, folder
            self.identity, self.every_minutes, self.every_steps, self.keep = identity, minutes, steps, keep
            self._write_log()
            self.tensorboard = TensorBoardLog(run_dir / "tensorboard", self.display)

    def close(self) -> None:
        """Close the logs in the run folder, if there is one."""
        if self.folder:
            self.tensorboard.close()

    def show_optimisations(self, optimisations: list[str]) -> None:
        """Show the optimisations used, unless this was done before."""
        if optimisations and not self.has_shown_optimisations:
            self.display.line(f"trains with {', '.join(optimisations)}")
        self.has_shown_optimisations = True

    def _variables(self) -> dict:
        trained, model = self.model, self.language_model  # on JAX, reading `self.model` updates the weights of both
        return {
            "variables": model.variables,  # weights, and the states of random number generators
            "optimizer": model.optimizer.variables,
            "metrics": trained.metrics_variables,  # the sum of the losses since the last validation
        }

    def on_epoch_begin(self, epoch, logs=None):
        if self.values_to_restore:
            variables = self._variables()
            for kind in (kind for kind in variables if kind in self.values_to_restore):  # in one order on all hosts
                for variable, value in zip(variables[kind], self.values_to_restore[kind], strict=True):
                    variable.assign(value)
            self.values_to_restore = None
        self.first_step = self.step
        if self.started is None:
            self.started = self.interval_started = self.checkpoint_ended = self.last_checked = time.perf_counter()
            self.start_step = self.interval_start_step = self.step

    def carry_metrics_over(self) -> None:
        """Carry the sum of the losses over to the next `fit`, which would reset it."""
        metrics = self._variables()["metrics"]
        self.values_to_restore = {"metrics": [keras.ops.convert_to_numpy(v) for v in metrics]}

    def _write_checkpoint(self) -> None:
        started = time.perf_counter()
        arrays = {kind: [keras.ops.convert_to_numpy(v) for v in vs] for kind, vs in self._variables().items()}
        for value in arrays["variables"]:
            self._check_is_finite("sum of the weights", float(np.sum(value, dtype=np.float64)))
        record = {"step": self.step, "history": self.history, "identity": self.identity}
        with self._write_errors_explained("the checkpoint", self.folder):
            self.newest_checkpoint = write_checkpoint(
                self.folder, self.step, {**arrays, "best": self.best_weights}, record, self.keep
            )
        self.checkpoint_ended = time.perf_counter()
        self.checkpoint_seconds = self.checkpoint_ended - started
        self.seconds_excluded += self.checkpoint_seconds

    def _is_checkpoint_due(self) -> bool:
        if self.folder is None:
            return False
        wait = max(60 * (self.every_minutes or math.inf), self.checkpoint_seconds / _MAX_CHECKPOINT_FRACTION)
        is_due_by_step = self.every_steps is not None and self._has_passed_multiple(self.every_steps)
        return is_due_by_step or self.step == self.steps or time.perf_counter() - self.checkpoint_ended > wait

    @contextlib.contextmanager
    def _write_errors_explained(self, what: str, path):
        """Name what could not be written, and the newest checkpoint, in an error of the operating system."""
        try:
            yield
        except OSError as error:
            reason = f"{error.strerror}: {what} of step {self.step} cannot be written."
            way_out = f"{self._newest_checkpoint_words()} Free some space and train again: it resumes there"
            raise OSError(error.errno, f"{reason} {way_out}", str(path)) from None

    def _newest_checkpoint_words(self) -> str:
        newest = self.newest_checkpoint
        return f"The last good checkpoint is {newest}." if newest else "There is no earlier checkpoint."

    # --- steps ---

    def on_train_batch_end(self, batch, logs=None):
        # An accelerator runs several steps before this is called, with the last of them.
        self.step_before, self.step = self.step, self.first_step + (batch + 1) // self.num_microbatches
        self.num_signal_checks += 1
        if should_stop_all_hosts(self.num_signal_checks):
            self.stop_signal = signal.SIGTERM
        if self._has_passed_multiple(self.steps_per_validation) or self.step == self.steps:
            self._validate(logs)
        elif time.perf_counter() - self.last_checked > 0.2:  # not each time, as reading the loss waits for the device
            self._check_is_finite("loss", float(logs["loss"]))
            self.display.live(f"{self._position()}  loss {logs['loss']:.3f}  {self._speed_and_time_left()}")
            self.last_checked = time.perf_counter()
        if self.step == self.phase_end:
            self.model.reset_metrics()  # so that a checkpoint has them as the next phase starts with them
        if self._is_checkpoint_due() or (self.stop_signal and self.folder):
            self._write_checkpoint()
        if self.stop_signal:
            self.model.stop_training = True
            # After the checkpoint: a resumed training must not see this validation.
            if self.stop_signal == signal.SIGINT and self.history["step"][-1:] != [self.step]:
                self._validate(logs)

    def _has_passed_multiple(self, interval: int) -> bool:
        """Return whether the last steps include a multiple of `interval`."""
        return self.step // interval > self.step_before // interval

    def _validate(self, logs) -> None:
        ended, loss = time.perf_counter(), float(logs["loss"])
        self._check_is_finite("loss", loss)
        trained = self.model  # on JAX this updates the weights of the language model
        bits = evaluate_with_scorer(self.scorer, self.batches, self.documents, self._show_validation)["bits_per_char"]
        self._check_is_finite("bits per character on the held-out documents", bits)
        is_best = bits < min(self.history["bits_per_char"], default=math.inf)
        if is_best:
            self.best_weights = self.language_model.get_weights()
        num_tokens = (self.step - self.interval_start_step) * self.tokens_per_step
        speed = num_tokens / (ended - self.interval_started)
        row = {
            "step": float(self.step),
            "loss": loss,
            "bits_per_char": bits,
            "learning_rate": self._learning_rate(),
            "tokens_per_second": speed,
        }
        for name, value in row.items():
            self.history[name].append(value)
        self.seconds_excluded += time.perf_counter() - ended
        self.display.line(
            f"{self._position()}  loss {loss:.3f}  held-out bits/char {bits:.3f}"
            f"{' (best)' if is_best else '       '}  {self._speed_and_time_left()}"
        )
        if self.folder:
            self._write_log()
            with self._write_errors_explained("the log", self.run_dir / "tensorboard"):
                self.tensorboard.write({name: row[name] for name in list(row)[1:]}, self.step)
        trained.reset_metrics()
        self.interval_started, self.interval_start_step = time.perf_counter(), self.step

    def _show_validation(self, done: int) -> None:
        self.display.live(f"{self._position()}  validating {done / len(self.batches):.0%}")

    def _write_log(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([list(self.history), *zip(*self.history.values(), strict=True)])
        log = self.run_dir / "log.csv"
        with self._write_errors_explained("the log", log), atomic_write(log) as temporary:
            temporary.write_text(text.getvalue(), "utf-8")

    def _check_is_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            checkpoint = f" {self._newest_checkpoint_words()}" if self.newest_checkpoint else ""
            raise ValueError(
                f"The {name} became {value} at step {self.step} with a learning rate of "
                f"{self._learning_rate():.3g}.{checkpoint} Train again with a lower one."
            )

    def _learning_rate(self) -> float:
        return float(self.schedule((self.step - 1) * self.num_microbatches))

    def _position(self) -> str:
        return f"step {self.step:>{len(str(self.steps))}}/{self.steps}"

    def _speed_and_time_left(self) -> str:
        seconds, done = time.perf_counter() - self.started, self.step - self.start_step
        tokens_per_second = done * self.tokens_per_step / (seconds - self.seconds_excluded)
        left = round(seconds / done * (self.steps - self.step))
        return f"{tokens_per_second:,.0f} tokens/s  {left // 60}:{left % 60:02d} left"
