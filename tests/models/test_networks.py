import math
import random
import subprocess
import sys

import numpy as np
import pytest

from aigc_tf import lstm, transformer
from aigc_tf.models.sizes import dimensions
from aigc_tf.runtime.backend import keras

V, T = 50, 12


def random_ids(rows, seed=0):
    return np.random.default_rng(seed).integers(0, V, (rows, T), dtype=np.int32)


def logits_of(model, ids):
    return np.asarray(model.predict_on_batch(ids))


def test_ids_become_float32_logits(build):
    model = build(V, T)
    assert model.input_shape == (None, T)
    assert model.output_shape == (None, T, V)
    assert logits_of(model, random_ids(3)).dtype == np.float32


def test_logits_depend_on_the_past_alone(build):
    model, ids = build(V, T), random_ids(4)
    before = logits_of(model, ids)
    for t in range(T):
        changed = ids.copy()
        changed[:, t:] = (changed[:, t:] + 1) % V
        after = logits_of(model, changed)
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert (np.abs(before[:, t:] - after[:, t:]).max(axis=-1) > 0).all()


def test_logits_use_the_whole_past(build):
    model, ids = build(V, T), random_ids(4)
    changed = ids.copy()
    changed[:, 0] = (changed[:, 0] + 1) % V
    difference = np.abs(logits_of(model, ids) - logits_of(model, changed))
    assert (difference.max(axis=-1) > 0).all()


def test_rows_do_not_mix(build):
    model, ids = build(V, T), random_ids(4)
    changed = ids.copy()
    changed[1] = (changed[1] + 1) % V
    before, after = logits_of(model, ids), logits_of(model, changed)
    np.testing.assert_array_equal(before[[0, 2, 3]], after[[0, 2, 3]])
    assert (before[1] != after[1]).any()


def test_positions_matter_in_a_transformer():
    ids = np.full((1, T), 7, np.int32)
    logits = logits_of(transformer(V, T, num_layers=1, num_heads=2, hidden_dim=16), ids)
    assert np.abs(logits[0, 0] - logits[0, 1]).max() > 1e-4


def transformer_parameters(v, t, layers, d, m):
    return (v + t) * d + layers * (4 * d * d + 2 * d * m + 9 * d + m) + 2 * d


@pytest.mark.parametrize(("layers", "heads", "d", "m"), [(1, 1, 8, 32), (3, 2, 16, 64), (2, 4, 32, 20)])
def test_transformer_parameters_follow_the_formula(layers, heads, d, m):
    model = transformer(V, T, num_layers=layers, num_heads=heads, hidden_dim=d, intermediate_dim=m)
    assert model.count_params() == transformer_parameters(V, T, layers, d, m)
    assert sum(math.prod(w.shape) for w in model.trainable_weights) == model.count_params()


def test_base_has_the_parameters_of_gpt2():
    assert transformer_parameters(50257, 1024, 12, 768, 4 * 768) == 124_439_808
    assert dimensions("transformer", "base") == {"num_layers": 12, "num_heads": 12, "hidden_dim": 768}


def test_lstm_parameters_follow_the_formula():
    def cell(inputs, d):
        return 4 * d * (inputs + d + 1)

    tied = lstm(V, T, num_layers=2, hidden_dim=16, embedding_dim=16)
    assert tied.count_params() == V * 16 + cell(16, 16) * 2
    projected = lstm(V, T, num_layers=2, hidden_dim=16)
    assert projected.count_params() == V * 8 + cell(8, 16) + cell(16, 16) + 16 * 8 + 8
    untied = lstm(V, T, num_layers=1, hidden_dim=16, embedding_dim=8, tie_embeddings=False)
    assert untied.count_params() == V * 8 + cell(8, 16) + 16 * V + V


def test_layer_names_are_the_contract():
    names = {layer.name for layer in transformer(V, T, num_layers=1, num_heads=2, hidden_dim=16).layers}
    block = {f"block_0_{part}" for part in ("attention_norm", "attention", "mlp_norm", "mlp_expand", "mlp_project")}
    assert names >= {"token_embedding", "position_embedding", "final_norm", "logits"} | block
    names = {layer.name for layer in lstm(V, T, num_layers=2, hidden_dim=16, embedding_dim=8).layers}
    assert names >= {"token_embedding", "lstm_0", "lstm_1", "head", "logits"}


def test_the_loss_starts_near_log_v(build):
    vocab_size = 500
    model = build(vocab_size, T, hidden_dim=64)
    ids, targets = np.random.default_rng(0).integers(0, vocab_size, (2, 16, T))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(targets, logits_of(model, ids))
    assert abs(float(loss) - math.log(vocab_size)) < 0.1


def test_gpt2_initialisation():
    model = transformer(2000, 64, num_layers=8, num_heads=4, hidden_dim=128)
    stddev = {w.path: float(np.std(np.asarray(w))) for w in model.trainable_weights}
    for path, value in stddev.items():
        if path.endswith(("bias", "beta", "gamma")):
            assert value == 0
        elif "attention_output" in path or "mlp_project" in path:
            assert value == pytest.approx(0.02 / math.sqrt(16), rel=0.03), path
        else:
            assert value == pytest.approx(0.02, rel=0.03), path
    attention = model.get_layer("block_0_attention")
    query, key = (np.asarray(w) for w in (attention.query_dense.kernel, attention.key_dense.kernel))
    assert not np.allclose(query, key)


def test_a_seed_decides_the_weights(build):
    def weights(seed):
        return np.concatenate([np.asarray(w).ravel() for w in build(V, T, seed=seed).trainable_weights])

    np.testing.assert_array_equal(weights(1), weights(1))
    assert (weights(1) != weights(2)).any()
    assert (weights(2**63 - 1) != weights(2**63 - 2)).any()  # the largest


def test_building_does_not_use_python_s_global_generator(build):
    before = random.getstate()
    build(V, T)
    assert random.getstate() == before


def test_every_weight_gets_a_gradient(build):
    model, ids = build(V, T, dropout=0.0), random_ids(8)
    before = [np.asarray(w).copy() for w in model.trainable_weights]
    model.compile(keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.train_on_batch(ids, np.roll(ids, -1, axis=1))
    for weight, old in zip(model.trainable_weights, before, strict=True):
        if not weight.path.endswith("key/bias"):  # softmax does not see what is added to every score
            assert (np.asarray(weight) != old).any(), weight.path


def test_a_saved_model_loads_in_plain_keras(build, tmp_path):
    model, ids = build(V, T), random_ids(3)
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "ids.npy", ids)
    code = (
        "import sys, os, keras, numpy as np; folder = sys.argv[1]\n"
        "model = keras.models.load_model(os.path.join(folder, 'model.keras'))\n"
        "logits = model.predict_on_batch(np.load(os.path.join(folder, 'ids.npy')))\n"
        "assert not any(name.startswith('aigc_tf') for name in sys.modules)\n"
        "np.save(os.path.join(folder, 'logits.npy'), logits)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), logits_of(model, ids))


def test_mixed_precision_computes_the_head_in_the_compute_dtype_and_gives_float32(build):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = build(V, T)
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.get_layer("token_embedding").reverse_dtype == "bfloat16"
    assert model.get_layer("logits").compute_dtype == "float32"
    logits = logits_of(model, random_ids(2))
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()


def test_dropout_works_in_training_only(build):
    model, ids = build(V, T, dropout=0.5), random_ids(2)
    np.testing.assert_array_equal(logits_of(model, ids), logits_of(model, ids))
    first, second = (np.asarray(keras.ops.convert_to_numpy(model(ids, training=True))) for _ in range(2))
    assert (first != second).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "huge"}, "size must be one of tiny, small, base, got 'huge'"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
        ({"num_layers": -1}, "num_layers must be at least 1, got -1"),
        ({"dropout": 1.0}, "dropout must lie from 0 to below 1, got 1.0"),
    ],
)
def test_invalid_settings_are_refused(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(V, T, **settings)


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="hidden_dim must be a multiple of num_heads, got 30 and 4"):
        transformer(V, T, hidden_dim=30, num_heads=4)
