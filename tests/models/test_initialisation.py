import tracemalloc

import numpy as np
import pytest

import aigc_tf
from aigc_tf.models.initialisation import initialise

NAMES = pytest.mark.parametrize("name", ["transformer", "lstm"])


def corpus(seed=0):
    """Make documents in which a letter of one kind is followed by one of the next kind, whichever it is."""
    generator = np.random.default_rng(seed)
    kinds = ["春夏秋冬", "风雨雪霜", "来去归行"]
    return ["".join(generator.choice(list(kind)) for kind in kinds * 4) for _ in range(200)], kinds


def built(name, tokenizer, dim=32):
    settings = {"num_heads": 2} if name == "transformer" else {"embedding_dim": dim}
    build = {"transformer": aigc_tf.transformer, "lstm": aigc_tf.lstm}[name]
    return build(tokenizer.vocab_size, 8, num_layers=1, hidden_dim=dim, **settings)


def embeddings(model):
    return model.get_layer("token_embedding").get_weights()[0]


@NAMES
def test_tokens_with_similar_neighbours_lie_close_together(name, monkeypatch):
    monkeypatch.setattr("aigc_tf.models.initialisation._NOISE", 0.0)
    documents, kinds = corpus()
    tokenizer = aigc_tf.Tokenizer.train(documents)
    rows = embeddings(aigc_tf.initialise(built(name, tokenizer), tokenizer, documents))
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    ids = [tokenizer.encode(kind) for kind in kinds]
    within = min((rows[kind] @ rows[kind].T).min() for kind in ids)
    across = max((rows[a] @ rows[b].T).max() for a in ids for b in ids if a is not b)
    assert within > across + 0.2, (within, across)


@NAMES
def test_only_the_embedding_changes_and_keeps_its_scale(name):
    documents, _ = corpus()
    tokenizer = aigc_tf.Tokenizer.train(documents)
    model = built(name, tokenizer)
    before = model.get_weights()
    assert initialise(model, tokenizer, documents) is model
    changed = [not np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True)]
    assert changed == [v.path.startswith("token_embedding") for v in model.weights]
    seen = tokenizer.encode("春夏秋冬风雨雪霜来去归行")
    norms = np.linalg.norm(embeddings(model)[seen], axis=1)
    expected = 2 * before[changed.index(True)].std() * np.sqrt(32)
    np.testing.assert_allclose(norms, expected, rtol=0.25)
    unseen = tokenizer.PAD
    assert np.linalg.norm(embeddings(model)[unseen]) < 0.5 * expected


def test_it_depends_on_the_documents_and_the_seed_alone(monkeypatch):
    documents, _ = corpus()
    tokenizer = aigc_tf.Tokenizer.train(documents)

    def rows(documents, seed=0):
        return embeddings(initialise(built("lstm", tokenizer), tokenizer, documents, seed))

    first = rows(documents)
    np.testing.assert_array_equal(rows(documents), first)
    np.testing.assert_array_equal(rows(aigc_tf.make_store(documents, tokenizer)), first)
    assert not np.array_equal(rows(documents, seed=1), first)
    assert not np.allclose(rows(documents[:50]), first)
    # Whatever the signs of the factors, tokens lie to each other as before when the documents come in another order.
    monkeypatch.setattr("aigc_tf.models.initialisation._NOISE", 0.0)
    first, other = rows(documents), rows(documents[::-1])
    np.testing.assert_allclose(other @ other.T, first @ first.T, atol=0.05 * np.abs(first @ first.T).max())


@pytest.mark.parametrize("num_documents", [1, 2, 200])
def test_a_part_of_a_large_text_is_enough_however_it_is_divided(num_documents, monkeypatch):
    texts, kinds = corpus()
    documents = ["".join(texts[i::num_documents]) for i in range(num_documents)]
    tokenizer = aigc_tf.Tokenizer.train(documents)
    monkeypatch.setattr("aigc_tf.models.initialisation._NOISE", 0.0)
    monkeypatch.setattr("aigc_tf.models.initialisation._MAX_TOKENS", 1_000)
    rows = embeddings(initialise(built("lstm", tokenizer), tokenizer, documents))
    ids = [tokenizer.encode(kind) for kind in kinds]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True) + 1e-9
    within = np.mean([rows[kind] @ rows[kind].T for kind in ids])
    across = np.mean([rows[a] @ rows[b].T for a in ids for b in ids if a is not b])
    assert within > across + 0.3, (within, across)


def test_it_takes_few_bytes_per_token(monkeypatch):
    tokenizer = aigc_tf.Tokenizer.train(["春眠不觉晓"])
    ids = np.random.default_rng(0).integers(259, tokenizer.vocab_size, 4_000_000, np.uint16)
    monkeypatch.setattr("aigc_tf.models.initialisation._MAX_TOKENS", 1_000_000)
    model = built("lstm", tokenizer)
    tracemalloc.start()
    initialise(model, tokenizer, ids)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 70 * 1_000_000


def test_a_vocabulary_smaller_than_the_embedding_is_wide():
    tokenizer = aigc_tf.Tokenizer([])
    model = built("lstm", tokenizer, dim=300)
    assert np.isfinite(embeddings(initialise(model, tokenizer, ["春"]))).all()


def test_invalid_arguments_are_refused():
    documents, _ = corpus()
    tokenizer = aigc_tf.Tokenizer.train(documents)
    with pytest.raises(ValueError, match="at least one document, got none"):
        initialise(built("lstm", tokenizer), tokenizer, [])
    with pytest.raises(ValueError, match="vocabulary"):
        initialise(built("lstm", aigc_tf.Tokenizer([])), tokenizer, documents)
    keras = pytest.importorskip("keras")
    other = keras.Sequential([keras.Input((8,)), keras.layers.Embedding(tokenizer.vocab_size, tokenizer.vocab_size)])
    with pytest.raises(ValueError, match="token_embedding"):
        initialise(other, tokenizer, documents)
