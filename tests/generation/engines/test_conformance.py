"""What all engines have in common: the logits of the graph, the quality of the model, the same tokens for a seed."""

import functools
import itertools

import numpy as np
import pytest
from conftest import spread

import aigc_tf
from aigc_tf import generate, generate_batch, stream
from aigc_tf.generation import writer
from aigc_tf.generation.batch import RandomNumbers, TextBatch
from aigc_tf.generation.engines import device_loop, device_steps
from aigc_tf.generation.engines.engine import make_engine
from aigc_tf.generation.engines.weight_cache import cached_weights
from aigc_tf.generation.processors import log_softmax
from aigc_tf.generation.sampler import Sampler
from aigc_tf.generation.settings import check_sampling
from aigc_tf.runtime.backend import keras

T, V = 12, 301
LENGTHS = [5, 1, 9]
TOLERANCE = {"numpy": 1e-4, "numba": 8e-3, "device": 1e-4, "model": 1e-5}  # of logits; numba rounds weights to 16 bits
ENGINES = list(TOLERANCE)


@pytest.fixture
def uncompiled(monkeypatch):
    """Run the operations of the device loop one by one: for a few steps, faster than compiling them."""
    monkeypatch.setattr(device_loop, "xla_jit", functools.partial)


def engine_reader(model, num_rows, engine):
    """A function that reads the new tokens of each row (B lists), and returns the logits of the rows that have any."""
    read, num_read = make_engine(model, num_rows, engine).read, [0] * num_rows

    def read_new(new):
        tokens = [(row, num_read[row] + i, token) for row, ids in enumerate(new) for i, token in enumerate(ids)]
        num_read[:] = [n + len(ids) for n, ids in zip(num_read, new, strict=True)]
        return read(*np.array(tokens, np.int64).T.copy())

    return read_new


def device_reader(model, num_rows):
    """Do the same with the functions of the device loop: first whole texts, aligned at the right, then columns."""
    weights = cached_weights(model)
    sampler = Sampler(aigc_tf.Tokenizer([]), check_sampling())
    cache = device_loop._first_state(weights, sampler, np.zeros((num_rows, T), np.int32), 0, "float32")["cache"]
    weights, column, starts = device_loop._weights_on_device(weights, "float32"), 0, np.zeros(num_rows, np.int32)

    def read_new(new):
        nonlocal cache, column, starts
        length = max(map(len, new))
        if column == 0:
            starts = np.array([length - len(ids) for ids in new], np.int32)
        column += length
        ids = np.array([[0] * (length - len(ids)) + ids for ids in new], np.int32)
        logits, cache = device_steps.read_columns(
            weights, cache, *map(keras.ops.convert_to_tensor, (ids, starts)), column
        )
        return keras.ops.convert_to_numpy(logits)[[row for row, ids in enumerate(new) if ids]]

    return read_new


def make_reader(model, num_rows, engine):
    return device_reader(model, num_rows) if engine == "device" else engine_reader(model, num_rows, engine)


@pytest.fixture(scope="module", params=["plain", "dropout", "other"])
def model(build, request):
    other = {"tie_embeddings": False} if build.architecture == "lstm" else {"num_heads": 4}
    return spread(build(V, T, **{"plain": {}, "dropout": {"dropout": 0.1}, "other": other}[request.param]))


@pytest.mark.parametrize("engine", ENGINES)
def test_logits_are_those_of_the_graph(model, engine):
    texts = np.random.default_rng(1).integers(0, V, (len(LENGTHS), T))
    expected = np.array(model.predict_on_batch(texts))
    assert expected.std() > 0.3
    read = make_reader(model, len(LENGTHS), engine)
    # Prompts of three lengths in one call, then a token per call, while rows end one by one.
    logits = read([texts[row, :length].tolist() for row, length in enumerate(LENGTHS)])
    np.testing.assert_allclose(logits, expected[range(3), np.array(LENGTHS) - 1], atol=TOLERANCE[engine])
    for step in range(T - min(LENGTHS)):
        positions = {row: length + step for row, length in enumerate(LENGTHS) if length + step < T}
        logits = read([[int(texts[row, positions[row]])] if row in positions else [] for row in range(len(LENGTHS))])
        assert logits.shape == (len(positions), V)
        rows, positions = list(positions), list(positions.values())
        np.testing.assert_allclose(logits, expected[rows, positions], atol=TOLERANCE[engine])


CONTEXT = 16


@pytest.fixture(scope="module")
def trained(build, tokenizer, documents):
    model = build(tokenizer.vocab_size, CONTEXT)
    data = aigc_tf.make_dataset(documents[:40], tokenizer, CONTEXT, 4, seed=0)
    aigc_tf.train(model, data, tokenizer, documents[:4], steps=20, progress=False)
    return model


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trained_model_predicts_as_well_by_each_engine(trained, tokenizer, documents, engine):
    texts = [text for text in documents[:40] if len(text) < CONTEXT - 2]
    nats = 0.0
    for text in texts:
        read = make_reader(trained, 1, engine)
        for i, following in itertools.pairwise([tokenizer.BOS, *tokenizer.encode(text), tokenizer.EOS]):
            nats -= log_softmax(read([[i]]))[0, following]
    expected = aigc_tf.evaluate(trained, tokenizer, texts)["bits_per_char"]
    assert nats / np.log(2) / sum(map(len, texts)) == pytest.approx(expected, abs=1e-3)


@pytest.fixture(scope="module")
def writing_model(build, tokenizer):
    return spread(build(tokenizer.vocab_size, T))


@pytest.mark.parametrize("engine", ["numba", "numpy", "device"])
def test_log_probabilities_beyond_the_context_are_those_of_the_graph(build, writing_model, tokenizer, engine):
    num_tokens, nats, finished = 4 * T, np.zeros(1), np.zeros(1, bool)
    sampler = Sampler(tokenizer, check_sampling(temperature=1.0, top_p=None, logit_bias={tokenizer.EOS: -np.inf}))
    rng, prompts = RandomNumbers([0]), [[tokenizer.BOS]]
    if engine == "device":
        args = cached_weights(writing_model), sampler, prompts, rng, num_tokens, finished
        written = device_loop.write_on_device(*args, log_probabilities=nats)
    else:
        texts = TextBatch(make_engine(writing_model, 1, engine), prompts)
        written = writer.write_steps(texts, sampler, rng, num_tokens, finished, nats)
    ids = np.array([tokenizer.BOS, *np.concatenate(list(written))])
    assert len(ids) == num_tokens + 1

    # By the plain graph, window by window; an LSTM carries its state along, as if its context were longer.
    longer = build(tokenizer.vocab_size, T if build.architecture == "transformer" else num_tokens)
    longer.set_weights(writing_model.get_weights())
    start, windows, lasts = 0, [], []
    for end in range(1, num_tokens + 1):
        if end - start > longer.input_shape[1]:
            start = end - T // 2
        windows.append(np.resize(ids[start:end], longer.input_shape[1]))
        lasts.append(end - start - 1)
    logits = longer.predict_on_batch(np.array(windows))[range(num_tokens), lasts]
    expected = np.take_along_axis(log_softmax(np.array(logits)), ids[1:, None], axis=1).mean()
    assert nats[0] / num_tokens == pytest.approx(expected, abs=TOLERANCE[engine])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.usefixtures("uncompiled")
def test_each_engine_writes_the_likeliest_text(writing_model, tokenizer, engine):
    settings = {"max_new_tokens": T - 3, "temperature": 0}
    expected = generate(writing_model, tokenizer, "白日", engine="model", **settings)
    assert generate(writing_model, tokenizer, "白日", engine=engine, **settings) == expected
    assert "".join(stream(writing_model, tokenizer, "白日", engine=engine, **settings)) == expected
    assert generate_batch(writing_model, tokenizer, ["白日", "白"], engine=engine, **settings)[0] == expected


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.usefixtures("uncompiled")
def test_a_seed_repeats_the_text_alone_and_in_a_batch(writing_model, tokenizer, engine):
    settings = {"max_new_tokens": 9, "temperature": 1.5, "top_p": None, "engine": engine}
    texts = generate_batch(writing_model, tokenizer, ["白日", "", "白日"], seed=3, **settings)
    assert texts == generate_batch(writing_model, tokenizer, ["白日", "", "白日"], seed=3, **settings)
    assert texts == [
        generate(writing_model, tokenizer, p, seed=3 + i, **settings) for i, p in enumerate(["白日", "", "白日"])
    ]
    assert texts[0] != texts[2]


# Settings, and those without the one in question, which must make a difference.
SETTINGS = {
    "temperature 0": ({"temperature": 0}, {}),
    "temperature": ({"temperature": 2.0}, {}),
    "top_k": ({"top_k": 5}, {}),
    "top_p": ({"top_p": 0.5}, {}),
    "min_p": ({"min_p": 0.2}, {}),
    "typical_p": ({"typical_p": 0.5}, {}),
    "repetition_penalty": ({"repetition_penalty": 1.5}, {}),
    "presence_penalty": ({"presence_penalty": 2.0}, {}),
    "frequency_penalty": ({"frequency_penalty": 2.0}, {}),
    "no_repeat_ngram": ({"no_repeat_ngram": 1}, {}),
    "exempt": ({"no_repeat_ngram": 1, "exempt": [*"白日依山尽，"]}, {"no_repeat_ngram": 1}),
    "logit_bias": ({"logit_bias": {"日": 3.0, "山": -np.inf}}, {}),
}
ALL_SETTINGS = functools.reduce(lambda a, b: a | b[0], list(SETTINGS.values())[1:], {})
PROMPTS = ["白", "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。", ""] * 8  # the second is longer than the context


def require_the_same_tokens(model, tokenizer, settings, without):
    def ids_by(engine, settings):
        settings = {"temperature": 0.8, "top_p": None, "max_new_tokens": 9, "seed": 0, **settings}
        return [text.ids for text in generate_batch(model, tokenizer, PROMPTS, engine=engine, **settings)]

    expected = ids_by("numpy", settings)
    assert expected != ids_by("numpy", without)
    assert ids_by("device", settings) == expected
    # With weights rounded to 16 bits, a draw near a border may fall on the other side.
    same = [ids == others for ids, others in zip(ids_by("numba", settings), expected, strict=True)]
    assert np.mean(same) >= 0.8


@pytest.fixture(scope="module")
def one_writing_model(build_one, tokenizer):
    return spread(build_one(tokenizer.vocab_size, T))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.usefixtures("uncompiled")
def test_each_setting_gives_the_same_tokens_on_every_engine(one_writing_model, tokenizer, name):
    require_the_same_tokens(one_writing_model, tokenizer, *SETTINGS[name])


@pytest.mark.usefixtures("uncompiled")
def test_all_settings_together_give_the_same_tokens_on_every_engine(writing_model, tokenizer):
    require_the_same_tokens(writing_model, tokenizer, ALL_SETTINGS, {})
