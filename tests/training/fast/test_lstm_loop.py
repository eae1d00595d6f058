import numpy as np
import pytest

from aigc_tf.models import networks
from aigc_tf.runtime.backend import keras, tf, xla_fusion
from aigc_tf.training.fast import lstm_loop
from aigc_tf.training.fast.fast_training import fast_model
from aigc_tf.training.fast.lstm_loop import FastLstm
from aigc_tf.training.optimizer import compile_model

V, T, B = 50, 9, 5


def with_fast_loop(model):
    model.compile("sgd", "mse")
    return fast_model(model, use_fused_ops=False)


def uses_fast_loop(model):
    return any(isinstance(layer, FastLstm) for layer in model.layers)


def loss_and_gradients(model):
    ids, targets = np.random.default_rng(0).integers(0, V, (2, B, T))

    @tf.function
    def compute():
        with tf.GradientTape() as tape:
            logits = model(ids, training=True)
            loss = keras.ops.mean(keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True))
        return loss, logits, tape.gradient(loss, [v.value for v in model.trainable_variables])

    loss, logits, gradients = compute()
    return float(loss), logits.numpy(), [tf.convert_to_tensor(g).numpy() for g in gradients]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def num_parts(request, monkeypatch):
    monkeypatch.setattr(lstm_loop, "num_threads", lambda kind: request.param)
    monkeypatch.setattr(lstm_loop, "_MIN_HALF_BATCH", 2)
    return request.param


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float32", 3e-6), ("mixed_bfloat16", 0.03)], ids=["float32", "bfloat16"]
)
def test_the_loop_computes_what_keras_computes(precision, tolerance, num_parts):
    model = networks.build("lstm", V, T, num_layers=2, hidden_dim=16, dropout=0.0, precision=precision)
    fast = with_fast_loop(model)
    assert uses_fast_loop(fast)
    loss, logits, gradients = loss_and_gradients(model)
    fast_loss, fast_logits, fast_gradients = loss_and_gradients(fast)
    assert fast_loss == pytest.approx(loss, rel=tolerance / 10)
    np.testing.assert_allclose(fast_logits, logits, atol=tolerance * np.abs(logits).max())
    assert len(gradients) == len(model.trainable_variables) > 6
    for fast, slow in zip(fast_gradients, gradients, strict=True):
        assert np.linalg.norm(fast - slow) <= tolerance * np.linalg.norm(slow)


def test_a_batch_is_split_if_there_is_a_thread_for_each_half(num_parts):
    assert lstm_loop._split_sizes(5) == ([2, 3] if num_parts == 2 else 1)
    assert lstm_loop._split_sizes(3) == lstm_loop._split_sizes(None) == 1


def test_initial_and_final_states_equal_those_of_keras(num_parts):
    x, hidden, cell = (keras.Input(shape) for shape in ((T, 3), (5,), (5,)))
    outputs = keras.layers.LSTM(5, return_sequences=False, return_state=True)(x, initial_state=[hidden, cell])
    model = keras.Model([x, hidden, cell], outputs)
    generator = np.random.default_rng(0)
    values = [tf.constant(generator.normal(size=(B, *i.shape[1:])), tf.float32) for i in model.inputs]

    def run(model):
        with tf.GradientTape() as tape:
            tape.watch(values)
            outputs = model(values)
            total = sum(tf.reduce_sum(y * tf.range(1.0, 6.0)) * (i + 1) for i, y in enumerate(outputs))
        return [*outputs, *tape.gradient(total, values)]

    fast = with_fast_loop(model)
    assert uses_fast_loop(fast)
    for one, other in zip(run(fast), run(model), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"go_backwards": True}, {"activation": "relu"}, {"recurrent_dropout": 0.1}, {"unroll": True}, {"use_bias": False}],
    ids=str,
)
def test_layers_with_other_settings_are_left_to_keras(settings):
    x = keras.Input((T, 3))
    model = keras.Model(x, keras.layers.LSTM(4, **settings)(x))
    assert with_fast_loop(model) is model


def test_a_masked_layer_is_left_to_keras():
    ids = keras.Input((T,), dtype="int32")
    model = keras.Model(ids, keras.layers.LSTM(4)(keras.layers.Embedding(V, 3, mask_zero=True)(ids)))
    assert with_fast_loop(model) is model


def test_xla_fusion_ends_with_its_context():
    before = tf.config.optimizer.get_jit()
    with xla_fusion() as is_on:
        assert is_on
        assert tf.config.optimizer.get_jit() == "autoclustering"
    assert tf.config.optimizer.get_jit() == before


def test_the_layer_is_not_changed():
    model = networks.lstm(V, T)
    layer = model.get_layer("lstm_0")
    before = dict(vars(layer))
    compile_model(model, 10)
    assert uses_fast_loop(fast_model(model, use_fused_ops=False))
    assert {name: value for name, value in vars(layer).items() if before.get(name) is not value} == {}
