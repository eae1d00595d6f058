import itertools

import numpy as np
import pytest
from conftest import message_of, spread, table_model

from aigc_tf import Tokenizer, generate, generate_batch
from aigc_tf.generation.batch import TextBatch
from aigc_tf.generation.beams import search_beams
from aigc_tf.generation.engines.engine import make_engine
from aigc_tf.generation.processors import log_softmax
from aigc_tf.generation.sampler import Sampler
from aigc_tf.generation.settings import check_sampling

TOKENIZER = Tokenizer(["白", "日", "依", "山", "，"])
BOS, EOS, V = TOKENIZER.BOS, TOKENIZER.EOS, TOKENIZER.vocab_size
T = 12
PROMPTS = ["", "白", "白日依，", "山日，白依白日依山，白日依"]  # the last is longer than the context


def only(text):
    """A bias that leaves nothing but the characters of a text and the end."""
    return dict.fromkeys(set(range(V)) - {EOS, *TOKENIZER.encode(text)}, -float("inf"))


@pytest.fixture(scope="module")
def model(build):
    model = spread(build(V, T, dropout=0.0))
    if build.architecture == "lstm":  # its state has no limit: for the graph, as if the context were longer
        longer = build(V, 64, dropout=0.0)
        longer.set_weights(model.get_weights())
        model.longer = longer
    return model


def search(model, prompts, num_beams, max_new_tokens, length_penalty=1.0, kind="numpy", **settings):
    """Search with one of the engines; return the texts written, and the number of steps it took."""
    if kind == "plain":
        engine = make_engine(getattr(model, "longer", model), len(prompts) * num_beams, "model")
        if not hasattr(model, "longer"):
            engine = engine._replace(num_positions=T)
    else:
        engine = make_engine(model, len(prompts) * num_beams, "numba" if kind == "compiled" else "numpy")
    ids = [[BOS, *TOKENIZER.encode(prompt)] for prompt in prompts for _ in range(num_beams)]
    texts = TextBatch(engine, ids)
    sampler = Sampler(TOKENIZER, check_sampling(**settings))
    found = search_beams(texts, sampler, num_beams, max_new_tokens, length_penalty)
    return ["".join(TOKENIZER.decode_stream(ids, cut=True)) for ids in found], texts.end - max(map(len, ids))


def log_probabilities(model, texts, bias):
    """Return the log-probabilities of the next token after texts, by the plain graph and the newest tokens."""
    if hasattr(model, "longer"):
        model, seen = model.longer, [ids for ids, _ in texts]
    else:
        seen = [ids[start:] for ids, start in texts]
    window = np.zeros((len(seen), model.input_shape[1]), np.int32)
    for row, ids in enumerate(seen):
        window[row, : len(ids)] = ids
    logits = np.array(model.predict_on_batch(window))[np.arange(len(seen)), [len(ids) - 1 for ids in seen]]
    return log_softmax(logits + bias)


def start_of(ids, start):
    return len(ids) - T // 2 if len(ids) - start > T else start


def bias_of(settings):
    return Sampler(TOKENIZER, check_sampling(**settings)).bias


def exhaustive_search(model, prompt, max_new_tokens, length_penalty, bias):
    """Score every text there is, and return the best and by how much."""
    letters = [i for i in range(V) if i != EOS and bias[i] > -np.inf]
    ids = [BOS, *TOKENIZER.encode(prompt)]
    going = [(0.0, ids, start_of(ids, 0))]
    finished = []
    for length in range(1, max_new_tokens + 1):
        after = log_probabilities(model, [(ids, start) for _, ids, start in going], bias)
        grown = []
        for (score, ids, start), row in zip(going, after, strict=True):
            finished.append(((score + row[EOS]) / length**length_penalty, ids))
            grown += [(score + row[i], [*ids, i], start_of([*ids, i], start)) for i in letters]
        going = grown
    finished += [(score / max_new_tokens**length_penalty, ids) for score, ids, _ in going]
    finished.sort(key=lambda pair: -pair[0])
    return TOKENIZER.decode(finished[0][1])[len(prompt) :], finished[0][0] - finished[1][0]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("kind", ["numpy", "compiled", "plain"])
def test_with_beams_for_all_texts_the_best_of_all_is_found(model, kind, length_penalty):
    settings = {"logit_bias": {**only("白日山"), EOS: 1.0}}
    found, _ = search(model, PROMPTS, 4**3, 3, length_penalty, kind, **settings)
    best = [exhaustive_search(model, prompt, 3, length_penalty, bias_of(settings)) for prompt in PROMPTS]
    assert min(lead for _, lead in best) > 1e-3  # or rounding might decide
    assert found == [text for text, _ in best]


def test_the_length_penalty_decides_between_short_and_long(model):
    settings = {"logit_bias": {**only("白日山"), EOS: 1.0}}
    lengths = [sum(map(len, search(model, PROMPTS, 64, 3, penalty, **settings)[0])) for penalty in (-4.0, 0.0, 6.0)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def beams_by_hand(model, prompt, num_beams, max_new_tokens, length_penalty, bias):
    """Beam search by its definition, with whole texts and the plain graph."""
    ids = [BOS, *TOKENIZER.encode(prompt)]
    beams, ended = [(0.0, ids, start_of(ids, 0))], []
    for length in range(1, max_new_tokens + 1):
        after = log_probabilities(model, [(ids, start) for _, ids, start in beams], bias)
        grown = [
            (score + row[i], [*ids, i], start_of([*ids, i], start))
            for (score, ids, start), row in zip(beams, after, strict=True)
            for i in range(V)
            if row[i] > -np.inf
        ]
        grown.sort(key=lambda beam: -beam[0])
        beams = []
        for beam in grown:
            if len(beams) == num_beams:
                break
            if beam[1][-1] == EOS:
                ended.append((beam[0] / length**length_penalty, beam[1][:-1]))
            else:
                beams.append(beam)
        ended = sorted(ended, key=lambda pair: -pair[0])[:num_beams]
        if not beams or (len(ended) == num_beams and ended[-1][0] >= beams[0][0] / length**length_penalty):
            beams = []
            break
    ended += [(score / max_new_tokens**length_penalty, ids) for score, ids, _ in beams]
    return TOKENIZER.decode(max(ended, key=lambda pair: pair[0])[1])[len(prompt) :]


@pytest.mark.parametrize("num_beams", [2, 4])
@pytest.mark.parametrize("end", [-1.0, -6.0], ids=["some end", "none end"])
def test_beyond_the_context_it_is_the_search_by_hand(model, num_beams, end):
    settings = {"logit_bias": {**only("白日依山，"), EOS: end}}
    expected = [beams_by_hand(model, prompt, num_beams, 30, 0.7, bias_of(settings)) for prompt in PROMPTS]
    assert max(map(len, expected)) > 2 * T or end == -1
    for kind in ("numpy", "plain"):
        assert search(model, PROMPTS, num_beams, 30, 0.7, kind, **settings)[0] == expected
        # Together they are what each is alone.
        assert [search(model, [prompt], num_beams, 30, 0.7, kind, **settings)[0][0] for prompt in PROMPTS] == expected


def test_one_beam_is_greedy(model):
    for bias in (-3.0, 0.0, 1.0, 2.0):
        settings = {"logit_bias": {**only("白日依山，"), EOS: bias}}
        expected = generate_batch(model, TOKENIZER, PROMPTS, max_new_tokens=20, temperature=0, **settings)
        found, _ = search(model, PROMPTS, 1, 20, kind="compiled", **settings)
        assert [prompt + text for prompt, text in zip(PROMPTS, found, strict=True)] == expected


def test_generate_takes_the_search(model):
    settings = {"logit_bias": only("白日依山，"), "max_new_tokens": 10, "length_penalty": 2.0}
    found, _ = search(model, PROMPTS, 3, 10, 2.0, "compiled", logit_bias=settings["logit_bias"])
    expected = [prompt + text for prompt, text in zip(PROMPTS, found, strict=True)]
    assert generate_batch(model, TOKENIZER, PROMPTS, num_beams=3, **settings) == expected
    # It is deterministic.
    texts = [generate(model, TOKENIZER, "白", num_beams=3, seed=seed, **settings) for seed in (1, 2, None)]
    assert texts == [expected[1]] * 3
    likelier = generate_batch(model, TOKENIZER, PROMPTS, num_beams=3, **{**settings, "length_penalty": 0.0})
    assert likelier != expected


def test_more_beams_than_there_are_tokens():
    white, sun = TOKENIZER.encode("白日")
    model = table_model(TOKENIZER, {BOS: [white, sun], white: [white, sun, EOS], sun: EOS})
    for num_beams in (2, 5, V, 2 * V):
        # Of equal probability to the last: 日 has one half, all others less.
        assert search(model, ["", "白日"], num_beams, 3, 0.0)[0] == ["日", ""]


def test_it_stops_when_nothing_better_can_come():
    white, sun, hill = TOKENIZER.encode("白日山")
    model = table_model(TOKENIZER, {BOS: white, white: sun, sun: EOS, hill: hill})
    found, steps = search(model, [""], 2, 50)
    assert found == ["白日"]
    assert steps < 50
    # Others continue after one has ended.
    model = table_model(TOKENIZER, {BOS: white, white: sun, sun: hill, hill: hill})
    assert search(model, ["依", "", "山"], 2, 9)[0] == ["", "白日" + "山" * 7, "山" * 9]


def test_no_tokens_to_write():
    model = table_model(TOKENIZER, {})
    assert search(model, ["白", ""], 3, 0)[0] == ["", ""]
    assert generate(model, TOKENIZER, "白", num_beams=3, max_new_tokens=0) == "白"


def test_what_is_banned_does_not_come():
    white, sun, hill = TOKENIZER.encode("白日山")
    model = table_model(TOKENIZER, {BOS: white, white: sun, sun: [hill, white], hill: white})
    settings = {"num_beams": 3, "max_new_tokens": 20}
    assert "白日" in generate(model, TOKENIZER, **settings)
    for prompt in ("", "白", "山白"):
        assert "白日" not in generate(model, TOKENIZER, prompt, banned=["白日"], **settings)[len(prompt) - 1 :]
    bias = {**only("白日山"), EOS: -float("inf")}
    for n in (1, 2, 3):
        text = generate(model, TOKENIZER, no_repeat_ngram=n, logit_bias=bias, **settings)
        grams = list(zip(*(text[i:] for i in range(n)), strict=False))
        assert len(grams) == len(set(grams))
        # Where nothing is left it ends.
        assert n <= len(text) < 20 if n < 3 else len(text) > n
    assert "白" not in generate(model, TOKENIZER, frequency_penalty=60.0, **settings)[1:]


def test_beams_continue_their_own_texts():
    # Bans depend on what a beam wrote: each of these words is banned in one beam only.
    white, sun = TOKENIZER.encode("白日")
    model = table_model(TOKENIZER, {BOS: [white, sun], white: [white, sun], sun: [white, sun]})
    words = ["".join(word) for word in itertools.product("白日", repeat=3)]
    allowed = {"白白日", "白日日", "日日白", "日白白"}  # over and over
    for num_beams in (2, 3, 8):
        text = generate(model, TOKENIZER, banned=set(words) - allowed, num_beams=num_beams, max_new_tokens=12)
        assert {text[i : i + 3] for i in range(10)} <= allowed
        assert set(text) == {"白", "日"}


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.8}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"typical_p": 0.5}, {"forced": ["白"]}],
)
def test_settings_that_a_search_does_not_support_are_refused(settings):
    message = message_of(ValueError, generate, table_model(TOKENIZER, {}), TOKENIZER, num_beams=2, **settings)
    assert f"num_beams > 1 does not support {next(iter(settings))}" in message


@pytest.mark.parametrize("length_penalty", [400.0, 1e300, -400.0])
def test_a_length_penalty_may_be_of_any_size(length_penalty):
    model = table_model(TOKENIZER, {BOS: TOKENIZER.encode("白日"), **dict.fromkeys(TOKENIZER.encode("白"), EOS)})
    text = generate(model, TOKENIZER, num_beams=3, max_new_tokens=12, length_penalty=length_penalty)
    assert text == ("" if length_penalty < 0 else text[:1] or "nothing")  # the shortest, or one of the longest
