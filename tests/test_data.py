"""The text shipped in data/, and the rules of the script that builds it."""

import collections
import hashlib
import importlib.util
import io
import itertools
import json
import re
import sys
import tarfile
from pathlib import Path

import pytest

DATA = Path(__file__).parent.parent / "data"
CORPUS = DATA / "tang_quatrains.txt"
CORPUS_SHA256 = "ed95cc64b4d617fb78ec920ba17cad3c96a9456160af1d8d77f5530458bdc8c5"

# Written out here, not taken from the script: a test must not compare the rules with themselves.
HAN = "[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0002f7ff\U00030000-\U0003ffff]"
QUATRAIN = "|".join(
    rf"{clause}[，！？；]{clause}[。！？；]\n{clause}[，！？；]{clause}[。！？]"
    for clause in (HAN + "{5}", HAN + "{7}")
)
# Frequent in the source, each with a simplified form of its own.
TRADITIONAL = "國風來時無萬聲門開間東馬鳥見長書歸遠過還處飛頭應為爲學話說詩語雲電龍陽陰難雙雞離點齊"


@pytest.fixture(scope="module")
def poems():
    """Return the shipped poems, two lines each."""
    return CORPUS.read_text(encoding="utf-8").removesuffix("\n").split("\n\n")


@pytest.fixture(scope="module")
def build():
    """Return the build script as a module; it must import without OpenCC."""
    spec = importlib.util.spec_from_file_location("build_tang_quatrains", DATA / "build_tang_quatrains.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stopwords(name):
    """Return the lines of a stopword list."""
    return (DATA / name).read_text(encoding="utf-8").removesuffix("\n").split("\n")


def test_corpus_is_the_one_that_was_built():
    assert hashlib.sha256(CORPUS.read_bytes()).hexdigest() == CORPUS_SHA256


def test_corpus_size(poems):
    lengths = collections.Counter(re.search("[，！？；]", poem).start() for poem in poems)
    assert lengths == {5: 3_903, 7: 10_440}
    assert sum(len(poem) - 1 for poem in poems) == 427_752


def test_corpus_every_poem_is_a_quatrain(poems):
    quatrain = re.compile(QUATRAIN)
    assert [poem for poem in poems if not quatrain.fullmatch(poem)] == []


def test_corpus_has_no_duplicates(poems):
    clauses = [re.findall(f"{HAN}+", poem) for poem in poems]
    pairs = collections.Counter(
        pair for poem in clauses for pair in set(map(frozenset, itertools.combinations(poem, 2)))
    )
    assert [set(pair) for pair, count in pairs.items() if count > 1] == []


def test_corpus_has_no_dirt():
    characters = set(CORPUS.read_text(encoding="utf-8"))
    assert {c for c in characters if not re.fullmatch(HAN, c)} == set("\n，。！？；")
    assert characters.isdisjoint("囗")


def test_corpus_is_simplified():
    assert set(CORPUS.read_text(encoding="utf-8")).isdisjoint(TRADITIONAL)


@pytest.mark.parametrize(
    ("name", "count", "words"),
    [
        ("stopwords_cn.txt", 722, "的 了 是 不 我们 因为 所以"),
        ("stopwords_classical.txt", 40, "之 乎 者 也 矣 焉 哉"),
    ],
)
def test_stopwords(name, count, words):
    lines = stopwords(name)
    assert len(lines) == count
    assert lines == sorted(set(lines))
    assert [line for line in lines if not re.fullmatch(f"{HAN}+", line)] == []
    assert set(words.split()) <= set(lines)
    assert set("".join(lines)).isdisjoint(TRADITIONAL)


def test_notice_names_every_file():
    notice = (DATA / "NOTICE.md").read_text(encoding="utf-8")
    files = [path.name for path in DATA.iterdir() if path.suffix in (".py", ".txt")]
    assert len(files) >= 4
    assert [name for name in files if f"`{name}`" not in notice] == []
    assert "Copyright (c) 2016 JackeyGao" in notice
    assert notice.count("Permission is hereby granted, free of charge") == 2


@pytest.mark.parametrize(
    ("paragraphs", "poem"),
    [
        (
            ["白日依山盡，黃河入海流。", "欲窮千里目，更上一層樓。"],
            "白日依山盡，黃河入海流。\n欲窮千里目，更上一層樓。",
        ),
        (["欲別牽郎衣，問郎遊何處？不恨歸日遲，莫向臨邛去。"], "欲別牽郎衣，問郎遊何處？\n不恨歸日遲，莫向臨邛去。"),
        # A variant reading inside a clause.
        (
            ["桃波（一作「陂」）一步地，了了語聲聞。", "闇與山僧別，低頭禮白雲。"],
            "桃波一步地，了了語聲聞。\n闇與山僧別，低頭禮白雲。",
        ),
        # A note over three paragraphs, with a note in it, and the full stop that stays behind.
        (
            ["寒川消積雪，凍浦漸通流。", "日暮人歸盡，沙禽上釣舟。", "（見《英華》（同前）。", "又□集", "）。"],
            "寒川消積雪，凍浦漸通流。\n日暮人歸盡，沙禽上釣舟。",
        ),
        # One character beyond the BMP is one character.
        (
            ["白日依山盡，黃河入海流。", "欲窮千里目，更上一層𪭢。"],
            "白日依山盡，黃河入海流。\n欲窮千里目，更上一層𪭢。",
        ),
    ],
)
def test_clean_keeps(build, paragraphs, poem):
    assert build.clean({"title": "詩", "paragraphs": paragraphs}) == (poem, "")


@pytest.mark.parametrize(
    ("first_couplet", "reason"),
    [
        ("白日依□盡，黃河入海流。", "missing"),
        ("白日依囗盡，黃河入海流。", "missing"),
        ("白日依\ue829盡，黃河入海流。", "missing"),
        ("白日依\ufffd盡，黃河入海流。", "missing"),
        ("白日依山（仙）盡，黃河入海流。", "misread"),
        ("白日依[山]盡，黃河入海流。", "marks"),
        ("白日依《山》盡，黃河入海流。", "marks"),
        ("白日依{山/石}盡，黃河入海流。", "marks"),
        ("白日依山盡〖1〗，黃河入海流。", "marks"),
        ("白日依の盡，黃河入海流。", "marks"),
        ("白日依山盡，黃河入海流（注。", "marks"),
        ("白日依山盡，黃河入大海流。", "form"),
        ("白日依青山盡，黃河入大海流。", "form"),
        ("白日依山，黃河入海。", "form"),
        ("白日依山盡，黃河入海流。白日依山盡，黃河入海流。", "form"),
        ("", "form"),
        ("白日依山盡。黃河入海流。", "punctuated"),
        ("白日依山盡，黃河入海流，", "punctuated"),
        ("白日依山盡、黃河入海流。", "punctuated"),
    ],
)
def test_clean_drops(build, first_couplet, reason):
    poem, why = build.clean({"title": "詩", "paragraphs": [first_couplet, "欲窮千里目，更上一層樓。"]})
    assert poem == ""
    assert reason in why


@pytest.mark.parametrize(
    ("title", "paragraphs", "reason"),
    [
        ("詩", [], "no text"),
        ("詩", ["（同前）。"], "no text"),
        ("詩", ["桃李何處開，此花非我春。"] * 3, "form"),
        ("田園樂", ["桃紅復含宿雨，柳綠更帶朝煙。", "花落家童未掃，鶯啼山客猶眠。"], "form"),
        ("句 二", ["白日依山盡，黃河入海流。", "欲窮千里目，更上一層樓。"], "fragments"),
        ("絕句", ["白日依山盡，黃河入海流。", "欲窮千里目，更上一層樓。"], ""),
    ],
)
def test_clean_looks_at_the_whole_work(build, title, paragraphs, reason):
    poem, why = build.clean({"title": title, "paragraphs": paragraphs})
    assert reason in why
    assert bool(poem) == (not why)


def test_drop_duplicates(build):
    first = "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。"
    exact = "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼？"
    near = "白日依林尽，黄河入江流。\n江山如有待，花柳更无私。"
    one_clause = "白日依山尽，春风动客愁。\n江山如有待，花柳更无私。"
    two_characters = "白云随山尽，黄河天上流。\n床前明月光，疑是地上霜。"
    kept, reasons = build.drop_duplicates([first, exact, near, one_clause, two_characters])
    assert kept == [first, one_clause, two_characters]
    assert reasons == {"exact duplicates": 1, "near duplicates": 1}


def test_read_works_goes_by_number(build, tmp_path):
    archive = tmp_path / "poems.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("poet.tang.10000", "poet.tang.2000", "poet.song.0", "authors.tang"):
            content = json.dumps([{"title": name}]).encode()
            member = tarfile.TarInfo(f"package/dist/quantangshi/{name}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert [work["title"] for work in build.read_works(archive)] == ["poet.tang.2000", "poet.tang.10000"]


def test_another_archive_is_refused(build, tmp_path, monkeypatch):
    (tmp_path / "other.tgz").write_bytes(b"other")
    target = tmp_path / "corpus.txt"
    monkeypatch.setattr(sys, "argv", ["build", str(tmp_path / "other.tgz"), str(target)])
    with pytest.raises(SystemExit, match=f"sha256 .* {build.SHA256}"):
        build.main()
    assert not target.exists()
