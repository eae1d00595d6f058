import inspect
import re

import pytest
from conftest import message_of

import aigc_tf
from aigc_tf.evaluation.bits import sample_documents
from aigc_tf.runs import pipeline
from aigc_tf.runs.pipeline import SETTINGS, default_steps, is_unfinished_run, run_pipeline
from aigc_tf.runtime.backend import keras

SMALL = {"context": 8, "steps": 2, "validations": 1, "num_layers": 1, "hidden_dim": 8, "valid_fraction": 0.2}


@pytest.mark.parametrize("model", ["transformer", "lstm"])
def test_a_run_is_documents_in_and_a_model_that_can_be_loaded_out(documents, tmp_path, capsys, model):
    figures = run_pipeline(documents, tmp_path / "run", model=model, **SMALL)
    out = capsys.readouterr().out
    run = aigc_tf.read_run(tmp_path / "run")
    loaded, tokenizer = aigc_tf.load(tmp_path / "run")
    held_out = aigc_tf.split(documents, 0.2)[1]
    assert run["figures"] == figures
    assert figures["bits_per_char"] == pytest.approx(
        aigc_tf.evaluate(loaded, tokenizer, held_out)["bits_per_char"], rel=1e-5
    )
    assert figures["steps_done"] == 2
    assert run["sample"] == aigc_tf.generate(loaded, tokenizer, max_new_tokens=8, seed=0)
    assert run["sample"] in out
    assert run["baselines"] == aigc_tf.baselines(tokenizer, aigc_tf.split(documents, 0.2)[0], held_out)
    assert set(run["settings"]) == set(SETTINGS)
    assert run["settings"]["model"] == model


def test_each_setting_reaches_the_steps_that_have_it(documents, tmp_path, monkeypatch):
    given = {
        "size": "small", "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "dropout": 0.2, "context": 8,
        "batch_size": 12, "steps": 3, "learning_rate": 2e-3, "weight_decay": 0.2, "validations": 2,
        "num_microbatches": 3, "num_candidates": 50, "precision": "float32", "seed": 5, "checkpoint_minutes": 7.0,
        "checkpoint_steps": 9, "keep_checkpoints": 4, "progress": False,
    }  # fmt: skip
    assert not [name for name in given.keys() & SETTINGS.keys() - {"precision"} if given[name] == SETTINGS[name]]
    reached = {}

    def recording(name, function):
        def call(*args, **kwargs):
            reached[name] = inspect.signature(function).bind(*args, **kwargs).arguments
            reached[name] |= reached[name].pop("settings", {})
            if name == "train":
                raise InterruptedError
            return function(*args, **kwargs)

        return call

    for name in ("make_dataset", "memory_warning", "build", "initialise", "train"):
        monkeypatch.setattr(pipeline, name, recording(name, getattr(pipeline, name)))
    monkeypatch.setattr(pipeline, "num_replicas", lambda: 2)
    with pytest.raises(InterruptedError):
        run_pipeline(documents, tmp_path / "run", valid_fraction=0.2, **given)
    assert reached["memory_warning"].pop("batch_size") == 12 // 3 // 2  # of one device at a time
    named = set()
    for name, arguments in reached.items():
        shared = given.keys() & arguments.keys()
        named |= shared
        assert {key: arguments[key] for key in shared} == {key: given[key] for key in shared}, name
    assert named == set(given)
    assert all("seed" in reached[name] for name in ("make_dataset", "build", "initialise"))
    assert {"num_layers", "num_heads", "hidden_dim", "dropout", "precision"} <= reached["build"].keys()


def test_without_progress_nothing_is_printed(documents, tmp_path, capsys):
    run_pipeline(documents, tmp_path / "run", progress=False, **SMALL)
    assert capsys.readouterr().out == ""


def test_the_same_seed_gives_the_same_figures(documents, tmp_path):
    figures = [
        run_pipeline(documents, tmp_path / name, seed=seed, progress=False, **SMALL)["bits_per_char"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert figures[0] == figures[1] != figures[2]


def test_precision_is_set_for_the_run_alone(documents, tmp_path):
    run_pipeline(documents, tmp_path / "run", precision="mixed_bfloat16", progress=False, **SMALL)
    assert keras.config.dtype_policy().name == "float32"
    model, _ = aigc_tf.load(tmp_path / "run")
    assert model.get_layer("block_0_attention").compute_dtype == "bfloat16"


def test_settings_that_do_not_fit_together_are_refused_before_anything_is_written(documents, tmp_path):
    for wrong, part in [
        ({"model": "rnn"}, "model must be one of transformer, lstm, got 'rnn'"),
        ({"model": "lstm", "num_heads": 2}, "an LSTM has no attention heads"),
        ({"user_dict": ["词"]}, 'user_dict is for unit="word"'),
        ({"hidden_dim": 9, "num_heads": 2}, "multiple of num_heads"),
        ({"precision": "float9"}, "float9"),
        ({"learning_rate": -1.0}, "learning_rate must be finite and above 0, got -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be finite and at least 0, got nan"),
        ({"seed": 2**63}, "seed must be a whole number from 0 to 2**63 - 1, got 9223372036854775808"),
    ]:
        assert part in message_of(ValueError, run_pipeline, documents, tmp_path / "run", **{**SMALL, **wrong})
    assert not (tmp_path / "run").exists()
    assert keras.config.dtype_policy().name == "float32"


def test_a_training_killed_before_its_first_checkpoint_is_unfinished(tmp_path):
    for name in (".lock", ".0123456789ab-log.csv", "log.csv"):
        (tmp_path / name).touch()
    assert is_unfinished_run(tmp_path)
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving/run.json").touch()  # a whole run, on its way to its place
    assert not is_unfinished_run(tmp_path)


def test_one_novel_makes_a_run(documents, tmp_path, capsys):
    novel = "\n".join(documents * 10)
    run_pipeline([novel], tmp_path / "run", **SMALL)
    assert "documents of over 4,000 characters are cut at line ends" in capsys.readouterr().out
    assert aigc_tf.read_run(tmp_path / "run")["data"]["documents"] == 1


def test_what_fails_after_the_training_loses_nothing(documents, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("aigc_tf.runs.pipeline.baselines", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_pipeline(documents, tmp_path / "run", **SMALL)
    aigc_tf.load(tmp_path / "run")
    assert aigc_tf.read_run(tmp_path / "run")["figures"] == {"steps_done": 2}
    monkeypatch.undo()
    monkeypatch.setattr("aigc_tf.runs.encoded_text.Tokenizer.train", lambda *args, **settings: 1 / 0)
    monkeypatch.setattr("aigc_tf.runs.encoded_text.make_store", lambda *args, **settings: 1 / 0)
    capsys.readouterr()
    figures = run_pipeline(documents, tmp_path / "run", **SMALL)  # neither trained nor encoded again
    assert "resumes after step 2" in capsys.readouterr().out
    assert aigc_tf.read_run(tmp_path / "run")["figures"] == figures
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_number_of_steps_follows_from_the_text(documents, tmp_path, capsys, monkeypatch):
    assert default_steps(455_000, 2048) == 2000
    assert default_steps(1000, 2048) == 500
    assert default_steps(10**9, 2048) == 10_000
    monkeypatch.setattr("aigc_tf.runs.pipeline._LEAST_STEPS", 1)
    run_pipeline(documents, tmp_path / "run", **{**SMALL, "steps": None})
    out = capsys.readouterr().out
    steps = aigc_tf.read_run(tmp_path / "run")["settings"]["steps"]
    assert re.search(rf"seen 9(\.\d+)? times in {steps} steps", out)
    assert f"step {steps}/{steps}" in out


def test_of_much_held_out_text_a_part_is_measured_and_named(documents, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("aigc_tf.runs.pipeline.FINAL_TOKENS", 40)
    figures = run_pipeline(documents, tmp_path / "run", **SMALL)
    held_out = aigc_tf.split(documents, 0.2)[1]
    assert figures["documents"] < len(held_out)
    run, (_, tokenizer) = aigc_tf.read_run(tmp_path / "run"), aigc_tf.load(tmp_path / "run")
    measured = sample_documents(held_out, tokenizer, 40)
    assert run["baselines"] == aigc_tf.baselines(tokenizer, aigc_tf.split(documents, 0.2)[0], measured)
    assert (
        f"measured on {figures['documents']:.0f} of the {len(held_out)} held-out documents" in capsys.readouterr().out
    )
