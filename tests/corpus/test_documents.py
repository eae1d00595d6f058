"""Documents: what reading gives and refuses, and what it leaves out of folders and says so."""

import gzip
import json
import pathlib
import re
import tracemalloc
import warnings

import pytest
from conftest import message_of
from hypothesis import given
from hypothesis import strategies as st

import aigc_tf
from aigc_tf import Tokenizer, iter_documents, load_documents, make_store
from aigc_tf.corpus import documents
from aigc_tf.corpus.cleaning import clean
from aigc_tf.corpus.documents import LeftOutWarning


def write(path, content):
    """Write text or bytes to a file in a folder that may not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def test_blank_lines_separate_documents(tmp_path):
    file = write(tmp_path / "a.txt", "\n\n春\n风\n\n夏\n\n\n\n秋\n")
    assert load_documents(file) == ["春\n风", "夏", "秋"]


def test_a_blank_line_may_hold_blanks(tmp_path):
    assert load_documents(write(tmp_path / "a.txt", "春\n \t\n夏\n　\n秋")) == ["春", "夏", "秋"]


def test_blank_lines_separate_documents_in_windows_files(tmp_path):
    assert load_documents(write(tmp_path / "a.txt", "春\r\n风\r\n\r\n夏\r\n  \r\n秋\r\n")) == ["春\n风", "夏", "秋"]


def test_a_byte_order_mark_is_not_text(tmp_path):
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
    with pytest.warns(LeftOutWarning, match="^left out: 2 .md$"):
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
    with pytest.warns(LeftOutWarning, match="^left out: 3 duplicates$"):
        assert load_documents(tmp_path) == ["春", "夏", "秋"]


def test_a_missing_file_is_named(tmp_path):
    assert "no.txt" in message_of(FileNotFoundError, load_documents, tmp_path / "no.txt")


def test_a_folder_without_text_is_named(tmp_path):
    write(tmp_path / "poems" / "a.md", "春")
    message = message_of(FileNotFoundError, load_documents, tmp_path / "poems")
    assert "poems contains no .txt or .jsonl file, but 1 .md. Name another" in message


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


def test_the_error_shows_the_type_of_a_field_that_is_not_text(tmp_path):
    message = message_of(ValueError, load_documents, write(tmp_path / "a.jsonl", '{"text": null}\n'))
    assert re.search("null|None", message)


def test_unreadable_files_and_records_of_a_folder_are_left_out_with_a_warning(tmp_path):
    write(tmp_path / "1.txt", "一")
    write(tmp_path / "2.txt", "二".encode("gb18030"))
    write(tmp_path / "3.jsonl", '{"text": "三"}\n{"text": 3}\n{"text": "四"}\n{\n')
    write(tmp_path / "a.docx", b"PK")
    write(tmp_path / "b.docx", b"PK")
    write(tmp_path / "c.csv", "id,text")
    write(tmp_path / "LICENSE", "")
    write(tmp_path / ".hidden.txt", "no")
    write(tmp_path / ".git" / "a.txt", "no")
    write(tmp_path / "__MACOSX" / "._1.txt", b"\x00\xff")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert load_documents(tmp_path) == ["一", "三", "四"]
    (said,) = (str(warning.message) for warning in caught)
    assert caught[0].filename == __file__
    assert said.startswith("left out: 1 without a suffix, 1 .csv, 2 .docx, 1 unreadable file (the first: ")
    assert "2.txt must be UTF-8 text, but byte 0xb6 at offset 0" in said
    assert "2 unreadable records (the first: " in said
    assert "3.jsonl, line 2 must have its text in the field 'text', but has: text (int)" in said
    assert "\n" not in said
    # A file that is named is asked for.
    assert "2.txt" in message_of(ValueError, load_documents, tmp_path / "2.txt")
    assert "line 2" in message_of(ValueError, load_documents, tmp_path / "3.jsonl")


def test_a_folder_of_which_nothing_can_be_read_is_an_error(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.txt", "春眠".encode("gb18030"))
    message = message_of(ValueError, load_documents, tmp_path)
    assert "No text found in" in message
    assert "3 unreadable files (the first: " in message
    assert "iconv -f GB18030" in message


@pytest.mark.parametrize(
    ("content", "what", "way_out"),
    [
        (b"PK\x03\x04\x14\x00\x06\x00\xff", "a ZIP archive, such as .docx", "Save its text as a .txt file"),
        (gzip.compress("春眠不觉晓".encode(), mtime=0), "compressed by gzip", "Unpack"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF", "pdftotext"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", "Save its text"),
        ("春眠不觉晓".encode("utf-16"), "UTF-16", "iconv -f UTF-16"),
        ("\ufeff春眠不觉晓".encode("utf-16-be"), "UTF-16", "iconv -f UTF-16"),
    ],
)
def test_the_error_names_the_kind_of_a_file_that_is_not_text(tmp_path, content, what, way_out):
    message = message_of(ValueError, load_documents, write(tmp_path / "a.txt", content))
    assert f"a.txt must be UTF-8 text, but is {what}" in message
    assert way_out in message
    assert "GB18030" not in message


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.json"])
def test_a_table_is_refused(tmp_path, name):
    message = message_of(ValueError, load_documents, write(tmp_path / name, "id,text\n1,你好\n2,再见"))
    assert name in message
    assert "Write a .jsonl file" in message


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5_000])
def test_a_record_that_cannot_be_parsed_is_named(tmp_path, line):
    assert "a.jsonl, line 1" in message_of(ValueError, load_documents, write(tmp_path / "a.jsonl", line))


parts_of_files = st.sampled_from(["春", "夏", "\n", "\r\n", "\n\n", "\r", " ", "\u200b", "\u3000", "👨\u200d"])


@given(st.lists(parts_of_files, max_size=40), st.integers(1, 7))
def test_blocks_of_a_file_give_the_documents_of_the_whole(tmp_path_factory, parts, block):
    text = "".join(parts)
    file = write(tmp_path_factory.mktemp("blocks") / "a.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_BLOCK", block)
        documents._check_utf8(file)
        read = [document for part in documents._parts(file) for document in clean(part).split("\n\n") if document]
    assert read == [document for document in clean(text).split("\n\n") if document]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 100])
def test_the_wrong_byte_is_found_in_blocks_of_any_size(tmp_path, monkeypatch, block):
    monkeypatch.setattr(documents, "_BLOCK", block)
    for content, offset in ((b"a" + "春眠".encode() + b"\xb4x", 7), ("春眠".encode() + b"\xe6\x98", 6)):
        message = message_of(ValueError, load_documents, write(tmp_path / "a.txt", content))
        assert re.search(rf"at offset {offset}\b", message)


def test_documents_come_one_by_one(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.txt", f"春{i}\n\n夏\n\n秋{i}")
    read = iter_documents(tmp_path)
    assert next(read) == "春0"
    (tmp_path / "1.txt").unlink()  # not read yet
    with pytest.warns(LeftOutWarning, match="1 unreadable file .*1 duplicate$"):
        assert list(read) == ["夏", "秋0", "春2", "秋2"]


def test_a_store_is_filled_from_files(tmp_path):
    write(tmp_path / "texts" / "a.txt", "春眠\n\n不觉晓")
    tokenizer = Tokenizer.train(iter_documents(tmp_path / "texts"))
    store = make_store(iter_documents(tmp_path / "texts"), tokenizer, tmp_path / "store")
    assert tokenizer.decode(store) == "春眠不觉晓"


def test_a_missing_path_is_an_error_before_anything_is_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.txt"):
        iter_documents([write(tmp_path / "a.txt", "春"), tmp_path / "no.txt"])


def test_reading_takes_little_more_memory_than_the_documents(tmp_path):
    file = write(tmp_path / "a.txt", "\n\n".join(f"{i}" + "春眠不觉晓，" * 16 for i in range(10_000)) + "\n\n🐉")
    load_documents(file)
    tracemalloc.start()
    load_documents(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * file.stat().st_size


def test_a_single_text_instead_of_documents_is_refused(tokenizer):
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
            assert f"documents must be a list of texts, got one {type(one).__name__}. Pass [text]" in message
    with pytest.raises(ValueError, match="must be a list of texts"):
        aigc_tf.run_pipeline(text, "never-written")
