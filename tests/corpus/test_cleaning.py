"""Text: what cleaning removes and keeps, and how documents are divided."""

import itertools
import math
import pathlib
import random
import time

import pytest
from conftest import message_of
from hypothesis import given, settings
from hypothesis import strategies as st

import aigc_tf
from aigc_tf import Tokenizer
from aigc_tf.corpus import cleaning as text_room
from aigc_tf.corpus.cleaning import clean, split

PUNCTUATION = "，。！？：；（）《》“”‘’……——、「」"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
RAINBOW_FLAG = "\U0001f3f3\ufe0f\u200d\U0001f308"
SKIN_TONE_ASTRONAUT = "\U0001f469\U0001f3fd\u200d\U0001f680"
HEART_ON_FIRE = "\u2764\ufe0f\u200d\U0001f525"
KEYCAP = "1\ufe0f\u20e3"

# What fights over a place in a text: the order of two rules shows only where both apply.
NEWLINES = ["\r\n", "\r", "\n", "\v", "\f", "\x85", "\u2028", "\u2029"]
BLANKS = [" ", "\t", "\u3000", "\xa0", "\u2009"]
INVISIBLE = ["\u200b", "\u200c", "\u200e", "\u202e", "\u2060", "\ufeff", "\xad", "\x00", "\x1c", "\x1f", "\x7f"]
PICTURES = ["\u200d", "\ufe0e", "\ufe0f", "\U000e0101", "\U0001f468", "\U0001f525", "\u2764", "\u2640", "\u20e3"]
VISIBLE = ["春", "风", "a", "1", "#", "①", "㎡", "。", "，", "２", "Ａ", "ｚ", "！", "é", "e\u0301", "\ud800"]
nasty = st.sampled_from(NEWLINES + BLANKS + INVISIBLE + PICTURES + VISIBLE)
nasty_text = st.lists(nasty | st.characters(), max_size=20).map("".join)

often = settings(max_examples=300, deadline=None)


@often
@given(nasty_text)
def test_cleaning_twice_changes_nothing(text):
    assert clean(clean(text)) == clean(text)


def test_cleaning_twice_changes_nothing_in_any_order_of_rules():
    # Every short string of one character from each rule: random ones seldom have the right three in a row.
    fighters = ["春", "1", "\U0001f468", "\u200d", "\ufe0f", "\u200b", "\r", "\n", "\u3000"]
    texts = map("".join, itertools.product(fighters, repeat=4))
    assert [text for text in texts if clean(clean(text)) != clean(text)] == []


@often
@given(nasty_text)
def test_a_clean_text_has_one_kind_of_newline_and_no_blank_tails(text):
    lines = clean(text).split("\n")
    assert [line for line in lines if line.splitlines() not in ([line], [])] == []
    assert [line for line in lines if line != line.rstrip()] == []
    assert "\n\n\n" not in clean(text)
    assert clean(text) == clean(text).strip("\n")


@often
@given(st.text(st.sampled_from(PUNCTUATION + "春风①㎡℃½ﬁ㈠々〇龘𠮷abcXYZ019.,!?\"'-")))
def test_what_a_reader_sees_stays(text):
    assert clean(text) == text


def test_chinese_punctuation_survives():
    assert clean(PUNCTUATION) == PUNCTUATION


def test_circled_digits_and_squared_units_survive():
    assert clean("①㎡") == "①㎡"


@pytest.mark.parametrize(
    "emoji", [FAMILY, RAINBOW_FLAG, SKIN_TONE_ASTRONAUT, HEART_ON_FIRE, KEYCAP, "\u263a\ufe0f", "\u263a\ufe0e"]
)
def test_emoji_sequences_survive(emoji):
    assert clean(emoji) == emoji
    assert clean(f"春{emoji}风{emoji}") == f"春{emoji}风{emoji}"
    assert clean(emoji.replace("\u200d", "\u200b\u200d")) == emoji


@pytest.mark.parametrize("dirt", [*INVISIBLE, "\u200d", "\ufe0f", "\ufe00", "\U000e0101"])
def test_invisible_characters_between_han_go(dirt):
    assert clean(f"{dirt}春{dirt}眠{dirt}") == "春眠"


def test_joiners_go_where_there_is_no_emoji_on_both_sides():
    assert clean("春\u200d眠") == "春眠"
    assert clean("\U0001f468\u200d春") == "\U0001f468春"
    assert clean("春\u200d\U0001f468") == "春\U0001f468"


def test_joiners_between_digits_go():
    assert clean("1\u200d3\u200d8") == "138"


def test_full_width_letters_and_digits_become_ascii():
    wide = "０１２３４５６７８９ＡＢＣＤＥＦＧＨＩＪＫＬＭＮＯＰＱＲＳＴＵＶＷＸＹＺ"
    wide += "ａｂｃｄｅｆｇｈｉｊｋｌｍｎｏｐｑｒｓｔｕｖｗｘｙｚ"
    assert clean(wide) == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("newline", NEWLINES)
def test_every_newline_becomes_one(newline):
    assert clean(f"春{newline}风") == "春\n风"


def test_blank_tails_and_surplus_blank_lines_go_and_indentation_stays():
    assert clean("\n \n　　春　\t\n\n \n　\n风 \n\n") == "　　春\n\n风"


POEMS = [f"第{i}首" for i in range(100)]
extra_documents = st.lists(st.text(st.characters(), max_size=3), max_size=20)


@often
@given(extra_documents, st.floats(0.1, 0.9), st.integers(0, 9))
def test_split_is_disjoint_complete_and_keeps_the_order(extra, valid_fraction, seed):
    documents = POEMS + extra
    random.Random(seed).shuffle(documents)
    train, valid = split(documents, valid_fraction)
    held_out = set(valid)
    assert held_out.isdisjoint(train)
    assert train == [document for document in documents if document not in held_out]
    assert valid == [document for document in documents if document in held_out]


@often
@given(extra_documents, st.sampled_from([0.1, 0.5]), st.integers(0, 9))
def test_split_is_stable_when_documents_are_added_or_reordered(extra, valid_fraction, seed):
    held_out = set(split(POEMS, valid_fraction)[1])
    documents = POEMS + extra
    random.Random(seed).shuffle(documents)
    assert held_out == set(split(documents, valid_fraction)[1]).intersection(POEMS)


def test_split_is_the_same_in_every_process():
    # Written out, because a hash that is salted once a process is stable within this one.
    assert split(POEMS)[1] == ["第20首", "第23首", "第40首", "第44首", "第50首", "第70首", "第73首"]


@pytest.mark.parametrize("valid_fraction", [0.01, 0.05, 0.3])
def test_split_holds_out_about_the_fraction_asked(valid_fraction):
    _, valid = split([f"第{i}首" for i in range(5_000)], valid_fraction)
    standard_deviation = math.sqrt(5_000 * valid_fraction * (1 - valid_fraction))
    assert abs(len(valid) - 5_000 * valid_fraction) < 4 * standard_deviation


@pytest.mark.parametrize("valid_fraction", [0, 1, -0.1, 1.5, math.nan])
def test_split_refuses_a_fraction_out_of_range(valid_fraction):
    assert "between 0 and 1" in message_of(ValueError, split, POEMS, valid_fraction)


@pytest.mark.parametrize("documents", [[], ["春"], ["春", "春"], ["春" * 10_000]])
def test_split_of_fewer_than_two_different_documents_is_refused(documents):
    message = message_of(ValueError, split, documents)
    assert f"at least two different documents, one to hold out, got {len(set(documents))}" in message
    assert "add text" in message


@pytest.mark.parametrize("valid_fraction", [1e-9, 0.05, 1 - 1e-9])
def test_however_few_documents_both_sides_have_some(valid_fraction):
    for i in range(100):
        documents = [f"{i}-{j}" for j in range(2 + i % 9)] * 2
        train, valid = split(documents, valid_fraction)
        assert train
        assert valid
        assert sorted(train + valid) == sorted(documents)
        assert set(valid).isdisjoint(train)
        # The one that is held out is the one that the smallest fraction to hold out any would hold out.
        if valid_fraction < 1e-6:
            assert len(set(valid)) == 1
            assert set(valid) <= set(split(documents, 0.3)[1])


def test_one_novel_is_divided_at_line_ends():
    novel = "\n".join(f"第{i}段。{'春眠不觉晓，' * (i % 50)}" for i in range(2_000))
    train, valid = split([novel])
    pieces = text_room._pieces(novel)
    assert "\n".join(pieces) == novel
    assert all(len(piece) <= 4_000 for piece in pieces)
    assert sorted(train + valid) == sorted(pieces)
    assert 0 < len(valid) < len(pieces) / 5
    # What is written after it, and other documents, change no side.
    assert set(split([novel + "\n尾声", "春"])[1]) >= set(valid) - {pieces[-1]}


@often
@given(st.text(st.sampled_from("春眠\n"), max_size=60), st.integers(1, 9))
def test_pieces_joined_are_the_document(document, most):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_room, "MOST_CHARS", most)
        pieces = text_room._pieces(document)
    assert "\n".join(pieces) == document
    assert all(len(piece) <= most or "\n" not in piece.lstrip("\n")[:-1] for piece in pieces)
    assert document == "" or "" not in pieces[:-1]


@pytest.mark.parametrize("blank", [" ", "\t", "\u3000", "\n", "\u200b", "\u200d", "\ufe0f", "\U0001f468\u200d", "\r"])
def test_a_long_run_takes_no_longer_than_its_length(blank):
    # In time that grows with the square, a run of 300,000 takes more than an hour.
    begun = time.monotonic()
    clean(f"春{blank * 300_000}风")
    assert time.monotonic() - begun < 30


def test_one_text_is_not_taken_for_documents(tokenizer):
    text = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"
    model = aigc_tf.lstm(tokenizer.vocab_size, 4, num_layers=1, hidden_dim=8)
    data = aigc_tf.make_dataset([text], tokenizer, 4, 1, seed=0)
    for one in (text, text.encode(), pathlib.Path("poems.txt")):
        for use in (
            aigc_tf.split,
            aigc_tf.remove_stopwords,
            Tokenizer.train,
            tokenizer.encode_documents,
            lambda text: aigc_tf.make_store(text, tokenizer),
            lambda text: aigc_tf.make_dataset(text, tokenizer, 4, 1),
            lambda text: aigc_tf.initialise(model, tokenizer, text),
            lambda text: aigc_tf.kneser_ney(text, tokenizer),
            lambda text: aigc_tf.evaluate(model, tokenizer, text),
            lambda text: aigc_tf.train(model, data, tokenizer, text, steps=1),
            lambda text: aigc_tf.baselines(tokenizer, text, [text]),
            lambda text: aigc_tf.baselines(tokenizer, [text], text),
        ):
            message = message_of(ValueError, use, one)
            assert f"documents must be a list of texts, got one {type(one).__name__}. Write [text]" in message
    with pytest.raises(ValueError, match="must be a list of texts"):
        aigc_tf.run_pipeline(text, "never-written")
