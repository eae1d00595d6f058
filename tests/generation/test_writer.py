import itertools
import pickle
import tracemalloc

import numpy as np
import pytest
from conftest import message_of, only, table_model

import aigc_tf
from aigc_tf import generate, generate_batch, stream
from aigc_tf.generation import processors, writer
from aigc_tf.generation.engines.weight_cache import cached_weights

T = 48


@pytest.fixture
def model(build, tokenizer):
    model = build(tokenizer.vocab_size, T, dropout=0.0)
    # Untrained logits are all alike: spread them, so that seed and context make a difference.
    for weight in model.trainable_weights:
        weight.assign(weight * 8)
    return model


@pytest.fixture(params=["numpy", "numba"])
def engine(request):
    return request.param


def test_a_text_tells_what_is_new_and_why_it_ended(tokenizer):
    a, b, c = tokenizer.encode("白日依")
    model = table_model(tokenizer, {tokenizer.BOS: a, a: b, b: c})
    text = generate(model, tokenizer, "白", seed=0, log_probability=True)
    assert (text, text.new, text.ids, text.finish_reason) == ("白日依", "日依", (b, c, tokenizer.EOS), "stop")
    assert text.log_probability == pytest.approx(0, abs=1e-3)
    text = generate(model, tokenizer, "白", max_new_tokens=1)
    assert (text, text.new, text.ids, text.finish_reason) == ("白日", "日", (b,), "length")
    assert text.log_probability is None
    copied = pickle.loads(pickle.dumps(text))
    assert (copied, copied.new, copied.ids) == (text, text.new, text.ids)


@pytest.mark.parametrize(
    "settings", [{}, {"best_of": 3}, {"num_beams": 3}, {"forced": ["月"]}, {"presence_penalty": 1.0}, {"stop": "月"}]
)
def test_the_log_probability_is_that_of_the_plain_model(model, tokenizer, engine, settings):
    settings = {"max_new_tokens": 12, "seed": 1, "engine": engine, "logit_bias": {"山": 3.0}, **settings}
    for text in generate_batch(model, tokenizer, ["白日", ""], log_probability=True, **settings):
        ids = [tokenizer.BOS, *tokenizer.encode(text.removesuffix(text.new)), *text.ids]
        window = np.array([ids + [0] * (T - len(ids))], np.int32)
        scores = processors.log_softmax(np.array(model.predict_on_batch(window))[0])
        first = len(ids) - len(text.ids)
        expected = sum(scores[i - 1, ids[i]] for i in range(first, len(ids)))
        assert text.log_probability == pytest.approx(expected, abs=0.05)
    assert generate(model, tokenizer, "白日", **settings).log_probability is None


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"best_of": 2}, {"num_beams": 2}, {"forced": ["山"]}])
def test_a_text_ends_before_a_stop_string(tokenizer, settings):
    ids = tokenizer.encode("日依山尽，黄河")
    model = table_model(tokenizer, dict(zip([tokenizer.BOS, *ids], [*ids, ids[0]], strict=True)))
    for stop, expected in (
        ("，", "日依山尽"),
        (["尽，", "河"], "日依山"),
        (["河日", "尽，黄河"], "日依山"),
        (["白"], "日依山尽，黄河日依山尽，黄河日依山尽"),
    ):
        text = generate(model, tokenizer, "", stop=stop, max_new_tokens=18, **settings)
        assert text == expected
        assert text.finish_reason == ("length" if stop == ["白"] else "stop")


def test_a_stop_string_is_found_across_tokens_batches_and_streams(model, tokenizer, engine):
    settings = {"max_new_tokens": 40, "temperature": 1.5, "top_p": None, "engine": engine}
    settings["logit_bias"] = only(tokenizer, "白日山水明月")
    prompts, num_stopped = ["白日", "", "月"] * 4, 0
    free = generate_batch(model, tokenizer, prompts, seed=7, **settings)
    stop = ["山水", "明月日", "日"]
    stopped = generate_batch(model, tokenizer, prompts, seed=7, stop=stop, **settings)
    for i, (prompt, text, whole) in enumerate(zip(prompts, stopped, free, strict=True)):
        places = [whole.new.index(end) for end in stop if end in whole.new]
        assert text == prompt + whole.new[: min(places, default=None)]
        pieces = list(stream(model, tokenizer, prompt, seed=7 + i, stop=stop, **settings))
        assert "".join(pieces) == text
        assert generate(model, tokenizer, prompt, seed=7 + i, stop=stop, **settings) == text
        num_stopped += bool(places)
    assert num_stopped > 3


def test_a_stream_holds_back_no_more_than_may_become_a_stop_string():
    from aigc_tf.generation.writer import _cut_at_stop

    tokenizer = aigc_tf.Tokenizer([*"白山水日明", "白水", "明日", "日白"])

    def until(stop, tokens):
        """Return what is known once each token is there."""
        read, known = [], []
        ids = (read.append(piece) or tokenizer.piece_id(piece) for piece in tokens)
        for i in _cut_at_stop([end.encode() for end in stop], ids, tokenizer):
            known.append((len(read), tokenizer.decode([i])))
        return [(number, text) for number, text in known if text]

    assert until(["山水"], "白山白山山水日") == [(1, "白"), (3, "山"), (3, "白"), (5, "山")]
    assert until([], "白山") == [(1, "白"), (2, "山")]
    assert until(["水明", "明"], ["白水", "明日"]) == [(2, "白")]
    assert until(["白日"], ["日白", "日"]) == [(2, "日")]
    assert until(["山水"], "白山") == [(1, "白"), (2, "山")]


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"best_of": 2}, {"num_beams": 2}])
def test_a_stop_string_acts_in_any_tokenisation(settings):
    tokenizer = aigc_tf.Tokenizer([*"白日\ufffd"])
    white, sun, shown = map(tokenizer.piece_id, "白日\ufffd")
    for spelt in ([shown], [3 + byte for byte in "\ufffd".encode()]):
        model = table_model(tokenizer, dict(zip([tokenizer.BOS, white, *spelt], [white, *spelt, sun], strict=True)))
        text = generate(model, tokenizer, stop="\ufffd", max_new_tokens=9, **settings)
        assert (text, text.ids, text.finish_reason) == ("白", (white, *spelt), "stop")
        assert "".join(stream(model, tokenizer, stop="\ufffd", max_new_tokens=9)) == "白"
        text = generate(model, tokenizer, stop="白", max_new_tokens=9, **settings)  # with the first token
        assert (text, text.ids, text.finish_reason) == ("", (white,), "stop")


def test_very_many_tokens_may_be_asked_for(tokenizer, engine):
    a, b = tokenizer.encode("白日")
    for model in (
        table_model(tokenizer, {a: b, b: a}),
        aigc_tf.transformer(tokenizer.vocab_size, 16, num_layers=1, num_heads=1, hidden_dim=8),
    ):
        kind = {} if len(model.layers) == 2 else {"engine": engine}
        tracemalloc.start()
        pieces = stream(model, tokenizer, "白", max_new_tokens=10**11, seed=0, **kind)
        assert len(list(itertools.islice(pieces, 9))) == 9
        assert tracemalloc.get_traced_memory()[1] < 50e6
        tracemalloc.stop()
        text = generate(model, tokenizer, "白", max_new_tokens=10**11, seed=0, stop=["日", "。"], **kind)
        assert text.startswith("白")


@pytest.mark.parametrize("settings", [{}, {"best_of": 2}, {"num_beams": 2}, {"forced": ["月"]}])
def test_prompts_beyond_memory_are_written_some_at_a_time(model, tokenizer, monkeypatch, settings):
    settings = {"max_new_tokens": 12, "seed": 3, **settings}
    prompts, batches = ["白", "", "日月", "白", "山"], []
    expected = generate_batch(model, tokenizer, prompts, **settings)
    make = writer.make_engine
    monkeypatch.setattr(
        writer, "make_engine", lambda source, rows, engine: (batches.append(rows), make(source, rows, engine))[1]
    )
    monkeypatch.setattr(writer, "_bytes_per_text", lambda source: 1)
    monkeypatch.setattr(writer, "machine_bytes", lambda: 2.0)
    assert generate_batch(model, tokenizer, prompts, **settings) == expected
    assert len(batches) >= 5
    assert len(set(batches)) <= 2


@pytest.mark.parametrize("forced", [[], ["月"]])
def test_candidates_beyond_memory_are_written_some_at_a_time(model, tokenizer, monkeypatch, forced):
    # So warm that the likeliest text may be any of them.
    settings = {"max_new_tokens": 6, "seed": 3, "best_of": 7, "forced": forced, "log_probability": True}
    settings |= {"temperature": 2.0, "top_p": None}
    expected, batches, make = generate_batch(model, tokenizer, ["白", "日"], **settings), [], writer.make_engine
    monkeypatch.setattr(
        writer, "make_engine", lambda source, rows, engine: (batches.append(rows), make(source, rows, engine))[1]
    )
    rows_per_text = writer.ForcedWords.rows_per_text if forced else 1
    monkeypatch.setattr(writer, "_bytes_per_text", lambda source: 1)
    for at_once in (1, 3):
        monkeypatch.setattr(writer, "machine_bytes", lambda at_once=at_once: 2.0 * at_once * rows_per_text)
        for i, (prompt, text) in enumerate(zip(["白", "日"], expected, strict=True)):
            alone = generate(model, tokenizer, prompt, **{**settings, "seed": 3 + i})
            assert (alone, alone.ids) == (text, text.ids)
            assert alone.log_probability == pytest.approx(text.log_probability, abs=1e-3)
        assert max(batches) == at_once * rows_per_text


def test_a_text_takes_the_memory_of_its_cache_and_its_logits(build, tokenizer):
    one, three = (
        writer._bytes_per_text(cached_weights(build(tokenizer.vocab_size, T, num_layers=n, hidden_dim=64)))
        for n in (1, 3)
    )
    of_a_layer = 2 * 4 * 64 * (T if build.architecture == "transformer" else 1)  # keys and values, or two states
    assert three - one >= 2 * of_a_layer
    assert one >= of_a_layer + 4 * tokenizer.vocab_size


def test_a_search_beyond_memory_is_refused(model, tokenizer, monkeypatch):
    monkeypatch.setattr(writer, "machine_bytes", lambda: 4e9)
    message = message_of(ValueError, generate, model, tokenizer, num_beams=10**7)
    assert "A beam search keeps num_beams texts in memory: 10000000 need about" in message
    assert message.endswith("GB, and 4 GB are free. Lower num_beams.")
