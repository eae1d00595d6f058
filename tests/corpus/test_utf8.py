import codecs

import numpy as np
import pytest
from conftest import is_character, may_follow, spread

import aigc_tf
from aigc_tf import Tokenizer, generate, generate_batch
from aigc_tf.corpus import utf8
from aigc_tf.generation.batch import TextBatch
from aigc_tf.generation.sampler import Sampler
from aigc_tf.generation.settings import check_sampling

TOKENIZER = Tokenizer(["白", "日", "，"])
BOS, EOS, V = TOKENIZER.BOS, TOKENIZER.EOS, TOKENIZER.vocab_size
INF = float("inf")


def after(data: bytes) -> int:
    pending = 0
    for byte in data:
        pending = utf8.transition_tables()[1][pending, byte]
    return pending


def test_the_tables_take_what_python_takes_byte_for_byte():
    """All sequences of one, two and three bytes, and those of four at whose ends rules change, go as Python says."""
    allowed, _ = utf8.transition_tables()
    ends = [0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xE0, 0xED, 0xF0, 0xF4, 0xF5, 0xFF]
    begun = [b""]
    for length in range(1, 5):
        longer = []
        for data in begun:
            pending = after(data)
            bytes_to_try = range(256) if length < 4 else ends
            assert [allowed[pending, byte] for byte in bytes_to_try] == [may_follow(data, i) for i in bytes_to_try], (
                data
            )
            for byte in bytes_to_try:
                grown = data + bytes([byte]) if may_follow(data, byte) else bytes([byte])  # or it begins anew
                is_begun = may_follow(grown[:-1], byte) and not is_character(grown)
                assert is_begun == (after(data + bytes([byte])) > 0)
                if is_begun and len(grown) == length:
                    longer.append(grown)
        begun = longer
    assert begun == []  # none is longer


def test_the_tables_take_each_character_and_nothing_else():
    allowed, following = utf8.transition_tables()
    characters = [i for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    for first, until in ((0, 0x80), (0x80, 0x800), (0x800, 0x10000), (0x10000, 0x110000)):
        text = "".join(chr(i) for i in characters if first <= i < until)
        data = np.frombuffer(text.encode(), np.uint8).reshape(len(text), -1)
        pending = np.zeros(len(text), np.int64)
        for column in data.T:
            assert allowed[pending, column].all()
            pending = following[pending, column]
        assert not pending.any()
    # So many ways there are from whole to whole; as all characters are among them, there are no others.
    paths, ways = np.eye(len(allowed), dtype=np.int64)[0], 0
    for _ in range(4):
        reached = np.zeros_like(paths)
        for pending, count in enumerate(paths):
            np.add.at(reached, following[pending][allowed[pending]], count)
        ways, paths = ways + reached[0], np.where(np.arange(len(paths)) > 0, reached, 0)
    assert ways == len(characters)
    assert not paths.any()


def assert_well_formed(ids, before=b""):
    """Whole characters, but for the last where the tokens ran out."""
    data = b"".join(map(TOKENIZER.token_bytes, ids))
    codecs.getincrementaldecoder("utf-8")("strict").decode(before + data, EOS in ids)


@pytest.fixture(scope="module")
def model(build):
    return spread(build(V, 12))


PROMPTS = ["", "白", "龘白日，日日日", "\ud83d"] * 3  # the last is one half of a pair, which UTF-8 has not
PLAIN = {"temperature": 1.5, "top_p": None}
SETTINGS = [
    {},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "no_repeat_ngram": 3, "top_k": 40},
    {"temperature": 0},
    {"log_probability": True, "best_of": 2},
]


@pytest.mark.parametrize("engine", ["numpy", "numba", "model", "device"])
def test_generated_text_is_valid_utf8(model, engine):
    count = 15 if engine == "model" else 60
    for settings in SETTINGS if engine in ("numpy", "numba") else SETTINGS[:2]:  # the others take longer
        texts = generate_batch(
            model, TOKENIZER, PROMPTS, max_new_tokens=count, seed=0, engine=engine, **{**PLAIN, **settings}
        )
        assert sum(len(text.ids) for text in texts) > 100
        assert any(i in range(3 + 0xC2, 259) for text in texts for i in text.ids)
        for text in texts:
            assert_well_formed(text.ids)
            assert "\ufffd" not in text.new


@pytest.mark.parametrize("engine", ["numpy", "numba"])
def test_generated_text_with_words_and_beams_is_valid_utf8(model, engine):
    for settings in ({"banned": ["龘", "é", "白日"], **PLAIN}, {"forced": ["日白"], **PLAIN}, {"num_beams": 3}):
        for text in generate_batch(model, TOKENIZER, PROMPTS, max_new_tokens=30, seed=1, engine=engine, **settings):
            assert_well_formed(text.ids)
            assert "\ufffd" not in text.new


def ids_of(data: bytes) -> list[int]:
    return [3 + byte for byte in data]


def adjusted(prompt, **settings):
    texts = TextBatch(None, [[BOS, *prompt]])
    sampler = Sampler(TOKENIZER, check_sampling(**settings))
    return sampler.process(np.zeros((1, V), np.float32), texts, np.array([0]))[0]


def come(logits):
    return set(np.flatnonzero(logits > -np.inf).tolist())


def test_an_incomplete_character_is_completed():
    for begun in (b"\xc3", b"\xe9", b"\xe9\xbe", b"\xe0", b"\xed", b"\xf0", b"\xf0\x9f\x90", b"\xf4", b"\xf4\x80"):
        for before in (b"", b"\x80", b"\xf0\x9f", "é".encode()):
            expected = {3 + byte for byte in range(256) if may_follow(begun, byte)}
            assert come(adjusted(ids_of(before + begun))) == expected
    # What is half a surrogate pair, or fits nowhere, is followed by whatever follows a character.
    for begun in (b"\xed\xa0\x80", b"\xed\xa0", b"\xe9\x80\x80\x80", b"\xff", b"\xf0\x80"):
        assert come(adjusted(ids_of(begun))) == come(adjusted([]))
    assert come(adjusted([*ids_of(b"\xe9"), 259])) == come(adjusted([]))


def test_a_character_that_cannot_be_completed_is_not_started():
    for last, banned in (
        (range(0x80, 0xC0), range(0xC2, 0xF5)),
        (range(0x90, 0xC0), [0xE0, 0xF0]),
        (range(0x80, 0x90), [0xF4]),
    ):
        logits = adjusted([], logit_bias=dict.fromkeys(ids_of(bytes(last)), -INF))
        assert come(adjusted([])) - come(logits) == set(ids_of(bytes(banned)))
    logits = adjusted(
        ids_of(b"\xe9"), logit_bias={**dict.fromkeys(ids_of(bytes(range(0x81, 0xC0))), -INF), 3 + 0x80: 2.5}
    )
    assert come(logits) == {3 + 0x80}
    assert logits[3 + 0x80] == 2.5


@pytest.mark.parametrize("engine", ["numpy", "numba"])
def test_a_character_whose_every_ending_is_banned_is_not_started(engine):
    family = [(b"\xe9\xbe" + bytes([byte])).decode() for byte in range(0x80, 0xC0)]
    only = dict.fromkeys(set(range(V)) - set(ids_of(b"\xe9\xbe")) - set(ids_of(bytes(range(0x80, 0xC0)))), -INF)
    only |= {3 + 0x80: -1.0, 3 + 0xBE: 50.0}
    model = aigc_tf.lstm(V, 8, hidden_dim=8)
    settings = {"logit_bias": only, "temperature": 0, "max_new_tokens": 9, "engine": engine}
    free = generate(model, TOKENIZER, "白", **settings)
    assert free == "白" + "龾" * 3
    text = generate(model, TOKENIZER, "白", banned=family, **settings)
    # The byte in the middle is the model's choice, which depends on its first values.
    assert [len(text), *{(char.encode()[0], char.encode()[2]) for char in text[1:]}] == [4, (0xE9, 0xBE)]
    assert not set(text) & set(family)
    assert "".join(aigc_tf.stream(model, TOKENIZER, "白", banned=family, **settings)) == text
