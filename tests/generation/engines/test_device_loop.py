import dataclasses
import functools
import gc
import importlib
import itertools

import numpy as np
import pytest

import aigc_tf
from aigc_tf.generation import writer
from aigc_tf.generation.batch import RandomNumbers, TextBatch
from aigc_tf.generation.engines import device_loop, device_steps
from aigc_tf.generation.engines.engine import cached_weights, make_engine
from aigc_tf.generation.sampler import Sampler
from aigc_tf.generation.settings import check_sampling
from aigc_tf.runtime.backend import keras, tf

T, STEPS = 12, 30
BUILDERS = {
    "transformer": lambda v: aigc_tf.transformer(v, T, num_layers=2, num_heads=2, hidden_dim=16),
    "lstm": lambda v: aigc_tf.lstm(v, T, num_layers=2, hidden_dim=16),
    "untied lstm": lambda v: aigc_tf.lstm(v, T, num_layers=1, hidden_dim=16, tie_embeddings=False),
}
PROMPTS = ["白", "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。", ""]  # the second is longer than T


def make_weights(kind, tokenizer, seed=0):
    """Weights of a model whose logits are spread, so that each weight and each position tells."""
    model = BUILDERS[kind](tokenizer.vocab_size)
    generator = np.random.default_rng(seed)
    for weight in model.trainable_weights:
        weight.assign(weight * 4 + generator.normal(size=weight.shape, scale=0.1))
    return cached_weights(model)


@pytest.fixture(scope="module", params=BUILDERS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def weights(kind, tokenizer):
    return make_weights(kind, tokenizer)


# Where an LSTM without a tied head brings nothing new.
architectures = pytest.mark.parametrize("kind", ["transformer", "lstm"], indirect=True)


@pytest.fixture(scope="module")
def transformer(tokenizer):
    return make_weights("transformer", tokenizer)


@pytest.fixture
def sampler(tokenizer):
    """A function from settings to a sampler; without any, the likeliest token is taken, and no text ends."""

    def make(**settings):
        settings = settings or {"temperature": 0, "logit_bias": {tokenizer.EOS: -np.inf}}
        return Sampler(tokenizer, check_sampling(**settings))

    return make


@pytest.fixture
def uncompiled(monkeypatch):
    """Run the operations one by one, which for a few steps of a small model takes less time than to compile them."""
    monkeypatch.setattr(device_loop, "xla_jit", functools.partial)


class Calls(list):
    """Of the compiled functions: (name, static arguments, others, result), in NumPy."""

    def __init__(self, compiled):
        self.compiled = compiled

    def spied(self, function, *static):
        def call(*arguments):
            before = keras.tree.map_structure(keras.ops.convert_to_numpy, arguments)
            result = self.compiled(function, *static)(*arguments)
            after = keras.tree.map_structure(keras.ops.convert_to_numpy, result)
            self.append((function.__name__, static, before, after))
            return result

        return call


@pytest.fixture
def calls(monkeypatch):
    record = Calls(device_loop.xla_jit)
    monkeypatch.setattr(device_loop, "xla_jit", record.spied)
    return record


def encode(tokenizer, prompts=PROMPTS):
    return [[tokenizer.BOS, *tokenizer.encode(prompt)] for prompt in prompts]


def make_uniforms(rows=3, steps=STEPS):
    return np.random.default_rng(3).random((rows, steps))


class Drawn(RandomNumbers):
    """The numbers that a test names."""

    def __init__(self, uniforms):
        super().__init__(list(range(len(uniforms))))
        self._drawn = np.pad(uniforms, ((0, 0), (0, 99)))


def on_the_cpu(weights, sampler, prompts, uniforms, log_probabilities=None):
    texts = TextBatch(make_engine(weights, len(prompts), "numpy"), prompts)
    finished = np.zeros(len(prompts), bool)
    return list(writer.write_steps(texts, sampler, Drawn(uniforms), uniforms.shape[1], finished, log_probabilities))


def write(weights, sampler, prompts, uniforms, log_probabilities=None, chunk=7, **options):
    """Write with the loop; so that most tests share what is compiled, log-probabilities are always asked for."""
    if log_probabilities is None:
        log_probabilities = np.zeros(len(prompts))
    options = {"chunk": chunk, "log_probabilities": log_probabilities, **options}
    finished = np.zeros(len(prompts), bool)
    return list(
        device_loop.write_on_device(weights, sampler, prompts, Drawn(uniforms), uniforms.shape[1], finished, **options)
    )


def assert_same_texts(weights, sampler, prompts, uniforms, **options):
    expected_scores, scores = np.zeros((2, len(prompts)))
    expected = on_the_cpu(weights, sampler, prompts, uniforms, expected_scores)
    written = write(weights, sampler, prompts, uniforms, scores, **options)
    np.testing.assert_array_equal(written, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-3)
    return np.array(written)


def all_settings(tokenizer):
    return {
        "temperature": 1.4,
        "top_k": 60,
        "typical_p": 0.98,
        "top_p": 0.95,
        "min_p": 0.002,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "no_repeat_ngram": 2,
        "exempt": ["，", "日"],
        "logit_bias": {"日": 3.0, tokenizer.EOS: 4.0, "白": -np.inf},
    }


@architectures
def test_draws_with_every_setting_are_those_of_the_cpu(weights, sampler, tokenizer):
    prompts = encode(tokenizer)
    settings = all_settings(tokenizer)
    written = assert_same_texts(weights, sampler(**settings), prompts, make_uniforms())
    ends = (written == tokenizer.EOS).sum(axis=0)
    assert len(set(ends)) > 1  # some end before others


@pytest.mark.usefixtures("uncompiled")
def test_a_text_with_nothing_left_to_come_ends(transformer, sampler, tokenizer):
    only = {i: -np.inf for i in range(tokenizer.vocab_size) if i not in tokenizer.encode("白日")}
    settings = {"temperature": 0, "no_repeat_ngram": 1, "logit_bias": only}
    written = assert_same_texts(
        transformer, sampler(**settings), encode(tokenizer, ["白", "", "白日"]), make_uniforms()
    )
    assert (written == tokenizer.EOS).argmax(axis=0).tolist() == [1, 2, 0]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore:You are using a softmax over axis")  # of the plain model, which is right
def test_a_context_of_one_position(sampler, tokenizer):
    model = aigc_tf.transformer(tokenizer.vocab_size, 1, num_layers=1, num_heads=1, hidden_dim=8)
    generator = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(generator.normal(size=weight.shape))
    assert_same_texts(cached_weights(model), sampler(), encode(tokenizer), make_uniforms(steps=9))


def test_logits_are_those_of_the_cpu(weights, sampler, tokenizer, calls, monkeypatch):
    expected, read = [], TextBatch.read
    monkeypatch.setattr(TextBatch, "read", lambda *args: expected.append(read(*args)) or expected[-1])
    assert_same_texts(weights, sampler(), encode(tokenizer), make_uniforms())
    step = 0
    for _, _, (_, state, *_, num_steps), _ in [call for call in calls if call[0] == "write_tokens"]:
        np.testing.assert_allclose(state["logits"][:3], expected[step], atol=1e-4)
        step += num_steps
    assert step == len(expected) == STEPS
    assert np.std(expected) > 0.5


@pytest.mark.usefixtures("uncompiled")
def test_the_rule_of_n_grams_sees_all_of_a_text_of_any_length(transformer, sampler, tokenizer, monkeypatch):
    settings = {"temperature": 0, "no_repeat_ngram": 1, "logit_bias": {tokenizer.EOS: -np.inf}}
    monkeypatch.setattr(device_loop, "_FIRST_COLUMNS", 3)
    written = assert_same_texts(transformer, sampler(**settings), encode(tokenizer), make_uniforms())
    assert all(len(set(ids.tolist())) == STEPS for ids in written.T)
    finished = np.zeros(3, bool)
    steps = device_loop.write_on_device(
        transformer, sampler(**settings), encode(tokenizer), RandomNumbers([0, 1, 2]), 10**11, finished, chunk=7
    )
    np.testing.assert_array_equal(list(itertools.islice(steps, STEPS)), written)


def test_how_many_texts_are_written_at_once_is_a_matter_of_the_memory_in_use(transformer, tokenizer, monkeypatch):
    monkeypatch.setattr(writer, "machine_bytes", lambda: 1e6)
    monkeypatch.setattr(writer, "available_bytes", lambda: 1e9)
    at_once = [
        writer.Writer(tokenizer, engine, transformer, check_sampling(), 9, ()).texts_per_batch(1)
        for engine in ("numpy", "device")
    ]
    assert at_once[1] == pytest.approx(1000 * at_once[0], rel=0.1)


@architectures
def test_bfloat16_is_near(weights, sampler, tokenizer, uncompiled, calls):
    for dtype in ("float32", "bfloat16"):
        write(weights, sampler(), encode(tokenizer), make_uniforms(steps=1), dtype=dtype)
    exact, near = (state["logits"][:3] for name, _, (_, state, *_), _ in calls if name == "write_tokens")
    assert near.dtype == np.float32
    assert 1e-4 < np.abs(near - exact).max() < 0.2 * exact.std()


@architectures
def test_another_prompt_batch_model_or_number_compiles_nothing(kind, weights, sampler, tokenizer, monkeypatch):
    traces, read = [], device_steps.read_columns
    monkeypatch.setattr(device_steps, "read_columns", lambda *args: traces.append(args) or read(*args))
    if keras.backend.backend() == "tensorflow":  # what is not traced anew is not compiled anew, which takes longer
        graph = functools.cache(lambda f, *static: tf.function(functools.partial(f, *static), autograph=False))
        monkeypatch.setattr(device_loop, "xla_jit", graph)
    other_weights = make_weights(kind, tokenizer, seed=1)
    settings = {**all_settings(tokenizer), "top_k": 61, "typical_p": None, "no_repeat_ngram": None}

    def run(prompts, weights=weights, steps=3, **changed):
        made = sampler(**{**settings, **changed})
        return np.array(write(weights, made, encode(tokenizer, prompts), make_uniforms(len(prompts), steps)))

    first = run(["白", "白日依", "", "山"])
    once = len(traces)
    assert once > 0
    run(["白日依山尽，黄", "", "日", "床前"])  # longer, to 8 tokens
    run(["白", "白日依"] * 2, steps=2)
    run(["白", "白日依", ""])
    assert not np.array_equal(run(["白", "白日依", "", "山"], other_weights), first)
    numbers = {"temperature": 0.5, "top_p": 0.5, "min_p": 0.1, "logit_bias": {"日": 9.0}}
    assert not np.array_equal(run(["白", "白日依", "", "山"], **numbers), first)
    penalties = {"repetition_penalty": 2.0, "presence_penalty": 1.0, "frequency_penalty": 1.0, "exempt": []}
    run(["白", "白日依", "", "山"], **penalties)
    assert len(traces) == once
    run(["白", "白日依", "", "山"], top_k=62)  # it is compiled in, so this counts
    assert len(traces) > once


def test_the_first_tokens_are_shown_while_more_are_to_come(transformer, sampler, tokenizer, calls):
    steps = device_loop.write_on_device(
        transformer, sampler(), encode(tokenizer, ["白"]), Drawn(make_uniforms(1)), STEPS, np.zeros(1, bool), chunk=4
    )
    for _ in range(4):
        next(steps)
    assert [name for name, *_ in calls] == ["read_texts", "write_tokens"]
    next(steps)
    assert len(calls) == 3


def test_the_device_stops_where_all_texts_have_ended(transformer, sampler, tokenizer, calls):
    settings = {"no_repeat_ngram": 9, "logit_bias": {tokenizer.EOS: 5.0}, "top_p": None}
    written = assert_same_texts(transformer, sampler(**settings), encode(tokenizer), make_uniforms(), chunk=STEPS)
    assert 1 < len(written) < STEPS // 2
    (*_, (state, ids, _)) = calls[-1]
    assert ids.shape == (4, STEPS)
    np.testing.assert_array_equal(state["text"][:3, -len(written) :], written.T)  # nothing was appended after


def test_weights_are_copied_once_and_freed_with_the_model(sampler, tokenizer):
    weights = make_weights("lstm", tokenizer)
    for prompts in (["白"], ["日"]):
        write(weights, sampler(), encode(tokenizer, prompts), make_uniforms(1, 2))
    kept = device_loop._device_weights[weights]["float32"]
    assert device_loop._weights_on_device(weights, "float32") is kept
    gc.collect()
    before = len(device_loop._device_weights)
    del weights, kept
    gc.collect()
    assert len(device_loop._device_weights) == before - 1


def test_a_number_that_rounds_to_1_draws_a_token_that_can_come(transformer, sampler, tokenizer):
    uniforms = np.full((3, 5), np.nextafter(1.0, 0.0))
    for ids in write(transformer, sampler(temperature=1.0, top_p=None), encode(tokenizer), uniforms):
        assert not {tokenizer.PAD, tokenizer.BOS} & set(ids.tolist())


def lowered_for_accelerators(function, arguments):
    """The code that XLA would compile; on TensorFlow for a GPU only, as its usual wheel knows no TPU."""
    if keras.backend.backend() == "jax":
        exported = importlib.import_module("jax.export").export(function, platforms=["cuda", "tpu"])(*arguments)
        return exported.mlir_module()
    arguments = keras.tree.map_structure(keras.ops.convert_to_tensor, arguments)
    return function.experimental_get_compiler_ir(*arguments)(stage="hlo", platform_name="GPU")


@architectures
def test_it_can_be_compiled_for_accelerators(weights, sampler, tokenizer, calls):
    write(
        weights, sampler(**all_settings(tokenizer)), encode(tokenizer), make_uniforms()
    )  # what was compiled for draws
    assert [name for name, *_ in calls[:2]] == ["read_texts", "write_tokens"]
    for name, static, arguments, _ in calls[:2]:
        code = lowered_for_accelerators(calls.compiled(getattr(device_steps, name), *static), arguments)
        assert ("while" in code) == (name == "write_tokens" or hasattr(weights, "layers"))


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="TensorFlow does not show its compiled code")
def test_the_cache_is_written_in_place(transformer, sampler, tokenizer, calls):
    write(transformer, sampler(), encode(tokenizer), make_uniforms(steps=1))
    name, static, arguments, _ = calls[-1]
    assert name == "write_tokens"
    lines = calls.compiled(device_steps.write_tokens, *static).lower(*arguments).compile().as_text().splitlines()
    of_the_cache = [line for line in lines if f"f32[4,2,{T},8]" in line]
    assert any("dynamic-update-slice" in line for line in of_the_cache)
    assert not [line for line in of_the_cache if " copy(" in line]


@pytest.mark.usefixtures("uncompiled")
def test_logits_that_are_not_finite_are_refused(transformer, sampler, tokenizer):
    spoilt = dataclasses.replace(transformer, final_norm=np.full_like(transformer.final_norm, np.nan))
    for weights, settings in ((spoilt, {}), (spoilt, {"temperature": 1.0})):
        with pytest.raises(ValueError, match="not finite"):
            write(weights, sampler(**settings), encode(tokenizer), make_uniforms())
