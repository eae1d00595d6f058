"""Sampled softmax: it learns nearly what the full softmax learns."""

import numpy as np
import pytest
from conftest import cpu_only, message_of, spread

from aigc_tf import load, lstm, make_dataset, save, train
from aigc_tf.corpus import dataset
from aigc_tf.runtime.backend import keras
from aigc_tf.training.sampled_softmax import (
    _log_expected,
    candidate_sampler,
    default_num_candidates,
    has_tied_head,
    sampled_softmax_model,
)

T, V = 20, 298


@pytest.fixture(params=["tf.data", "without TensorFlow"])
def counts(request, monkeypatch):
    """How often tokens occur; candidates are drawn for data of both kinds."""
    if request.param == "without TensorFlow":
        monkeypatch.setattr(dataset, "tensorflow_for_data", lambda: None)
    else:
        pytest.importorskip("tensorflow")
    return np.random.default_rng(0).integers(0, 200, V) ** 2


def data_of(targets, first=0):
    """Batches of these targets (batches, B, T)."""
    rows = np.concatenate([targets[:, :, :1], targets], axis=2).reshape(-1, targets.shape[2] + 1)
    return dataset.batches_of(lambda places: rows[places], *targets.shape[1:], first, len(targets))


def sampled(draw, targets, first=0):
    return keras.tree.map_structure(np.asarray, list(draw(data_of(targets, first), first)))


def test_the_expected_count_is_how_often_a_token_is_drawn(counts):
    log_frequency = np.log((counts + 0.5) / (counts + 0.5).sum())
    expected = np.exp(_log_expected(log_frequency, 60))
    assert expected.sum() == pytest.approx(60, rel=1e-4)
    targets = np.full((500, 1, 1), counts.argmin(), np.int32)
    batches = sampled(candidate_sampler(counts, 60), targets)
    drawn = np.bincount(np.concatenate([x[1] for x, _ in batches]), minlength=V) / 500
    is_drawn = np.arange(V) != counts.argmin()
    assert abs(drawn - expected)[is_drawn].max() < 0.1
    assert np.corrcoef(drawn[is_drawn], expected[is_drawn])[0, 1] > 0.98


def test_the_mean_gradient_approximates_that_of_the_full_softmax():
    num_tokens, number, num_positions = 200, 60, 5
    generator = np.random.default_rng(0)
    counts = generator.integers(1, 200, num_tokens) ** 2
    frequency = counts / counts.sum()
    hidden, embeddings = generator.normal(size=(num_positions, 16)) / 2, generator.normal(size=(num_tokens, 16))
    logits = hidden @ embeddings.T + np.log(frequency)
    targets = generator.choice(num_tokens, num_positions, p=frequency).astype(np.int32)

    def gradient(candidates, log_expected):
        odds = np.exp(logits[:, candidates] - log_expected)
        result = np.zeros_like(logits)
        result[:, candidates] = odds / odds.sum(1, keepdims=True)
        result[np.arange(num_positions), targets] -= 1
        return hidden.T @ result

    batches = sampled(candidate_sampler(counts, number), np.tile(targets, (500, 1, 1)))
    mean = np.mean([gradient(*x[1:]) for x, _ in batches], axis=0)
    uncorrected = np.mean([gradient(x[1], 0.0) for x, _ in batches], axis=0)
    true = gradient(np.arange(num_tokens), 0.0)
    error, unchecked = (np.linalg.norm(x - true) / np.linalg.norm(true) for x in (mean, uncorrected))
    assert error < 0.1
    assert unchecked > 1.2 * error  # without the correction by the probability of a candidate


def test_candidates_depend_on_the_seed_and_the_batch_number(counts):
    targets = np.zeros((3, 1, 1), np.int32)

    def drawn(seed, first=0):
        return [x[1].tolist() for x, _ in sampled(candidate_sampler(counts, 60, seed), targets, first)]

    assert drawn(1) == drawn(1)
    assert drawn(1)[1:] == drawn(1, first=1)
    assert all(a != b for a, b in zip(drawn(1), drawn(2), strict=True))
    assert drawn(-1) != drawn(1)


@pytest.mark.parametrize("wrong", [-1, -100, V])
def test_targets_outside_the_vocabulary_are_refused(counts, wrong):
    with pytest.raises(Exception, match=f"Targets must be from 0 to {V - 1}.*got {wrong}"):
        sampled(candidate_sampler(counts, 60), np.array([[[1, wrong]]], np.int32))


def test_a_loaded_model_trains_with_a_sampled_softmax_repeatedly(build, documents, tokenizer, tmp_path):
    model = build(tokenizer.vocab_size, 10, num_layers=1)
    data = make_dataset(documents, tokenizer, 10, 4, seed=0)
    for i in range(2):
        keras.backend.clear_session()  # restarts the numbers in names, as another process does
        save(tmp_path / str(i), model, tokenizer)
        model, _ = load(tmp_path / str(i))
        train(model, data, tokenizer, documents[:9], steps=2, validations=1, num_candidates=40, progress=False)


def test_candidates_include_all_targets_and_depend_on_the_batch_number(counts):
    targets = np.random.default_rng(1).integers(0, V, (6, 4, T)).astype(np.int32)
    draw = candidate_sampler(counts, 90)
    batches = sampled(draw, targets)
    for batch, ((inputs, candidates, expected), indices) in zip(targets, batches, strict=True):
        np.testing.assert_array_equal(inputs[:, 1:], batch[:, :-1])
        np.testing.assert_array_equal(candidates[indices], batch)
        assert len(set(candidates.tolist())) == 90
        assert (expected <= 0).all()
    for (x, y), (x_again, y_again) in zip(sampled(draw, targets, first=2), batches[2:], strict=True):
        for a, b in zip((*x, y), (*x_again, y_again), strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(batches[0][0][1], batches[1][0][1])


def test_candidate_logits_are_those_of_the_model(build):
    model = spread(build(V, T, dropout=0.0))
    number_of_weights = len(model.weights)
    among = sampled_softmax_model(model, 50)
    ids = np.random.default_rng(0).integers(0, V, (3, T)).astype(np.int32)
    candidates = np.random.default_rng(1).permutation(V)[:50].astype(np.int32)
    expected = np.linspace(-3, 0, 50, dtype=np.float32)
    logits = keras.ops.convert_to_numpy(among([ids, candidates, expected]))
    all_logits = keras.ops.convert_to_numpy(model(ids))
    np.testing.assert_allclose(logits, all_logits[..., candidates] - expected, rtol=1e-4, atol=1e-4)
    assert {id(weight) for weight in among.weights} == {id(weight) for weight in model.weights}
    assert len(model.weights) == number_of_weights


@pytest.mark.parametrize("settings", [{"logit_soft_cap": 2.0}, {"reverse_dtype": "float16"}, {"tie_weights": False}])
def test_a_head_that_does_more_than_multiply_is_not_supported(settings):
    ids = keras.Input((T,), dtype="int32")
    plain, other = (keras.layers.ReversibleEmbedding(V, 4, **kwargs) for kwargs in ({}, settings))
    assert has_tied_head(keras.Model(ids, plain(plain(ids), reverse=True)))
    assert not has_tied_head(keras.Model(ids, other(other(ids), reverse=True)))


def test_with_all_tokens_as_candidates_the_losses_are_the_same(build, documents, tokenizer):
    losses = []
    for number in (0, tokenizer.vocab_size):
        model = build(tokenizer.vocab_size, T, num_layers=1, dropout=0.0, seed=1)
        data = make_dataset(documents, tokenizer, T, 4, seed=0)
        history = train(
            model, data, tokenizer, documents[:9], steps=10, validations=5, num_candidates=number, progress=False
        )
        losses.append([*history["loss"][:4], *history["bits_per_char"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_sampled_softmax_learns_nearly_as_well(documents, tokenizer):
    bits = []
    for number in (0, 80):
        model = lstm(tokenizer.vocab_size, T, num_layers=1, hidden_dim=32, dropout=0.0, seed=1)
        data = make_dataset(documents, tokenizer, T, 4, seed=0)
        settings = {"steps": 60, "validations": 1, "learning_rate": 1e-2, "progress": False}
        history = train(model, data, tokenizer, documents[:9], num_candidates=number, **settings)
        bits.append(history["bits_per_char"][-1])
    assert bits[1] < bits[0] + 0.1


@cpu_only
def test_the_default_is_a_sampled_softmax_for_large_vocabularies(build, tokenizer, monkeypatch):
    model = build(9000, T, num_layers=1)
    for tokens, vocab_size, number in [
        (80, 160, 80),
        (80, 159, 0),
        (80, 9000, 1125),
        (4500, 9000, 4500),
        (4501, 9000, 0),
    ]:
        assert default_num_candidates(model, tokens, vocab_size) == number
    assert default_num_candidates(lstm(9000, T, hidden_dim=16, tie_embeddings=False), 80, 9000) == 0
    with monkeypatch.context() as patched:
        patched.setattr("aigc_tf.training.sampled_softmax.num_replicas", lambda: 2)
        assert default_num_candidates(model, 80, 9000) == 0
    monkeypatch.setattr("aigc_tf.training.sampled_softmax.uses_accelerator", lambda: True)
    assert default_num_candidates(model, 80, 9000) == 0


@cpu_only
def test_a_sampled_softmax_is_shown_and_not_used_for_other_models_or_data(build, documents, tokenizer, capsys):
    settings = {"steps": 2, "validations": 1}
    data = make_dataset(documents, tokenizer, 10, 4, seed=0)
    train(build(tokenizer.vocab_size, 10, num_layers=1), data, tokenizer, documents[:9], **settings)
    assert f"a softmax over 40 of {tokenizer.vocab_size} tokens in 90% of the steps" in capsys.readouterr().out
    pytest.importorskip("tensorflow")
    mapped = data.map(lambda x, y: (x, y))
    train(build(tokenizer.vocab_size, 10, num_layers=1), mapped, tokenizer, documents[:9], **settings)
    layers = [keras.Input((10,), dtype="int32"), keras.layers.Embedding(tokenizer.vocab_size, tokenizer.vocab_size)]
    train(keras.Sequential(layers), data, tokenizer, documents[:9], **settings)
    assert "a softmax over" not in capsys.readouterr().out


def test_invalid_settings_are_refused(build, documents, tokenizer):
    model = build(tokenizer.vocab_size, T, num_layers=1)
    data = make_dataset(documents, tokenizer, T, 4, seed=0)
    valid, settings = documents[:9], {"steps": 2, "progress": False}
    for number in (79, tokenizer.vocab_size + 1):
        message = message_of(ValueError, train, model, data, tokenizer, valid, num_candidates=number, **settings)
        assert "num_candidates must be 0, or from 80, the tokens in a batch, to" in message
    pytest.importorskip("tensorflow")
    mapped = data.map(lambda x, y: (x, y))
    message = message_of(ValueError, train, model, mapped, tokenizer, valid, num_candidates=90, **settings)
    assert "train_data straight from make_dataset" in message
    untied = lstm(tokenizer.vocab_size, T, hidden_dim=16, tie_embeddings=False)
    message = message_of(ValueError, train, untied, data, tokenizer, valid, num_candidates=90, **settings)
    assert "whose head is its token embedding" in message


def test_candidates_on_several_devices_are_refused(build_one, documents, tokenizer, monkeypatch):
    monkeypatch.setattr("aigc_tf.training.train.num_replicas", lambda: 2)
    model, data = build_one(tokenizer.vocab_size, T), make_dataset(documents, tokenizer, T, 4, seed=0)
    message = message_of(ValueError, train, model, data, tokenizer, documents[:9], num_candidates=90, steps=2)
    assert "num_candidates > 0 needs one device" in message


def test_candidates_are_drawn_with_the_seed_of_the_data(build_one, documents, tokenizer, monkeypatch):
    seeds = []
    monkeypatch.setattr(
        "aigc_tf.training.loop.candidate_sampler", lambda *args: seeds.append(args[-1]) or candidate_sampler(*args)
    )
    model, data = build_one(tokenizer.vocab_size, T, num_layers=1), make_dataset(documents, tokenizer, T, 4, seed=5)
    train(model, data, tokenizer, documents[:2], steps=2, validations=1, num_candidates=90, progress=False)
    assert seeds == [5]
