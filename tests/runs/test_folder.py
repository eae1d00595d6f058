import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
from conftest import change_weights, message_of, spread, table_model

import aigc_tf
from aigc_tf import (
    Tokenizer,
    attention_maps,
    evaluate,
    generate,
    generate_batch,
    load,
    load_writer,
    make_dataset,
    read_run,
    save,
    stream,
    surprisal,
    surprisal_html,
    train,
)
from aigc_tf.models.weights import LstmWeights, TransformerWeights
from aigc_tf.runs.folder import add_to_run
from aigc_tf.runtime.backend import keras


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


def test_the_weights_of_a_writer_are_evaluated_like_its_model(trained, tokenizer, documents, tmp_path):
    save(tmp_path, trained, tokenizer)
    writer, _ = load_writer(tmp_path)
    assert isinstance(writer, LstmWeights | TransformerWeights)
    texts = [*documents[:9], "龘\n🐉"]  # of one window and of several
    assert evaluate(writer, tokenizer, texts) == pytest.approx(evaluate(trained, tokenizer, texts), rel=1e-5)
    pieces, bits = zip(*surprisal(writer, tokenizer, texts[-1] + texts[2]), strict=True)
    expected_pieces, expected = zip(*surprisal(trained, tokenizer, texts[-1] + texts[2]), strict=True)
    assert pieces == expected_pieces
    assert bits == pytest.approx(expected, rel=1e-4)
    assert f"<b>{sum(bits) / len(texts[-1] + texts[2]):.2f} bits" in surprisal_html(
        writer, tokenizer, texts[-1] + texts[2]
    )
    for function, arguments in ((save, (tmp_path, writer, tokenizer)), (attention_maps, (writer, tokenizer, "白"))):
        assert "Load it with aigc_tf.load." in message_of(ValueError, function, *arguments)


def test_the_run_file_records_how_the_model_was_made(trained, tokenizer, tmp_path):
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
    with pytest.raises((OSError, ValueError)):
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


def test_a_save_killed_at_any_moment_leaves_one_run_or_the_other(build, trained, tokenizer, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    other = build(tokenizer.vocab_size, 8, seed=9)
    their_replace, outcomes = os.replace, []
    for moment in range(7):
        folder = tmp_path / str(moment)
        save(folder, trained, tokenizer, figures={"run": 1})
        left = [moment]

        def replace(old, new, left=left):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            their_replace(old, new)

        monkeypatch.setattr(os, "replace", replace)
        with contextlib.suppress(Killed):
            save(folder, other, tokenizer, figures={"run": 2})
        monkeypatch.setattr(os, "replace", their_replace)
        run, (model, _) = read_run(folder)["figures"]["run"], load(folder)
        expected = trained if run == 1 else other
        for a, b in zip(model.get_weights(), expected.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        assert load_writer(folder)[0].output_shape[-1] == tokenizer.vocab_size
        save(folder, trained, tokenizer)  # and the next one ends it
        assert sorted(path.name for path in folder.iterdir()) == ["model.keras", "run.json", "tokenizer.json"]
        outcomes.append(run)
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}


def test_a_run_that_is_replaced_while_it_is_read_is_read_again(build, trained, tokenizer, tmp_path, monkeypatch):
    save(tmp_path, build(tokenizer.vocab_size, 8), tokenizer)
    check = aigc_tf.runs.folder._sha256

    def slow(file):
        monkeypatch.setattr("aigc_tf.runs.folder._sha256", check)
        save(tmp_path, trained, tokenizer)  # by another process
        return "of the run before"

    monkeypatch.setattr("aigc_tf.runs.folder._sha256", slow)
    model, _ = load(tmp_path)
    for one, other in zip(model.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_model_has_its_own_tokenizer_even_if_the_run_is_replaced_between_them(
    build, trained, tokenizer, tmp_path, monkeypatch
):
    other, read = Tokenizer([*"白日"]), Tokenizer.load
    save(tmp_path, trained, tokenizer)

    def slow(file):
        monkeypatch.setattr(Tokenizer, "load", read)
        save(tmp_path, build(other.vocab_size, 8), other)  # by another process
        return read(file)

    monkeypatch.setattr(Tokenizer, "load", slow)
    model, found = load(tmp_path)
    assert model.output_shape[-1] == found.vocab_size == other.vocab_size


def test_a_save_deletes_the_leftovers_of_a_killed_one(trained, tokenizer, tmp_path):
    (tmp_path / ".0123456789ab-.lock").touch()
    (tmp_path / ".0123456789ab-.saving").mkdir()
    (tmp_path / ".0123456789ab-.saving" / "model.keras").touch()
    save(tmp_path, trained, tokenizer)
    assert {path.name for path in tmp_path.iterdir()} == {"model.keras", "run.json", "tokenizer.json"}


@pytest.mark.parametrize("where", ["config", "inbound_nodes"])
def test_a_deeply_nested_model_file_is_refused_in_one_line(trained, tokenizer, tmp_path, where):
    save(tmp_path, trained, tokenizer)
    file = tmp_path / "model.keras"
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(content["config.json"])
    deep = {}
    for _ in range(600):
        deep = {"a": deep}
    layer = config["config"]["layers"][-1]
    layer[where] = {**layer[where], "a": deep} if where == "config" else [*layer[where], deep]
    content["config.json"] = json.dumps(config)
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    run = read_run(tmp_path)
    run["sha256"]["model.keras"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "run.json").write_text(json.dumps(run))
    for read in (load, load_writer):
        assert "nested more than 100 levels deep" in message_of(ValueError, read, tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({**run, "figures": deep}))
    assert "nested more than 100 levels deep" in message_of(ValueError, read_run, tmp_path)


def test_two_threads_save_to_one_folder(trained, tokenizer, tmp_path):
    errors = []

    def save_often():
        try:
            for _ in range(3):
                save(tmp_path, trained, tokenizer)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save_often) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    load(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.keras", "run.json", "tokenizer.json"]


def test_a_record_is_added_to_a_run(trained, tokenizer, tmp_path):
    save(tmp_path, trained, tokenizer, figures={"bits": 7.5})
    before = read_run(tmp_path)
    add_to_run(tmp_path, figures={"bits": 7.4}, sample="春")
    assert read_run(tmp_path) == {**before, "figures": {"bits": 7.4}, "sample": "春"}
    load(tmp_path)
    # Also to one whose files were on their way to their places when the process was killed.
    (tmp_path / ".saving").mkdir()
    for name in ("model.keras", "tokenizer.json", "run.json"):
        os.replace(tmp_path / name, tmp_path / ".saving" / name)
    add_to_run(tmp_path, sample="夏")
    assert read_run(tmp_path) == {**before, "figures": {"bits": 7.4}, "sample": "夏"}
    load(tmp_path)


def nested(depth):
    return [nested(depth - 1)] if depth else []


@pytest.mark.parametrize(
    "record",
    [
        {"version": "2024-05"},
        {"format": "poems"},
        {"sha256": {}},
        {"settings": None},
        {"settings": {"valid_fraction": 2}},
        {"figures": nested(150)},
        {"figures": {1, 2}},
        {"sample": "\ud800"},
    ],
    ids=ascii,
)
def test_a_record_that_could_not_be_read_again_is_refused(trained, tokenizer, tmp_path, record):
    save(tmp_path, trained, tokenizer, figures={"bits": 7.5})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "run.json " in message_of(ValueError, save, tmp_path, trained, tokenizer, **record)
    assert "run.json " in message_of(ValueError, add_to_run, tmp_path, **record)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("load", [load, load_writer])
def test_what_is_not_a_run_is_refused(trained, tokenizer, tmp_path, load):
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        load(tmp_path)
    save(tmp_path, trained, tokenizer)
    Tokenizer.train(["别的"]).save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json does not have the hash in run\.json"):
        load(tmp_path)
    (tmp_path / "model.keras").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.keras"):
        load(tmp_path)
    for content, reason in (
        ("{", "Expecting property name"),
        ("[1]", "it must contain"),
        ('{"version": 1}', "it must contain"),
    ):
        (tmp_path / "run.json").write_text(content, "utf-8")
        for read in (load, read_run):
            assert f"run.json cannot be read by this version: {reason}" in message_of(ValueError, read, tmp_path)


@pytest.mark.parametrize("load", [load, load_writer])
def test_a_damaged_model_file_is_refused(trained, tokenizer, tmp_path, load):
    save(tmp_path, trained, tokenizer)
    file = tmp_path / "model.keras"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-1], bytes([whole[0] ^ 1]) + whole[1:], b""):
        file.write_bytes(damaged)
        assert "model.keras does not have the hash in run.json" in message_of(ValueError, load, tmp_path)
    file.write_bytes(whole)
    load(tmp_path)


def test_model_and_tokenizer_must_belong_together(trained, tmp_path):
    with pytest.raises(ValueError, match="same vocabulary size"):
        save(tmp_path / "run", trained, Tokenizer.train(["别的"]))
    assert not (tmp_path / "run").exists()


MODELS = {
    "transformer": (aigc_tf.transformer, {"num_layers": 2, "num_heads": 2}),
    "transformer of one block": (aigc_tf.transformer, {"num_layers": 1, "num_heads": 4}),
    "lstm": (aigc_tf.lstm, {"num_layers": 2}),
    "lstm of one width": (aigc_tf.lstm, {"num_layers": 1, "embedding_dim": 16}),
    "untied lstm": (aigc_tf.lstm, {"num_layers": 3, "tie_embeddings": False}),
}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "float32") for name in MODELS),
        ("transformer", "mixed_bfloat16"),
        ("lstm", "mixed_bfloat16"),
        ("untied lstm", "mixed_bfloat16"),
        ("transformer", "mixed_float16"),
        ("transformer", "bfloat16"),  # of which h5py knows nothing
    ],
)
def test_a_writer_writes_what_the_loaded_model_writes(name, precision, tokenizer, tmp_path):
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        build, settings = MODELS[name]
        model = spread(build(tokenizer.vocab_size, 8, hidden_dim=16, **settings))
    finally:
        keras.config.set_dtype_policy(previous)
    save(tmp_path, model, tokenizer)
    writer, its_tokenizer = load_writer(tmp_path)
    assert its_tokenizer.fingerprint == tokenizer.fingerprint
    assert writer.output_shape[-1] == model.output_shape[-1]
    if precision != "bfloat16":
        assert isinstance(writer, TransformerWeights if name.startswith("transformer") else LstmWeights)
    loaded = load(tmp_path)[0]
    for prompt, settings in (("", {"temperature": 0}), ("白日依山尽，黄河", {"temperature": 1.5, "seed": 1})):
        settings["max_new_tokens"] = 20
        if precision != "bfloat16":
            settings["engine"] = "numpy"
        expected = generate(loaded, tokenizer, prompt, **settings)
        assert generate(writer, tokenizer, prompt, **settings) == expected
        assert "".join(stream(writer, tokenizer, prompt, **settings)) == expected
        assert generate_batch(writer, tokenizer, ["黄", prompt], **{**settings, "seed": 0})[1] == expected
        assert len(expected) > len(prompt)


def test_a_writer_loads_neither_keras_nor_a_backend(trained, tokenizer, tmp_path):
    save(tmp_path, trained, tokenizer)
    code = f"""
import sys
import aigc_tf
model, tokenizer = aigc_tf.load_writer({str(tmp_path)!r})
for settings in (
    {{"temperature": 0}},
    {{"best_of": 2, "forced": ["明月"], "banned": ["黄河"], "repetition_penalty": 1.2, "no_repeat_ngram": 3}},
    {{"top_k": 9, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "logit_bias": {{"山": 1}}, "exempt": ["，"]}},
    {{"num_beams": 3}},
):
    aigc_tf.generate(model, tokenizer, "白日", max_new_tokens=12, **settings)
list(aigc_tf.stream(model, tokenizer, "白日", max_new_tokens=12))
assert not {{"keras", "tensorflow", "jax", "numba"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_a_model_with_another_graph_is_loaded_by_keras(tokenizer, tmp_path):
    a, b = tokenizer.encode("白日")
    model = table_model(tokenizer, {a: b, b: a}, context=8)
    save(tmp_path, model, tokenizer)
    writer, its_tokenizer = load_writer(tmp_path)
    assert isinstance(writer, keras.Model)
    assert generate(writer, its_tokenizer, "白", max_new_tokens=20, temperature=0) == "白" + "日白" * 10
    # Also one that has a name and layers as ours have, and a head that differs.
    ids = keras.Input((8,), dtype="int32", name="ids")
    x = keras.layers.ReversibleEmbedding(tokenizer.vocab_size, 8, name="token_embedding")(ids)
    x = keras.layers.LSTM(8, return_sequences=True, name="lstm_0")(x)
    x = keras.layers.Dense(tokenizer.vocab_size, activation="tanh", name="head")(x)
    model = spread(keras.Model(ids, keras.layers.Identity(name="logits")(x), name="lstm"))
    save(tmp_path, model, tokenizer)
    writer, _ = load_writer(tmp_path)
    assert isinstance(writer, keras.Model)
    settings = {"max_new_tokens": 12, "seed": 0}
    assert generate(writer, tokenizer, "白", **settings) == generate(model, tokenizer, "白", **settings)


def test_a_file_with_another_layout_is_loaded_by_keras(trained, tokenizer, tmp_path):
    save(tmp_path, trained, tokenizer)

    def change(file, h5py):
        for group in file["layers"].values():
            group["vars"].attrs["name"] = "layer"  # as if it stood in another place

    change_weights(tmp_path / "model.keras", change)
    update_hashes(tmp_path)
    writer, _ = load_writer(tmp_path)
    assert isinstance(writer, keras.Model)
    settings = {"max_new_tokens": 12, "seed": 0}
    assert generate(writer, tokenizer, "白", **settings) == generate(trained, tokenizer, "白", **settings)


def test_a_writer_and_another_tokenizer_do_not_belong_together(trained, tokenizer, tmp_path):
    save(tmp_path, trained, tokenizer)
    writer, _ = load_writer(tmp_path)
    assert "same vocabulary size" in message_of(ValueError, generate, writer, Tokenizer.train(["别的"]), "白")


def test_a_sequential_model_that_was_never_called_is_saved(tokenizer, tmp_path):
    size = tokenizer.vocab_size
    model = keras.Sequential([keras.Input((8,), dtype="int32"), keras.layers.Embedding(size, size)])
    save(tmp_path, model, tokenizer)
    ids = np.arange(8)[None]
    np.testing.assert_array_equal(load(tmp_path)[0](ids), model(ids))


def test_an_error_of_keras_without_a_message_is_named(trained, tokenizer, tmp_path, monkeypatch):
    save(tmp_path, trained, tokenizer)

    def fail(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr("aigc_tf.runtime.backend.keras.models.load_model", fail)
    assert message_of(ValueError, load, tmp_path).endswith("model.keras: AssertionError.")


# --- folders from elsewhere --------------------------------------------------------------------------------------


def update_hashes(folder, **changes):
    """Write the hashes of the files as they are now to `run.json`."""
    run = json.loads((folder / "run.json").read_text("utf-8"))
    files = {name: folder / name for name in ("model.keras", "tokenizer.json")}
    run["sha256"] = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    (folder / "run.json").write_text(json.dumps({**run, **changes}), "utf-8")


@pytest.mark.parametrize("load", [load, load_writer])
def test_no_code_runs_from_a_folder(tokenizer, tmp_path, load):
    ran = tmp_path / "ran"
    ids = keras.Input((8,), dtype="int32")
    x = keras.layers.Embedding(tokenizer.vocab_size, tokenizer.vocab_size)(ids)
    hostile = keras.layers.Lambda(lambda x, place=str(ran): (open(place, "w").close(), x)[1])
    save(tmp_path, keras.Model(ids, hostile(x)), tokenizer)
    ran.unlink()
    with pytest.raises(ValueError, match="Lambda"):
        load(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("load", [load, load_writer])
def test_a_model_file_that_reads_other_files_is_refused(trained, tokenizer, tmp_path, load):
    save(tmp_path, trained, tokenizer)
    (tmp_path / "secret").write_bytes(b"TOP SECRET" * 10_000)

    def change(file, h5py):
        data = []
        file.visititems(lambda _, item: data.append(item) if isinstance(item, h5py.Dataset) else None)
        group, name, shape, dtype = data[0].parent, data[0].name, data[0].shape, data[0].dtype
        del group[name]
        size = dtype.itemsize * int(np.prod(shape))
        group.create_dataset(name, shape, dtype, external=[(str(tmp_path / "secret"), 0, size)])

    change_weights(tmp_path / "model.keras", change)
    update_hashes(tmp_path)
    assert "is refused" in message_of(ValueError, load, tmp_path)


@pytest.mark.parametrize(
    "hashes", [None, [], {}, {"model.keras": ""}, {"../secret": "", "tokenizer.json": ""}], ids=repr
)
def test_the_hashes_are_of_the_files_of_a_run_and_no_others(trained, tokenizer, tmp_path, hashes):
    save(tmp_path, trained, tokenizer)
    (tmp_path / "run.json").write_text(json.dumps({**read_run(tmp_path), "sha256": hashes}), "utf-8")
    for load_it in (load, load_writer, read_run):
        assert "must be of model.keras and tokenizer.json" in message_of(ValueError, load_it, tmp_path)


@pytest.mark.parametrize(("name", "value"), [("pieces", [1, 2]), ("pieces", "白日"), ("user_dict", [3]), ("unit", [])])
def test_a_tokenizer_file_with_wrong_types_is_refused(trained, tokenizer, tmp_path, name, value):
    save(tmp_path, trained, tokenizer)
    state = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**state, name: value}), "utf-8")
    update_hashes(tmp_path)
    assert "is not a tokenizer" in message_of(ValueError, load_writer, tmp_path)


@pytest.mark.parametrize("settings", [["steps"], "x", None, *({"valid_fraction": value} for value in ("x", 0, 1, 2))])
def test_settings_must_be_a_dict_with_a_usable_valid_fraction(trained, tokenizer, tmp_path, settings):
    assert "settings" in message_of(ValueError, save, tmp_path / "other", trained, tokenizer, settings=settings)
    assert not (tmp_path / "other").exists()
    save(tmp_path, trained, tokenizer)
    file = tmp_path / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), "settings": settings}), "utf-8")
    for read in (read_run, load_writer):
        assert "cannot be read by this version: " in message_of(ValueError, read, tmp_path)
