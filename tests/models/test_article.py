import inspect
import itertools
import random
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import message_of

import aigc_tf
from aigc_tf.models import article as article_module
from aigc_tf.models.article import RNNCell, attention, attention_scores, copy_accuracy
from aigc_tf.runtime.backend import keras

layers, ops = keras.layers, keras.ops
B, T, D, UNITS = 3, 7, 5, 4

PRINTED = """
text = "这是一个示例文本，用于演示如何使用AI大模型生成文本。"
tokenizer = Tokenizer()
tokenizer.fit_on_texts([text])
word_index = tokenizer.word_index
sequences = tokenizer.texts_to_sequences([text])
padded_sequences = pad_sequences(sequences, padding='post')
model = Sequential()
model.add(Embedding(len(word_index) + 1, 100, input_length=padded_sequences.shape[1]))
model.add(LSTM(100, return_sequences=True))
model.add(LSTM(100))
model.add(Dense(1, activation='sigmoid'))
model.compile(loss='binary_crossentropy', optimizer='adam', metrics=['accuracy'])
model.fit(padded_sequences, np.ones(padded_sequences.shape[0]), epochs=10, verbose=0)
"""


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def redraw(layer, seed=0):
    """Give every weight, the biases too, a value that matters."""
    for i, weight in enumerate(layer.weights):
        weight.assign(normal(*weight.shape, seed=seed * 100 + i))


def recurrent_model(num_layers=1, **settings):
    model = keras.Sequential([keras.Input((T, D))])
    for _ in range(num_layers):
        model.add(layers.RNN(RNNCell(UNITS, **settings), return_sequences=True))
    redraw(model)
    return model


def outputs_of(model, inputs):
    return ops.convert_to_numpy(model(inputs))


# The formula of the recurrent network


def formula(x, w, r, b, c, f, sigma):
    """f(W x_t + R sigma(W x_{t-1} + b) + c), one vector at a time; nothing comes before the first."""
    columns = [f(w.T @ x[0] + c)]
    columns += [f(w.T @ x[t] + r.T @ sigma(w.T @ x[t - 1] + b) + c) for t in range(1, len(x))]
    return np.array(columns)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("settings", "f", "sigma"),
    [
        ({}, np.tanh, sigmoid),
        ({"activation": "relu", "recurrent_activation": "tanh"}, lambda x: np.maximum(x, 0), np.tanh),
    ],
)
def test_the_cell_is_the_formula(settings, f, sigma):
    model, inputs = recurrent_model(**settings), normal(B, T, D)
    cell = model.layers[0].cell
    weights = [ops.convert_to_numpy(w).astype(np.float64) for w in (cell.W, cell.R, cell.b, cell.c)]
    expected = [formula(row, *weights, f, sigma) for row in inputs.astype(np.float64)]
    np.testing.assert_allclose(outputs_of(model, inputs), expected, atol=1e-5)


def test_w_is_one_matrix():
    cell = recurrent_model().layers[0].cell
    assert {w.name: w.shape for w in cell.weights} == {
        "W": (D, UNITS),
        "R": (UNITS, UNITS),
        "b": (UNITS,),
        "c": (UNITS,),
    }
    assert len(cell.trainable_weights) == 4


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_n_layers_see_n_steps_back(num_layers):
    model, inputs = recurrent_model(num_layers), normal(B, T, D)
    before = outputs_of(model, inputs)
    for s in range(T):
        changed = inputs.copy()
        changed[:, s] += 1
        is_changed = (outputs_of(model, changed) != before).any(axis=(0, 2))
        assert [t for t in range(T) if is_changed[t]] == list(range(s, min(s + num_layers, T - 1) + 1))


def test_every_weight_learns():
    model = recurrent_model()
    before = [w.copy() for w in model.get_weights()]
    model.compile(keras.optimizers.SGD(1.0), "mse")
    model.train_on_batch(normal(B, T, D), normal(B, T, UNITS, seed=1))
    for old, new in zip(before, model.get_weights(), strict=True):
        assert (old != new).all()


def test_a_saved_cell_loads(tmp_path):
    model, inputs = recurrent_model(activation="relu", recurrent_activation="tanh"), normal(B, T, D)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(outputs_of(loaded, inputs), outputs_of(model, inputs))


def test_keras_stacks_the_cells_in_one_layer():
    stacked = layers.RNN([RNNCell(UNITS), RNNCell(UNITS)], return_sequences=True)
    model, inputs = recurrent_model(2), normal(B, T, D)
    stacked.build(inputs.shape)
    stacked.set_weights(model.get_weights())
    np.testing.assert_allclose(outputs_of(stacked, inputs), outputs_of(model, inputs), atol=1e-6)


def test_the_cell_computes_in_mixed_precision():
    layer = layers.RNN(RNNCell(UNITS, dtype="mixed_bfloat16"), return_sequences=True, dtype="mixed_bfloat16")
    outputs = layer(normal(B, T, D))
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    assert layer.cell.W.dtype == "float32"


def test_units_must_be_positive():
    assert message_of(ValueError, RNNCell, 0) == "units must be at least 1, got 0."


# How far a layer remembers


def article(units=16, num_layers=1):
    cells = [RNNCell(units) for _ in range(num_layers)]
    return lambda: layers.RNN(cells, return_sequences=True)


@pytest.mark.parametrize(("num_layers", "distance", "expected"), [(1, 0, 1), (1, 1, 1), (1, 2, 1 / 4), (2, 2, 1)])
def test_the_formula_remembers_one_step_a_layer(num_layers, distance, expected):
    accuracy = copy_accuracy(article(num_layers=num_layers), distance, num_symbols=4, steps=100)
    assert accuracy == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("layer", [layers.SimpleRNN, layers.LSTM])
def test_keras_layers_remember_further(layer):
    assert copy_accuracy(lambda: layer(16, return_sequences=True), 2, num_symbols=4, steps=100) > 0.9


def test_a_seed_decides_the_weights_and_the_symbols():
    def simple():
        return layers.SimpleRNN(8, return_sequences=True)

    def weights(seed):
        random.random()  # what others draw changes nothing
        state = random.getstate()
        model = article_module._copy_model(simple, 0, 8, seed)
        assert random.getstate() == state
        return np.concatenate([w.ravel() for w in model.get_weights()])

    np.testing.assert_array_equal(weights(1), weights(1))
    assert (weights(1) != weights(2)).any()
    assert copy_accuracy(simple, 0, steps=2, seed=1) == copy_accuracy(simple, 0, steps=2, seed=1)


def test_with_hardly_any_training_a_layer_guesses():
    assert copy_accuracy(article(), 1, steps=1) < 0.4


def test_invalid_settings_are_refused():
    assert "distance must be at least 0, got -1" in message_of(ValueError, copy_accuracy, article(), -1)
    assert "num_symbols must be at least 2, got 1" in message_of(ValueError, copy_accuracy, article(), 1, num_symbols=1)
    assert "steps must be at least 1, got 0" in message_of(ValueError, copy_accuracy, article(), 1, steps=0)
    message = message_of(ValueError, copy_accuracy, lambda: layers.LSTM(4), 1)
    assert "each of the 17 steps" in message
    assert "return_sequences=True" in message


# The formula of attention


def attention_by_hand(query, key, value):
    logits = np.einsum("...td,...sd->...ts", query, key) / np.sqrt(query.shape[-1])
    exponentials = np.exp(logits)
    return np.einsum("...ts,...sd->...td", exponentials / exponentials.sum(axis=-1, keepdims=True), value)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_attention_is_the_formula(leading):
    query, key, value = normal(*leading, 4, 6), normal(*leading, 5, 6, seed=1), normal(*leading, 5, 3, seed=2)
    outputs = ops.convert_to_numpy(attention(query, key, value))
    assert outputs.shape == (*leading, 4, 3)
    np.testing.assert_allclose(outputs, attention_by_hand(query, key, value), atol=1e-5)


def test_the_rows_of_the_scores_sum_to_one_and_forbidden_keys_get_none():
    query, key, mask = normal(2, 3, 6, 4), normal(2, 3, 6, 4, seed=1), np.tri(6, dtype=bool)
    for dtype in ("float32", "float16"):
        scores = ops.convert_to_numpy(attention_scores(ops.cast(query, dtype), ops.cast(key, dtype), mask))
        assert scores.dtype == dtype
        np.testing.assert_allclose(scores.sum(axis=-1), 1, atol=1e-5 if dtype == "float32" else 2e-3)
        assert (scores[..., ~mask] == 0).all()
        assert (scores[..., mask] > 0).all()


def test_masked_keys_have_no_effect():
    query, key, value = normal(4, 6), normal(5, 6, seed=1), normal(5, 3, seed=2)
    mask = np.array([True, True, False, True, False])
    seen = ops.convert_to_numpy(attention(query, key[mask], value[mask]))
    np.testing.assert_allclose(ops.convert_to_numpy(attention(query, key, value, mask)), seen, atol=1e-6)


def test_a_query_without_keys_gets_zeros():
    query, mask = normal(3, 4), np.array([[True], [False], [True]])
    outputs = ops.convert_to_numpy(attention(query, query, query, mask))
    assert (outputs[1] == 0).all()
    np.testing.assert_allclose(outputs[[0, 2]], attention_by_hand(query, query, query)[[0, 2]], atol=1e-6)


def attend_with_weights_of(layer, inputs, mask=None):
    """Do what a MultiHeadAttention does to itself: project, attend with the formula, project."""

    def project(dense):  # (B, T, D) to (B, H, T, d_k)
        kernel, bias = (ops.convert_to_numpy(w) for w in (dense.kernel, dense.bias))
        return np.einsum("btd,dhk->bhtk", inputs, kernel) + bias[:, None]

    dense = layer.query_dense, layer.key_dense, layer.value_dense
    heads = ops.convert_to_numpy(attention(*map(project, dense), mask))
    kernel, bias = (ops.convert_to_numpy(w) for w in (layer.output_dense.kernel, layer.output_dense.bias))
    return np.einsum("bhtk,hkd->btd", heads, kernel) + bias


@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_that_of_keras(num_heads, causal):
    layer, inputs = layers.MultiHeadAttention(num_heads, key_dim=8), normal(B, T, D)
    layer.build(inputs.shape, inputs.shape)
    redraw(layer)
    expected = ops.convert_to_numpy(layer(inputs, inputs, use_causal_mask=causal))
    mask = np.tri(T, dtype=bool) if causal else None
    np.testing.assert_allclose(attend_with_weights_of(layer, inputs, mask), expected, rtol=1e-4, atol=1e-4)


def test_attention_is_that_of_the_model():
    model = aigc_tf.transformer(50, T, num_layers=2, num_heads=4, hidden_dim=16)
    for i in range(2):
        layer = model.get_layer(f"block_{i}_attention")
        redraw(layer, seed=i)  # as drawn for training, the scores would be all but equal
        block = keras.Model(model.input, [layer.input[0], layer.output])
        ids = np.random.default_rng(0).integers(50, size=(B, T))
        inputs, outputs = (ops.convert_to_numpy(x) for x in block(ids))
        result = attend_with_weights_of(layer, inputs, np.tri(T, dtype=bool))
        np.testing.assert_allclose(result, outputs, rtol=1e-4, atol=1e-4)


def test_attention_works_in_a_graph():
    inputs = keras.Input((None, D))
    mask = keras.Input((None, None), dtype="bool")
    model = keras.Model([inputs, mask], attention(inputs, inputs, inputs, mask))
    x, causal = normal(B, T, D), np.broadcast_to(np.tri(T, dtype=bool), (B, T, T))
    expected = ops.convert_to_numpy(attention(x, x, x, causal))
    np.testing.assert_allclose(ops.convert_to_numpy(model([x, causal])), expected, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    a, b = normal(4, 6), normal(5, 3)
    assert "same size d_k, got 6 and 3" in message_of(ValueError, attention, a, b, b)
    assert "one value for each key, got 5 and 4" in message_of(ValueError, attention, a, a, b)
    assert "broadcastable to (4, 4), got (5, 4)" in message_of(ValueError, attention, a, a, a, np.ones((5, 4), bool))
    assert "broadcastable to (4, 4), got (1, 4, 4)" in message_of(
        ValueError, attention, a, a, a, np.ones((1, 4, 4), bool)
    )
    assert "must be bool" in message_of(ValueError, attention, a, a, a, np.ones((4, 4)))


# The example


@pytest.fixture(scope="module")
def shown():
    keras.utils.set_random_seed(0)
    return article_module.example()


def test_the_example_is_the_printed_one():
    body = inspect.getsource(article_module.example).split('"""')[2]
    imported = r"keras\.preprocessing\.sequence\.|keras\.models\.|layers\.|history = "
    lines = iter(
        [
            re.sub(imported, "", line).replace("legacy_text_tokenizer()", "Tokenizer").strip()
            for line in body.splitlines()
        ]
    )
    for printed in PRINTED.strip().splitlines():
        assert printed.replace("'", '"') in lines, printed  # `in` reads on: the order counts too


def test_the_sentence_is_one_word_and_other_texts_have_none(shown):
    assert shown["word_index"] == {shown["text"].lower(): 1}
    np.testing.assert_array_equal(shown["padded_sequences"], [[1]])
    others = ["春眠不觉晓", "AI大模型", "这是一个示例文本", "生成 文本", ""]
    assert shown["tokenizer"].texts_to_sequences(others) == [[]] * len(others)


def test_the_example_says_one_whatever_it_reads(shown):
    assert shown["model"].count_params() == 2 * 100 + 2 * 4 * 100 * (100 + 100 + 1) + 100 + 1
    assert shown["model"].output_shape[1:] == (1,)  # a probability, and no vocabulary to choose from
    assert len(shown["loss"]) == 10
    assert shown["loss"] == sorted(shown["loss"], reverse=True)
    # Every sequence of up to four ids, of the two there are.
    sequences = [np.array(list(itertools.product([0, 1], repeat=length))) for length in (1, 2, 3, 4)]
    probabilities = np.concatenate([outputs_of(shown["model"], ids) for ids in sequences])
    assert probabilities.shape == (30, 1)
    assert 0.5 < probabilities.min() < probabilities.max() < 0.6


def test_with_more_training_the_answer_is_still_one(shown):
    model = keras.models.clone_model(shown["model"])
    model.set_weights(shown["model"].get_weights())
    model.compile("adam", "binary_crossentropy")
    model.fit(np.repeat(shown["padded_sequences"], 100, axis=0), np.ones(100), batch_size=1, verbose=0)
    assert outputs_of(model, np.array([[1]]))[0, 0] > 0.99
    assert outputs_of(model, np.array([[0]]))[0, 0] > 0.6  # which it never saw


def test_the_guide_names_files_that_exist():
    files = re.findall(r"[\w/]+\.py", article_module.__doc__)
    assert len(files) >= 9
    assert all((Path(aigc_tf.__file__).parent / name).exists() for name in files)
