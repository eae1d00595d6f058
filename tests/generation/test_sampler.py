import itertools
import time
import tracemalloc

import numpy as np
import pytest
from conftest import breaking_tokens, table_model
from hypothesis import given
from hypothesis import strategies as st

from aigc_tf import Tokenizer, generate, generate_batch
from aigc_tf.generation import processors
from aigc_tf.generation.batch import TextBatch
from aigc_tf.generation.sampler import Sampler
from aigc_tf.generation.settings import check_sampling
from aigc_tf.runtime.backend import keras

# Characters, a word, and pieces that begin or end inside one.
TOKENIZER = Tokenizer(["白", "日", "依", "山", "，", "白日", "山白", "日依", "依白日山"])
BOS, EOS, V = TOKENIZER.BOS, TOKENIZER.EOS, TOKENIZER.vocab_size
STRAY = [3 + byte for byte in (*range(0x80, 0xC2), *range(0xF5, 0x100))]  # bytes that begin no character
NAN, INF = float("nan"), float("inf")


def piece(word):
    return TOKENIZER.piece_id(word)


def make(tokenizer=TOKENIZER, compiled=False, **settings):
    return Sampler(tokenizer, check_sampling(**settings), compiled)


def texts_of(prompts, written=()):
    """A batch of texts that continue prompts with the same ids."""
    texts = TextBatch(None, [[BOS, *prompt] for prompt in prompts])
    for i in written:
        texts.write(np.arange(len(prompts)), np.full(len(prompts), i))
    return texts


def adjusted(prompt, written=(), logits=None, **settings):
    """Adjust logits, by default all 0, after a text; return them (V,)."""
    logits = np.zeros(V, np.float32) if logits is None else logits
    return make(**settings).process(logits[None], texts_of([prompt], written), np.array([0]))[0]


def only(text):
    """A bias that leaves nothing but the characters of a text, each a token."""
    return dict.fromkeys(set(range(V)) - set(TOKENIZER.encode(text)), -INF)


def banned_pieces(logits):
    return {TOKENIZER.decode([i]) for i in np.flatnonzero(np.isneginf(logits)) if i > 258}


def test_banned_words_may_come_from_an_iterator():
    assert "白日" in banned_pieces(adjusted([], banned=iter(["白日"])))


def test_padding_and_begin_never_come_and_the_rest_is_left():
    logits = adjusted([piece("白")])
    assert np.flatnonzero(np.isneginf(logits)).tolist() == [TOKENIZER.PAD, BOS, *STRAY]
    assert (np.delete(logits, [TOKENIZER.PAD, BOS, *STRAY]) == 0).all()


def test_a_bias_is_added_by_text_or_id():
    logits = adjusted([], logit_bias={"白": 2.5, piece("日"): -1, "山": -INF, EOS: 1})
    assert logits[[piece("白"), piece("日"), EOS]].tolist() == [2.5, -1, 1]
    assert banned_pieces(logits) == {"山"}
    # The text and the id of one token add up.
    assert adjusted([], logit_bias={"白": 2.5, piece("白"): -1})[piece("白")] == 1.5


def test_an_n_gram_comes_once():
    text = TOKENIZER.encode("白日依白日山白")
    assert banned_pieces(adjusted(text, no_repeat_ngram=1)) == {"白", "日", "依", "山"}
    assert banned_pieces(adjusted(text, no_repeat_ngram=2)) == {"日"}
    assert banned_pieces(adjusted(text, no_repeat_ngram=3)) == set()
    assert banned_pieces(adjusted(text[:-2], no_repeat_ngram=3)) == {"依"}
    # It does not matter how much of it was prompt.
    assert banned_pieces(adjusted(text[:4], text[4:], no_repeat_ngram=2)) == {"日"}
    assert banned_pieces(adjusted([], text, no_repeat_ngram=2)) == {"日"}
    for prompt in ([], text[:1]):  # shorter than an n-gram
        assert banned_pieces(adjusted(prompt, no_repeat_ngram=5)) == set()


def test_exempt_words_may_repeat():
    text = TOKENIZER.encode("白，日，白")
    assert banned_pieces(adjusted(text, no_repeat_ngram=1)) == {"白", "日", "，"}
    assert banned_pieces(adjusted(text, no_repeat_ngram=1, exempt=["，", "没有"])) == {"白", "日"}
    assert banned_pieces(adjusted(text, no_repeat_ngram=2)) == {"，"}
    assert banned_pieces(adjusted(text, no_repeat_ngram=2, exempt=["，"])) == set()
    # A word is exempt where it is a token, not its characters.
    assert banned_pieces(adjusted(text, no_repeat_ngram=1, exempt=["白日"])) == {"白", "日", "，"}


def test_penalties_distinguish_prompt_and_text():
    prompt, written = TOKENIZER.encode("白日日"), TOKENIZER.encode("日，山山")
    logits = np.random.default_rng(0).normal(size=V).astype(np.float32)
    before = adjusted(prompt, written, logits)
    for token, times, in_text in (("白", 0, True), ("日", 1, True), ("，", 1, True), ("山", 2, True), ("依", 0, False)):
        changed = adjusted(prompt, written, logits, presence_penalty=0.5, frequency_penalty=0.25)
        expected = before[piece(token)] - 0.5 * (times > 0) - 0.25 * times
        assert changed[piece(token)] == pytest.approx(expected, abs=1e-6), token
        changed = adjusted(prompt, written, logits, presence_penalty=0.5)
        assert changed[piece(token)] == pytest.approx(before[piece(token)] - 0.5 * (times > 0), abs=1e-6), token
        changed = adjusted(prompt, written, logits, frequency_penalty=0.25)
        assert changed[piece(token)] == pytest.approx(before[piece(token)] - 0.25 * times, abs=1e-6), token
        changed = adjusted(prompt, written, logits, repetition_penalty=1.5)
        expected = processors.log_softmax(before)[piece(token)] * (1.5 if in_text else 1)
        assert changed[piece(token)] == pytest.approx(expected, abs=1e-5), token
    changed = adjusted(
        prompt, written, logits, presence_penalty=0.5, frequency_penalty=1, repetition_penalty=2, exempt=["日", "山"]
    )
    expected = processors.log_softmax(before)
    assert changed[piece("日")] == pytest.approx(expected[piece("日")], abs=1e-5)
    assert changed[piece("，")] == pytest.approx(2 * expected[piece("，")] - 1.5, abs=1e-5)


def test_before_anything_is_written_only_the_prompt_counts():
    logits = adjusted(TOKENIZER.encode("白"), presence_penalty=1, frequency_penalty=1)
    np.testing.assert_array_equal(logits, adjusted(TOKENIZER.encode("白")))


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties_may_be_numpy_scalars(penalty):
    text = TOKENIZER.encode("白日白")
    expected = adjusted(text, text, **{penalty: 1.5})
    for kind in (np.float32, np.float64):
        logits = adjusted(text, text, **{penalty: kind(1.5)})
        assert logits.dtype == np.float32
        np.testing.assert_array_equal(logits, expected)


def test_banned_words_by_hand():
    """Banned is what holds the word, and what would complete it however its beginning was spelt."""
    spelt = TOKENIZER.encode("白")
    in_bytes = [3 + byte for byte in "白".encode()]
    holds = {"白日", "依白日山"}
    for text in ([], TOKENIZER.encode("山"), TOKENIZER.encode("白依"), TOKENIZER.encode("日")):
        assert banned_pieces(adjusted(text, banned=["白日"])) == holds
    for text in (spelt, in_bytes, [piece("山白")], [*TOKENIZER.encode("日"), *spelt]):
        for prompt in (text, text[:-1]):
            logits = adjusted(prompt, text[len(prompt) :], banned=["白日"])
            assert banned_pieces(logits) == {*holds, "日", "日依"}
            assert (np.flatnonzero(np.isneginf(logits[3:259])) + 3).tolist() == STRAY
    # In bytes it may begin, but not end.
    for text in (spelt, in_bytes):
        for length in (1, 2):
            beginning = [*text, *(3 + byte for byte in "日".encode()[:length])]
            logits = adjusted(beginning, banned=["白日"])
            expected = {3 + "日".encode()[2]} if length == 2 else set()
            assert set(np.flatnonzero(np.isneginf(logits))) == {0, 1, *breaking_tokens(TOKENIZER, beginning), *expected}


def test_several_banned_words_of_different_lengths():
    logits = adjusted(TOKENIZER.encode("山白日"), banned=["日依", "白日山", "，", "山白日依白"])
    assert banned_pieces(logits) == {"，", "日依", "山", "依", "依白日山", "山白"}
    # Of one beginning.
    logits = adjusted(TOKENIZER.encode("山白"), banned=["白山", "白依", "白日"])
    assert banned_pieces(logits) == {"山", "日", "依", "白日", "日依", "山白", "依白日山"}


def test_banned_letters():
    tokenizer = Tokenizer(["a", "ba", "c"])
    sampler = make(tokenizer, banned=["a"])
    assert np.flatnonzero(np.isneginf(sampler.bias)).tolist() == [0, 1, 3 + ord("a"), *STRAY, 259, 260]
    assert not sampler.depends_on_text

    def banned(word, text):
        logits = np.zeros((1, tokenizer.vocab_size), np.float32)
        logits = make(tokenizer, banned=[word]).process(logits, texts_of([tokenizer.encode(text)]), np.array([0]))[0]
        return np.flatnonzero(np.isneginf(logits)).tolist()[2:]

    assert banned("ab", "ca") == [3 + ord("b"), *STRAY, 260]
    assert banned("cab", "ca") == [3 + ord("b"), *STRAY, 260]
    assert banned("cab", "aa") == STRAY
    first, second = "é".encode()
    assert banned("é", "ca") == STRAY
    assert banned("é", "") == STRAY
    logits = np.zeros((1, tokenizer.vocab_size), np.float32)
    logits = make(tokenizer, banned=["é"]).process(logits, texts_of([[3 + first]]), np.array([0]))[0]
    assert set(np.flatnonzero(np.isneginf(logits))) == {0, 1, *breaking_tokens(tokenizer, [3 + first]), 3 + second}


def test_many_banned_words_are_prepared_quickly():
    tokenizer = Tokenizer([chr(0x4E00 + i) for i in range(5700)])
    words = [chr(0x4E00 + i % 5700) + chr(0x4E00 + (i * 37 + 11) % 5700) for i in range(10_000)]
    start = time.process_time()
    sampler = make(tokenizer, banned=words)
    assert time.process_time() - start < 2
    ids = np.array(tokenizer.encode(words[5][0]))
    assert tokenizer.encode(words[5][1])[0] in sampler.banned.completing(ids)


def test_a_long_banned_word_takes_little_memory():
    tracemalloc.start()
    make(banned=["白" * 5000])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_a_character_that_could_not_be_completed_is_not_begun():
    kana = [chr(i) for i in range(0x3040, 0x3100)]  # E3 81 80 to E3 83 BF
    before, first = TOKENIZER.encode("白"), 3 + 0xE3
    logits = adjusted([*before, first], banned=kana)
    assert np.isneginf(logits[[3 + 0x81, 3 + 0x82, 3 + 0x83]]).all()
    assert logits[3 + 0x80] == logits[3 + 0x84] == 0
    assert not np.isneginf(adjusted([*before, first], banned=kana[1:])[3 + 0x81])
    # After one character only.
    pairs = ["白" + char for char in kana[:64]]
    assert np.isneginf(adjusted([*before, first], banned=pairs)[3 + 0x81])
    assert not np.isneginf(adjusted([*TOKENIZER.encode("日"), first], banned=pairs)[3 + 0x81])
    # All that begin with one byte.
    assert np.isneginf(make(banned=[chr(i) for i in range(0x3000, 0x4000)]).bias[first])


def test_the_text_ends_where_no_token_is_left():
    for settings in ({"no_repeat_ngram": 1}, {"banned": ["白白"]}, {"no_repeat_ngram": 1, "repetition_penalty": 2}):
        logits = adjusted(TOKENIZER.encode("白"), logit_bias=only("白"), **settings)
        assert np.flatnonzero(logits > -np.inf).tolist() == [EOS]
        logits = adjusted([], logit_bias=only("白"), **settings)
        assert np.flatnonzero(logits > -np.inf).tolist() == [piece("白")]
    # The model itself may leave nothing but what is banned.
    alone = np.full(V, -np.inf, np.float32)
    alone[piece("日")] = 0
    for settings in ({"banned": ["日"]}, {"logit_bias": {"日": -INF}}, {"banned": ["白日"]}):
        logits = adjusted(TOKENIZER.encode("白"), logits=alone, **settings)
        assert np.flatnonzero(logits > -np.inf).tolist() == [EOS], settings


@given(
    st.lists(st.lists(st.integers(3, V - 1), max_size=6), min_size=1, max_size=3),
    st.lists(st.sampled_from([*map(piece, TOKENIZER.pieces), *(3 + byte for byte in "白日".encode())]), max_size=8),
    st.lists(st.text("白日依山，", min_size=1, max_size=3), max_size=2),
    st.sampled_from([None, 1, 2, 3]),
    st.sampled_from([1.0, 0.7, 1.6]),
    st.sampled_from([(0.0, 0.0), (0.5, 0.25), (-1.0, 0.0)]),
)
def test_processing_follows_the_plain_definitions(prompts, written, banned, n, penalty, presence_and_frequency):
    """A batch of texts, against the plain definitions."""
    presence, frequency = presence_and_frequency
    settings = {
        "banned": banned,
        "no_repeat_ngram": n,
        "repetition_penalty": penalty,
        "presence_penalty": presence,
        "frequency_penalty": frequency,
        "exempt": ["，", "日"],
        "logit_bias": {"山": 1.5, "依": -INF},
    }
    exempt = {piece("，"), piece("日")}
    logits = np.random.default_rng(len(written)).normal(size=(len(prompts), V)).astype(np.float32)
    result = make(**settings).process(logits, texts_of(prompts, written), np.arange(len(prompts)))
    for row, prompt in enumerate(prompts):
        text = [BOS, *prompt, *written]
        expected = logits[row].astype(np.float64)
        expected[piece("山")] += 1.5
        expected[[TOKENIZER.PAD, BOS, piece("依"), *breaking_tokens(TOKENIZER, text)]] = -np.inf
        data = b"".join(map(TOKENIZER.token_bytes, text))
        for i in range(V):
            grown = [*text, i]
            grams = list(zip(*(grown[k:] for k in range(n)), strict=False)) if n else []
            if i not in exempt and len(grams) > 0 and grams[-1] in grams[:-1]:
                expected[i] = -np.inf
            for word in banned:
                word = word.encode()
                if word in data[len(data) - len(word) + 1 if len(word) <= len(data) else 0 :] + TOKENIZER.token_bytes(
                    i
                ):
                    expected[i] = -np.inf
        if np.isneginf(expected).all():
            expected[EOS] = 0
        if penalty != 1:
            expected = processors.log_softmax(expected)
        for i in set(text) - exempt:
            expected[i] *= penalty
        for i in set(written) - exempt:
            expected[i] -= presence + frequency * written.count(i)
        np.testing.assert_allclose(result[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_given_logits_are_not_changed(compiled):
    logits = np.random.default_rng(0).normal(size=(2, V)).astype(np.float32)
    before = logits.copy()
    settings = {"banned": ["白日"], "no_repeat_ngram": 1, "repetition_penalty": 2, "presence_penalty": 1, "top_k": 5}
    sampler = make(compiled=compiled, **settings)
    sampler.sample(sampler.process(logits, texts_of([[260], [261]], [262]), np.arange(2)), np.array([0.1, 0.9]))
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("kind", ["numpy", "keras", "compiled"])
def test_sampling_applies_temperature_top_k_typical_top_p_min_p_and_draws(kind):
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(200, 30), scale=2).astype(np.float32)
    uniforms = generator.random(200)

    def array(numbers):
        return keras.ops.convert_to_tensor(numbers, "float32") if kind == "keras" else numbers

    for used in itertools.product([False, True], repeat=4):
        settings = dict(zip(("top_k", "typical_p", "top_p", "min_p"), (12, 0.8, 0.7, 0.2), strict=True))
        settings = {name: value if use else None for (name, value), use in zip(settings.items(), used, strict=True)}
        sampler = make(compiled=kind == "compiled", temperature=1.5, **settings)
        expected, ids = processors.apply_temperature(logits, 1.5), np.arange(30)[None]
        if settings["top_k"]:
            expected, ids = processors.select_top_k(expected, 12)
        for name, keep in (
            ("typical_p", processors.keep_typical),
            ("top_p", processors.keep_top_p),
            ("min_p", processors.keep_min_p),
        ):
            expected = expected if settings[name] is None else keep(expected, settings[name])
        drawn = processors.draw(expected, uniforms)
        expected = np.take_along_axis(np.broadcast_to(ids, expected.shape), drawn[:, None], axis=-1)[:, 0]
        chosen = np.asarray(keras.ops.convert_to_numpy(sampler.sample(array(logits), array(uniforms))))
        assert (chosen == expected).mean() >= 0.99, settings
    greedy = make(compiled=kind == "compiled", temperature=0, top_k=2).sample(array(logits), array(uniforms))
    assert np.asarray(keras.ops.convert_to_numpy(greedy)).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("kind", ["numpy", "keras", "compiled"])
@pytest.mark.parametrize("used", [{}, {"top_k": 3}, {"typical_p": 0.9}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_temperature_does_not_overflow_float32(kind, used):
    logits = np.array([[0, 0, -INF, 3e38, 0], [0, 3e38, -3e38, 0, 3e38]], np.float32)
    if kind == "keras":
        logits = keras.ops.convert_to_tensor(logits)
    sampler = make(compiled=kind == "compiled", temperature=0.2, **{"top_p": None, **used})
    for uniform, expected in ((0.1, [3, 1]), (0.9, [3, 4])):
        chosen = sampler.sample(logits, np.full(2, uniform, np.float32))
        assert keras.ops.convert_to_numpy(chosen).tolist() == expected


def test_neutral_settings_keep_all_tokens():
    logits = np.random.default_rng(0).normal(size=(500, 30)).astype(np.float32)
    uniforms = np.random.default_rng(1).random(500)
    for compiled in (False, True):
        open_to_all = make(compiled=compiled, temperature=1, top_p=None).sample(logits, uniforms)
        same = make(compiled=compiled, temperature=1, top_p=1, typical_p=1, min_p=0, top_k=10**6)
        assert (same.sample(logits, uniforms) == open_to_all).mean() >= 0.99


def spelling_model(text, tokenizer=TOKENIZER):
    """A model that writes a text over and over, each part of it in any of its spellings, as likely."""
    data = text.encode()
    at = {}  # from a place in the text to the tokens that may stand there
    for place in range(len(data)):
        for i in range(3, tokenizer.vocab_size):
            token = tokenizer.token_bytes(i)
            if (data[place:] + data)[: len(token)] == token:
                at.setdefault(place, []).append(i)
    successors = {tokenizer.BOS: at[0]}
    for place, ids in at.items():
        for i in ids:
            successors.setdefault(i, []).extend(at[(place + len(tokenizer.token_bytes(i))) % len(data)])
    return table_model(tokenizer, {i: sorted(set(ids)) for i, ids in successors.items()})


WORDS = Tokenizer.train(["我们今天学习。", "今天我们学习，我们学"], unit="word")


@pytest.mark.parametrize(
    ("tokenizer", "text", "banned"),
    [
        (TOKENIZER, "山白日依", ["白日"]),
        (TOKENIZER, "山白日依", ["日依山", "白日依"]),
        (TOKENIZER, "白日龘", ["日龘白"]),  # 龘 has no piece
        (WORDS, "我们今天学习", ["们今"]),
        (WORDS, "我们今天学习", ["今天"]),
        (Tokenizer(["ab", "a", "aab"]), "aab", ["aba"]),  # it can begin again inside itself
    ],
)
def test_a_banned_word_is_never_written_in_any_tokenisation(tokenizer, text, banned):
    model = spelling_model(text, tokenizer)
    settings = {"max_new_tokens": 16, "temperature": 1.0, "top_p": None, "seed": 0}
    prompts = ["", text[:1], text[:2], text[:3]]
    prompts = 25 * [prompt for prompt in prompts if not any(word in prompt for word in banned)]
    free = generate_batch(model, tokenizer, prompts, **settings)
    for word in banned:
        assert sum(word in written for written in free) > len(prompts) / 3
    texts = generate_batch(model, tokenizer, prompts, banned=banned, **settings)
    assert not [written for written in texts if any(word in written for word in banned)]
    # Nothing else is banned: the word's beginning comes as before, in several ways.
    assert sum(banned[0][0] in written for written in texts) > len(prompts) / 3
    assert len(set(texts)) > len(prompts) / 3


def test_a_banned_word_in_the_prompt_is_not_written_again():
    model = spelling_model("白日")
    (text,) = {generate(model, TOKENIZER, "白日", banned=["白日"], temperature=0, max_new_tokens=9) for _ in range(2)}
    assert text.startswith("白日")
    assert "白日" not in text[1:]


def test_where_nothing_is_left_the_text_ends():
    model = spelling_model("白")
    for settings in ({"temperature": 0}, {"temperature": 1.0, "top_p": None, "seed": 0}):
        settings = {"max_new_tokens": 9, "logit_bias": only("白"), **settings}
        assert generate(model, TOKENIZER, **settings) == "白" * 9
        assert generate(model, TOKENIZER, banned=["白白白"], **settings) == "白白"
        assert generate(model, TOKENIZER, no_repeat_ngram=1, **settings) == "白"
        assert generate(model, TOKENIZER, "白", no_repeat_ngram=1, **settings) == "白"


def test_only_exempt_n_grams_come_twice():
    def repeated(text, n):
        grams = [text[i : i + n] for i in range(len(text) - n + 1)]
        return {gram for gram in grams if grams.count(gram) > 1}

    model = spelling_model("白日，依")
    bias = only("白日，依")
    del bias[EOS]
    settings = {"max_new_tokens": 40, "temperature": 1.0, "top_p": None, "seed": 0, "logit_bias": bias}
    for n in (2, 3):
        texts = generate_batch(model, TOKENIZER, ["白日"] * 30, no_repeat_ngram=n, **settings)
        assert not any(repeated(text, n) for text in texts)
        assert min(map(len, texts)) > 4
        assert max(map(len, texts)) < 42  # where nothing is left it ends
        exempt = generate_batch(model, TOKENIZER, ["白日"] * 30, no_repeat_ngram=n, exempt=["，"], **settings)
        grams = set().union(*(repeated(text, n) for text in exempt))
        assert grams
        assert all(gram.endswith("，") for gram in grams)
