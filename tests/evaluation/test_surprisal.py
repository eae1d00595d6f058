"""Surprisal: the bits of each piece are those of the evaluation."""

import math

import numpy as np
import pytest
from conftest import message_of, spread

from aigc_tf import Tokenizer, evaluate, lstm, surprisal
from aigc_tf.models.ngram import kneser_ney
from aigc_tf.runtime.backend import keras

T = 16


@pytest.fixture(scope="module")
def model(build, tokenizer):
    return spread(build(tokenizer.vocab_size, T))


def uniform_model(vocab_size, context=T):
    ids = keras.Input((context,), dtype="int32")
    return keras.Model(ids, keras.layers.Embedding(vocab_size, vocab_size, embeddings_initializer="zeros")(ids))


def total_bits(model, tokenizer, text):
    return evaluate(model, tokenizer, [text])["bits_per_char"] * len(text)


def texts():
    """One shorter than the context, one of just its length with the end, one of several windows; then bytes."""
    line = "白日依山尽，黄河入海流。"
    return [line[:5], (line + line)[: T - 1], "\n".join([line] * 5), "白日龘 <b>🐉"]


@pytest.mark.parametrize("text", texts())
def test_the_bits_are_those_of_the_evaluation(model, tokenizer, text):
    pieces = surprisal(model, tokenizer, text)
    assert [piece for piece, _ in pieces] == [*text, ""]
    assert all(type(bits) is float and bits > 0 for _, bits in pieces)
    assert sum(bits for _, bits in pieces) == pytest.approx(total_bits(model, tokenizer, text), abs=1e-4, rel=0)


@pytest.mark.parametrize("text", texts())
def test_the_bits_of_an_ngram_are_those_of_the_evaluation(documents, tokenizer, text):
    ngram = kneser_ney(documents, tokenizer, order=3)
    pieces = surprisal(ngram, tokenizer, text)
    assert "".join(piece for piece, _ in pieces) == text
    assert sum(bits for _, bits in pieces) == pytest.approx(total_bits(ngram, tokenizer, text), abs=1e-4, rel=0)


def test_the_bits_of_each_token_by_hand(model, tokenizer):
    text = "白日依山"
    ids = [tokenizer.BOS, *tokenizer.encode(text), tokenizer.EOS]
    window = np.zeros((1, T), np.int32)
    window[0, : len(ids) - 1] = ids[:-1]
    logits = np.asarray(model.predict_on_batch(window)[0, : len(ids) - 1], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    by_hand = [-log_p[t, ids[t + 1]] / math.log(2) for t in range(len(ids) - 1)]
    np.testing.assert_allclose([bits for _, bits in surprisal(model, tokenizer, text)], by_hand, rtol=1e-4)


def test_later_text_changes_no_bits(model, tokenizer):
    text = "白日依山尽，黄"
    before = surprisal(model, tokenizer, text)
    for t in range(len(text)):
        after = surprisal(model, tokenizer, text[:t] + "月" + text[t + 1 :])
        assert after[:t] == before[:t]
        assert after[t] != before[t]


@pytest.mark.parametrize("length", [4, 3 * T])
def test_a_uniform_model_gives_each_token_log2_v_bits(tokenizer, length):
    pieces = surprisal(uniform_model(tokenizer.vocab_size), tokenizer, "白" * length)
    assert len(pieces) == length + 1
    assert [bits for _, bits in pieces] == pytest.approx([math.log2(tokenizer.vocab_size)] * (length + 1))


def test_the_bits_of_bytes_go_to_their_character(tokenizer):
    text = "白龘\ufffd🐉<\ud800\udc00"
    bits_per_token = math.log2(tokenizer.vocab_size)
    pieces = surprisal(uniform_model(tokenizer.vocab_size), tokenizer, text)
    assert [piece for piece, _ in pieces] == [*text, ""]
    assert [bits / bits_per_token for _, bits in pieces] == pytest.approx([1, 3, 3, 4, 1, 3, 3, 1])


def test_a_word_is_one_piece():
    tokenizer = Tokenizer.train(["我们的模型会写诗，我们的模型"], unit="word")
    text = "我们的模型，写龘诗"
    pieces = surprisal(uniform_model(tokenizer.vocab_size), tokenizer, text)
    assert [piece for piece, _ in pieces] == ["我们", "的", "模型", "，", "写", "龘", "诗", ""]
    assert sum(bits for _, bits in pieces) / math.log2(tokenizer.vocab_size) == pytest.approx(10)


def test_a_model_of_another_vocabulary_is_refused(tokenizer):
    other = lstm(tokenizer.vocab_size + 1, T, num_layers=1, hidden_dim=8)
    assert "same vocabulary size" in message_of(ValueError, surprisal, other, tokenizer, "白")
