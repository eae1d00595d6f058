"""Attention maps: the shares that the weights give, by hand."""

import math

import numpy as np
import pytest
from conftest import message_of

from aigc_tf import attention_maps, lstm, transformer
from aigc_tf.models.ngram import kneser_ney
from aigc_tf.runtime.backend import keras

T = 16


@pytest.fixture(scope="module")
def attentive(tokenizer):
    """A Transformer whose heads prefer some positions to others."""
    model = transformer(tokenizer.vocab_size, T, num_layers=2, num_heads=2, hidden_dim=16)
    generator = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(variable + 0.5 * generator.standard_normal(variable.shape, np.float32))
    return model


def scores_by_hand(model, tokenizer, text, layer):
    """softmax(Q K^T / sqrt d) with the layer's kernels, on what the layer's norm gives."""
    ids = [tokenizer.BOS, *tokenizer.encode(text)]
    window = np.zeros((1, T), np.int32)
    window[0, : len(ids)] = ids
    norm = keras.Model(model.inputs, model.get_layer(f"block_{layer}_attention_norm").output)
    x = np.asarray(norm.predict_on_batch(window), np.float64)[0, : len(ids)]
    attention = model.get_layer(f"block_{layer}_attention")
    query, key = (
        np.einsum("td,dhk->htk", x, np.asarray(dense.kernel, np.float64)) + np.asarray(dense.bias)[:, None]
        for dense in (attention.query_dense, attention.key_dense)
    )
    scores = query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1])
    scores[:, ~np.tri(len(ids), dtype=bool)] = -np.inf
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("text", ["白", "白日依山尽，黄", "白日依山尽，黄河入海流。白日依"])
def test_attention_is_that_of_the_weights(attentive, tokenizer, text, layer):
    maps = attention_maps(attentive, tokenizer, text, layer)
    n = len(text) + 1
    assert (maps.shape, maps.dtype) == ((2, n, n), np.float32)
    by_hand = scores_by_hand(attentive, tokenizer, text, layer)
    np.testing.assert_allclose(maps, by_hand, atol=1e-5)
    np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-6)
    assert (maps[:, ~np.tri(n, dtype=bool)] == 0).all()
    # The weights are such that a wrong block, head or scale would show.
    assert n == 2 or np.abs(by_hand[0] - by_hand[1]).max() > 0.05
    assert n == 2 or np.abs(by_hand - scores_by_hand(attentive, tokenizer, text, 1 - layer)).max() > 0.05


def test_attention_does_not_depend_on_dropout_or_on_what_comes_later(tokenizer):
    model = transformer(tokenizer.vocab_size, T, num_layers=1, num_heads=2, hidden_dim=16, dropout=0.5)
    maps = attention_maps(model, tokenizer, "白日依山")
    np.testing.assert_array_equal(attention_maps(model, tokenizer, "白日依山"), maps)
    np.testing.assert_allclose(attention_maps(model, tokenizer, "白日依"), maps[:, :4, :4], atol=1e-6)


def test_attention_leaves_the_model_as_it_was(attentive, tokenizer):
    nodes = [len(layer._inbound_nodes) for layer in attentive.layers]
    attention_maps(attentive, tokenizer, "白日", layer=1)
    assert [len(layer._inbound_nodes) for layer in attentive.layers] == nodes


def test_attention_under_mixed_precision(tokenizer):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = transformer(tokenizer.vocab_size, T, num_layers=1, num_heads=2, hidden_dim=16)
    finally:
        keras.config.set_dtype_policy("float32")
    maps = attention_maps(model, tokenizer, "白日依山")
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=0.02)


def test_a_model_of_another_vocabulary_is_refused(tokenizer):
    other = transformer(tokenizer.vocab_size + 1, T, num_layers=1, num_heads=1, hidden_dim=8)
    assert "same vocabulary size" in message_of(ValueError, attention_maps, other, tokenizer, "白")


def test_a_model_or_layer_without_attention_is_refused(documents, attentive, tokenizer):
    recurrent = lstm(tokenizer.vocab_size, T, num_layers=1, hidden_dim=8)
    for other, name in ((recurrent, "'lstm'"), (kneser_ney(documents, tokenizer, order=2), "'2-gram'")):
        message = message_of(ValueError, attention_maps, other, tokenizer, "白")
        assert "need a Transformer" in message
        assert name in message
    for layer in (-1, 2):
        message = message_of(ValueError, attention_maps, attentive, tokenizer, "白", layer)
        assert message == f"layer must lie from 0 to 1, got {layer}."


def test_attention_is_for_texts_that_fit(attentive, tokenizer):
    assert attention_maps(attentive, tokenizer, "白" * (T - 1)).shape == (2, T, T)
    message = message_of(ValueError, attention_maps, attentive, tokenizer, "白" * T)
    assert f"at most {T - 1} tokens, got {T}" in message
