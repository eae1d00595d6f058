"""Text intake: what cleaning removes and keeps, what loading reads and refuses, how documents are split."""

import itertools
import json
import math
import pathlib
import random
import re
import time

import pytest
from conftest import message_of
from hypothesis import given, settings
from hypothesis import strategies as st

import aigc_tf
from aigc_tf import Tokenizer
from aigc_tf.text import clean, load_documents, split

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


def write(path, content):
    """Write text or bytes to a file in a folder that may not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


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


def test_blank_lines_separate_documents(tmp_path):
    file = write(tmp_path / "a.txt", "\n\n春\n风\n\n夏\n\n\n\n秋\n")
    assert load_documents(file) == ["春\n风", "夏", "秋"]


def test_a_blank_line_may_hold_blanks(tmp_path):
    assert load_documents(write(tmp_path / "a.txt", "春\n \t\n夏\n　\n秋")) == ["春", "夏", "秋"]


def test_blank_lines_separate_documents_in_windows_files(tmp_path):
    assert load_documents(write(tmp_path / "a.txt", "春\r\n风\r\n\r\n夏\r\n  \r\n秋\r\n")) == ["春\n风", "夏", "秋"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert load_documents(write(tmp_path / "a.txt", b"\xef\xbb\xbf" + "春".encode())) == ["春"]
    assert load_documents(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + '{"text": "夏"}'.encode())) == ["夏"]


def test_documents_come_out_clean(tmp_path):
    assert load_documents(write(tmp_path / "a.txt", "Ａ\u200b１，")) == ["A1，"]


def test_a_folder_gives_its_text_files_by_name(tmp_path):
    write(tmp_path / "3.jsonl", '{"text": "三"}\n')
    write(tmp_path / "4.TXT", "四")
    write(tmp_path / "1.txt", "一")
    write(tmp_path / "2" / "deep" / "b.txt", "二乙")
    write(tmp_path / "2" / "deep" / "a.txt", "二甲")
    write(tmp_path / "0.md", "零")
    write(tmp_path / "5.txt" / "notes.md", "a folder whose name ends in .txt")
    assert load_documents(tmp_path) == ["一", "二甲", "二乙", "三", "四"]


def test_a_list_of_paths_keeps_its_order(tmp_path):
    first, second = write(tmp_path / "b.txt", "春"), write(tmp_path / "a.md", "夏")
    assert load_documents([str(first), second]) == ["春", "夏"]


def test_a_jsonl_record_is_one_document(tmp_path):
    records = [{"text": "春\n\n风", "id": 1}, {"text": " \n"}, {"text": "夏\u2028雨"}]
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    assert load_documents(write(tmp_path / "a.jsonl", lines)) == ["春\n\n风", "夏\n雨"]


def test_a_jsonl_field_can_be_named(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "题", "body": "文"}\n')
    assert load_documents(file, field="body") == ["文"]


def test_duplicates_are_dropped_and_the_first_stays(tmp_path):
    write(tmp_path / "a.txt", "春\n\n夏\n\n春 ")
    write(tmp_path / "b.jsonl", '{"text": "夏"}\n{"text": "秋"}\n{"text": "\\u200b春"}\n')
    assert load_documents(tmp_path) == ["春", "夏", "秋"]


def test_a_missing_file_is_named(tmp_path):
    assert "no.txt" in message_of(FileNotFoundError, load_documents, tmp_path / "no.txt")


def test_a_folder_without_text_is_named(tmp_path):
    write(tmp_path / "poems" / "a.md", "春")
    assert "poems" in message_of(FileNotFoundError, load_documents, tmp_path / "poems")


@pytest.mark.parametrize("content", ["", "\n \n\n", "\ufeff\u200b"])
def test_a_corpus_without_text_is_an_error(tmp_path, content):
    assert "a.txt" in message_of(ValueError, load_documents, write(tmp_path / "a.txt", content))


def test_no_paths_at_all_is_an_error():
    assert "empty list" in message_of(ValueError, load_documents, [])


@pytest.mark.parametrize(
    ("before", "offset"), [(b"", 0), ("春".encode(), 3), (b"a" * 70_000, 70_000), (b"\xef\xbb\xbfab", 5)]
)
def test_the_first_byte_that_is_not_utf8_is_named(tmp_path, before, offset):
    message = message_of(ValueError, load_documents, write(tmp_path / "a.txt", before + b"\xb4\xba"))
    assert "a.txt" in message
    assert re.search(rf"0xb4 at offset {offset}\b", message)


def test_a_broken_json_line_is_named(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "春"}\n\n{"text": "夏"\n')
    assert "a.jsonl, line 3" in message_of(ValueError, load_documents, file)


def test_a_missing_field_is_named_with_the_fields_there_are(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "春"}\n{"title": "题", "body": "文"}\n')
    message = message_of(ValueError, load_documents, file)
    assert "a.jsonl, line 2" in message
    assert "'text'" in message
    assert re.search("has.*title.*body", message)


def test_a_record_that_is_no_object_is_an_error(tmp_path):
    assert "list" in message_of(ValueError, load_documents, write(tmp_path / "a.jsonl", '["text"]\n'))


def test_a_field_that_holds_no_text_is_not_called_missing(tmp_path):
    message = message_of(ValueError, load_documents, write(tmp_path / "a.jsonl", '{"text": null}\n'))
    assert re.search("null|None", message)


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


@pytest.mark.parametrize("documents", [[], ["春"], ["春", "春"]])
def test_split_of_fewer_than_two_different_documents_offers_no_fraction(documents):
    message = message_of(ValueError, split, documents)
    assert "Choose" not in message
    assert "add text" in message


@pytest.mark.parametrize("valid_fraction", [0.0001, 0.9999])
def test_split_names_a_way_out_that_works(valid_fraction):
    rng, refused = random.Random(0), []
    for i in range(200):
        documents = [f"{i}-{j}" for j in range(rng.randrange(2, 5))]
        message = message_of(ValueError, split, documents, valid_fraction)
        low, high = map(float, re.search(r"above ([\d.e-]+) and up to ([\d.e-]+)", message).groups())
        for fraction in (math.nextafter(low, 1), (low + high) / 2, high):
            try:
                split(documents, fraction)
            except ValueError:
                refused.append((documents, fraction))
    assert refused == []


@pytest.mark.parametrize("blank", [" ", "\t", "\u3000", "\n", "\u200b", "\u200d", "\ufe0f", "\U0001f468\u200d", "\r"])
def test_a_long_run_takes_no_longer_than_its_length(blank):
    # In time that grows with the square, a run of 300,000 takes more than an hour.
    begun = time.monotonic()
    clean(f"春{blank * 300_000}风")
    assert time.monotonic() - begun < 30


def test_one_text_is_not_taken_for_documents(tokenizer):
    text = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"
    model = aigc_tf.lstm(tokenizer.vocab_size, 4, num_layers=1, hidden_dim=8)
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
            lambda text: aigc_tf.baselines(tokenizer, text, [text]),
            lambda text: aigc_tf.baselines(tokenizer, [text], text),
        ):
            message = message_of(ValueError, use, one)
            assert f"documents must be a list of texts, got one {type(one).__name__}. Write [text]" in message
    with pytest.raises(ValueError, match="must be a list of texts"):
        aigc_tf.run_pipeline(text, "never-written")
