"""Checkpoints: whole or not there, damaged ones skipped, and a training run resumes as if it had never stopped."""

import errno
import gc
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import cpu_only, message_of

import aigc_tf
from aigc_tf import Tokenizer, make_dataset, train
from aigc_tf.runtime.backend import keras
from aigc_tf.training import checkpoints
from aigc_tf.training.checkpoints import list_checkpoints, read_newest, require_same, write_checkpoint
from aigc_tf.training.session import Session

try:
    import resource
except ImportError:  # Windows, where the size of files cannot be limited
    resource = None
limits_files = pytest.mark.skipif(resource is None, reason="the size of files is limited by POSIX")
# Where a file could not be written, `savez` of NumPy 1 leaves a ZipFile, which cannot be closed when it is collected.
ignores_unraisable = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def collected():
    """Collect the garbage of a test after it, before it could be found in another."""
    yield
    gc.collect()


ARRAYS = {"weights": [np.arange(6, dtype=np.float32).reshape(2, 3), np.array(7)], "best": []}
T = 20


def write(folder, *steps, keep=10):
    for step in steps:
        write_checkpoint(folder, step, ARRAYS, {"step": step}, keep)


def read(folder):
    warnings = []
    arrays, record, path = read_newest(folder, warnings.append)
    return arrays, record, path, warnings


def steps_in(folder):
    return [int(path.name.split("-")[1]) for path in list_checkpoints(folder)]


# --- files --------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    write(tmp_path, 3, 12)
    arrays, record, path, warnings = read(tmp_path)
    assert record["step"] == 12
    assert path.name.startswith("step-0000000012-")
    assert warnings == []
    assert list(arrays) == ["weights", "best"]
    assert arrays["best"] == []
    for value, expected in zip(arrays["weights"], ARRAYS["weights"], strict=True):
        np.testing.assert_array_equal(value, expected)
        assert value.dtype == expected.dtype


def test_none_is_none(tmp_path):
    assert read(tmp_path / "nowhere") == (None, None, None, [])


def test_the_last_few_are_kept(tmp_path):
    write(tmp_path, 9, 10, 100, keep=2)
    assert steps_in(tmp_path) == [10, 100]


def test_the_numbers_of_numpy_are_settings_like_python_s(build_one, documents, tokenizer, tmp_path):
    settings = {"steps": np.int64(2), "learning_rate": np.float32(1e-3), "weight_decay": np.float64(0.1)}
    _, history = run(build_one, documents, tokenizer, tmp_path, **settings)
    _, again = run(build_one, documents, tokenizer, tmp_path, **settings)
    assert history == again  # it was kept, and there was nothing left to do


def test_whatever_the_damage_the_one_before_is_taken(tmp_path):
    write(tmp_path, 1, 2)
    newest = list_checkpoints(tmp_path)[-1]
    whole = newest.read_bytes()
    generator = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        if generator.random() < 0.3:
            del damaged[generator.randrange(len(whole)) :]
        else:
            for _ in range(generator.choice([1, 8])):
                damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        newest.write_bytes(damaged)
        arrays, record, _, warnings = read(tmp_path)
        assert record["step"] == 1
        assert warnings == [f"warning: {newest} is damaged, and skipped"]
        for value, expected in zip(arrays["weights"], ARRAYS["weights"], strict=True):
            np.testing.assert_array_equal(value, expected)


def test_one_of_another_version_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setitem(checkpoints._FORMAT, "version", 2)
        write(tmp_path, 1)
    assert "cannot be read by this version" in message_of(ValueError, read, tmp_path)


@limits_files
@ignores_unraisable
@pytest.mark.usefixtures("collected")
def test_where_there_is_no_room_the_earlier_ones_stay(tmp_path):
    write(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="large") as caught:
            write_checkpoint(tmp_path, 2, {"weights": [np.zeros(10_000)]}, {}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert steps_in(tmp_path) == [1]
    assert len(os.listdir(tmp_path)) == 1


def test_what_differs_is_named(tmp_path):
    before = {"steps": 10, "tokenizer": "a" * 64, "model": {"layer 1 (Dropout)": {"rate": 0.1}}, "batch": [4, 20]}
    warnings = []
    require_same(tmp_path, before, dict(before), warnings.append)
    assert warnings == []
    now = {"steps": 20, "tokenizer": "b" * 64, "model": {"layer 1 (Dropout)": {"rate": 0.2}}, "batch": [4, 20]}
    message = message_of(ValueError, require_same, tmp_path, before, now, warnings.append)
    assert "steps was 10, is 20; tokenizer differs; model layer 1 (Dropout) rate was 0.1, is 0.2. Train with" in message
    assert warnings == []


def test_what_a_layer_has_in_one_version_of_keras_alone_is_no_difference(tmp_path):
    before = {"steps": 10, "model": {"layer 1 (Dropout)": {"rate": 0.1, "old": 1}}}
    now = {"steps": 10, "model": {"layer 1 (Dropout)": {"rate": 0.1, "new": None}}}
    warnings = []
    require_same(tmp_path, before, now, warnings.append)
    assert warnings == ["warning: another version of Keras? Not compared are the layers' new, old"]
    now["model"]["layer 1 (Dropout)"]["rate"] = 0.2
    assert "rate was 0.1, is 0.2" in message_of(ValueError, require_same, tmp_path, before, now, warnings.append)


# --- training -----------------------------------------------------------------------------------------------------


def run(build, documents, tokenizer, folder, **settings):
    model = build(tokenizer.vocab_size, T, num_layers=1, dropout=settings.pop("dropout", 0.3), seed=1)
    data = make_dataset(documents, tokenizer, T, settings.pop("batch_size", 4), seed=settings.pop("seed", 0))
    valid = settings.pop("valid_documents", documents[:10])
    usual = {"steps": 12, "validations": 3, "progress": False, "checkpoint_steps": 1, "num_candidates": 0}
    settings = {**usual, **settings}
    return model, train(model, data, tokenizer, valid, run_dir=folder, **settings)


def state_of(model, history, folder):
    """All that must be the same, bit for bit."""
    arrays, record, _, _ = read(folder / "checkpoints")
    figures = [{name: h[name] for name in h if name != "tokens_per_second"} for h in (history, record["history"])]
    flat = [value for values in arrays.values() for value in values]
    return [*flat, *model.get_weights()], [*figures, record["step"]]


def require_equal(one, two):
    for a, b in zip(one[0], two[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert one[1] == two[1]


@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        ((4, 7), {}),  # at a validation, and between two
        ((7, 10), {"num_candidates": 100}),  # and of the steps among candidates, of which the tenth is the last
        ((7,), {"num_microbatches": 2, "num_candidates": 100}),
    ],
)
def test_from_each_checkpoint_it_goes_on_to_the_same_end(build, documents, tokenizer, tmp_path, steps, settings):
    whole = tmp_path / "whole"
    model, history = run(build, documents, tokenizer, whole, keep_checkpoints=99, **settings)
    expected = state_of(model, history, whole)
    assert len(list_checkpoints(whole / "checkpoints")) == 12
    for step in steps:
        part = tmp_path / f"part-{step}"
        (part / "checkpoints").mkdir(parents=True)
        shutil.copy(list_checkpoints(whole / "checkpoints")[step - 1], part / "checkpoints")
        require_equal(state_of(*run(build, documents, tokenizer, part, **settings), part), expected)
        assert (part / "log.csv").read_text().splitlines()[
            0
        ] == "step,loss,bits_per_char,learning_rate,tokens_per_second"
        assert len((part / "log.csv").read_text().splitlines()) == 4


def test_checkpoints_change_nothing(build_one, documents, tokenizer, tmp_path):
    with_them, history = run(build_one, documents, tokenizer, tmp_path)
    model = build_one(tokenizer.vocab_size, T, num_layers=1, dropout=0.3, seed=1)
    data = make_dataset(documents, tokenizer, T, 4, seed=0)
    settings = {"steps": 12, "validations": 3, "num_candidates": 0, "progress": False}
    alone = train(model, data, tokenizer, documents[:10], **settings)
    assert alone["bits_per_char"] == history["bits_per_char"]
    for a, b in zip(model.get_weights(), with_them.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_scale_of_the_loss_goes_on_too(documents, tokenizer, tmp_path):
    def build(*args, **settings):
        return aigc_tf.lstm(*args, hidden_dim=16, **settings)

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        settings = {"keep_checkpoints": 9, "checkpoint_steps": 4}
        expected = state_of(*run(build, documents, tokenizer, tmp_path, **settings), tmp_path)
        for path in list_checkpoints(tmp_path / "checkpoints")[1:]:
            path.unlink()
        require_equal(state_of(*run(build, documents, tokenizer, tmp_path, **settings), tmp_path), expected)
    finally:
        keras.config.set_dtype_policy(before)


def test_data_of_another_origin_is_read_again(build_one, documents, tokenizer, tmp_path):
    def run_on(folder):
        model = build_one(tokenizer.vocab_size, T, num_layers=1, dropout=0.3, seed=1)
        pytest.importorskip("tensorflow")
        data = make_dataset(documents, tokenizer, T, 4, seed=0).map(lambda x, y: (x, y))
        settings = {"steps": 6, "validations": 2, "progress": False, "checkpoint_steps": 2, "keep_checkpoints": 9}
        return model, train(model, data, tokenizer, documents[:10], run_dir=folder, **settings)

    expected = state_of(*run_on(tmp_path), tmp_path)
    for path in list_checkpoints(tmp_path / "checkpoints")[1:]:
        path.unlink()
    require_equal(state_of(*run_on(tmp_path), tmp_path), expected)


def test_another_setting_corpus_or_tokenizer_is_refused(build_one, documents, tokenizer, tmp_path):
    run(build_one, documents, tokenizer, tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = [documents[0].replace("白", "黄"), *documents[1:]]
    for part, texts, tokens, change in [
        ("steps was 12, is 13", documents, tokenizer, {"steps": 13}),
        ("learning_rate was 0.001, is 0.002", documents, tokenizer, {"learning_rate": 2e-3}),
        ("validations was 3, is 4", documents, tokenizer, {"validations": 4}),
        ("rate was 0.3, is 0.4", documents, tokenizer, {"dropout": 0.4}),
        ("training data order's seed was 0, is 5", documents, tokenizer, {"seed": 5}),
        ("training data shape of a batch was [4, 20], is [5, 20]", documents, tokenizer, {"batch_size": 5}),
        ("held-out documents differs", documents, tokenizer, {"valid_documents": documents[:9]}),
        ("training data tokens differs", other, tokenizer, {}),
        ("tokenizer differs", documents, Tokenizer.train(documents[:9]), {}),
    ]:
        assert part in message_of(ValueError, run, build_one, texts, tokens, tmp_path, **change)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_damaged_checkpoint_is_skipped_and_said(build_one, documents, tokenizer, tmp_path, capsys):
    expected = state_of(*run(build_one, documents, tokenizer, tmp_path), tmp_path)
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    again = run(build_one, documents, tokenizer, tmp_path, progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"warning: {newest} is damaged, and skipped"
    assert lines[1].startswith("resumes after step 11 from ")
    require_equal(state_of(*again, tmp_path), expected)


def test_a_log_that_cannot_be_written_says_so(build_one, documents, tokenizer, tmp_path, monkeypatch):
    def fail(path):
        raise OSError(28, "No space left on device", ".1-log.csv")

    monkeypatch.setattr("aigc_tf.training.session.atomic_write", fail)
    with pytest.raises(OSError, match="the log of step 0 cannot be written. There is no earlier checkpoint. Free") as e:
        run(build_one, documents, tokenizer, tmp_path)
    assert e.value.filename == str(tmp_path / "log.csv")


@limits_files
@ignores_unraisable
@pytest.mark.usefixtures("collected")
def test_a_full_disk_stops_with_what_is_kept(build_one, documents, tokenizer, tmp_path):
    run(build_one, documents, tokenizer, tmp_path)
    for path in list_checkpoints(tmp_path / "checkpoints")[1:]:
        path.unlink()
    kept = list_checkpoints(tmp_path / "checkpoints")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot be written") as caught:
            run(build_one, documents, tokenizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"the checkpoint of step 12 cannot be written. The last good checkpoint is {kept[0]}." in str(caught.value)
    assert list_checkpoints(tmp_path / "checkpoints") == kept
    assert run(build_one, documents, tokenizer, tmp_path)[1]["step"] == [4, 8, 12]


def test_a_folder_that_cannot_be_written_is_said_before_training(build_one, documents, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(build_one, documents, tokenizer, tmp_path / "file" / "run")


def test_a_loss_that_is_no_number_names_the_last_good_checkpoint(build_one, documents, tokenizer, tmp_path):
    message = message_of(ValueError, run, build_one, documents, tokenizer, tmp_path, learning_rate=1e38)
    newest = list_checkpoints(tmp_path / "checkpoints")[-1]
    assert f"The last good checkpoint is {newest}." in message
    for values in read(tmp_path / "checkpoints")[0].values():
        assert all(np.isfinite(value).all() for value in values)


def test_what_a_kill_left_half_written_is_gone_after_the_next_training(build_one, documents, tokenizer, tmp_path):
    folders = (tmp_path, tmp_path / "checkpoints")
    leftovers = [folder / f".0123456789ab-{name}" for folder in folders for name in (".lock", "step.npz")]
    folders[1].mkdir()
    for path in leftovers:
        path.touch()
    run(build_one, documents, tokenizer, tmp_path, steps=1, validations=1)
    assert not any(path.exists() for path in leftovers)


@cpu_only
def test_checkpoints_come_by_the_minute(build_one, documents, tokenizer, tmp_path):
    settings = {"checkpoint_steps": None, "keep_checkpoints": 99, "steps": 3, "validations": 1}
    run(build_one, documents, tokenizer, tmp_path / "seldom", **settings)
    assert steps_in(tmp_path / "seldom" / "checkpoints") == [3]
    run(build_one, documents, tokenizer, tmp_path / "often", **settings, checkpoint_minutes=1e-9)
    assert steps_in(tmp_path / "often" / "checkpoints")[0] == 1


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1, got 0"),
        ({"checkpoint_steps": 0}, "checkpoint_steps must be above 0, or None, got 0"),
        ({"checkpoint_minutes": -1}, "checkpoint_minutes must be above 0, or None, got -1"),
    ],
)
def test_wrong_settings_are_said(build_one, documents, tokenizer, tmp_path, wrong, part):
    assert part in message_of(ValueError, run, build_one, documents, tokenizer, tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


# --- processes ----------------------------------------------------------------------------------------------------

# The arguments: the texts, the folder, the signal, and where it comes: at a step, or where a checkpoint is written.
SCRIPT = """
import io, os, sys
import numpy as np, aigc_tf
from aigc_tf.training import checkpoints
from aigc_tf.training.session import Session
texts, folder, signum, moment = sys.argv[1:]
savez, rename, end = np.savez, checkpoints.rename, Session.on_train_batch_end
def kill():
    os.kill(os.getpid(), int(signum))
def write_half(file, **entries):
    whole = io.BytesIO()
    savez(whole, **entries)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    kill()
def rename_only(path, new):
    rename(path, new)
    kill()
def end_unless_killed(session, batch, logs=None):
    if session.step + 1 == int(moment):
        kill()
    end(session, batch, logs)
if moment == "written by half":
    np.savez = write_half
elif moment == "renamed":
    checkpoints.rename = rename_only
else:
    Session.on_train_batch_end = end_unless_killed
documents = open(texts).read().split("\\n\\n")
tokenizer = aigc_tf.Tokenizer.train(documents)
model = aigc_tf.lstm(tokenizer.vocab_size, 20, num_layers=1, hidden_dim=16, dropout=0.3, seed=1)
data = aigc_tf.make_dataset(documents, tokenizer, 20, 4, seed=0)
aigc_tf.train(model, data, tokenizer, documents[:10], steps=60, validations=3, checkpoint_steps=7, run_dir=folder)
"""


@pytest.mark.slow
@cpu_only
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_killed_again_and_again_it_ends_as_if_it_had_not_been(build_one, documents, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "texts").write_text("\n\n".join(documents))
    folder, settings = tmp_path / "killed", {"steps": 60, "checkpoint_steps": 7, "num_candidates": None}
    kept = folder / "checkpoints"
    # The log is ahead of the checkpoints at step 21, as there was a validation at step 20.
    for signum, moment, steps, last_validation in (
        (signal.SIGTERM, "8", [7, 8], "step"),
        (signal.SIGKILL, "21", [8, 14], "20.0"),
        (signal.SIGKILL, "written by half", [8, 14], "20.0"),
        (signal.SIGKILL, "renamed", [8, 14, 21], "20.0"),
    ):
        command = [sys.executable, "-c", SCRIPT, tmp_path / "texts", folder, str(int(signum)), moment]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == -signum, done.stdout
        assert steps_in(kept) == steps, moment
        assert (folder / "log.csv").read_text().splitlines()[-1].split(",")[0] == last_validation
        assert len(list(kept.glob(".*-step.npz"))) == (moment == "written by half")

    with monkeypatch.context() as patched:

        def interrupt(session, batch, logs=None, end=Session.on_train_batch_end):
            if session.step + 1 == 45:
                signal.raise_signal(signal.SIGINT)
            end(session, batch, logs)

        patched.setattr(Session, "on_train_batch_end", interrupt)
        run(build_one, documents, tokenizer, folder, **settings)
    assert steps_in(kept) == [42, 45]
    assert not list(kept.glob(".*"))
    ended = state_of(*run(build_one, documents, tokenizer, folder, **settings), folder)
    whole = tmp_path / "whole"
    require_equal(ended, state_of(*run(build_one, documents, tokenizer, whole, **settings), whole))
    assert ended[1][0]["step"] == [20, 40, 60]
