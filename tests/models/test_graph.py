"""Which models are recognised by their graph."""

import copy
import json
import math
import warnings

import numpy as np
import pytest
from conftest import spread

import aigc_tf
from aigc_tf.generation.engines.engine import make_engine
from aigc_tf.models.graph import read_weights
from aigc_tf.runtime.backend import keras

T, V, D = 12, 301, 8
layers, ops = keras.layers, keras.ops


def config_of(model):
    return json.loads(json.dumps(model.get_config()))


def weights_of(model, config=None):
    return read_weights(config or config_of(model), lambda name: model.get_layer(name).get_weights())


def transformer(norm_first=True, act="gelu", epsilon=1e-5, approximate=True, offset=1, more=0, added=0.0, table=True,
                by_keyword=False, mask=None, causal=True, rate=None, training=None, others=1, **attention):  # fmt: skip
    """A Transformer as `models/networks.py` builds it, or one that differs."""

    def norm(name):
        return layers.LayerNormalization(epsilon=epsilon, name=name)

    ids = keras.Input((T,), dtype="int32", name="ids")
    embedding = layers.ReversibleEmbedding(V, D, name="token_embedding")
    if table:
        positions = ops.cumsum(ops.ones_like(ids), 1) - offset
        x = embedding(ids) + layers.Embedding(T + more, D, name="position_embedding")(positions)
    else:
        x = embedding(ids) + np.sin(np.arange(T * D).reshape(T, D)).astype(np.float32)
    if rate:
        x = layers.Dropout(rate, seed=0)(x, training=training)
    y = norm("block_0_attention_norm")(x) if norm_first else x
    layer = layers.MultiHeadAttention(2, 4, name="block_0_attention", **attention)
    called = {"use_causal_mask": causal, **({} if mask is None else {"attention_mask": mask})}
    y = layer(query=y, value=y, **called) if by_keyword else layer(*[y] * (1 + others), **called)
    x = x + y
    y = norm("block_0_mlp_norm")(x)
    y = layers.Dense(16, name="block_0_mlp_expand")(y)
    y = ops.gelu(y, approximate=approximate) if act == "gelu" else ops.relu(y)
    x = x + layers.Dense(D, name="block_0_mlp_project")(y)
    if added:
        x = x + added
    x = norm("final_norm")(x)
    return keras.Model(ids, layers.Identity(name="logits")(embedding(x, reverse=True)), name="transformer")


def lstm(activation="tanh", go_backwards=False, head_activation=None, tied=True, **settings):
    ids = keras.Input((T,), dtype="int32", name="ids")
    table = layers.ReversibleEmbedding(V, D, name="token_embedding")
    x = table(ids)
    settings = {"return_sequences": True, "go_backwards": go_backwards, **settings}
    x = layers.LSTM(D, activation, name="lstm_0", **settings)(x)
    x = layers.Dense(D, activation=head_activation, name="head")(x)
    if not tied:
        table = layers.ReversibleEmbedding(V, D, name="another_table")
        table.build((None, T))
    return keras.Model(ids, layers.Identity(name="logits")(table(x, reverse=True)), name="lstm")


def with_another_output():
    model = transformer()
    return keras.Model(model.inputs, [model.output, model.get_layer("final_norm").output])


def with_lora():
    model = spread(transformer())
    model.get_layer("block_0_mlp_expand").enable_lora(2)
    return model


def quantised():
    model = spread(lstm())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the layers that have nothing to quantise
        model.quantize("int8")
    return model


class Doubled(layers.Dense):
    def call(self, x):
        return 2 * super().call(x)


def with_a_layer_of_the_users():
    ids = keras.Input((T,), dtype="int32", name="ids")
    x = layers.ReversibleEmbedding(V, D, name="token_embedding")(ids)
    x = layers.LSTM(D, return_sequences=True, name="lstm_0")(x)
    Doubled.__name__ = "Dense"
    return keras.Model(ids, layers.Identity(name="logits")(Doubled(V, name="head")(x)), name="lstm")


WINDOW = np.abs(np.subtract.outer(np.arange(T), np.arange(T))) < 3
OTHERS = {
    "post-norm": lambda: transformer(norm_first=False),
    "relu": lambda: transformer(act="relu"),
    "not causal": lambda: transformer(causal=False),
    "epsilon": lambda: transformer(epsilon=1e-3),
    "exact GELU": lambda: transformer(approximate=False),
    "positions from 1": lambda: transformer(offset=0, more=1),
    "positions from -1": lambda: transformer(offset=2),
    "a position more": lambda: transformer(more=1),
    "a local mask": lambda: transformer(mask=WINDOW),
    "sinusoids": lambda: transformer(table=False),
    "by keywords": lambda: transformer(by_keyword=True),
    "a constant added": lambda: transformer(added=1.0),
    "dropout that never ends": lambda: transformer(rate=0.5, training=True),
    "no biases": lambda: transformer(use_bias=False),
    "half the heads": lambda: transformer(value_dim=2),
    "the text as a mask": lambda: transformer(others=3),
    "two outputs": with_another_output,
    "LoRA": with_lora,
    "int8": quantised,
    "LSTM relu": lambda: lstm(activation="relu"),
    "LSTM backwards": lambda: lstm(go_backwards=True),
    "LSTM stateful": lambda: lstm(recurrent_activation="hard_sigmoid"),
    "LSTM head": lambda: lstm(head_activation="tanh"),
    "LSTM with two tables": lambda: lstm(tied=False),
    "a layer of the user's": with_a_layer_of_the_users,
    "sequential": lambda: keras.Sequential([keras.Input((T,), dtype="int32"), layers.Embedding(V, V)]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_differs_in_one_setting_is_not_recognised(name):
    assert weights_of(OTHERS[name]()) is None


@pytest.mark.parametrize("build", [transformer, lstm])
def test_the_weights_that_each_token_is_multiplied_with_are_counted(build):
    model = build()
    others = ("position_embedding", "final_norm") if build is transformer else ("bias",)
    used = [weight.shape for weight in model.weights if not any(name in weight.path for name in others)]
    assert weights_of(model).num_parameters == sum(map(math.prod, used))


def test_settings_of_training_make_no_difference():
    for model in (transformer(), transformer(rate=0.5), transformer(others=2, dropout=0.1), lstm(), lstm(unroll=True)):
        assert weights_of(model) is not None


def test_a_graph_that_is_not_recognised_is_computed_by_keras():
    texts = np.random.default_rng(1).integers(0, V, (1, T))
    for name in ("a local mask", "a constant added"):
        model = spread(OTHERS[name]())
        decoder = make_engine(model, 1, "numba")
        assert decoder.num_positions is None
        logits = decoder.read(np.zeros(T, np.int64), np.arange(T), texts[0])
        np.testing.assert_allclose(logits[0], np.array(model.predict_on_batch(texts))[0, -1], atol=1e-6)


MODELS = {
    "transformer": lambda: aigc_tf.transformer(V, T, num_layers=2, num_heads=2, hidden_dim=D),
    "lstm": lambda: aigc_tf.lstm(V, T, num_layers=2, hidden_dim=D),
    "untied lstm": lambda: aigc_tf.lstm(V, T, num_layers=1, hidden_dim=D, tie_embeddings=False),
}
# Settings that do not affect inference, whatever their value: names, settings of training, the form of a loop, masked
# positions where nothing is masked.
IGNORED = {
    "name", "trainable", "seed", "rate", "noise_shape", "unroll", "zero_output_for_mask", "unit_forget_bias",
    *(f"{of}_{what}" for what in ("initializer", "regularizer", "constraint") for of in (
        "embeddings", "beta", "gamma", "kernel", "bias", "recurrent", "activity")),
}  # fmt: skip


def changed(value):
    if isinstance(value, bool) or value is None:
        return "something" if value is None else not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, dict):  # of a dtype
        return {**value, "class_name": "QuantizedDTypePolicy"}
    return [*value, 1] if isinstance(value, list) else "another"


def mutants(config):
    """Yield each configuration that differs in one setting of a layer, one argument or one class, and its name."""

    def mutant(i, change):
        other = copy.deepcopy(config)
        change(other["layers"][i])
        return other

    for i, layer in enumerate(config["layers"]):
        name = layer["name"]
        for key, value in layer["config"].items():
            is_rate = key in ("dropout", "recurrent_dropout")
            if key not in IGNORED and not is_rate:
                yield (
                    f"{name}.{key}",
                    mutant(i, lambda it, key=key, value=value: it["config"].update({key: changed(value)})),
                )
                if value and not key.endswith(
                    "dtype"
                ):  # of nothing else is the default of Keras, which comes where a key is missing, another
                    yield f"{name} without {key}", mutant(i, lambda it, key=key: it["config"].pop(key))
        yield f"{name}.new", mutant(i, lambda it: it["config"].update(a_setting_of_later=True))
        yield f"{name}.module", mutant(i, lambda it: it.update(module="keras_of_others.layers"))
        yield f"{name}.registered_name", mutant(i, lambda it: it.update(registered_name="mine>Dense"))
        yield f"{name}.class_name", mutant(i, lambda it: it.update(class_name="Softmax"))
        for n, node in enumerate(layer["inbound_nodes"]):
            for key, value in node["kwargs"].items():
                yield (
                    f"{name}({key})",
                    mutant(
                        i,
                        lambda it, n=n, key=key, value=value: it["inbound_nodes"][n]["kwargs"].update(
                            {key: changed(value)}
                        ),
                    ),
                )
            yield f"{name}(new)", mutant(i, lambda it, n=n: it["inbound_nodes"][n]["kwargs"].update(attention_mask=[1]))
            yield f"{name}(number)", mutant(i, lambda it, n=n: it["inbound_nodes"][n]["args"].append(1))
            yield f"{name}(fewer)", mutant(i, lambda it, n=n: it["inbound_nodes"][n]["args"].pop())


@pytest.mark.parametrize("name", MODELS)
def test_each_setting_that_affects_the_results_is_noticed(name):
    model = MODELS[name]()
    config = config_of(model)
    assert weights_of(model, config) is not None
    assert not [what for what, mutant in mutants(config) if weights_of(model, mutant) is not None]


def test_settings_that_do_not_affect_the_results_are_ignored():
    model = MODELS["transformer"]()
    config = config_of(model)
    for layer in config["layers"]:
        for key in IGNORED & layer["config"].keys() - {"name"}:
            layer["config"][key] = changed(layer["config"][key])
        for key in ("use_gate", "sliding_window", "quantization_config", "optional"):  # as Keras 3.13 wrote it
            layer["config"].pop(key, None)
    assert weights_of(model, config) is not None


def test_each_block_must_have_the_same_number_of_heads():
    model = MODELS["transformer"]()
    config = config_of(model)
    attention = next(layer for layer in config["layers"] if layer["name"] == "block_1_attention")
    attention["config"].update(num_heads=4, key_dim=2, value_dim=2)
    assert weights_of(model, config) is None


@pytest.mark.parametrize("config", [{}, [], None, {"output_layers": [], "layers": []}, {"output_layers": 1}], ids=repr)
def test_something_else_than_a_configuration_is_not_recognised(config):
    assert read_weights(config, lambda name: []) is None
