import csv
import math
import os
import signal
import threading
import types

import numpy as np
import pytest
from conftest import cpu_only, message_of

from aigc_tf import Tokenizer, evaluate, make_dataset, train
from aigc_tf.evaluation.bits import sample_documents
from aigc_tf.generation.engines.engine import cached_weights
from aigc_tf.models.weights import LstmWeights, TransformerWeights
from aigc_tf.runtime.backend import keras
from aigc_tf.training import session
from aigc_tf.training.checkpoints import list_checkpoints
from aigc_tf.training.schedule import WarmupStableDecay
from aigc_tf.training.session import Session

T = 20


def run(build, documents, tokenizer, **settings):
    model = build(tokenizer.vocab_size, T, num_layers=1, dropout=settings.pop("dropout", 0.1))
    data = make_dataset(documents, tokenizer, T, 4, seed=0)
    settings = {"steps": 12, "validations": 3, "num_candidates": 0, "progress": False, **settings}
    return model, train(model, data, tokenizer, documents[:10], **settings)


def test_a_model_memorises_documents(build, documents, tokenizer):
    few = documents[:6:3]  # the same up to the comma: only the choice between them should cost anything, 1 bit
    context = len(few[0]) + 1  # one window for each document
    model = build(tokenizer.vocab_size, context, num_layers=1, hidden_dim=64, dropout=0.0)
    data = make_dataset(few, tokenizer, context, 2, seed=0)
    train(model, data, tokenizer, few, steps=200, learning_rate=1e-2, validations=1, progress=False)
    figures = evaluate(model, tokenizer, few)
    assert figures["bits_per_char"] * figures["chars"] == pytest.approx(2, abs=0.4)


def test_the_same_seed_gives_the_same_history(build, documents, tokenizer):
    (first, one), (second, two) = (run(build, documents, tokenizer) for _ in range(2))
    for name in ("step", "loss", "bits_per_char", "learning_rate"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-6, err_msg=name)
    for a, b in zip(first.trainable_weights, second.trainable_weights, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("steps", "validations", "at"), [(7, 3, [3, 6, 7]), (6, 2, [3, 6]), (2, 9, [1, 2])])
def test_training_has_exactly_the_given_number_of_steps(build, documents, tokenizer, steps, validations, at):
    model, history = run(build, documents, tokenizer, steps=steps, validations=validations)
    assert history["step"] == at
    assert int(model.optimizer.iterations) == steps
    assert {len(values) for values in history.values()} == {len(at)}
    schedule = WarmupStableDecay(1e-3, steps)
    assert history["learning_rate"] == [float(schedule(step - 1)) for step in at]  # of the last step


def test_training_in_blocks_of_steps_is_the_same_training(build, documents, tokenizer, monkeypatch, tmp_path):
    settings = {"steps": 11, "validations": 3}
    _, history = run(build, documents, tokenizer, **settings)
    assert history["step"] == [4, 8, 11]
    monkeypatch.setattr("aigc_tf.training.loop.uses_accelerator", lambda: True)
    settings |= {"run_dir": tmp_path, "checkpoint_steps": 3, "keep_checkpoints": 9}
    _, same = run(build, documents, tokenizer, **settings)
    assert same["step"] == [6, 9, 11]  # each after the block in which it was due
    assert same["bits_per_char"][-1] == pytest.approx(history["bits_per_char"][-1], rel=1e-6)
    sums = [np.diff([0, *h["step"]]) @ h["loss"] for h in (history, same)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)
    steps = [int(path.name.split("-")[1]) for path in list_checkpoints(tmp_path / "checkpoints")]
    assert steps == [3, 6, 9, 11]


def test_validation_is_bounded_and_encodes_once(build, documents, tokenizer, monkeypatch):
    monkeypatch.setattr("aigc_tf.training.session.VALIDATION_TOKENS", 60)
    model = build(tokenizer.vocab_size, T, num_layers=1)
    data = make_dataset(documents, tokenizer, T, 4, seed=0)
    encoded = []
    encode = Tokenizer.encode_documents
    monkeypatch.setattr(Tokenizer, "encode_documents", lambda *args: (encoded.append(args), encode(*args))[1])
    history = train(model, data, tokenizer, documents, steps=2, validations=2, num_candidates=0, progress=False)
    assert len(encoded) == 2  # once to choose and once to evaluate, for any number of validations
    chosen = sample_documents(documents, tokenizer, 60)
    assert 60 <= sum(map(len, tokenizer.encode_documents(chosen))) < 60 + 40
    assert set(chosen) < set(documents)
    best = min(history["bits_per_char"])
    assert evaluate(model, tokenizer, chosen)["bits_per_char"] == pytest.approx(best, rel=1e-5)


def test_the_sample_of_documents_does_not_depend_on_their_order(documents, tokenizer):
    sample = sample_documents(documents, tokenizer, 100)
    assert sorted(sample_documents(documents[::-1], tokenizer, 100)) == sorted(sample)
    assert sample == [document for document in documents if document in sample]
    assert sample_documents(documents, tokenizer, 10**6) == documents
    assert sample_documents(["春" * 1000], tokenizer, 100) == ["春" * 100]


def test_the_best_weights_are_kept(build, documents, tokenizer):
    # Trained on other text than it is validated on, a model gets worse after a while.
    model = build(tokenizer.vocab_size, T, num_layers=1, hidden_dim=64, dropout=0.0)
    data = make_dataset(documents[:3], tokenizer, T, 4, seed=0)
    history = train(
        model, data, tokenizer, documents[40:], steps=80, learning_rate=3e-2, validations=20, progress=False
    )
    best = min(history["bits_per_char"])
    assert history["bits_per_char"][-1] > best + 0.1
    assert evaluate(model, tokenizer, documents[40:])["bits_per_char"] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_a_trained_model_still_generates_and_can_be_saved_by_keras(
    build, documents, tokenizer, tmp_path, num_microbatches
):
    model, _ = run(build, documents, tokenizer, num_microbatches=num_microbatches)
    assert isinstance(cached_weights(model), LstmWeights | TransformerWeights)
    model.save(tmp_path / "model.keras")
    schedule = keras.saving.load_model(tmp_path / "model.keras").optimizer._learning_rate
    assert float(schedule(1)) == float(model.optimizer._learning_rate(1))


def test_the_logs_have_the_figures_of_the_history(build, documents, tokenizer, tmp_path):
    _, history = run(build, documents, tokenizer, run_dir=tmp_path / "run")
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["bits_per_char"]) for row in rows] == history["bits_per_char"]
    assert [float(row["loss"]) for row in rows] == history["loss"]
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents.*"))
    # Its writer's thread has ended with it.
    assert not [thread for thread in threading.enumerate() if "AsyncWriter" in type(thread).__name__]


def test_the_training_loss_is_the_loss_of_the_batches(build, documents, tokenizer):
    model = build(tokenizer.vocab_size, T, num_layers=1, dropout=0.0)
    x, y = next(iter(make_dataset(documents, tokenizer, T, 4, seed=0)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(
        np.asarray(y), model.predict_on_batch(np.asarray(x))
    )
    _, history = run(build, documents, tokenizer, steps=1, validations=1, dropout=0.0)
    assert history["loss"][0] == pytest.approx(float(loss), rel=1e-5)


@cpu_only
def test_ctrl_c_ends_early_and_keeps_what_was_learned(build, documents, tokenizer, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    model = build(tokenizer.vocab_size, T, num_layers=1)
    data = make_dataset(documents, tokenizer, T, 4, seed=0)

    def stop_at_first_step(session, batch, logs=None, end=Session.on_train_batch_end):
        os.kill(os.getpid(), signal.SIGINT)
        end(session, batch, logs)

    monkeypatch.setattr(Session, "on_train_batch_end", stop_at_first_step)
    history = train(model, data, tokenizer, documents[:10], steps=1_000_000, validations=1, progress=False)
    assert history["step"] == [1]
    assert evaluate(model, tokenizer, documents[:10])["bits_per_char"] == pytest.approx(
        history["bits_per_char"][-1], rel=1e-5
    )
    assert signal.getsignal(signal.SIGINT) is handler


def test_progress_reads_well(build, documents, tokenizer, capsys):
    run(build, documents, tokenizer, progress=True)
    lines = capsys.readouterr().out.splitlines()
    if lines[0].startswith("trains with "):
        assert keras.backend.backend() == "tensorflow"
        del lines[0]
    assert len(lines) == 3
    for step, line in zip((4, 8, 12), lines, strict=True):
        assert line.startswith(f"step {step:2}/12  loss ")
        assert "held-out bits/char" in line
        assert "tokens/s" in line
    assert lines[-1].endswith("0:00 left")


def test_speeds_leave_the_validations_out_and_the_time_left_does_not(
    build_one, documents, tokenizer, monkeypatch, capsys
):
    now = [0.0]

    def lasting(seconds, function):
        def call(*args, **settings):
            now[0] += seconds
            return function(*args, **settings)

        return call

    monkeypatch.setattr(session, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Session, "on_train_batch_end", lasting(1, Session.on_train_batch_end))
    monkeypatch.setattr(session, "evaluate_with_scorer", lasting(100, session.evaluate_with_scorer))
    _, history = run(build_one, documents, tokenizer, progress=True)
    assert history["tokens_per_second"] == [4 * T] * 3
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split("tokens/s")[0].split()[-1] for line in lines] == [str(4 * T)] * 3
    # After 104 seconds for four of twelve steps, then 208 for eight.
    assert [line.split()[-2] for line in lines] == ["3:28", "1:44", "0:00"]


def test_a_loss_that_is_not_finite_stops_the_training(build, documents, tokenizer):
    with pytest.raises(ValueError, match=r"The loss became (nan|inf) at step \d+ with a learning rate of"):
        run(build, documents, tokenizer, learning_rate=1e38, steps=20)


def test_a_validation_figure_that_is_not_finite_stops_the_training(build, documents, tokenizer, monkeypatch):
    monkeypatch.setattr("aigc_tf.training.session.evaluate_with_scorer", lambda *args: {"bits_per_char": math.nan})
    with pytest.raises(ValueError, match="The bits per character on the held-out documents became nan at step 4"):
        run(build, documents, tokenizer)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # from Keras
def test_data_with_too_few_batches_is_refused(build, documents, tokenizer):
    data = make_dataset(documents, tokenizer, T, 4)
    model, steps = build(tokenizer.vocab_size, T, num_layers=1), int(data.cardinality()) + 1
    settings = {"steps": steps, "validations": 1, "num_candidates": 0, "progress": False}
    # With a known number of batches, and an unknown one.
    for train_data in (data, data.filter(lambda *_: True)) if hasattr(data, "filter") else (data,):
        with pytest.raises(ValueError, match=rf"ended after {steps - 1} of {steps} batches; .*seed=0\) is endless"):
            train(model, train_data, tokenizer, documents[:2], **settings)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # from Keras
def test_data_that_ends_within_a_block_of_steps_is_refused(build_one, documents, tokenizer, monkeypatch):
    pytest.importorskip("tensorflow")
    monkeypatch.setattr("aigc_tf.training.loop.uses_accelerator", lambda: True)  # which takes 16 steps at a time
    data = make_dataset(documents, tokenizer, T, 4).filter(lambda *_: True)
    model, steps = build_one(tokenizer.vocab_size, T, num_layers=1), 1 + sum(1 for _ in data)
    with pytest.raises(ValueError, match=f"ended after {steps - 1} of {steps} batches"):
        train(model, data, tokenizer, documents[:2], steps=steps, validations=1, num_candidates=0, progress=False)


def test_batches_of_varying_size_are_refused(build, documents, tokenizer):
    pytest.importorskip("tensorflow")
    data = make_dataset(documents, tokenizer, T, 4, seed=0).unbatch().batch(4)
    with pytest.raises(ValueError, match=r"batches of one shape \(B, T\), got \(None, 20\).*drop_remainder=True"):
        train(build(tokenizer.vocab_size, T), data, tokenizer, documents[:2], steps=1)


INVALID_SETTINGS = {
    "learning_rate": [0.0, -1.0, math.nan, math.inf],
    "weight_decay": [-1.0, math.nan, math.inf],
    "clip_norm": [0.0, -1.0, math.nan, math.inf],
}


def test_invalid_settings_are_refused(build, documents, tokenizer):
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        run(build, documents, tokenizer, steps=0)
    for name, values in INVALID_SETTINGS.items():
        for value in values:
            with pytest.raises(ValueError, match=f"{name} must be finite and .*, got {value}"):
                run(build, documents, tokenizer, **{name: value})
    data = make_dataset(documents, tokenizer, T, 4, seed=0)
    with pytest.raises(ValueError, match="at least one held-out document"):
        train(build(tokenizer.vocab_size, T), data, tokenizer, [], steps=1)
    with pytest.raises(ValueError, match="at least one held-out document that is not empty"):
        train(build(tokenizer.vocab_size, T), data, tokenizer, [""], steps=1)


@pytest.mark.parametrize("data", [[], iter([]), np.zeros((4, 21), np.int32)], ids=lambda data: type(data).__name__)
def test_data_of_another_kind_is_refused(build_one, documents, tokenizer, data):
    model = build_one(tokenizer.vocab_size, T, num_layers=1)
    said = message_of(ValueError, train, model, data, tokenizer, documents[:9], steps=2, progress=False)
    assert said.startswith("train_data must be what make_dataset returns")
    assert f"got {type(data).__name__}." in said


def test_data_that_does_not_come_straight_from_make_dataset_is_pointed_out(build, documents, tokenizer, capsys):
    pytest.importorskip("tensorflow")
    data = make_dataset(documents, tokenizer, 8, 4, seed=0)
    message = "train_data does not come straight from make_dataset"
    for train_data, expected in ((data, False), (data.map(lambda x, y: (x, y)), True)):
        train(build(tokenizer.vocab_size, 8), train_data, tokenizer, documents[:2], steps=1, validations=1)
        assert (message in capsys.readouterr().out) == expected


def test_a_subclassed_model_is_refused_and_trains_when_wrapped(documents, tokenizer):
    class Bigrams(keras.Model):
        def __init__(self):
            super().__init__()
            self.table = keras.layers.Embedding(tokenizer.vocab_size, tokenizer.vocab_size)

        def call(self, ids):
            return self.table(ids)

    model, settings = Bigrams(), {"steps": 2, "validations": 1, "progress": False}
    data = make_dataset(documents, tokenizer, T, 4, seed=0)
    with pytest.raises(ValueError, match="functional or sequential keras.Model, got a Bigrams"):
        train(model, data, tokenizer, documents[:10], **settings)
    ids = keras.Input((T,), dtype="int32")
    assert math.isfinite(train(keras.Model(ids, model(ids)), data, tokenizer, documents[:10], **settings)["loss"][0])
