import json
import zipfile

import numpy as np
import pytest

from aigc_tf import Tokenizer, load, make_dataset, read_run, save, train
from aigc_tf.devices import keras


@pytest.fixture(scope="module")
def trained(build, documents, tokenizer):
    model = build(tokenizer.vocab_size, 8)
    data = make_dataset(documents, tokenizer, 8, 4, seed=0)
    train(model, data, tokenizer, documents[:4], steps=2, progress=False)
    return model


def test_what_is_saved_is_loaded(trained, tokenizer, tmp_path):
    save(tmp_path / "run", trained, tokenizer, settings={"steps": 2}, figures={"bits_per_char": 7.5})
    model, loaded_tokenizer = load(tmp_path / "run")
    ids = np.arange(16, dtype=np.int32).reshape(2, 8)
    np.testing.assert_array_equal(model.predict_on_batch(ids), trained.predict_on_batch(ids))
    assert model(ids).shape == (2, 8, tokenizer.vocab_size)
    assert loaded_tokenizer.fingerprint == tokenizer.fingerprint
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["model.keras", "run.json", "tokenizer.json"]


def test_the_run_file_tells_how_it_was_made(trained, tokenizer, tmp_path):
    save(tmp_path, trained, tokenizer, settings={"steps": 2}, data={"documents": 56}, figures={"bits": 7.5})
    run = read_run(tmp_path)
    assert run["settings"] == {"steps": 2}
    assert run["data"] == {"documents": 56}
    assert run["figures"] == {"bits": 7.5}
    assert run["model"] == {"name": trained.name, "parameters": trained.count_params(), "context": 8}
    assert run["versions"]["keras"] == keras.__version__
    assert run["versions"]["backend"] == keras.backend.backend()


def test_the_optimizer_stays_out_of_the_file(trained, tokenizer, tmp_path):
    save(tmp_path, trained, tokenizer)
    with zipfile.ZipFile(tmp_path / "model.keras") as file:
        assert not json.loads(file.read("config.json")).get("compile_config")
        assert file.getinfo("model.weights.h5").file_size < 8 * trained.count_params() + 200_000
    assert trained.optimizer is not None  # and the model in memory can train on


@pytest.mark.parametrize("broken", ["tokenizer", "model", "record"])
def test_a_save_that_fails_leaves_the_run_before_it(build, trained, tokenizer, tmp_path, broken, monkeypatch):
    save(tmp_path, trained, tokenizer, figures={"run": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    record = {"figures": {"run": 2}}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if broken == "tokenizer":
        monkeypatch.setattr(Tokenizer, "save", fail)
    elif broken == "model":
        monkeypatch.setattr(keras.Model, "save", fail)
    else:
        record["figures"]["run"] = object()  # JSON cannot hold it
    with pytest.raises((OSError, TypeError)):
        save(tmp_path, build(tokenizer.vocab_size, 8, seed=9), tokenizer, **record)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    load(tmp_path)


def test_a_new_run_replaces_the_old_one_and_keeps_other_files(build, trained, tokenizer, tmp_path):
    (tmp_path / "log.csv").write_text("epoch\n")
    save(tmp_path, trained, tokenizer)
    other = build(tokenizer.vocab_size, 8, seed=9)
    save(tmp_path, other, tokenizer)
    ids = np.arange(8, dtype=np.int32)[None]
    np.testing.assert_array_equal(load(tmp_path)[0].predict_on_batch(ids), other.predict_on_batch(ids))
    assert (tmp_path / "log.csv").exists()


def test_what_is_no_run_is_said(trained, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        load(tmp_path / "nowhere")
    save(tmp_path, trained, tokenizer)
    Tokenizer.train(["别的"]).save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the file that run\.json tells of"):
        load(tmp_path)
    (tmp_path / "model.keras").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks its model\.keras"):
        load(tmp_path)
    (tmp_path / "run.json").write_text("{", "utf-8")
    with pytest.raises(ValueError, match="cannot be read by this version"):
        read_run(tmp_path)


def test_model_and_tokenizer_must_belong_together(trained, tmp_path):
    with pytest.raises(ValueError, match="same vocabulary size"):
        save(tmp_path / "run", trained, Tokenizer.train(["别的"]))
    assert not (tmp_path / "run").exists()
