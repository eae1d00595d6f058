import contextlib

import numpy as np
import pytest

from aigc_tf import models
from aigc_tf.devices import fused, keras, tf
from aigc_tf.fast_training import fast_training
from aigc_tf.recurrence import fast_recurrence

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="other backends have other loops")

V, T, B = 50, 9, 4


def loss_and_gradients(model, is_fast):
    ids, targets = np.random.default_rng(0).integers(0, V, (2, B, T))

    @tf.function
    def compute():
        with tf.GradientTape() as tape:
            logits = model(ids, training=True)
            loss = keras.ops.mean(keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True))
        return loss, logits, tape.gradient(loss, [v.value for v in model.trainable_variables])

    with fast_recurrence(model) if is_fast else contextlib.nullcontext(False) as is_used:
        loss, logits, gradients = compute()
        return is_used, float(loss), logits.numpy(), [tf.convert_to_tensor(g).numpy() for g in gradients]


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 3e-6), ("mixed_bfloat16", 0.03)], ids=["float32", "bfloat16"]
)
def test_it_is_the_loop_of_keras(precision, tolerance):
    model = models.build("lstm", V, T, num_layers=2, hidden_dim=16, dropout=0.0, precision=precision)
    not_used, loss, logits, gradients = loss_and_gradients(model, is_fast=False)
    used, fast_loss, fast_logits, fast_gradients = loss_and_gradients(model, is_fast=True)
    assert (not_used, used) == (False, True)
    assert fast_loss == pytest.approx(loss, rel=tolerance / 10)
    np.testing.assert_allclose(fast_logits, logits, atol=tolerance * np.abs(logits).max())
    assert len(gradients) == len(model.trainable_variables) > 6
    for fast, slow in zip(fast_gradients, gradients, strict=True):
        assert np.linalg.norm(fast - slow) <= tolerance * np.linalg.norm(slow)


def test_states_given_and_returned_are_those_of_keras():
    x, hidden, cell = (keras.Input(shape) for shape in ((T, 3), (5,), (5,)))
    outputs = keras.layers.LSTM(5, return_sequences=False, return_state=True)(x, initial_state=[hidden, cell])
    model = keras.Model([x, hidden, cell], outputs)
    generator = np.random.default_rng(0)
    values = [tf.constant(generator.normal(size=(B, *i.shape[1:])), tf.float32) for i in model.inputs]

    def run():
        with tf.GradientTape() as tape:
            tape.watch(values)
            outputs = model(values)
            total = sum(tf.reduce_sum(y * tf.range(1.0, 6.0)) * (i + 1) for i, y in enumerate(outputs))
        return [*outputs, *tape.gradient(total, values)]

    expected = run()
    with fast_recurrence(model) as is_used:
        assert is_used
        for fast, slow in zip(run(), expected, strict=True):
            np.testing.assert_allclose(fast, slow, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"go_backwards": True}, {"activation": "relu"}, {"recurrent_dropout": 0.1}, {"unroll": True}, {"use_bias": False}],
    ids=str,
)
def test_other_layers_stay_with_keras(settings):
    x = keras.Input((T, 3))
    with fast_recurrence(keras.Model(x, keras.layers.LSTM(4, **settings)(x))) as is_used:
        assert not is_used


def test_a_mask_goes_to_keras():
    ids = keras.Input((T,), dtype="int32")
    model = keras.Model(ids, keras.layers.LSTM(4)(keras.layers.Embedding(V, 3, mask_zero=True)(ids)))
    masked = np.array([[5, 6, 7, 0, 0, 0, 0, 0, 0]])
    expected = model(masked)
    with fast_recurrence(model) as is_used:
        assert is_used
        np.testing.assert_allclose(model(masked), expected, atol=1e-6)


def test_nothing_of_it_is_left_afterwards():
    model = models.lstm(V, T)
    with pytest.raises(ZeroDivisionError), fast_recurrence(model):
        assert "inner_loop" in vars(model.get_layer("lstm_0"))
        raise ZeroDivisionError
    assert "inner_loop" not in vars(model.get_layer("lstm_0"))
    before = tf.config.optimizer.get_jit()
    with fused() as is_fused:
        assert is_fused
        assert tf.config.optimizer.get_jit() == "autoclustering"
    assert tf.config.optimizer.get_jit() == before


def test_what_is_worth_its_compilation_is_fused():
    model = models.transformer(V, T)
    with fast_training(model, num_tokens=1000) as methods:
        assert methods == []
    with fast_training(model, num_tokens=1e12) as methods:
        assert methods == ["elementwise operations fused by XLA"]
    with fast_training(models.lstm(V, T), num_tokens=1000) as methods:
        assert methods == ["LSTM layers in a loop of our own"]


@pytest.mark.parametrize("build", [models.transformer, models.lstm])
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_fused_operations_learn_the_same(build, precision):
    ids = np.random.default_rng(0).integers(0, V, (B, T + 1))
    losses = []
    for num_tokens in (0, 1e15):
        model = models.build(build.__name__, V, T, dropout=0.0, precision=precision)
        model.compile(keras.optimizers.AdamW(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        with fast_training(model, num_tokens):
            losses.append([float(model.train_on_batch(ids[:, :-1], ids[:, 1:])) for _ in range(8)])
    assert losses[0][-1] < losses[0][0] - 0.1
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4 if precision == "float32" else 5e-3)
