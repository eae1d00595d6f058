import collections
import gc
import inspect
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import message_of

import aigc_tf
from aigc_tf.corpus.dataset import make_store
from aigc_tf.runs import tune as tune_module
from aigc_tf.runs.folder import _FORMAT
from aigc_tf.runs.pipeline import SETTINGS, run_pipeline
from aigc_tf.runs.trials import trials_table
from aigc_tf.runs.tune import tune
from aigc_tf.runtime.backend import keras
from aigc_tf.runtime.files import write_json
from aigc_tf.runtime.locks import locked
from aigc_tf.training.checkpoints import list_checkpoints
from aigc_tf.training.logs import NoDisplay
from aigc_tf.training.session import Session

SMALL = {"context": 8, "steps": 2, "validations": 1, "num_layers": 1, "hidden_dim": 8, "valid_fraction": 0.2}
SMALL |= {"model": "lstm"}
RATES = {"learning_rate": (1e-3, 1e-1)}


def without_seconds(trials):
    return [{name: value for name, value in trial.items() if name != "seconds"} for trial in trials]


def recorded(folder):
    return json.loads((folder / "trials.json").read_text("utf-8"))["trials"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def without_training(monkeypatch):
    """Let a trial only refuse wrong settings and write a `run.json`; its figure follows from the learning rate."""

    def run(documents, folder, *, text_dir, progress, **given):
        inspect.signature(run_pipeline).bind(documents, folder, **given)
        settings = {**SETTINGS, **given}
        if settings["model"] == "transformer":
            if settings["hidden_dim"] % (settings["num_heads"] or 1):
                raise ValueError("hidden_dim must be a multiple of num_heads")
        elif settings["num_heads"]:
            raise ValueError("an LSTM has no attention heads")
        if settings["user_dict"] and settings["unit"] != "word":
            raise ValueError("a user dictionary is for words")
        figures = {"bits_per_char": 7 - math.log10(settings["learning_rate"]), "steps_done": settings["steps"]}
        sha256 = {"model.keras": "", "tokenizer.json": ""}
        folder.mkdir(exist_ok=True)
        write_json(folder / "run.json", {**_FORMAT, "sha256": sha256, "settings": settings, "figures": figures})
        return figures

    monkeypatch.setattr(tune_module, "run_pipeline", run)


def test_the_better_setting_comes_first_and_its_run_is_kept(documents, tmp_path, capsys, monkeypatch):
    folder, made = tmp_path / "search", []
    monkeypatch.setattr("aigc_tf.runs.encoded_text.make_store", lambda *args: made.append(args) or make_store(*args))
    trials = tune(documents, folder, {"learning_rate": [1e-9, 1e-1]}, trials=5, **{**SMALL, "steps": 20})
    # Of two values there are two trials, however many are allowed.
    assert [trial["settings"] for trial in trials] == [{"learning_rate": 1e-1}, {"learning_rate": 1e-9}]
    assert trials[0]["bits_per_char"] < trials[1]["bits_per_char"] - 0.5
    assert names(folder) == ["best", "trials.json"]
    assert len(made) == 1  # the text is encoded once
    run = aigc_tf.read_run(folder / "best")
    assert run["settings"]["learning_rate"] == 1e-1
    assert run["figures"]["bits_per_char"] == trials[0]["bits_per_char"]
    model, tokenizer = aigc_tf.load(folder / "best")
    measured = aigc_tf.evaluate(model, tokenizer, aigc_tf.split(documents, 0.2)[1])["bits_per_char"]
    assert measured == pytest.approx(trials[0]["bits_per_char"], rel=1e-5)

    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    assert out[0].startswith("trial 1/5  learning_rate ")
    assert f"(best {trials[0]['bits_per_char']:.3f})" in out[1]
    assert out[2] == "all settings of the space have been tried"


@pytest.mark.usefixtures("without_training")
def test_a_resumed_search_equals_an_uninterrupted_one(documents, tmp_path, capsys):
    for trials in (2, 4):
        tune(documents, tmp_path / "twice", RATES, trials=trials, progress=False, **SMALL)
        (tmp_path / "twice" / f"trial-{trials + 1}").mkdir()  # what a killed process leaves
        if trials == 2:
            first = recorded(tmp_path / "twice")
    again = recorded(tmp_path / "twice")
    assert again[:2] == first  # the seconds, too: they were not done again
    once = tune(documents, tmp_path / "once", RATES, trials=4, progress=False, **SMALL)
    assert without_seconds(recorded(tmp_path / "once")) == without_seconds(again)
    assert [trial["bits_per_char"] for trial in once] == sorted(trial["bits_per_char"] for trial in again)
    assert aigc_tf.read_run(tmp_path / "once" / "best")["figures"]["bits_per_char"] == once[0]["bits_per_char"]
    assert capsys.readouterr().out == ""

    # With nothing left to do, only the clean-up is done, and the budget of an earlier call may be larger.
    assert tune(documents, tmp_path / "twice", RATES, trials=1, progress=False, **SMALL) == sorted(
        again, key=lambda trial: trial["bits_per_char"]
    )
    assert names(tmp_path / "twice") == ["best", "trial-5", "trials.json"]  # which may be resumed


@pytest.mark.usefixtures("without_training")
def test_minutes_end_the_search_after_the_running_trial(documents, tmp_path):
    for done in (1, 2):
        assert len(tune(documents, tmp_path / "search", RATES, minutes=1e-9, progress=False, **SMALL)) == done


@pytest.mark.usefixtures("without_training")
def test_trials_start_until_the_minutes_are_over(documents, tmp_path, monkeypatch):
    clock = itertools.count(0, 10)  # it is asked once by the search, twice by a trial and once after it
    monkeypatch.setattr(tune_module, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    # They end 30, 60, 90, 120 seconds after the search began.
    assert len(tune(documents, tmp_path / "search", RATES, minutes=1.75, progress=False, **SMALL)) == 4


@pytest.mark.usefixtures("without_training")
def test_another_search_is_refused_in_the_same_folder(documents, tmp_path):
    folder = tmp_path / "search"
    tune(documents, folder, RATES, trials=1, progress=False, **SMALL)
    before = (folder / "trials.json").read_bytes()
    for difference, arguments, settings in [
        ("documents", (documents[1:], folder, RATES), {}),
        ("space", (documents, folder, {"learning_rate": [1e-3, 1e-1]}), {}),
        ("fixed", (documents, folder, RATES), {"steps": 3}),
        ("seed", (documents, folder, RATES), {"seed": 1}),
    ]:
        message = message_of(ValueError, tune, *arguments, trials=2, **{**SMALL, **settings})
        assert f"differs in {difference}." in message
    assert (folder / "trials.json").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds no trials.json" in message_of(ValueError, tune, documents, tmp_path, RATES, trials=1)
    record = json.loads(before)
    (folder / "trials.json").write_text(json.dumps({**record, "trials": [{**record["trials"][0], "seconds": "61"}]}))
    assert "is damaged: entry 1" in message_of(ValueError, tune, documents, folder, RATES, trials=2, **SMALL)


@pytest.mark.usefixtures("without_training")
def test_a_failed_trial_is_listed_and_the_search_continues(documents, tmp_path, capsys):
    # 9 is no multiple of 2 heads; without heads to count an LSTM takes it.
    space = {"hidden_dim": [8, 9], "model": ["transformer", "lstm"]}
    fixed = {**{k: v for k, v in SMALL.items() if k not in space}, "num_heads": 2}
    trials = tune(documents, tmp_path / "search", space, trials=9, **fixed)
    assert len(trials) == 4
    assert trials[-1]["settings"] == {"hidden_dim": 9, "model": "transformer"}
    assert trials[-1]["bits_per_char"] is None
    assert "multiple of num_heads" in trials[-1]["error"]
    assert all(trial["error"] is None for trial in trials[:3])
    assert names(tmp_path / "search") == ["best", "trials.json"]
    table = trials_table(trials[::-1]).splitlines()
    assert len(table) == 5
    assert f"{trials[0]['bits_per_char']:.4f}" in table[1]
    assert "failed" in table[-1]
    assert "multiple of num_heads" in table[-1]
    assert "failed: " in capsys.readouterr().out


@pytest.mark.usefixtures("without_training")
def test_a_figure_that_is_not_finite_is_a_failure(documents, tmp_path, monkeypatch):
    run, figures = tune_module.run_pipeline, iter([math.inf, math.nan, 7.0])
    monkeypatch.setattr(
        tune_module, "run_pipeline", lambda *args, **given: {**run(*args, **given), "bits_per_char": next(figures)}
    )
    trials = tune(documents, tmp_path / "search", RATES, trials=3, progress=False, **SMALL)
    assert [trial["bits_per_char"] for trial in trials] == [7.0, None, None]
    assert [trial["error"] for trial in trials[1:]] == [f"The bits per character became {f}." for f in ("inf", "nan")]
    assert tune(documents, tmp_path / "search", RATES, trials=3, progress=False, **SMALL) == trials  # it can be read


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused_before_a_folder_is_made(documents, tmp_path, seed):
    for wrong in ({"seed": seed}, {"seed": 0.5}, {"seed": None}, {"seed": "1"}):
        message = message_of(ValueError, tune, documents, tmp_path / "search", RATES, trials=1, **wrong, **SMALL)
        assert "seed must be a whole number from 0 to 2**63 - 1, got" in message
    assert not (tmp_path / "search").exists()


def test_when_all_trials_fail_the_reason_is_given(documents, tmp_path):
    space, fixed = {"hidden_dim": [7, 9]}, {**SMALL, "model": "transformer", "num_heads": 2}
    del fixed["hidden_dim"]
    message = message_of(ValueError, tune, documents, tmp_path / "search", space, trials=3, progress=False, **fixed)
    assert "All 2 trials failed. The last error was: " in message
    assert "multiple of num_heads" in message


def test_too_little_memory_fails_a_trial_and_a_bug_ends_the_search():
    tf = pytest.importorskip("tensorflow")
    for error in (
        ValueError("hidden_dim must be a multiple of num_heads"),
        MemoryError(),
        tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"),  # of JAX
    ):
        assert tune_module._is_failure_of_settings(error)
    for error in (TypeError("a bug"), RuntimeError("a bug"), OSError(28, "No space left on device")):
        assert not tune_module._is_failure_of_settings(error)


def test_ten_failures_without_a_success_end_the_search(documents, tmp_path):
    fixed = {**SMALL, "model": "transformer", "num_heads": 3}
    message = message_of(ValueError, tune, documents, tmp_path / "search", RATES, minutes=60, progress=False, **fixed)
    assert "All 10 trials failed" in message
    assert "multiple of num_heads" in message


@pytest.mark.usefixtures("without_training")
def test_a_search_over_units_uses_the_user_dictionary_for_words_alone(documents, tmp_path):
    fixed = {**SMALL, "user_dict": ["欲穷千里"]}
    trials = tune(documents, tmp_path / "search", {"unit": ["char", "word"]}, trials=2, progress=False, **fixed)
    assert [trial["error"] for trial in trials] == [None, None]
    best = trials[0]["settings"]["unit"]
    assert bool(aigc_tf.read_run(tmp_path / "search" / "best")["settings"]["user_dict"]) == (best == "word")


def count_graphs():
    gc.collect()
    # By its name without isinstance: some objects of the heap answer with a warning when they are asked.
    return collections.Counter(type(thing).__name__ for thing in gc.get_objects())["FuncGraph"]


def test_a_trial_leaves_no_graph_no_warning_and_the_user_s_policy(documents, tmp_path, capfd):
    before = count_graphs()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        tune(documents, tmp_path / "search", RATES, trials=2, progress=False, **SMALL)
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
    finally:
        keras.config.set_dtype_policy("float32")
    assert count_graphs() <= before
    assert capfd.readouterr() == ("", "")


def records_of(space, count, figure, seed=0):
    """Go through a search without training: the figure is a function of the settings."""
    records = []
    for number in range(1, count + 1):
        settings = tune_module._propose(space, records, seed)
        bits = figure(settings)
        error = "failed" if bits is None else None
        records.append({"trial": number, "settings": settings, "bits_per_char": bits, "seconds": 1.0, "error": error})
    return records


def test_proposals_follow_from_the_seed_and_stay_in_the_space():
    space = {"learning_rate": (1e-3, 1e-2), "num_layers": (1, 3), "model": ["transformer", "lstm"], "num_heads": [1, 2]}
    # One more than are drawn at random.
    first, same = (
        [record["settings"] for record in records_of(space, 6, lambda s: s["learning_rate"] * 100, seed=3)]
        for _ in range(2)
    )
    assert first == same
    assert tune_module._propose(space, [], 4) != first[0]
    for settings in first:
        assert 1e-3 <= settings["learning_rate"] <= 1e-2
        assert settings["num_layers"] in (1, 2, 3)
        assert type(settings["num_layers"]) is int
        assert ("num_heads" in settings) == (settings["model"] == "transformer")


def test_ranges_above_0_are_drawn_from_on_a_logarithmic_scale_and_others_evenly():
    space = {"learning_rate": (1e-6, 1.0), "dropout": (0.0, 0.8)}
    drawn = [tune_module._propose(space, [], seed) for seed in range(40)]
    for name, middle in (("learning_rate", 1e-3), ("dropout", 0.4)):
        assert 10 <= sum(settings[name] < middle for settings in drawn) <= 30, name


def test_settings_near_those_that_failed_are_avoided():
    space = {"dropout": (0.0, 0.9)}
    # The nearer to the failures, the better.
    tried = [(rate, 8 - rate if rate < 0.5 else None) for rate in (0.05, 0.2, 0.35, 0.45, 0.6, 0.7, 0.8)]
    records = [
        {"trial": i, "settings": {"dropout": rate}, "bits_per_char": bits, "error": None if bits else "failed"}
        for i, (rate, bits) in enumerate(tried, 1)
    ]
    assert all(tune_module._propose(space, records, seed)["dropout"] < 0.55 for seed in range(3))


@pytest.mark.slow
def test_the_search_finds_a_minimum_that_random_draws_do_not():
    # So near to the lowest, within 0.03 of 4 orders of magnitude, 14 draws at random come once in five searches.
    def figure(settings):
        rate = settings["learning_rate"]
        return None if rate > 0.5 else 7 + math.log10(rate / 0.03) ** 2

    records = records_of({"learning_rate": (1e-4, 1.0)}, 14, figure)
    best = min(r["bits_per_char"] for r in records if not r["error"])
    assert best < 7.001


def test_each_setting_of_a_finite_space_is_tried_once_and_then_no_more():
    space = {"num_layers": (1, 2), "model": ["transformer", "lstm"], "num_heads": [1, 2]}
    records = records_of(space, 6, lambda settings: float(settings["num_layers"]))
    assert len({json.dumps(record["settings"], sort_keys=True) for record in records}) == 6
    assert tune_module._propose(space, records, 0) is None


def test_invalid_searches_are_refused_before_anything_is_written(documents, tmp_path):
    folder = tmp_path / "search"
    for space, settings, part in [
        ({"width": [1]}, {}, "no setting 'width'"),
        (RATES, {"width": 1}, "no setting 'width'"),
        ({}, {}, "nothing to search"),
        ({"dropout": []}, {}, "at least one value"),
        ({"learning_rate": (1e-2, 1e-3)}, {}, "low <= high, got 0.01 and 0.001"),
        ({"num_layers": (1, 2.5)}, {}, "num_layers must be of type int, got 2.5"),
        ({"dropout": [0.1, "much"]}, {}, "dropout must be of type float, got 'much'"),
        ({"learning_rate": (1e-3, float("inf"))}, {}, "got inf"),
        ({"model": ("a", "b")}, {}, "model must be a list, got"),
        ({"dropout": 0.1}, {}, "a list or a tuple"),
        (RATES, {"learning_rate": 1e-3}, "both searched and fixed"),
        ({"valid_fraction": [0.1, 0.2]}, {}, "cannot be compared"),
        (RATES, {"trials": None}, "needs a limit"),
        (RATES, {"trials": 0}, "trials must be at least 1, got 0"),
        (RATES, {"minutes": 0}, "minutes must be above 0, got 0"),
    ]:
        assert part in message_of(ValueError, tune, documents, folder, space, **{"trials": 1, **settings}), part
    assert not folder.exists()


def test_without_keras_tuner_the_error_says_how_to_install_it(documents, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "keras_tuner", None)
    message = message_of(ValueError, tune, documents, tmp_path / "search", RATES, trials=1)
    assert "pip install 'keras-tuner[bayesian]'" in message
    assert not (tmp_path / "search").exists()


def test_a_keras_tuner_without_what_is_needed_is_refused(documents, tmp_path, monkeypatch):
    keras_tuner = pytest.importorskip("keras_tuner")
    monkeypatch.delattr(keras_tuner.oracles.BayesianOptimizationOracle, "populate_space")
    monkeypatch.setattr(keras_tuner.Oracle, "populate_space", None)
    monkeypatch.delattr(keras_tuner.Oracle, "populate_space")
    message = message_of(ValueError, tune, documents, tmp_path / "search", RATES, trials=1)
    assert "needs keras_tuner.oracles.BayesianOptimizationOracle.populate_space" in message
    assert keras_tuner.__version__ in message
    assert not (tmp_path / "search").exists()


@pytest.mark.usefixtures("without_training")
def test_folders_that_the_search_did_not_make_stay(documents, tmp_path):
    folder = tmp_path / "search"
    tune(documents, folder, RATES, trials=1, progress=False, **SMALL)
    (folder / "trial-1-my-copy").mkdir()
    (folder / "trial-7").mkdir()  # of no trial that is recorded
    (folder / "trial-notes.txt").write_text("mine")
    tune(documents, folder, RATES, trials=2, progress=False, **SMALL)
    assert names(folder) == ["best", "trial-1-my-copy", "trial-7", "trial-notes.txt", "trials.json"]


def test_one_search_at_a_time_in_a_folder(documents, tmp_path):
    with ThreadPoolExecutor(1) as other, locked(tmp_path / "search"):
        search = other.submit(tune, documents, tmp_path / "search", RATES, trials=1, progress=False, **SMALL)
        assert "A training is running in this folder" in message_of(BlockingIOError, search.result)


def stop_in_the_second_trial(signum):
    """Return a method of `Session` that sends this process a signal at the third step of the second trial."""

    def stop(session, batch, logs=None, end=Session.on_train_batch_end):
        if session.run_dir.name == "trial-2" and session.step == 2:
            os.kill(os.getpid(), signum)
        end(session, batch, logs)

    return stop


SEARCH = {**SMALL, "steps": 6, "validations": 3}
SCRIPT = """
import sys
sys.path.insert(0, {path!r})
from runs.test_tune import *
Session.on_train_batch_end = stop_in_the_second_trial(signal.SIGKILL)
tune({documents!r}, Path({folder!r}), RATES, trials=9, **SEARCH)
"""


def resume(documents, folder):
    """Resume a search that was stopped in its second trial."""
    kept = recorded(folder)
    assert [record["trial"] for record in kept] == [1]
    assert [name for name in names(folder) if name != ".lock"] == [".text", "best", "trial-2", "trials.json"]
    trials = tune(documents, folder, RATES, trials=2, progress=False, **SEARCH)
    assert recorded(folder)[:1] == kept
    assert sorted(trial["trial"] for trial in trials) == [1, 2]
    assert names(folder) == ["best", "trials.json"]
    assert aigc_tf.read_run(folder / "best")["figures"]["bits_per_char"] == trials[0]["bits_per_char"]
    return trials


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_killed_search_resumes_with_the_unfinished_trial(documents, tmp_path):
    path, folder = str(Path(__file__).parent.parent), str(tmp_path / "search")
    script = SCRIPT.format(path=path, documents=documents, folder=folder)
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "search" / "trial-2" / "log.csv").exists()
    resume(documents, tmp_path / "search")


def test_ctrl_c_stops_a_search_which_resumes_from_the_last_step(documents, tmp_path, monkeypatch, capsys):
    folder, lines = tmp_path / "search", []
    with monkeypatch.context() as patched:
        patched.setattr(Session, "on_train_batch_end", stop_in_the_second_trial(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            tune(documents, folder, RATES, trials=9, **SEARCH)
    assert f"stopped after 1 trial, kept in {folder}" in capsys.readouterr().out
    (newest,) = list_checkpoints(folder / "trial-2" / "checkpoints")
    monkeypatch.setattr(NoDisplay, "line", lambda self, text: lines.append(text))
    trials = resume(documents, folder)
    assert [line for line in lines if line.startswith("resumes")] == [f"resumes after step 3 from {newest}"]
    uninterrupted = tune(documents, tmp_path / "uninterrupted", RATES, trials=2, progress=False, **SEARCH)
    assert without_seconds(uninterrupted) == without_seconds(trials)
