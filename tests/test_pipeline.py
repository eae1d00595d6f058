import pytest
from conftest import message_of

import aigc_tf
from aigc_tf.__main__ import _pipeline_settings
from aigc_tf.devices import keras
from aigc_tf.parser import make_parser
from aigc_tf.pipeline import SETTINGS, run_pipeline

SMALL = {"context": 8, "steps": 2, "validations": 1, "num_layers": 1, "hidden_dim": 8, "valid_fraction": 0.2}


def test_the_command_has_the_function_s_settings_and_defaults():
    options = make_parser().parse_args(["train", "texts"])
    assert set(SETTINGS) <= set(vars(options))
    for name, value in _pipeline_settings(options).items():
        assert value == SETTINGS[name], name


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


def test_without_progress_nothing_is_printed(documents, tmp_path, capsys):
    run_pipeline(documents, tmp_path / "run", progress=False, **SMALL)
    assert capsys.readouterr().out == ""


def test_the_same_seed_gives_the_same_figures(documents, tmp_path):
    figures = [
        run_pipeline(documents, tmp_path / name, seed=seed, progress=False, **SMALL)["bits_per_char"]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert figures[0] == figures[1] != figures[2]


def test_precision_holds_for_the_run_alone(documents, tmp_path):
    run_pipeline(documents, tmp_path / "run", precision="mixed_bfloat16", progress=False, **SMALL)
    assert keras.config.dtype_policy().name == "float32"
    model, _ = aigc_tf.load(tmp_path / "run")
    assert model.get_layer("block_0_attention").compute_dtype == "bfloat16"


def test_settings_that_do_not_go_together_are_refused_before_anything_is_written(documents, tmp_path):
    for wrong, part in [
        ({"model": "rnn"}, "model must be one of transformer, lstm, got 'rnn'"),
        ({"model": "lstm", "num_heads": 2}, "an LSTM has no attention heads"),
        ({"user_dict": ["词"]}, 'user_dict is for unit="word"'),
        ({"hidden_dim": 9, "num_heads": 2}, "multiple of num_heads"),
        ({"precision": "float9"}, "float9"),
    ]:
        assert part in message_of(ValueError, run_pipeline, documents, tmp_path / "run", **{**SMALL, **wrong})
    assert not (tmp_path / "run").exists()
    assert keras.config.dtype_policy().name == "float32"


def test_one_novel_makes_a_run(documents, tmp_path, capsys):
    novel = "\n".join(documents * 10)
    run_pipeline([novel], tmp_path / "run", **SMALL)
    assert "documents of over 4,000 characters are cut at line ends" in capsys.readouterr().out
    assert aigc_tf.read_run(tmp_path / "run")["data"]["documents"] == 1
