import gc

import numpy as np
import pytest
from conftest import spread

from aigc_tf import lstm, save, transformer
from aigc_tf.generation.engines import weight_cache
from aigc_tf.generation.engines.engine import make_engine
from aigc_tf.generation.engines.weight_cache import cached_weights
from aigc_tf.generation.engines.weight_watch import LayerSnapshot, VariableSnapshot
from aigc_tf.runtime.backend import keras

T, V = 12, 301


def test_weights_are_the_same_object_while_they_are_equal(build):
    model = build(V, T)
    weights = cached_weights(model)
    assert cached_weights(model) is weights
    model.set_weights(model.get_weights())  # equal values elsewhere in memory
    assert cached_weights(model) is weights
    model.set_weights([2 * value for value in model.get_weights()])
    assert cached_weights(model) is not weights


def test_a_model_that_only_looks_like_ours_is_read_through_itself(build, tokenizer, monkeypatch):
    model = spread(build(tokenizer.vocab_size, T))
    layer = model.get_layer("logits")
    monkeypatch.setattr(layer, "call", lambda x: x[:, :, ::-1])  # which no configuration tells
    with pytest.warns(UserWarning, match="computes something else"):
        assert cached_weights(model) is None
    assert cached_weights(model) is None  # it is not tried again
    engine = make_engine(model, 1, "numba")
    logits = engine.read(np.zeros(3, np.int64), np.arange(3), np.arange(3))[0]
    np.testing.assert_allclose(logits, np.array(model(np.arange(T)[None]))[0, 2], atol=1e-5)


def test_a_long_context_is_compared_over_a_few_tokens(build, monkeypatch):
    lengths, make = [], weight_cache.numpy_engine

    def counting(*args):
        read, copy = make(*args)
        return lambda rows, positions, ids: lengths.append(len(ids)) or read(rows, positions, ids), copy

    monkeypatch.setattr(weight_cache, "numpy_engine", counting)
    assert cached_weights(spread(build(V, 5 * weight_cache._NUM_COMPARED))) is not None
    assert lengths == [weight_cache._NUM_COMPARED]


def test_a_model_that_looks_ahead_is_read_through_itself(build, monkeypatch):
    model = spread(build(V, T))
    layer = model.get_layer("logits")
    monkeypatch.setattr(layer, "call", lambda x: x + x[:, ::-1])
    with pytest.warns(UserWarning, match="computes something else"):
        assert cached_weights(model) is None


def test_each_way_to_change_a_variable_is_noticed(build, tmp_path):
    model = spread(build(V, T))
    other = tmp_path / "other.weights.h5"
    spread(build(V, T, seed=1)).save_weights(other)
    variable = model.weights[0]
    first = np.zeros_like(variable)
    first[0, 0] = 1
    for change in (
        lambda: variable.assign(variable + first),
        lambda: variable.assign_add(first),
        lambda: variable.assign_sub(3 * first),
        lambda: model.load_weights(other),
        lambda: model.set_weights([value + 1 for value in model.get_weights()]),
    ):
        before = cached_weights(model)
        assert cached_weights(model) is before
        change()
        after = cached_weights(model)
        assert after is not before
        np.testing.assert_array_equal(after.token_embedding, np.asarray(model.get_layer("token_embedding").weights[0]))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("Dense", "activation", keras.activations.relu),
        ("LayerNormalization", "epsilon", 0.5),
        ("MultiHeadAttention", "_inverse_sqrt_key_dim", 2.0),  # which no configuration tells
    ],
)
@pytest.mark.filterwarnings("ignore:The model has the layers and settings of one that aigc_tf built")
def test_a_setting_of_a_layer_that_changes_is_noticed(tokenizer, kind, name, value):
    model = spread(transformer(tokenizer.vocab_size, T, num_layers=1, num_heads=2, hidden_dim=8))
    ids = np.arange(T)[None]

    def logits():
        return make_engine(model, 1, "numpy").read(*np.array([[0] * T, range(T), ids[0]]))[0]

    before = logits()
    np.testing.assert_allclose(before, np.array(model(ids))[0, -1], atol=1e-4)
    weights = cached_weights(model)
    assert cached_weights(model) is weights
    layer = next(layer for layer in model.layers if type(layer).__name__ == kind)
    old = getattr(layer, name)
    setattr(layer, name, value)
    after = logits()
    np.testing.assert_allclose(after, np.array(model(ids))[0, -1], atol=1e-4)
    assert np.abs(after - before).max() > 1e-3
    setattr(layer, name, old)
    np.testing.assert_allclose(logits(), before, atol=1e-6)


def test_added_and_removed_layers_are_noticed(tokenizer):
    ids = keras.Input((T,), dtype="int32")
    x = keras.layers.Embedding(tokenizer.vocab_size, 8)(ids)
    one, two = keras.Model(ids, x), keras.Model(ids, keras.layers.Dense(8)(x))  # of the same layers, and one more
    assert LayerSnapshot(one).is_current(one)
    assert not LayerSnapshot(one).is_current(two)
    assert not LayerSnapshot(two).is_current(one)


def test_the_cache_does_not_keep_a_model_alive(tokenizer):
    model = transformer(tokenizer.vocab_size, T, num_layers=1, num_heads=2, hidden_dim=8)
    cached_weights(model)
    known = len(weight_cache._cache)
    del model
    gc.collect()
    assert len(weight_cache._cache) < known


def test_values_are_compared_on_their_device(build):
    model = build(V, T)
    watch = VariableSnapshot(model)
    watch._on_host = False  # as on a GPU
    assert watch.is_current(model)
    model.weights[-1].assign(model.weights[-1] + 1)
    assert not watch.is_current(model)


def test_one_model_after_the_other_is_read_without_a_warning(tensorflow_log):
    for _ in range(8):
        ids = keras.Input((T,), dtype="int32")
        VariableSnapshot(keras.Model(ids, keras.layers.Embedding(V, V)(ids)))
    assert tensorflow_log.messages == []


@pytest.mark.parametrize("name", ["call", "__call__"])
def test_a_class_that_overrides_its_call_is_read_through_itself(tokenizer, tmp_path, name):
    ours = spread(lstm(tokenizer.vocab_size, context=T, num_layers=1, hidden_dim=8))

    def shifted(self, *args, **kwargs):
        return getattr(super(kind, self), name)(*args, **kwargs) + keras.ops.one_hot([300], tokenizer.vocab_size) * 1e-3

    kind = type("Shifted", (keras.Model,), {name: shifted})
    model = kind(ours.input, ours.output)
    assert cached_weights(ours) is not None
    assert cached_weights(model) is None
    with pytest.raises(ValueError, match="Shifted overrides .*, which would be lost"):
        save(tmp_path, model, tokenizer)
    plain = type("Plain", (keras.Model,), {"train_step": lambda self, data: {}})(ours.input, ours.output)
    assert cached_weights(plain) is not None


def test_a_model_that_changes_one_logit_is_read_through_itself(build):
    model = build(V, T)
    weights = cached_weights(model)
    assert weight_cache._agree(model, weights)
    logits = model.output
    change = keras.ops.max(keras.ops.abs(logits)) * (-2 * keras.ops.one_hot([[7]], V))
    other = keras.Model(model.input, logits + change)
    assert not weight_cache._agree(other, weights)
