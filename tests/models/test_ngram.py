import math
from collections import Counter

import numpy as np
import pytest
from conftest import message_of
from nltk.lm import KneserNeyInterpolated

from aigc_tf import Tokenizer, evaluate, generate, generate_batch, split, stream
from aigc_tf.models.ngram import _discounts, kneser_ney, kneser_ney_from_ids

PAD, BOS, EOS = Tokenizer.PAD, Tokenizer.BOS, Tokenizer.EOS
ORDERS = (1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def parts(documents):
    return split(documents, valid_fraction=0.3)


@pytest.fixture(scope="module", params=ORDERS)
def model(request, parts, tokenizer):
    return kneser_ney(parts[0], tokenizer, order=request.param)


def random_sequences(num_ids=5, seed=0):
    """Sequences of 3 up to `num_ids` + 2, each framed by begin and end; one is empty, and some come twice."""
    generator = np.random.default_rng(seed)
    lengths = [0, 1, 1, *generator.integers(2, 9, 12)]
    return [[BOS, *(3 + generator.integers(0, num_ids, length)).tolist(), EOS] for length in lengths]


def contexts_of(ids, order):
    return [ids[max(0, t - order + 1) : t] for t in range(1, len(ids))]


def test_every_distribution_sums_to_1_and_has_no_zeros(model, parts, tokenizer):
    seen = tokenizer.encode(parts[0][0])[:6]
    strange = tokenizer.encode("龘")
    begin = [BOS]
    for context in (
        [],
        begin,
        seen,
        begin + seen[:2],
        strange,
        strange + seen,
        seen + strange,
        [EOS],
        [PAD],
        seen[::-1],
    ):
        p = model.probabilities(context)
        assert p.dtype == np.float64
        assert p.shape == (tokenizer.vocab_size,)
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert p[[PAD, BOS]].tolist() == [0, 0]
        assert np.delete(p, [PAD, BOS]).min() > 0


def test_nats_are_those_of_the_probabilities(model, parts, tokenizer):
    for ids in tokenizer.encode_documents(["白日依山尽，", parts[1][0], "更上龘楼", ""]):
        expected = [-math.log(model.probabilities(ids[:t])[ids[t]]) for t in range(1, len(ids))]
        assert model.nats(ids).dtype == np.float64
        np.testing.assert_allclose(model.nats(ids), expected, rtol=1e-12)
        if len(ids) > 4:  # and from amidst a document
            expected = [-math.log(model.probabilities(ids[3:t])[ids[t]]) for t in range(4, len(ids))]
            np.testing.assert_allclose(model.nats(ids[3:]), expected, rtol=1e-12)
    assert model.nats([BOS]).shape == model.nats([]).shape == (0,)


def test_concatenated_documents_are_independent(model, parts, tokenizer):
    rows = list(tokenizer.encode_documents(parts[1][:9]))
    nats, begins = model.nats(np.concatenate(rows)), np.concatenate(rows)[1:] == BOS
    np.testing.assert_allclose(nats[~begins], np.concatenate([model.nats(ids) for ids in rows]), rtol=1e-12)
    assert np.isinf(nats[begins]).all()


def test_only_the_last_order_less_1_tokens_count(model, parts, tokenizer):
    (ids,) = tokenizer.encode_documents(parts[0][:1])
    for t in range(1, len(ids)):
        context = ids[max(0, t - model.order + 1) : t]
        np.testing.assert_array_equal(model.probabilities(ids[:t]), model.probabilities(context))


def test_two_documents_by_hand():
    tokenizer = Tokenizer.train(["春夏"])
    (a,), (b,) = tokenizer.encode("春"), tokenizer.encode("夏")
    model = kneser_ney(["春夏", "夏"], tokenizer, order=2)
    # Before a stands the begin, before b a and the begin, before the end b: counts of 1, 2 and 1. Too few to
    # estimate discounts from: counts of 1 give up 0.75, those of 2 give up 1.25.
    left = (0.75 + 1.25 + 0.75) / 4 / (tokenizer.vocab_size - 2)
    of_a, of_b, of_end = 0.25 / 4 + left, 0.75 / 4 + left, 0.25 / 4 + left
    assert model.probabilities([])[[a, b, EOS]] == pytest.approx([of_a, of_b, of_end])
    # Bigrams: begin a, begin b and a b once, b end twice.
    after_begin, after_b = model.probabilities([BOS]), model.probabilities([b])
    assert after_begin[[a, b]] == pytest.approx([0.25 / 2 + 1.5 / 2 * of_a, 0.25 / 2 + 1.5 / 2 * of_b])
    assert after_begin[EOS] == pytest.approx(1.5 / 2 * of_end)
    assert model.probabilities([a])[b] == pytest.approx(0.25 + 0.75 * of_b)
    assert after_b[[a, EOS]] == pytest.approx([1.25 / 2 * of_a, 0.75 / 2 + 1.25 / 2 * of_end])


def test_what_begins_a_document_keeps_its_count():
    tokenizer = Tokenizer.train(["春"])
    (a,) = tokenizer.encode("春")
    model = kneser_ney(["春"] * 4, tokenizer, order=3)
    of_a = 0.25 / 2 + 1.5 / 2 / (tokenizer.vocab_size - 2)  # begin a, a end: each has one predecessor
    assert model.probabilities([])[a] == pytest.approx(of_a)
    # Nothing stands before "begin a", and it stands four times; before "a end" stands the begin alone.
    assert model.probabilities([BOS])[a] == pytest.approx(2.5 / 4 + 1.5 / 4 * of_a)
    assert model.probabilities([a])[EOS] == pytest.approx(0.25 + 0.75 * of_a)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(3))
def test_a_slow_implementation_of_the_definition_agrees(order, seed):
    sequences, vocab_size = random_sequences(seed=seed), 9
    discounts = [(0.3 + 0.1 * k, 0.7 + 0.2 * k, 0.9 + 0.3 * k) for k in range(order)]
    occurrences = Counter(
        tuple(ids[i : i + k]) for ids in sequences for k in range(1, order + 1) for i in range(len(ids) - k + 1)
    )

    def count(gram):
        if len(gram) == order or gram[0] == BOS:
            return occurrences[gram]
        return sum(longer[1:] == gram for longer in occurrences)

    def probability(context, i):
        below = probability(context[1:], i) if context else 1 / (vocab_size - 2)
        counts = {gram: count(gram) for gram in occurrences if gram[:-1] == context and gram[-1] != BOS}
        if not counts:
            return below
        taken = {gram: discounts[len(context)][min(n, 3) - 1] for gram, n in counts.items()}
        gram = (*context, i)
        return (counts.get(gram, 0) - taken.get(gram, 0) + sum(taken.values()) * below) / sum(counts.values())

    model = kneser_ney_from_ids(np.concatenate(sequences), vocab_size, order, discounts)
    for ids in [*sequences, [BOS, 8, 3, 8, 4, 4, 4, 3, 5, EOS]]:
        expected = [
            [probability(tuple(context), i) for i in range(EOS, vocab_size)] for context in contexts_of(ids, order)
        ]
        found = [model.probabilities(context)[EOS:] for context in contexts_of(ids, order)]
        np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_nltk_gives_the_same(order):
    sequences, discount = random_sequences(), 0.75
    theirs = KneserNeyInterpolated(order, discount)
    grams = [
        tuple(str(i) for i in ids[t - k + 1 : t + 1])
        for ids in sequences
        for t in range(1, len(ids))
        for k in range(1, min(order, t + 1) + 1)
    ]
    theirs.fit([grams], [gram[-1] for gram in grams] + [str(BOS)])
    # nltk's lowest order is not interpolated, which a discount of 0 makes ours.
    ours = kneser_ney_from_ids(np.concatenate(sequences), 8, order, [(0,) * 3] + [(discount,) * 3] * (order - 1))
    compared = 0
    for ids in [*sequences, [3, 3, 3, 4, 4, 5, 6, 7, 7, 3, EOS]]:
        for t in range(order - 1, len(ids)):
            # Only full contexts: after a shorter one, which begins a document, nltk counts predecessors, of which
            # there are none.
            context = ids[t - order + 1 : t]
            for i in range(EOS, 8):
                expected = theirs.score(str(i), [str(j) for j in context])
                assert ours.probabilities(context)[i] == pytest.approx(expected, rel=1e-12)
                compared += 1
    assert compared > 300


def test_the_unigram_model_is_the_frequencies_less_a_discount(documents, tokenizer):
    p = kneser_ney(documents, tokenizer, order=1).probabilities([])
    counts = Counter(i for ids in tokenizer.encode_documents(documents) for i in ids[1:].tolist())
    assert min(counts.values()) > 3  # each gives up 1.5, as no counts are small enough to estimate a discount from
    left = 1.5 * len(counts) / counts.total() / (tokenizer.vocab_size - 2)
    for i in range(EOS, tokenizer.vocab_size):
        assert p[i] == pytest.approx(max(0, counts[i] - 1.5) / counts.total() + left)


def test_discounts_by_hand():
    counts = np.repeat([0, 1, 2, 3, 4, 9], [7, 10, 5, 3, 2, 4])
    # Y = 10 / (10 + 2 * 5) = 1/2
    assert _discounts(counts) == pytest.approx([1 - 2 / 2 * 5 / 10, 2 - 3 / 2 * 3 / 5, 3 - 4 / 2 * 2 / 3])


@pytest.mark.parametrize("numbers", [[7, 0, 5, 3, 2, 4], [7, 10, 5, 3, 0, 4], [0] * 6, [0, 9, 2, 9, 9, 0]])
def test_with_few_or_odd_counts_every_token_still_has_a_probability(numbers):
    discounts = _discounts(np.repeat([0, 1, 2, 3, 4, 9], numbers))
    assert all(0 < discount <= i for i, discount in enumerate(discounts, 1))


def test_more_context_predicts_better(parts, tokenizer):
    orders = (1, 2, 3, 4)  # a fifth adds nothing to clauses of five characters
    bits = [evaluate(kneser_ney(parts[0], tokenizer, order), tokenizer, parts[1])["bits_per_char"] for order in orders]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] - bits[-1] > 1


def test_evaluate_sums_the_nats(model, parts, tokenizer):
    rows = list(tokenizer.encode_documents(parts[1]))
    nats = sum(model.nats(ids).sum() for ids in rows)
    num_chars = sum(map(len, parts[1]))
    figures = evaluate(model, tokenizer, parts[1])
    assert figures["tokens"] == num_chars + len(parts[1])  # the end of each document is predicted
    assert figures["bits_per_char"] == pytest.approx(nats / math.log(2) / num_chars)
    assert figures["nats_per_token"] == pytest.approx(nats / figures["tokens"])


def test_documents_shorter_than_the_order(tokenizer):
    for documents in ([""], ["春"], ["白", "", "白日"]):
        model = kneser_ney(documents, tokenizer, order=5)
        for ids in tokenizer.encode_documents(["", "白日依山尽，黄河入海流。"]):
            assert np.isfinite(model.nats(ids)).all()
            assert model.probabilities(ids[:-1]).sum() == pytest.approx(1)


def test_predict_on_batch_gives_the_logarithms(model, parts, tokenizer):
    context = model.input_shape[1]
    assert context == max(1, model.order - 1)
    assert model.output_shape == (None, context, tokenizer.vocab_size)
    (ids,) = tokenizer.encode_documents(parts[0][:1])
    batch = np.full((3, context), PAD, np.int32)
    batch[0], batch[1], batch[2, 0] = ids[:context], ids[4 : 4 + context], ids[5]
    logits = model.predict_on_batch(batch)
    assert logits.dtype == np.float32
    assert logits.shape == (3, context, tokenizer.vocab_size)
    for row, t in [(0, context - 1), (1, context - 1), (1, 0), (2, 0)]:
        expected = model.probabilities(batch[row, : t + 1])
        np.testing.assert_allclose(np.exp(logits[row, t]), expected, rtol=1e-5)
    assert np.isneginf(logits[..., [PAD, BOS]]).all()


def test_it_writes(model, tokenizer):
    text = generate(model, tokenizer, "白日", max_new_tokens=300, temperature=1.0, top_p=None, seed=1)
    assert text.startswith("白日")
    assert text == generate(model, tokenizer, "白日", max_new_tokens=300, temperature=1.0, top_p=None, seed=1)
    assert text == "".join(stream(model, tokenizer, "白日", max_new_tokens=300, temperature=1.0, top_p=None, seed=1))
    texts = generate_batch(model, tokenizer, ["", "白日", ""], max_new_tokens=300, seed=0)
    assert texts[1] == generate(model, tokenizer, "白日", max_new_tokens=300, seed=1)
    assert max(map(len, texts)) < 300  # all came to an end
    assert texts[0] != texts[2]


def test_it_writes_what_was_always_written(tokenizer):
    model = kneser_ney(["白日依山尽，黄河入海流。"] * 3, tokenizer)
    assert generate(model, tokenizer, temperature=0) == "白日依山尽，黄河入海流。"
    assert generate(model, tokenizer, "山", temperature=0) == "山尽，黄河入海流。"


def test_invalid_arguments_are_refused(parts, tokenizer):
    assert "order must be at least 1, got 0" in message_of(ValueError, kneser_ney, parts[0], tokenizer, order=0)
    assert "at least one document" in message_of(ValueError, kneser_ney, [], tokenizer)
    model = kneser_ney(parts[0], tokenizer, order=3)
    other = Tokenizer.train(["春"])
    assert f"got {tokenizer.vocab_size} and {other.vocab_size}" in message_of(
        ValueError, evaluate, model, other, ["春"]
    )
    assert "same vocabulary size" in message_of(ValueError, generate, model, other)
    assert "at least one document that is not empty, got none" in message_of(ValueError, evaluate, model, tokenizer, [])
    for ids in ([BOS, tokenizer.vocab_size], [BOS, -1]):
        for function in (model.nats, model.probabilities):
            assert f"run from 0 to {tokenizer.vocab_size - 1}" in message_of(ValueError, function, ids)
