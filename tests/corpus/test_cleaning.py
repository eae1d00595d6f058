"""What cleaning removes and keeps."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aigc_tf.corpus.cleaning import clean

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
def test_a_clean_text_has_one_kind_of_newline_and_no_trailing_blanks(text):
    lines = clean(text).split("\n")
    assert [line for line in lines if line.splitlines() not in ([line], [])] == []
    assert [line for line in lines if line != line.rstrip()] == []
    assert "\n\n\n" not in clean(text)
    assert clean(text) == clean(text).strip("\n")


@often
@given(st.text(st.sampled_from(PUNCTUATION + "春风①㎡℃½ﬁ㈠々〇龘𠮷abcXYZ019.,!?\"'-")))
def test_visible_characters_stay(text):
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
def test_invisible_characters_between_chinese_ones_are_removed(dirt):
    assert clean(f"{dirt}春{dirt}眠{dirt}") == "春眠"


def test_joiners_without_an_emoji_on_both_sides_are_removed():
    assert clean("春\u200d眠") == "春眠"
    assert clean("\U0001f468\u200d春") == "\U0001f468春"
    assert clean("春\u200d\U0001f468") == "春\U0001f468"


def test_joiners_between_digits_are_removed():
    assert clean("1\u200d3\u200d8") == "138"


def test_full_width_letters_and_digits_become_ascii():
    wide = "０１２３４５６７８９ＡＢＣＤＥＦＧＨＩＪＫＬＭＮＯＰＱＲＳＴＵＶＷＸＹＺ"
    wide += "ａｂｃｄｅｆｇｈｉｊｋｌｍｎｏｐｑｒｓｔｕｖｗｘｙｚ"
    assert clean(wide) == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("newline", NEWLINES)
def test_every_newline_becomes_one(newline):
    assert clean(f"春{newline}风") == "春\n风"


def test_trailing_blanks_and_repeated_blank_lines_are_removed_and_indentation_stays():
    assert clean("\n \n　　春　\t\n\n \n　\n风 \n\n") == "　　春\n\n风"


@pytest.mark.parametrize("blank", [" ", "\t", "\u3000", "\n", "\u200b", "\u200d", "\ufe0f", "\U0001f468\u200d", "\r"])
def test_a_long_run_takes_no_longer_than_its_length(blank):
    # In time that grows with the square, a run of 300,000 takes more than an hour.
    begun = time.monotonic()
    clean(f"春{blank * 300_000}风")
    assert time.monotonic() - begun < 30
