import numpy as np
import pytest

from aigc_tf.models import networks
from aigc_tf.runtime import backend
from aigc_tf.runtime.backend import keras, tf
from aigc_tf.training.fast import fast_training as module
from aigc_tf.training.fast import fused_optimizer
from aigc_tf.training.fast.fast_training import fast_model, fast_training, fusion_problem
from aigc_tf.training.fast.fused_layers import FusedLossModel
from aigc_tf.training.optimizer import compile_model

pytest.importorskip("numba")
V, T, B = 50, 9, 4
FUSED_BY_NUMBA = "elementwise operations fused by numba"
LOOP = "a faster loop for LSTM layers"
FUSED_BY_XLA = "elementwise operations fused by XLA"


def built(name, precision="float32", dropout=0.1, num_layers=2):
    model = networks.build(name, V, T, num_layers=num_layers, hidden_dim=16, dropout=dropout, precision=precision)
    # Not clipped: Keras on TensorFlow takes the norm of the gradients of a gather before it adds them up.
    compile_model(model, 10, learning_rate=0.01, clip_norm=1e3)
    return model


def trained(name, precision, is_fast, steps=4):
    """Train a model with fixed seeds for some steps; return it and the losses."""
    generator = np.random.default_rng(0)
    model = built(name, precision)
    to_train = fast_model(model, use_fused_ops=True) if is_fast else model
    losses = []
    for _ in range(steps):
        ids = generator.integers(0, V, (B, T + 1))
        losses.append(float(to_train.train_on_batch(ids[:, :-1], ids[:, 1:])))
        to_train.reset_metrics()
    return model, losses


def weights(model):
    """Return all weights but the biases of keys, whose gradient is only rounding: a softmax ignores them."""
    return np.hstack([v.numpy().ravel() for v in model.trainable_variables if not v.path.endswith("key/bias")])


@pytest.mark.parametrize("name", ["transformer", "lstm"])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("mixed_bfloat16", 0.1)])
def test_training_equals_that_of_keras(name, precision, tolerance):
    start = weights(built(name, precision))
    slow, slow_losses = trained(name, precision, is_fast=False)
    fast, fast_losses = trained(name, precision, is_fast=True)
    np.testing.assert_allclose(fast_losses, slow_losses, rtol=1e-5 if precision == "float32" else 1e-3)
    assert np.linalg.norm(weights(fast) - weights(slow)) < tolerance * np.linalg.norm(weights(slow) - start)
    assert int(fast.optimizer.iterations) == int(slow.optimizer.iterations) == 4
    names = [[v.path.split("/", 1)[1] for v in model.optimizer.variables] for model in (fast, slow)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    ("name", "optimisations"), [("transformer", [FUSED_BY_NUMBA]), ("lstm", [LOOP, FUSED_BY_NUMBA])]
)
def test_another_model_is_trained_and_the_original_is_not_changed(name, optimisations):
    model = built(name, "mixed_bfloat16", dropout=0.0)
    owners = [model, model.optimizer, *model.operations]
    before = [set(vars(owner)) for owner in owners]
    calls = [owner.call for owner in model.operations]
    with fast_training(model, num_tokens=1) as (other, shown):
        assert shown == optimisations
        assert other is not model
        assert not other.jit_compile
        ids = np.random.default_rng(0).integers(0, V, (B, T))
        start = weights(model)
        other.train_on_batch(ids, ids)
        assert (weights(model) != start).any()
    assert [v is w for v, w in zip(model.variables, other.variables, strict=True)] == [True] * len(model.variables)
    assert [set(vars(owner)) for owner in owners] == before
    assert [owner.call for owner in model.operations] == calls
    assert model(ids).dtype == tf.float32


def test_all_elementwise_layers_of_a_transformer_are_fused():
    model = built("transformer")
    kinds = [type(operation).__name__ for operation in fast_model(model, use_fused_ops=True).operations]
    assert [kinds.count(kind) for kind in ("_FusedLayerNorm", "_FusedGelu", "_FusedAttention")] == [5, 2, 2]
    assert not {"LayerNormalization", "Gelu", "MultiHeadAttention", "Identity"} & set(kinds)


def test_layers_with_other_settings_are_left_to_keras(monkeypatch):
    def kinds_of(make, width=6):
        ids = keras.Input((T,), dtype="int32")
        x = keras.layers.Embedding(V, width)(ids)
        model = keras.Model(ids, keras.layers.Dense(V)(make(x)))
        compile_model(model, 10)
        other = fast_model(model, use_fused_ops=True)
        values = np.zeros((2, T), np.int32)
        assert np.isfinite(other.train_on_batch(values, values))
        return {type(operation).__name__ for operation in other.operations}

    norm, attention = keras.layers.LayerNormalization, keras.layers.MultiHeadAttention
    assert "_FusedLayerNorm" in kinds_of(norm())
    for settings in ({"center": False}, {"gamma_regularizer": "l2"}, {"axis": 1}):
        assert "_FusedLayerNorm" not in kinds_of(norm(**settings))
    with pytest.warns(UserWarning, match="rms_scaling"):
        assert "_FusedLayerNorm" not in kinds_of(norm(rms_scaling=True))
    assert "_FusedAttention" in kinds_of(lambda x: attention(2, 3)(x, x, use_causal_mask=True))
    assert "_FusedAttention" not in kinds_of(lambda x: attention(2, 3)(x, x))
    assert "_FusedAttention" not in kinds_of(lambda x: attention(2, 3)(x, x + 1, use_causal_mask=True))
    assert "_FusedAttention" not in kinds_of(lambda x: attention(2, 3, use_bias=False)(x, x, use_causal_mask=True))
    monkeypatch.setattr("aigc_tf.training.fast.fused_layers.attention_problem", lambda layer: "it lacks something")
    assert "_FusedAttention" not in kinds_of(lambda x: attention(2, 3)(x, x, use_causal_mask=True))


def test_other_optimizers_and_losses_are_left_to_keras():
    def optimizer_of(optimizer):
        model = built("lstm")
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.optimizer.build(model.trainable_variables)
        return type(fast_model(model, use_fused_ops=True).optimizer).__name__

    assert optimizer_of(keras.optimizers.AdamW()) == "FusedAdamW"
    assert optimizer_of(keras.optimizers.SGD()) == "SGD"
    assert optimizer_of(keras.optimizers.AdamW(use_ema=True)) == "AdamW"

    def problem_with(loss):
        model = built("lstm")
        model.compile("adamw", loss)
        return fusion_problem(model)

    assert fusion_problem(built("lstm")) is None
    for loss in (
        "mse",
        keras.losses.SparseCategoricalCrossentropy(),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0),
    ):
        assert problem_with(loss) == "the loss is not the mean cross-entropy of logits"


def masked():
    """Return a compiled model whose loss ignores padding, as its layers pass on a mask."""
    keras.utils.set_random_seed(0)
    ids = keras.Input((T,), dtype="int32")
    x = keras.layers.LayerNormalization()(keras.layers.Embedding(V, 8, mask_zero=True)(ids))
    model = keras.Model(ids, keras.layers.Dense(V)(x))
    compile_model(model, 10, learning_rate=0.01, clip_norm=None)
    return model


def test_masked_positions_are_ignored():
    ids = np.random.default_rng(0).integers(1, V, (B, T + 1))
    ids[0, 3:] = 0
    inputs, targets = ids[:, :-1], ids[:, 1:]
    expected = masked().train_on_batch(inputs, targets)
    model = masked()
    assert fusion_problem(model) == "a layer passes on a mask"
    in_a_row = keras.Sequential(masked().layers)
    compile_model(in_a_row, 10)
    assert fusion_problem(in_a_row) == "a layer passes on a mask"
    with fast_training(model, 100) as (to_train, optimisations):
        assert FUSED_BY_NUMBA not in optimisations
        assert to_train.train_on_batch(inputs, targets) == pytest.approx(expected, rel=1e-6)
    fused_model = FusedLossModel(model.inputs[0], model.outputs[0])
    fused_model.compile(loss=model.loss)
    losses = [float(m.compute_loss(inputs, tf.constant(targets), m(inputs))) for m in (model, fused_model)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "policy"),
    # Keras builds no LSTM in bfloat16.
    [("transformer", "bfloat16"), ("transformer", "mixed_float16"), ("transformer", "float64"), ("lstm", "float16")],
)
def test_models_of_other_precisions_train(name, policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = getattr(networks, name)(V, T, num_layers=1, hidden_dim=16)
    finally:
        keras.config.set_dtype_policy(before)
    compile_model(model, 10)
    ids = np.random.default_rng(0).integers(0, V, (B, T))
    with fast_training(model, 1) as (other, _):
        assert np.isfinite([other.train_on_batch(ids, ids) for _ in range(2)]).all()


def test_frozen_layers_are_not_trained():
    model = networks.transformer(V, T, num_layers=1, hidden_dim=16, num_heads=2)
    for name in ("token_embedding", "block_0_attention", "final_norm"):
        model.get_layer(name).trainable = False
    compile_model(model, 10)
    frozen = [v.numpy() for v in model.non_trainable_variables if v.dtype == "float32"]
    ids = np.random.default_rng(0).integers(0, V, (B, T))
    with fast_training(model, 1) as (other, _):
        other.train_on_batch(ids, ids)
    now = [v.numpy() for v in model.non_trainable_variables if v.dtype == "float32"]
    assert len(frozen) == 1 + 8 + 2
    for one, other in zip(frozen, now, strict=True):
        np.testing.assert_array_equal(one, other)


def test_targets_outside_the_vocabulary_are_refused_as_by_keras():
    model = built("lstm")
    ids = np.zeros((B, T), np.int32)
    with fast_training(model, 1) as (other, _):
        for wrong in (V, -1, -100):
            for one in (model, other):
                with pytest.raises(tf.errors.InvalidArgumentError, match=str(wrong)):
                    one.train_on_batch(ids, np.full_like(ids, wrong))


def test_a_hidden_gpu_changes_nothing(monkeypatch):
    class Gpu:
        device_type = "GPU"

    found = tf.config.list_physical_devices()
    monkeypatch.setattr(
        tf.config, "list_physical_devices", lambda kind=None: [Gpu()] if kind == "GPU" else [*found, Gpu()]
    )
    model = built("lstm")
    assert not model.jit_compile
    with fast_training(model, 1) as (other, optimisations):
        assert optimisations == [LOOP, FUSED_BY_NUMBA]
        assert not other.jit_compile


def test_without_numba_xla_fuses_long_training_runs(monkeypatch):
    monkeypatch.setattr("aigc_tf.training.fast.fast_training.numba_problem", lambda: "numba is not installed")
    with fast_training(built("transformer"), num_tokens=1) as (_, optimisations):
        assert optimisations == ["elementwise operations not fused (numba is not installed)"]
    with fast_training(built("transformer"), num_tokens=1e12) as (_, optimisations):
        assert optimisations == [FUSED_BY_XLA]
    with fast_training(built("lstm"), num_tokens=1e12) as (_, optimisations):
        assert optimisations == [LOOP, FUSED_BY_XLA]


def test_a_learning_rate_can_be_set_during_training():
    model = built("lstm")
    model.compile(keras.optimizers.AdamW(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.optimizer.build(model.trainable_variables)
    ids = np.random.default_rng(0).integers(0, V, (B, T + 1))
    with fast_training(model, 1) as (other, _):
        for rate, changes in ((0.01, True), (0.0, False), (0.1, True)):
            before = weights(model)
            other.optimizer.learning_rate = rate
            assert float(other.optimizer.learning_rate) == float(model.optimizer.learning_rate) == np.float32(rate)
            other.train_on_batch(ids[:, :-1], ids[:, 1:])
            assert (before != weights(model)).any() == changes


def test_what_this_keras_does_not_allow_to_fuse_is_shown(monkeypatch):
    monkeypatch.setattr(module, "attention_problem", lambda layer: "MultiHeadAttention lacks query_dense")
    with fast_training(built("transformer"), 1) as (_, optimisations):
        assert optimisations == [FUSED_BY_NUMBA, "attention not fused (MultiHeadAttention lacks query_dense)"]
    with fast_training(built("lstm"), 1) as (_, optimisations):
        assert optimisations == [LOOP, FUSED_BY_NUMBA]
    for owner in (module, fused_optimizer):
        monkeypatch.setattr(owner, "adamw_problem", lambda optimizer: "AdamW lacks _momentums")
    with fast_training(built("lstm"), 1) as (trained, optimisations):
        assert optimisations == [LOOP, FUSED_BY_NUMBA, "AdamW not fused (AdamW lacks _momentums)"]
        assert type(trained.optimizer) is keras.optimizers.AdamW
    model = built("lstm")
    compile_model(model, 10, num_microbatches=2)
    with fast_training(model, 1) as (_, optimisations):  # left to Keras because of its settings
        assert optimisations == [LOOP, FUSED_BY_NUMBA]


@pytest.mark.parametrize("name", [pytest.param("transformer", marks=pytest.mark.slow), "lstm"])
def test_operations_fused_by_xla_learn_the_same(name, monkeypatch):
    monkeypatch.setattr("aigc_tf.training.fast.fast_training.numba_problem", lambda: "numba is not installed")
    ids = np.random.default_rng(0).integers(0, V, (B, T + 1))
    losses = []
    for num_tokens in (0, 1e15):
        model = built(name, dropout=0.0, num_layers=1)
        with fast_training(model, num_tokens) as (other, optimisations):
            assert (FUSED_BY_XLA in optimisations) == bool(num_tokens)
            assert tf.config.optimizer.get_jit() == ("autoclustering" if num_tokens else "")
            losses.append([float(other.train_on_batch(ids[:, :-1], ids[:, 1:])) for _ in range(4)])
    assert losses[0][-1] < losses[0][0] - 0.02
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.parametrize("kind", ["intra", "inter"])
def test_the_number_of_threads_is_that_of_the_usable_cores_unless_it_is_set(kind, monkeypatch):
    name = f"TF_NUM_{kind.upper()}OP_THREADS"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backend, "usable_cores", lambda: 3)
    assert backend.num_threads(kind) == 3
    for no_number in ("", "abc", "0", "-1"):
        monkeypatch.setenv(name, no_number)
        assert backend.num_threads(kind) == 3
    monkeypatch.setenv(name, "2")
    assert backend.num_threads(kind) == 2
    monkeypatch.setattr(tf.config.threading, f"get_{kind}_op_parallelism_threads", lambda: 5)
    assert backend.num_threads(kind) == 5
