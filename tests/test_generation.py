import itertools

import numpy as np
import pytest

import aigc_tf
from aigc_tf import Tokenizer, generate, generate_batch, stream
from aigc_tf.devices import keras
from aigc_tf.sampler import Sampler, check_settings

T = 48


@pytest.fixture
def model(build, tokenizer):
    model = build(tokenizer.vocab_size, T, dropout=0.0)
    # Untrained logits are all alike: spread them, so that chance and context tell.
    for weight in model.trainable_weights:
        weight.assign(weight * 8)
    return model


def table_model(tokenizer, successors, context=T):
    """A model that surely follows each token of `successors` by the one it maps to, and others by EOS."""
    table = np.full((tokenizer.vocab_size,) * 2, -50.0, np.float32)
    table[:, tokenizer.EOS] = 0.0
    for token, successor in successors.items():
        table[token, [tokenizer.EOS, successor]] = -50.0, 0.0
    ids = keras.Input((context,), dtype="int32")
    embedding = keras.layers.Embedding(tokenizer.vocab_size, tokenizer.vocab_size)
    model = keras.Model(ids, embedding(ids))
    embedding.embeddings.assign(table)
    return model


def greedy_by_hand(model, tokenizer, prompt, max_new_tokens):
    ids = [tokenizer.BOS, *tokenizer.encode(prompt)]
    new = []
    for _ in range(max_new_tokens):
        newest = ids[-T:]
        logits = np.array(model.predict_on_batch(np.array([newest + [0] * (T - len(newest))], np.int32)))
        logits = logits[0, len(newest) - 1]
        logits[[tokenizer.PAD, tokenizer.BOS]] = -np.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.EOS:
            break
        new.append(ids[-1])
    return prompt + tokenizer.decode(new)


@pytest.mark.parametrize("prompt", ["", "白日", "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"])
def test_temperature_0_is_the_argmax_loop(model, tokenizer, prompt):
    expected = greedy_by_hand(model, tokenizer, prompt, 20)
    assert generate(model, tokenizer, prompt, max_new_tokens=20, temperature=0) == expected
    assert len(expected) > len(prompt)


def test_what_follows_the_prompt_does_not_reach_the_logits(model, tokenizer):
    # The same prompt at the left of a batch of longer ones, hence with other rows and more steps around it.
    prompts = ["白", "白日依山尽，黄河入海流。", ""]
    batch = generate_batch(model, tokenizer, prompts, max_new_tokens=15, seed=3)
    alone = [generate(model, tokenizer, p, max_new_tokens=15, seed=3 + i) for i, p in enumerate(prompts)]
    assert batch == alone


def test_a_seed_repeats_the_text_and_another_changes_it(model, tokenizer):
    settings = {"max_new_tokens": 20, "temperature": 2.0, "top_p": None}
    texts = [generate(model, tokenizer, "白日", seed=seed, **settings) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    samples = generate_batch(model, tokenizer, ["白日"] * 5, seed=1, **settings)
    assert len(set(samples)) == 5
    assert generate(model, tokenizer, **settings) != generate(model, tokenizer, **settings)


def test_top_k_1_is_greedy_and_top_p_narrows(model, tokenizer):
    greedy = generate(model, tokenizer, "白", max_new_tokens=10, temperature=0)
    assert generate(model, tokenizer, "白", max_new_tokens=10, top_k=1, top_p=None, seed=5) == greedy
    assert generate(model, tokenizer, "白", max_new_tokens=10, top_p=1e-6, seed=5) == greedy
    assert generate(model, tokenizer, "白", max_new_tokens=10, temperature=1e-4, seed=5) == greedy


def test_it_stops_at_the_end_of_the_document(tokenizer):
    a, b, c = tokenizer.encode("白日依")
    # After the end this model would begin anew.
    model = table_model(tokenizer, {tokenizer.BOS: a, a: b, b: c, tokenizer.EOS: a})
    assert generate(model, tokenizer, max_new_tokens=50) == "白日依"
    assert generate(model, tokenizer, max_new_tokens=2) == "白日"
    assert generate(model, tokenizer, max_new_tokens=0) == ""
    assert generate_batch(model, tokenizer, ["", "日", "山"], max_new_tokens=9) == ["白日依", "日依", "山"]
    assert generate_batch(model, tokenizer, []) == []


def test_the_newest_tokens_are_kept(tokenizer):
    a, b = tokenizer.encode("白日")
    model = table_model(tokenizer, {a: b, b: a})
    prompt = "山" * 100 + "白"
    assert generate(model, tokenizer, prompt, max_new_tokens=30) == prompt + "日白" * 15


def test_padding_and_begin_are_never_written(tokenizer):
    a, b = tokenizer.encode("白日")
    model = table_model(tokenizer, {tokenizer.BOS: a, a: tokenizer.PAD, b: tokenizer.BOS})
    for settings in ({"temperature": 0}, {"seed": 1}):
        assert generate(model, tokenizer, max_new_tokens=5, top_p=None, **settings).startswith("白")
    flat = table_model(tokenizer, {i: i for i in range(tokenizer.vocab_size)})
    for layer in flat.layers[1:]:
        layer.embeddings.assign(np.zeros(layer.embeddings.shape, np.float32))
    sampler = Sampler(tokenizer, check_settings(temperature=1.0, top_p=None))
    texts = aigc_tf.generation._texts(flat, tokenizer, [""] * 400, 1, 4, compiled=False)
    for ids in aigc_tf.generation._steps(texts, sampler, [], np.random.default_rng(0).random((400, 4))):
        assert not {tokenizer.PAD, tokenizer.BOS} & set(ids.tolist())
        assert len(set(ids.tolist())) > 100


def test_a_stream_joins_to_the_text(model, tokenizer):
    settings = {"max_new_tokens": 20, "seed": 4}
    pieces = list(stream(model, tokenizer, "白日", **settings))
    assert "".join(pieces) == generate(model, tokenizer, "白日", **settings)
    assert pieces[0] == "白日"


def test_a_stream_never_shows_half_a_character():
    tokenizer = Tokenizer.train(["白"])
    ids = [tokenizer.BOS, *tokenizer.encode("龘🐉")]  # seven bytes
    model = table_model(tokenizer, dict(itertools.pairwise(ids)))
    assert list(stream(model, tokenizer, max_new_tokens=9)) == ["", "龘", "🐉"]


def test_a_prompt_of_unseen_characters_works(model, tokenizer):
    assert generate(model, tokenizer, "🐉龘", max_new_tokens=3).startswith("🐉龘")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature must be at least 0.*, got -1"),
        ({"temperature": float("nan")}, "temperature must be at least 0.*, got nan"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1.*, got 0"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1.*, got 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1.*, got 1.5"),
        ({"max_new_tokens": -1}, "max_new_tokens must be a whole number of at least 0, got -1"),
    ],
)
def test_settings_that_mean_nothing_are_said(tokenizer, settings, message):
    model = table_model(tokenizer, {})
    for function in (generate, stream):
        with pytest.raises(ValueError, match=message):
            function(model, tokenizer, "白", **settings)
    with pytest.raises(ValueError, match="same vocabulary size"):
        generate(model, Tokenizer.train(["白日依"]), "白")
