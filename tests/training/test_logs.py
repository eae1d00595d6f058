import importlib.util
import sys

import pytest
from conftest import message_of

from aigc_tf.training.logs import Display, NoDisplay, TensorBoardLog


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


def test_a_line_covers_the_live_one_before_it_and_is_not_longer_otherwise(capsys):
    display = Display()
    display.live("nobody sees it change")
    assert capsys.readouterr().out == ""
    display.is_live = True  # as in a terminal
    display.live("step 1 of 10")
    display.live("step 2 of 10")  # too soon to be read
    display.line("done")
    display.line("!")
    assert capsys.readouterr().out == "step 1 of 10\rdone        \n!\n"


def test_tensorboard_reads_the_scalars_of_each_step(tmp_path):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    log = TensorBoardLog(tmp_path, NoDisplay())
    log.write({"loss": 2.5, "bits_per_char": 7.25}, 4)
    log.write({"loss": 1.5}, 8)
    log.close()
    (file,) = tmp_path.iterdir()
    events = loader.LegacyEventFileLoader(str(file)).Load()
    scalars = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert scalars == [(4, "loss", 2.5), (4, "bits_per_char", 7.25), (8, "loss", 1.5)]
