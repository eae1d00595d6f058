import importlib.util
import sys

import pytest
from conftest import message_of

from aigc_tf.training.logs import TensorBoardLog


class Lines(list):
    line = list.append


@pytest.mark.parametrize("broken", ["not installed", "its import fails"])
def test_training_goes_without_a_tensorboard_that_cannot_be_used(tmp_path, monkeypatch, broken):
    if broken == "not installed":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    said = Lines()
    log = TensorBoardLog(tmp_path / "tensorboard", said)
    log.write({"loss": 1.0}, 1)
    log.close()
    assert [line for line in said if line.startswith("no logs for TensorBoard: ") and broken in line] == said
    assert len(said) == 1
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_logs_is_named(tmp_path):
    (tmp_path / "tensorboard").touch()
    assert "tensorboard" in message_of(FileExistsError, TensorBoardLog, tmp_path / "tensorboard", Lines())


def test_what_cannot_be_written_is_an_error_of_the_operating_system(tmp_path, monkeypatch):
    tf = pytest.importorskip("tensorflow")
    log = TensorBoardLog(tmp_path, Lines())

    def fail():
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(log._writer, "flush", fail)
    monkeypatch.setattr(log._writer, "close", fail)
    assert "No space left on device" in message_of(OSError, log.write, {"loss": 1.0}, 1)
    log.close()
