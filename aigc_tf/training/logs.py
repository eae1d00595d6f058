"""Logs: the progress that a training run shows on standard output, and scalars for TensorBoard."""

import contextlib
import errno
import importlib.util
import sys
import time
from pathlib import Path

from ..generation.show import in_notebook
from ..runtime.backend import tensorflow_for_data


class Display:
    """Show lines that stay, and in a terminal or a notebook a last line that is overwritten."""

    def __init__(self):
        self.is_live = sys.stdout.isatty() or in_notebook()
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


class NoDisplay:
    """Show nothing."""

    def live(self, text: str) -> None: ...

    def line(self, text: str) -> None: ...


class TensorBoardLog:
    """Scalars in a folder for TensorBoard, written by TensorBoard's own writer, which needs no TensorFlow.

    Args:
        folder: the folder.
        display: where it is said if the package tensorboard cannot be used; nothing is written then.
    """

    def __init__(self, folder, display):
        self._writer = None
        if importlib.util.find_spec("tensorboard") is None:
            display.line("no logs for TensorBoard: tensorboard is not installed")
            return
        tf = tensorflow_for_data()  # where it is installed, tensorboard imports it, with all its start-up lines
        self._tensorflow_errors = (tf.errors.OpError,) if tf else ()  # tensorboard writes files through it
        try:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except Exception as error:  # any kind: it imports code of others, for other versions perhaps
            display.line(f"no logs for TensorBoard: its import fails: {' '.join(str(error).split())}")
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Write scalars by name, and wait until they are in the file.

        Raises:
            OSError: they cannot be written.
        """
        if self._writer is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        try:
            self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            self._writer.flush()
        except self._tensorflow_errors as error:
            raise OSError(errno.EIO, error.message) from None

    def close(self) -> None:
        """Close the file, and end the writer's thread."""
        if self._writer is not None:
            with contextlib.suppress(OSError, *self._tensorflow_errors):  # `write` has raised it before
                self._writer.close()
