"""Tokens: text -> ids -> text without loss, ids that stay what they are, a vocabulary that holds together."""

import json
import random
import re
from collections import Counter

import numpy as np
import pytest
from conftest import message_of
from hypothesis import given, settings
from hypothesis import strategies as st

from aigc_tf.corpus import parallel
from aigc_tf.corpus.tokenizer import UNITS, Tokenizer
from aigc_tf.runtime.files import read_text, shipped_file

PROSE = [
    "我们的模型会写诗，我们的模型也会写文章。",
    "语言模型从文本学习语言。语言模型写出新的文本。",
    "春天来了，我们去看江南的春天。\n　　The model writes 2026 poems.",
]
USER_DICT = ("新的文本 10 n",)
WORDS = ["我们", "模型", "语言", "语言模型", "写诗", "春天", "江南", "诗歌", "中国科学院", "的", "诗", "，", " ", "a"]

often = settings(max_examples=150, deadline=None)
seldom = settings(max_examples=50, deadline=None)
han_text = st.lists(st.sampled_from([*WORDS, *PROSE[2], "龘", "🐉", "é"])).map("".join)
# Surrogates come from broken JSON escapes; st.characters() has them, the alphabet of st.text() has not.
surrogate_text = st.text(st.characters(categories=["Cs"]) | st.sampled_from("春a🐉\n"))


@pytest.fixture(scope="module", params=UNITS)
def tokenizer(request):
    """Return a tokenizer of each unit, too small for everything that the tests encode."""
    poems = read_text(shipped_file("tang_quatrains.txt")).split("\n\n")[:100]
    return Tokenizer.train(PROSE + poems, request.param, vocab_size=400)


def any_ids(tokenizer):
    """Return a strategy for lists of ids that no text need have: half of them bytes."""
    return st.lists(st.integers(3, 258) | st.integers(0, tokenizer.vocab_size - 1))


def same(a, b):
    """Say whether two tokenizers have the same settings and the same encodings."""
    state = [(t.pieces, t.unit, t.user_dict, t.vocab_size, t.fingerprint) for t in (a, b)]
    return state[0] == state[1] and all(a.encode(text) == b.encode(text) for text in PROSE)


@often
@given(data=st.data())
def test_round_trip_on_any_text(tokenizer, data):
    text = data.draw(st.text() | han_text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@often
@given(text=surrogate_text)
def test_round_trip_on_lone_surrogates(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@often
@given(text=st.text(st.characters()))
def test_without_pieces_the_ids_are_the_bytes(text):
    tokenizer = Tokenizer(())
    assert tokenizer.encode(text) == [3 + byte for byte in text.encode("utf-8", "surrogatepass")]


@often
@given(text=han_text)
def test_ids_of_a_text_are_in_the_vocabulary_and_not_special(tokenizer, text):
    assert all(3 <= i < tokenizer.vocab_size for i in tokenizer.encode(text))


@often
@given(text=st.lists(st.text(max_size=3) | han_text | surrogate_text, max_size=4).map("".join))
def test_the_ids_of_characters_are_those_of_each_alone(text):
    tokenizer = Tokenizer(["春", "眠", "🐉", "a"])
    ids = []
    for character in text:
        known = tokenizer.piece_id(character)
        ids += [3 + byte for byte in character.encode("utf-8", "surrogatepass")] if known is None else [known]
    assert tokenizer.encode(text) == ids
    assert next(tokenizer.encode_documents([text])).tolist() == [1, *ids, 2]


def test_special_ids_are_fixed_and_give_no_text(tokenizer):
    assert (tokenizer.PAD, tokenizer.BOS, tokenizer.EOS) == (0, 1, 2)
    春, 天 = tokenizer.encode("春")[0], tokenizer.encode("天")[0]
    assert tokenizer.decode([1, 春, 0, 天, 2, 0]) == "春天"


def test_bytes_have_the_ids_3_to_258_and_pieces_follow():
    tokenizer = Tokenizer(["春", "眠"])
    assert tokenizer.encode("\x00\x7f") == [3, 130]
    assert tokenizer.decode([3 + 0xC3, 3 + 0xA9]) == "é"
    assert tokenizer.encode("眠春") == [260, 259]
    assert tokenizer.vocab_size == 261


def test_a_word_that_is_unknown_is_spelt_in_characters_then_bytes():
    tokenizer = Tokenizer(["写", "模型"], "word")
    assert tokenizer.encode("模型写诗") == [260, 259, *(3 + byte for byte in "诗".encode())]


@often
@given(data=st.data())
def test_a_stream_gives_what_decode_gives(tokenizer, data):
    ids = data.draw(any_ids(tokenizer))
    assert "".join(tokenizer.decode_stream(iter(ids))) == tokenizer.decode(ids)


# A UTF-8 character (Unicode, table 3-7), lone surrogates included, or else one byte that belongs to none.
CHARACTER = re.compile(
    rb"[\x00-\x7f]|[\xc2-\xdf][\x80-\xbf]|(?:\xe0[\xa0-\xbf]|[\xe1-\xef][\x80-\xbf])[\x80-\xbf]"
    rb"|(?:\xf0[\x90-\xbf]|[\xf1-\xf3][\x80-\xbf]|\xf4[\x80-\x8f])[\x80-\xbf]{2}|(?s:.)"
)


def decode_bytes(data):
    """Decode bytes by the table, each byte that belongs to no character as U+FFFD."""
    return "".join(
        "\ufffd" if len(found) == 1 and found > b"\x7f" else found.decode("utf-8", "surrogatepass")
        for found in CHARACTER.findall(data)
    )


@often
@given(data=st.data())
def test_any_ids_decode_to_their_characters_and_replacements(tokenizer, data):
    ids = data.draw(any_ids(tokenizer))
    parts = [bytes([i - 3]) if 3 <= i < 259 else tokenizer.pieces[i - 259] if i >= 259 else "" for i in ids]
    expected, run = "", b""
    for part in [*parts, ""]:
        if isinstance(part, bytes):
            run += part
        else:
            expected, run = expected + decode_bytes(run) + part, b""
    # How many U+FFFD stand for a broken character is nobody's business.
    collapse = re.compile("\ufffd+")
    assert collapse.sub("\ufffd", tokenizer.decode(ids)) == collapse.sub("\ufffd", expected)


@often
@given(data=st.data())
def test_a_stream_never_gives_half_a_character(tokenizer, data):
    text = data.draw(st.text() | han_text)
    seen = ""
    for piece in tokenizer.decode_stream(tokenizer.encode(text)):
        assert piece
        seen += piece
        assert text.startswith(seen)
    assert seen == text


def test_a_stream_gives_a_character_as_soon_as_it_is_complete():
    tokenizer = Tokenizer(["春"])
    text, fed = "龘春é春🐉\ud800", []

    def feed():
        for i in tokenizer.encode(text):
            fed.append(i)
            yield i

    seen = ""
    for piece in tokenizer.decode_stream(feed()):
        seen += piece
        assert fed == tokenizer.encode(seen)
    assert seen == text


def test_a_broken_character_is_not_silently_dropped():
    tokenizer = Tokenizer(["春"])
    half = tokenizer.encode("龘")[:2]
    assert tokenizer.decode(half) == "\ufffd"
    assert tokenizer.decode([*half, 259]) == "\ufffd春"
    assert tokenizer.decode([*half, 2]) == "\ufffd"


@pytest.mark.parametrize("i", [-1, 260])
def test_an_id_outside_the_vocabulary_is_an_error(i):
    message = message_of(ValueError, Tokenizer(["春"]).decode, [259, i])
    assert "0 to 259" in message
    assert f"got {i}" in message


def test_ids_may_be_numpy_integers(tokenizer):
    ids = np.array(tokenizer.encode("春天🐉"), np.int32)
    assert tokenizer.decode(ids) == "春天🐉"


@pytest.mark.parametrize("unit", UNITS)
def test_saved_and_loaded_is_equal(tmp_path, unit):
    tokenizer = Tokenizer.train([*PROSE, '\r\u2028\x00"\\'], unit, user_dict=USER_DICT)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert same(Tokenizer.load(tmp_path / "tokenizer.json"), tokenizer)
    assert "春" in (tmp_path / "tokenizer.json").read_text("utf-8")


def test_the_fingerprint_depends_on_all_that_determines_an_encoding():
    tokenizers = [
        Tokenizer(["春", "眠"]),
        Tokenizer(["眠", "春"]),
        Tokenizer(["春"]),
        Tokenizer(["春", "眠"], "word"),
        Tokenizer(["春", "眠"], "word", ["春眠"]),
    ]
    assert len({tokenizer.fingerprint for tokenizer in tokenizers}) == len(tokenizers)
    assert Tokenizer(("春", "眠")).fingerprint == tokenizers[0].fingerprint


def test_loading_a_missing_file_is_an_error(tmp_path):
    assert "no.json" in message_of(FileNotFoundError, Tokenizer.load, tmp_path / "no.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"1", b"{}", b"\xb4\xba"])
def test_loading_something_else_is_an_error(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    message = message_of(ValueError, Tokenizer.load, tmp_path / "a.json")
    assert "a.json is not a tokenizer" in message


@pytest.mark.parametrize("key", ["format", "version", "unit", "user_dict", "pieces"])
def test_loading_with_a_wrong_or_missing_key_is_an_error(tmp_path, key):
    path = tmp_path / "a.json"
    Tokenizer(["春"]).save(path)
    state = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({k: value for k, value in state.items() if k != key}), "utf-8")
    assert key in message_of(ValueError, Tokenizer.load, path)
    if key in ("format", "version", "unit"):
        path.write_text(json.dumps({**state, key: 2}), "utf-8")
        assert key in message_of(ValueError, Tokenizer.load, path)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("vocab_size", [260, 270, 300])
def test_the_vocabulary_is_as_large_as_asked(unit, vocab_size):
    poems = read_text(shipped_file("tang_quatrains.txt")).split("\n\n")[:50]
    assert Tokenizer.train(poems, unit, vocab_size).vocab_size == vocab_size


def test_the_vocabulary_is_no_larger_than_the_text():
    assert Tokenizer.train(["春眠春"]).pieces == ("春", "眠")


@pytest.mark.parametrize("vocab_size", [259, 1, 0, -5])
def test_a_vocabulary_without_room_is_an_error(vocab_size):
    message = message_of(ValueError, Tokenizer.train, PROSE, vocab_size=vocab_size)
    assert "259" in message
    assert f"got {vocab_size}" in message


def test_an_unknown_unit_is_an_error():
    message = message_of(ValueError, Tokenizer.train, PROSE, "bpe")
    assert "char, word" in message
    assert "'bpe'" in message


@pytest.mark.parametrize("pieces", [["春", "春"], ["春", ""]])
def test_pieces_must_differ_and_not_be_empty(pieces):
    assert "different" in message_of(ValueError, Tokenizer, pieces)


small_corpora = st.lists(st.lists(st.sampled_from(WORDS), max_size=8).map("".join), min_size=1, max_size=4)


@often
@given(small_corpora, st.integers(260, 275))
def test_every_character_of_a_kept_word_is_kept(documents, vocab_size):
    pieces = Tokenizer.train(documents, "word", vocab_size).pieces
    assert {character for piece in pieces for character in piece} <= set(pieces)


@often
@given(small_corpora)
def test_characters_are_ranked_by_frequency_wherever_they_occur(documents):
    counts = Counter("".join(documents))
    for unit in UNITS:
        characters = [piece for piece in Tokenizer.train(documents, unit).pieces if len(piece) == 1]
        assert characters == sorted(counts, key=lambda character: (-counts[character], character))


def test_words_are_ranked_among_the_characters():
    # 江南 stands 3 times as a word, 春 twice, and 天 once.
    assert Tokenizer.train(["江南，江南。江南！春天，春。"], "word").pieces[:5] == ("南", "江", "江南", "。", "春")


@pytest.mark.parametrize("unit", UNITS)
def test_training_is_deterministic(unit):
    shuffled = PROSE * 2
    random.Random(0).shuffle(shuffled)
    assert same(Tokenizer.train(shuffled, unit), Tokenizer.train(iter(PROSE * 2), unit))


@pytest.mark.parametrize("unit", UNITS)
def test_training_text_may_hold_lone_surrogates(tmp_path, unit):
    tokenizer = Tokenizer.train(["春\ud800眠\udfff"], unit)
    assert set(tokenizer.pieces) == {"春", "眠"}
    tokenizer.save(tmp_path / "tokenizer.json")


def framed(tokenizer, documents):
    """Encode documents one by one, as lists."""
    return [[1, *tokenizer.encode(document), 2] for document in documents]


@often
@given(documents=st.lists(st.text() | han_text, max_size=4))
def test_encode_documents_frames_what_encode_gives(tokenizer, documents):
    encoded = list(tokenizer.encode_documents(documents))
    assert [ids.tolist() for ids in encoded] == framed(tokenizer, documents)
    assert all(ids.dtype == np.int32 for ids in encoded)


@seldom
@given(text=surrogate_text)
def test_encode_documents_takes_lone_surrogates(tokenizer, text):
    assert [ids.tolist() for ids in tokenizer.encode_documents([text])] == framed(tokenizer, [text])


def test_encode_documents_keeps_the_order_over_chunks(tokenizer, monkeypatch):
    monkeypatch.setattr(parallel, "_CHUNK_CHARS", 25)
    documents = [*PROSE, "", "龘", *PROSE]
    assert [ids.tolist() for ids in tokenizer.encode_documents(iter(documents))] == framed(tokenizer, documents)


def test_encode_documents_reads_no_more_than_a_chunk_ahead(tokenizer, monkeypatch):
    monkeypatch.setattr(parallel, "_CHUNK_CHARS", 5)
    documents = iter(PROSE)
    next(tokenizer.encode_documents(documents))
    assert next(documents) == PROSE[1]


def test_a_user_dictionary_is_looked_up_once(monkeypatch):
    hashed = []

    class Lines(tuple):
        def __hash__(self):
            hashed.append(1)
            return super().__hash__()

    tokenizer = Tokenizer(["春"], "word", USER_DICT)
    tokenizer.user_dict = Lines(tokenizer.user_dict)
    list(tokenizer.encode_documents(PROSE * 3))
    assert len(hashed) <= 2


def test_two_processes_give_what_one_gives(monkeypatch):
    monkeypatch.setattr(parallel, "_CHUNK_CHARS", 25)
    documents = [*PROSE, "", "龘", *PROSE]
    tokenizer = Tokenizer.train(documents, "word", 300)
    assert same(Tokenizer.train(documents, "word", 300, processes=2), tokenizer)
    encoded = [ids.tolist() for ids in tokenizer.encode_documents(documents, processes=2)]
    assert encoded == framed(tokenizer, documents)


def test_a_user_dictionary_is_used_stored_and_restored(tmp_path):
    path = tmp_path / "user_dict.txt"
    path.write_text("\n".join(USER_DICT), "utf-8")
    tokenizer = Tokenizer.train(PROSE, "word", user_dict=path)
    assert "新的文本" in tokenizer.pieces
    assert "新的文本" not in Tokenizer.train(PROSE, "word").pieces
    tokenizer.save(tmp_path / "tokenizer.json")
    path.unlink()
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.user_dict == USER_DICT
    assert len(loaded.encode("新的文本")) == 1
    assert same(loaded, tokenizer)


@pytest.mark.parametrize("state", [{"pieces": ["春", "\ud800"]}, {"unit": "word", "user_dict": ["春\udfff 3"]}])
def test_a_file_with_surrogates_is_refused(tmp_path, state):
    path = tmp_path / "tokenizer.json"
    Tokenizer(["春"]).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **state}), "utf-8")
    message = message_of(ValueError, Tokenizer.load, path)
    assert "text that UTF-8 can encode, got" in message
    assert message.isascii()
