import contextlib

import numpy as np
import pytest

from aigc_tf import models
from aigc_tf.devices import keras, tf
from aigc_tf.fast_training import fast_passes, fast_training
from aigc_tf.training import compile_model

pytest.importorskip("numba")
V, T, B = 50, 9, 4
REPLACED = ("call", "_compute_attention")
on_tensorflow = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="passes are for TensorFlow")


def built(name, precision="float32", dropout=0.1):
    model = models.build(name, V, T, num_layers=2, hidden_dim=16, dropout=dropout, precision=precision)
    # Not clipped: Keras on TensorFlow takes the norm of the gradients of a gather before it adds them up.
    compile_model(model, 10, learning_rate=0.01, clip_norm=1e3)
    return model


def trained(name, precision, is_fast, steps=4):
    """Return what a model of fixed seeds becomes in some steps, and their losses."""
    generator = np.random.default_rng(0)
    model, losses = built(name, precision), []
    with fast_passes(model) if is_fast else contextlib.nullcontext(False) as is_used:
        assert is_used == is_fast
        for _ in range(steps):
            ids = generator.integers(0, V, (B, T + 1))
            losses.append(float(model.train_on_batch(ids[:, :-1], ids[:, 1:])))
    return model, losses


def weights(model):
    """Return all weights but the biases of keys, whose gradient is nothing but rounding: a softmax ignores them."""
    return np.hstack([v.numpy().ravel() for v in model.trainable_variables if not v.path.endswith("key/bias")])


@on_tensorflow
@pytest.mark.parametrize("name", ["transformer", "lstm"])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("mixed_bfloat16", 0.2)])
def test_training_is_that_of_keras(name, precision, tolerance):
    start = weights(built(name, precision))
    slow, slow_losses = trained(name, precision, is_fast=False)
    fast, fast_losses = trained(name, precision, is_fast=True)
    np.testing.assert_allclose(fast_losses, slow_losses, rtol=tolerance / 20)
    assert np.linalg.norm(weights(fast) - weights(slow)) < tolerance * np.linalg.norm(weights(slow) - start)
    assert int(fast.optimizer.iterations) == int(slow.optimizer.iterations) == 4
    assert len(fast.optimizer.variables) == len(slow.optimizer.variables)


@on_tensorflow
@pytest.mark.parametrize("name", ["transformer", "lstm"])
def test_model_is_as_before_afterwards_and_gives_float32_meanwhile(name):
    model = built(name, "mixed_bfloat16", dropout=0.0)
    ids = np.random.default_rng(0).integers(0, V, (B, T))
    owners = [model, model.optimizer, *model.operations]
    logits = model(ids)
    model.train_on_batch(ids, ids)  # Keras keeps what it compiled
    model.make_train_function(force=True)
    before = [set(vars(owner)) for owner in owners]
    with fast_passes(model) as is_used:
        assert is_used
        assert model(ids).dtype == tf.float32
        assert keras.ops.shape(logits) == keras.ops.shape(model(ids))
        model.make_train_function(force=True)
        model.train_on_batch(ids, ids)
        assert model(ids).dtype == tf.float32
    assert [set(vars(owner)) for owner in owners] == before


@on_tensorflow
def test_all_of_a_transformer_that_is_no_product_is_replaced():
    model = built("transformer")
    with fast_passes(model):
        replaced = [name for operation in model.operations for name in vars(operation) if name in REPLACED]
    num_blocks = 2
    assert sorted(replaced) == ["_compute_attention"] * num_blocks + ["call"] * (2 * num_blocks + 1 + num_blocks)


@on_tensorflow
def test_others_are_left_to_keras():
    def is_used(change):
        model = built("transformer")
        change(model)
        with fast_passes(model) as used:
            return used, "_backend_apply_gradients" in vars(model.optimizer)

    def compile_with(optimizer, loss):
        return lambda model: model.compile(optimizer, loss)

    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert is_used(lambda model: None) == (True, True)
    assert is_used(compile_with(keras.optimizers.SGD(), entropy)) == (True, False)
    assert is_used(compile_with(keras.optimizers.AdamW(use_ema=True), entropy)) == (True, False)
    assert is_used(compile_with("adamw", keras.losses.SparseCategoricalCrossentropy())) == (False, False)
    assert is_used(compile_with("adamw", "mse")) == (False, False)
    ignoring = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
    assert is_used(compile_with("adamw", ignoring)) == (False, False)
    half = built("transformer", "mixed_float16")
    with fast_passes(half) as used:
        assert not used


def test_without_tensorflow_or_numba_xla_fuses(monkeypatch):
    model = built("transformer")
    monkeypatch.setattr("aigc_tf.fast_training.numba_is_usable", lambda: False)
    with fast_training(model, num_tokens=1e12) as methods:
        is_tensorflow = keras.backend.backend() == "tensorflow"
        assert methods == ["elementwise operations fused by XLA"] * is_tensorflow
