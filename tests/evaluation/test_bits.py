import math

import numpy as np
import pytest

from aigc_tf import Tokenizer, baselines, evaluate
from aigc_tf.evaluation.bits import _windows, batch_rows, evaluate_with_scorer, make_scorer, window_batches
from aigc_tf.models.ngram import kneser_ney
from aigc_tf.runtime.backend import keras


def uniform_model(vocab_size, context):
    """Logits of zero, whatever the ids."""
    ids = keras.Input((context,), dtype="int32")
    return keras.Model(ids, keras.layers.Embedding(vocab_size, vocab_size, embeddings_initializer="zeros")(ids))


def bigram_model(vocab_size, context, seed=0):
    """Random logits that depend on the current token alone, so that windows cannot change them."""
    ids = keras.Input((context,), dtype="int32")
    embedding = keras.layers.Embedding(vocab_size, vocab_size)
    model = keras.Model(ids, embedding(ids))
    embedding.embeddings.assign(np.random.default_rng(seed).normal(size=(vocab_size, vocab_size)))
    return model


def test_a_uniform_model_needs_log2_v_bits_a_token(documents, tokenizer):
    figures = evaluate(uniform_model(tokenizer.vocab_size, 16), tokenizer, documents)
    num_chars = sum(map(len, documents))
    num_tokens = num_chars + len(documents)  # each character is a token, and each document ends
    assert figures["tokens"] == num_tokens
    assert figures["chars"] == num_chars
    assert figures["documents"] == len(documents)
    assert figures["tokens_per_char"] == pytest.approx(num_tokens / num_chars)
    assert figures["nats_per_token"] == pytest.approx(math.log(tokenizer.vocab_size))
    assert figures["perplexity"] == pytest.approx(tokenizer.vocab_size)
    assert figures["bits_per_char"] == pytest.approx(math.log2(tokenizer.vocab_size) * num_tokens / num_chars)
    assert figures["bits_per_char"] == pytest.approx(baselines(tokenizer, documents, documents)["uniform"], rel=1e-6)


def test_two_documents_by_hand():
    tokenizer = Tokenizer.train(["春夏"])
    model = bigram_model(tokenizer.vocab_size, 8)
    table = np.asarray(keras.ops.convert_to_numpy(model.weights[0]), np.float64)
    log_p = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    (a,), (b,) = tokenizer.encode("春"), tokenizer.encode("夏")
    begin, end = tokenizer.BOS, tokenizer.EOS
    by_hand = -(log_p[begin, a] + log_p[a, b] + log_p[b, end] + log_p[begin, b] + log_p[b, end])
    figures = evaluate(model, tokenizer, ["春夏", "夏"])
    assert figures["nats_per_token"] == pytest.approx(by_hand / 5, rel=1e-5)
    assert figures["bits_per_char"] == pytest.approx(by_hand / math.log(2) / 3, rel=1e-5)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 30, 100])
@pytest.mark.parametrize("context", [1, 2, 8])
def test_each_token_counts_once_with_half_a_context_before_it(length, context):
    counted = np.zeros(length + 1, int)
    for start, counted_from in _windows(np.arange(length + 1), context):
        end = min(start + context, length)
        counted[counted_from + 1 : end + 1] += 1
        assert start == 0 or counted_from - start >= context // 2
        assert start == 0 or start + context <= length
    assert (counted[1:] == 1).all()


def test_windows_lose_nothing(documents, tokenizer):
    text = ["\n".join(documents)]
    whole = evaluate(bigram_model(tokenizer.vocab_size, 1000), tokenizer, text)
    for context in (1, 2, 7, 64):
        cut = evaluate(bigram_model(tokenizer.vocab_size, context), tokenizer, text)
        assert cut["tokens"] == whole["tokens"]
        assert cut["nats_per_token"] == pytest.approx(whole["nats_per_token"], rel=1e-5)


def test_a_batch_has_few_windows_where_their_logits_are_many():
    assert batch_rows(8, 300) == 64
    for context, vocab_size in ((128, 6000), (1024, 6000), (1024, 50_000)):
        bytes_per_row = 4 * context * vocab_size
        rows = batch_rows(context, vocab_size)
        assert rows == 1 or rows * bytes_per_row <= 2**25 < (rows + 1) * bytes_per_row


def test_progress_is_the_number_of_batches_done(documents, tokenizer):
    batches = list(window_batches(tokenizer, documents[:5], 4, batch_size=3))
    done = []
    evaluate_with_scorer(make_scorer(uniform_model(tokenizer.vocab_size, 4)), batches, documents[:5], done.append)
    assert done == list(range(len(batches)))


def test_documents_are_independent(build, documents, tokenizer):
    model = build(tokenizer.vocab_size, 40)
    alone = [evaluate(model, tokenizer, [document]) for document in documents[:5]]
    together = evaluate(model, tokenizer, documents[:5])
    nats = sum(figures["nats_per_token"] * figures["tokens"] for figures in alone)
    assert together["nats_per_token"] == pytest.approx(nats / together["tokens"], rel=1e-5)
    assert evaluate(model, tokenizer, documents[4::-1])["bits_per_char"] == pytest.approx(together["bits_per_char"])


def test_bytes_count_as_part_of_their_character():
    tokenizer = Tokenizer.train(["春"])
    figures = evaluate(uniform_model(tokenizer.vocab_size, 8), tokenizer, ["龘"])
    assert figures["tokens_per_char"] == 4  # three bytes and the end
    assert figures["bits_per_char"] == pytest.approx(4 * math.log2(tokenizer.vocab_size))


def test_an_ngram_model_gets_the_figures_of_a_keras_model(documents, tokenizer):
    of_ngram = evaluate(kneser_ney(documents, tokenizer, order=2), tokenizer, documents)
    of_keras = evaluate(uniform_model(tokenizer.vocab_size, 16), tokenizer, documents)
    assert list(of_ngram) == list(of_keras)
    for name in ("tokens", "chars", "documents", "tokens_per_char"):
        assert of_ngram[name] == of_keras[name]
    assert all(type(value) is float for value in of_ngram.values())


def test_a_keras_model_with_the_ngrams_probabilities_gets_their_figures(documents, tokenizer):
    ngram = kneser_ney(documents[:40], tokenizer, order=2)
    model = bigram_model(tokenizer.vocab_size, 8)
    log_p = ngram.predict_on_batch(np.arange(tokenizer.vocab_size)[:, None])[:, 0]
    model.set_weights([np.maximum(log_p, -1e9)])
    expected = evaluate(model, tokenizer, documents[40:])
    assert evaluate(ngram, tokenizer, documents[40:]) == pytest.approx(expected, rel=1e-5)


def test_one_evaluation_after_the_other_logs_no_warning(build, documents, tokenizer, tensorflow_log):
    model = build(tokenizer.vocab_size, 8)
    for n in range(1, 9):
        evaluate(model, tokenizer, documents[:n])
    assert tensorflow_log.messages == []


def test_invalid_arguments_are_refused(tokenizer):
    model = uniform_model(tokenizer.vocab_size, 4)
    with pytest.raises(ValueError, match="at least one document that is not empty, got none"):
        evaluate(model, tokenizer, [])
    with pytest.raises(ValueError, match="at least one document that is not empty, got none"):
        evaluate(model, tokenizer, [""])
    with pytest.raises(ValueError, match="at least one document that is not empty, got none"):
        evaluate(kneser_ney(["春"], tokenizer), tokenizer, [])
    with pytest.raises(ValueError, match="same vocabulary size, got 5 and"):
        evaluate(uniform_model(5, 4), tokenizer, ["春"])
