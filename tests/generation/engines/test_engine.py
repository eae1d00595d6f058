import json

import numpy as np
import pytest
from conftest import breaking_tokens, spread

from aigc_tf import generate, generate_batch, load, lstm, save
from aigc_tf.generation.engines.engine import make_engine
from aigc_tf.models.graph import read_weights
from aigc_tf.runtime.backend import keras

T, V = 12, 301
LENGTHS = [5, 1, 9]


def weights_of(model):
    config = json.loads(model.to_json())["config"]
    return read_weights(config, lambda name: model.get_layer(name).get_weights())


@pytest.fixture(params=[0.0, 0.1], ids=["", "dropout"])
def model(build, request):
    return spread(build(V, T, dropout=request.param))


@pytest.fixture
def texts():
    return np.random.default_rng(1).integers(0, V, (len(LENGTHS), T))


def tokens(texts, spans):
    """Return (rows, positions, ids) of texts[row][start:end]."""
    triples = [(row, at, texts[row][at]) for row, (start, end) in spans.items() for at in range(start, end)]
    return np.array(triples, np.int64).T.copy()


def engines(model):
    """Each engine there is for a model, and how near it comes to the model's own logits."""
    weights = weights_of(model)
    yield make_engine(weights, len(LENGTHS), "numpy").read, 1e-4
    yield make_engine(weights, len(LENGTHS), "numba").read, 8e-3
    yield make_engine(model, len(LENGTHS), "model").read, 1e-5


def test_a_row_can_be_restarted_and_read_pieces_of_any_length(model, texts):
    expected = np.array(model.predict_on_batch(texts))
    for read, tolerance in engines(model):
        read(*tokens(texts[::-1], {0: (0, T), 1: (0, T), 2: (0, T)}))
        for start, end in ((0, 2), (2, 7), (7, T)):
            logits = read(*tokens(texts, {0: (start, end), 2: (start, end)}))
            np.testing.assert_allclose(logits, expected[[0, 2], end - 1], atol=tolerance)


def greedy(model, tokenizer, prompt, max_new_tokens, window):
    """The likeliest token each time, after the tokens that `window` chooses, by the plain graph."""
    ids = [tokenizer.BOS, *tokenizer.encode(prompt)]
    first = len(ids)
    for _ in range(max_new_tokens):
        seen = window(ids)
        logits = np.array(model.predict_on_batch(np.array([seen + [0] * (model.input_shape[1] - len(seen))])))
        logits = logits[0, len(seen) - 1]
        logits[[tokenizer.PAD, tokenizer.BOS, *breaking_tokens(tokenizer, ids)]] = -np.inf
        if logits.argmax() == tokenizer.EOS:
            break
        ids.append(int(logits.argmax()))
    return prompt + "".join(tokenizer.decode_stream(ids[first:], cut=True))


class Halves:
    """The newest tokens from a start that moves on when more than T stand after it, to the newest T / 2."""

    start = 0

    def __call__(self, ids):
        if len(ids) - self.start > T:
            self.start = len(ids) - T // 2
        return ids[self.start :]


@pytest.mark.parametrize("prompt", ["", "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"])
def test_beyond_the_context(build, tokenizer, prompt):
    # In float32: where two tokens are as likely within the rounding of a weight to 16 bits, either may come.
    settings = {"max_new_tokens": 30, "temperature": 0, "engine": "numpy"}
    model = spread(build(tokenizer.vocab_size, T))
    if build.architecture == "lstm":  # its state has no limit: as if the context were longer
        longer = build(tokenizer.vocab_size, 64)
        longer.set_weights(model.get_weights())
        expected = greedy(longer, tokenizer, prompt, 30, lambda ids: ids)
    else:
        expected = greedy(model, tokenizer, prompt, 30, Halves())
    assert len(tokenizer.encode(expected)) > 2 * T
    assert generate(model, tokenizer, prompt, **settings) == expected
    assert generate_batch(model, tokenizer, ["日", prompt], **settings)[1] == expected


@pytest.mark.parametrize("error", [NotImplementedError, TypeError])
def test_a_layer_without_a_configuration_is_no_obstacle(tokenizer, error):
    class Doubled(keras.layers.Layer):
        def __init__(self, anything):
            super().__init__()

        def call(self, x):
            return 2 * x

    if error is TypeError:
        Doubled.get_config = lambda self: {"anything": object()}
    ids = keras.Input((T,), dtype="int32")
    embedded = keras.layers.Embedding(tokenizer.vocab_size, tokenizer.vocab_size)(ids)
    model = keras.Model(ids, Doubled(object())(embedded))
    with pytest.raises(error):
        model.to_json()
    assert generate(model, tokenizer, "白", max_new_tokens=3, seed=0).startswith("白")


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_a_loaded_model_of_any_precision_is_read_fast(build, tokenizer, tmp_path, precision):
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        model = build(tokenizer.vocab_size, T)
    finally:
        keras.config.set_dtype_policy(previous)
    save(tmp_path / "run", model, tokenizer)
    loaded, _ = load(tmp_path / "run")
    ours, theirs = weights_of(model), weights_of(loaded)
    assert ours is not None
    np.testing.assert_array_equal(ours.token_embedding, theirs.token_embedding)
    assert ours.token_embedding.dtype == np.float32


def test_an_untied_lstm_is_read_fast(texts):

    for settings in ({"tie_embeddings": False}, {"embedding_dim": 16}):
        model = spread(lstm(V, T, hidden_dim=16, **settings))
        engine = make_engine(model, 1, "numpy")
        assert weights_of(model) is not None
        assert engine.num_positions is None
        np.testing.assert_allclose(
            engine.read(*tokens(texts, {0: (0, T)}))[0], np.array(model.predict_on_batch(texts[:1]))[0, -1], atol=1e-4
        )


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float16"])
def test_logits_of_16_bits_are_chosen_from(tokenizer, policy):
    ids = keras.Input((T,), dtype="int32")
    model = keras.Model(ids, keras.layers.Embedding(tokenizer.vocab_size, tokenizer.vocab_size, dtype=policy)(ids))
    assert generate(model, tokenizer, "白", max_new_tokens=3, seed=0).startswith("白")
    logits = make_engine(model, 1, "model").read(*np.zeros((3, 1), np.int64))
    assert logits.dtype == np.float32
