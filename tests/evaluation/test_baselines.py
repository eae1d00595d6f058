"""Baselines: figures by hand, and the same from documents, slices and a store."""

import math

import pytest

from aigc_tf import Tokenizer, baselines, evaluate, make_store
from aigc_tf.corpus.store import sample_tokens
from aigc_tf.evaluation import bits
from aigc_tf.models.ngram import kneser_ney


def test_the_frequency_baseline_by_hand():
    tokenizer = Tokenizer.train(["春春夏"])
    (a,) = tokenizer.encode("春")
    total = 4 + tokenizer.vocab_size  # three characters and an end, and one for each token
    expected = -(math.log2(3 / total) + math.log2(2 / total)) / 1
    assert baselines(tokenizer, ["春春夏"], ["春"])["frequency"] == pytest.approx(expected)
    assert a != tokenizer.EOS


def test_the_ngram_baseline_is_kneser_ney(documents, tokenizer):
    bits = baselines(tokenizer, documents[:40], documents[40:])
    assert list(bits) == ["uniform", "frequency", "5-gram"]
    expected = evaluate(kneser_ney(documents[:40], tokenizer, order=5), tokenizer, documents[40:])
    assert bits["5-gram"] == pytest.approx(expected["bits_per_char"])
    assert bits["5-gram"] < bits["frequency"] < bits["uniform"]


def test_of_long_text_the_ngram_baseline_counts_slices(documents, tokenizer, monkeypatch):
    whole = baselines(tokenizer, documents[:40], documents[40:])
    num_tokens = sum(map(len, documents[:40])) + 2 * 40
    monkeypatch.setattr("aigc_tf.evaluation.baselines._MAX_TOKENS", num_tokens)
    assert baselines(tokenizer, documents[:40], documents[40:]) == whole
    monkeypatch.setattr("aigc_tf.evaluation.baselines._MAX_TOKENS", num_tokens // 2)
    half = baselines(tokenizer, documents[:40], documents[40:])
    assert whole["5-gram"] < half["5-gram"] < whole["uniform"]
    assert half["frequency"] == whole["frequency"]
    sample = sample_tokens(make_store(documents[:40], tokenizer), num_tokens // 2)  # from all over the text
    assert half["5-gram"] == baselines(tokenizer, sample, documents[40:])["5-gram"]


def test_baselines_count_in_a_store_too(documents, tokenizer, tmp_path):
    store = make_store(documents[:40], tokenizer, tmp_path / "store")
    assert baselines(tokenizer, store, documents[40:]) == baselines(tokenizer, documents[:40], documents[40:])


def test_held_out_documents_are_predicted_alike_in_rows_of_any_length(documents, tokenizer, monkeypatch):
    whole = baselines(tokenizer, documents[:40], documents[40:])
    monkeypatch.setattr(bits, "_ROW_TOKENS", 30)
    assert baselines(tokenizer, documents[:40], documents[40:]) == pytest.approx(whole, rel=1e-12)


def test_baselines_need_documents_to_count_in_and_to_predict(tokenizer):
    with pytest.raises(ValueError, match="at least one document"):
        baselines(tokenizer, ["春"], [])
    with pytest.raises(ValueError, match="not empty to predict"):
        baselines(tokenizer, ["春"], [""])
    with pytest.raises(ValueError, match="got 0 and 1"):
        baselines(tokenizer, [], ["春"])
