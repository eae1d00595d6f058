"""Words: nothing is lost, both cutters agree, nothing leaks, and what stopwords and keywords promise."""

import os
import random
import re
import statistics
import subprocess
import sys

import pytest
from conftest import message_of
from hypothesis import given, settings
from hypothesis import strategies as st

from aigc_tf import Tokenizer
from aigc_tf.corpus import segmentation
from aigc_tf.corpus.segmentation import keywords, load_stopwords, load_user_dict, remove_stopwords, segment
from aigc_tf.runtime.files import read_text, shipped_file

# In jieba's dictionary are neither these words nor, without them, a reading of the texts that has them.
USER_DICT = ("自注意力", "诗云词霸 5 nz")
OTHER_DICT = ("小明 0",)
TEXT = "模型用自注意力，不用诗云词霸。"
COMMON_HAN = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"
    "用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日"
    "春花秋月江山风雨云雪人间流水青白红绿门楼船马酒诗歌梦夜明東語言模型数据训练语言文本生成人工智能"
)
OTHERS = "，。！？：；（）《》“”‘’…—、「」abcxyzABC0123456789 .,-+#&%_/@$'\"\n\r\t\u3000"

often = settings(max_examples=100, deadline=None)
# Lone surrogates are part of "any string": broken JSON escapes bring them in.
any_character = st.characters() | st.characters(categories=["Cs"]) | st.sampled_from(COMMON_HAN + OTHERS)
# A list, because st.text() would weigh the three alphabets by their sizes.
any_text = st.lists(any_character, max_size=30).map("".join)
ordinary_text = st.text(st.sampled_from(COMMON_HAN + OTHERS), max_size=40)


def jieba_cut(text):
    """Cut without the HMM by jieba in Python, whatever else is installed."""
    return segmentation._jieba_tokenizer(()).lcut(text, HMM=False)


@pytest.fixture(scope="module")
def rjieba_cut():
    """Return the cutter in Rust, which the extra `fast` installs."""
    pytest.importorskip("rjieba")
    return segmentation._rust_cut()


@pytest.fixture
def without_rjieba(monkeypatch):
    """Let `import rjieba` fail, and forget that it worked before."""
    monkeypatch.setitem(sys.modules, "rjieba", None)
    segmentation._rust_cut.cache_clear()
    yield
    segmentation._rust_cut.cache_clear()


@pytest.fixture
def user_dict_file(tmp_path):
    """Return a file with the lines of the user dictionary, an empty line among them."""
    path = tmp_path / "user_dict.txt"
    path.write_text("\ufeff" + "\n\n".join(USER_DICT) + "\n", "utf-8")
    return path


@often
@given(any_text)
def test_nothing_is_lost(text):
    assert "".join(segment(text)) == text


@often
@given(any_text)
def test_nothing_is_lost_with_the_hmm(text):
    assert "".join(segment(text, hmm=True)) == text


@often
@given(any_text)
def test_nothing_is_lost_by_jieba_without_the_hmm(text):
    assert "".join(jieba_cut(text)) == text


@often
@given(st.text())
def test_nothing_is_lost_by_rjieba(rjieba_cut, text):
    assert "".join(rjieba_cut(text)) == text


def test_no_word_is_empty():
    assert "" not in segment("春 眠\n\n不，觉  晓")


@often
@given(ordinary_text)
def test_rjieba_cuts_as_jieba(rjieba_cut, text):
    assert list(rjieba_cut(text)) == jieba_cut(text)


def test_rjieba_cuts_the_poems_as_jieba(rjieba_cut):
    poems = random.Random(0).sample(read_text(shipped_file("tang_quatrains.txt")).split("\n\n"), 300)
    assert [poem for poem in poems if list(rjieba_cut(poem)) != jieba_cut(poem)] == []


def test_without_the_hmm_only_words_of_the_dictionary_come_out():
    for user_dict in ((), USER_DICT):
        words = segment("他来到了网易杭研大厦", user_dict=user_dict)
        assert words == ["他", "来到", "了", "网易", "杭", "研", "大厦"]
    assert segment("他来到了网易杭研大厦", hmm=True) == ["他", "来到", "了", "网易", "杭研", "大厦"]


def test_rjieba_is_used_where_it_can_be(rjieba_cut, monkeypatch):
    jieba = segmentation._import_jieba()
    monkeypatch.setattr(jieba.Tokenizer, "cut", lambda self, text, **_: ["jieba"])
    assert segment("我们写诗") == ["我们", "写诗"]
    assert segment("我们写诗", hmm=True) == ["jieba"]
    assert segment("我们写诗", user_dict=USER_DICT) == ["jieba"]


def test_jieba_is_used_without_rjieba(without_rjieba, monkeypatch):
    assert segment("我们在杭研写诗") == ["我们", "在", "杭", "研", "写诗"]
    jieba = segmentation._import_jieba()
    monkeypatch.setattr(jieba.Tokenizer, "cut", lambda self, text, **_: ["jieba"])
    assert segment("我们写诗") == ["jieba"]


def test_everything_is_silent_and_leaves_no_file(tmp_path, capfd):
    # A process of its own, with compiled files of its own, since Python warns only when it compiles.
    code = """if True:
        import aigc_tf.corpus.segmentation as s
        s.segment("春眠不觉晓")
        s.segment("春眠不觉晓", "cn", user_dict=["春眠不觉晓"], hmm=True)
        s.keywords("春眠不觉晓")
    """
    temporary, compiled = tmp_path / "temporary", tmp_path / "compiled"
    temporary.mkdir()
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    environment = {**os.environ, **places, "PYTHONPYCACHEPREFIX": str(compiled)}
    returned = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, check=False).returncode
    assert capfd.readouterr() == ("", "")
    assert returned == 0
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("hmm", [False, True])
def test_a_user_dictionary_is_respected(hmm):
    words = segment(TEXT, user_dict=USER_DICT, hmm=hmm)
    assert words == ["模型", "用", "自注意力", "，", "不用", "诗云词霸", "。"]


def test_a_user_dictionary_can_be_a_file(user_dict_file):
    assert load_user_dict(user_dict_file) == USER_DICT
    assert segment(TEXT, user_dict=str(user_dict_file)) == segment(TEXT, user_dict=USER_DICT)
    assert segment(TEXT, user_dict=user_dict_file) == segment(TEXT, user_dict=list(USER_DICT))


def test_a_text_is_not_taken_for_a_user_dictionary(tmp_path):
    (tmp_path / "text.txt").write_text("春眠不觉晓\n" + "处处闻啼鸟" * 100, "utf-8")
    for user_dict in (tmp_path / "text.txt", ["春眠不觉晓", "处处闻啼鸟" * 100]):
        message = message_of(ValueError, segment, TEXT, user_dict=user_dict)
        assert "at most 200 characters, but one has 500: '处处闻啼鸟处处闻啼鸟" in message
    assert "one has 201" in message_of(ValueError, Tokenizer, [], "word", ["白" * 201])


def test_a_missing_user_dictionary_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.txt"):
        segment(TEXT, user_dict=str(tmp_path / "no.txt"))


@pytest.mark.parametrize("hmm", [False, True])
def test_a_user_dictionary_has_no_effect_on_other_calls(hmm):
    before = segment(TEXT, hmm=hmm)
    assert not {"自注意力", "诗云词霸"} & set(before)
    segment(TEXT, user_dict=USER_DICT, hmm=hmm)
    assert segment(TEXT, hmm=hmm) == before
    assert segment(TEXT, user_dict=OTHER_DICT, hmm=hmm) == before


def test_a_user_dictionary_does_not_reach_jieba_itself():
    jieba = segmentation._import_jieba()
    segment(TEXT, user_dict=USER_DICT)
    assert "自注意力" not in jieba.dt.FREQ
    assert "诗云词霸" not in jieba.dt.user_word_tag_tab


def test_a_word_of_frequency_zero_has_no_effect_on_other_calls():
    # jieba keeps such words in a set that all its tokenizers share.
    jieba = segmentation._import_jieba()
    segment("小明写诗", user_dict=OTHER_DICT, hmm=True)
    assert segment("小明写诗", hmm=True) == ["小明", "写诗"]
    assert "小明" not in jieba.finalseg.Force_Split_Words


def test_words_given_to_jieba_itself_change_nothing(monkeypatch):
    jieba = segmentation._import_jieba()
    monkeypatch.setattr(jieba.dt, "FREQ", {"自注意力": 1_000_000})
    monkeypatch.setattr(jieba.dt, "initialized", True)
    assert "自注意力" not in segment(TEXT)
    assert "自注意力" not in segment(TEXT, hmm=True)


def test_a_jieba_with_other_internals_loads_itself(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where it keeps its cache
    monkeypatch.setattr(segmentation, "_JIEBA_INTERNALS", [*segmentation._JIEBA_INTERNALS, "not_there"])
    words = segmentation._jieba_tokenizer.__wrapped__(USER_DICT).lcut(TEXT, HMM=False)
    assert words == segment(TEXT, user_dict=USER_DICT)
    assert any(tmp_path.iterdir())


def test_jieba_has_the_internals_that_are_used():
    tokenizer = segmentation._import_jieba().Tokenizer()
    assert [name for name in segmentation._JIEBA_INTERNALS if not hasattr(tokenizer, name)] == []
    assert isinstance(segmentation._import_jieba().finalseg.Force_Split_Words, set)


def test_stopwords_can_be_a_set():
    assert segment("我们的模型会写诗。", {"的", "。"}) == ["我们", "模型", "会", "写诗"]


def test_stopwords_can_be_a_list_by_name():
    assert segment("我们的模型不写诗了。", "cn") == ["模型", "写诗", "。"]
    assert "也" not in segment("青山也白头", "classical")


def test_stopwords_can_be_a_file(tmp_path):
    path = tmp_path / "stopwords.txt"
    path.write_text("\ufeff模型\n\n写诗\n", "utf-8")
    assert segment("我们的模型会写诗。", str(path)) == ["我们", "的", "会", "。"]
    assert segment("我们的模型会写诗。", path) == ["我们", "的", "会", "。"]


@pytest.mark.parametrize("name", ["的", "chinese"])
def test_a_string_that_names_no_stopwords_is_an_error(name):
    for use in (segment, remove_stopwords, keywords):
        with pytest.raises(FileNotFoundError) as caught:
            use(["春"] if use is remove_stopwords else "春", stopwords=name)
        message = str(caught.value)
        assert name in message
        assert "cn, classical" in message
        assert "\n" not in message


def test_stopword_lists_load():
    modern, classical = load_stopwords(), load_stopwords("classical")
    assert modern == load_stopwords("cn")
    assert {"的", "不", "我们"} <= modern
    assert "之" in classical
    assert modern != classical
    assert not modern & {"", "模型", "\ufeff"}


def test_stopwords_of_a_file_load(tmp_path):
    (tmp_path / "stopwords.txt").write_text("春\r\n夏\n\n 秋 \n", "utf-8")
    assert load_stopwords(tmp_path / "stopwords.txt") == {"春", "夏", "秋"}
    with pytest.raises(FileNotFoundError, match=r"no\.txt"):
        load_stopwords(tmp_path / "no.txt")


ESSAY = (
    "我们在2026年用TensorFlow训练语言模型，因为语言模型会写诗，而诗人也写诗。\n"
    "没有文本就没有语言模型：文本越多，语言模型写出的诗歌越好。TensorFlow TensorFlow TensorFlow 2026 2026"
)


def test_keywords_are_content_words():
    words = keywords(ESSAY, top_k=100)
    assert {"语言", "模型", "文本", "诗歌"} <= set(words)
    assert [word for word in words if not re.fullmatch("[一-鿿]{2,}", word)] == []
    assert not load_stopwords("cn") & set(words)


def test_keywords_leave_out_the_stopwords_given():
    assert "我们" not in keywords(ESSAY, top_k=100)
    words = keywords(ESSAY, top_k=100, stopwords={"模型"})
    assert "我们" in words
    assert "模型" not in words


def test_keywords_are_the_heaviest_and_descend():
    weights = keywords(ESSAY, top_k=100)
    assert list(weights.values()) == sorted(weights.values(), reverse=True)
    assert min(weights.values()) > 0
    assert list(keywords(ESSAY, top_k=3).items()) == list(weights.items())[:3]
    assert len(keywords(ESSAY, top_k=1)) == 1


def test_keyword_weights_are_term_frequency_times_inverse_document_frequency():
    once, thrice = keywords("诗歌，月亮。"), keywords("诗歌，诗歌，月亮，诗歌。")
    assert thrice["月亮"] == pytest.approx(once["月亮"] * 2 / 4)
    assert thrice["诗歌"] == pytest.approx(once["诗歌"] * 2 * 3 / 4)
    table = segmentation._inverse_document_frequencies()[0]
    assert once == pytest.approx({word: table[word] / 2 for word in ("诗歌", "月亮")})


def test_a_keyword_that_the_table_lacks_takes_its_median():
    table, _ = segmentation._inverse_document_frequencies()
    weights = keywords("自注意力", user_dict=USER_DICT)
    assert weights == pytest.approx({"自注意力": statistics.median(table.values())}, rel=1e-3)


def test_a_text_without_content_words_has_no_keywords():
    assert keywords("") == {}
    assert keywords("的，abc 123") == {}


def test_keywords_refuse_a_top_k_below_one():
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        keywords(ESSAY, top_k=0)


def test_remove_stopwords_says_what_share_of_words_went():
    # 我们 的 模型 写诗 了 。 | 我们 的 | 春天: 5 of the 9 words are stopwords, one document is nothing else.
    documents, share = remove_stopwords(["我们的模型写诗了。", "我们的", "春天"])
    assert documents == ["模型写诗。", "春天"]
    assert share == pytest.approx(5 / 9)


def test_remove_stopwords_takes_a_set_and_a_user_dictionary():
    documents, share = remove_stopwords([TEXT], {"自注意力"}, user_dict=USER_DICT)
    assert documents == ["模型用，不用诗云词霸。"]
    assert share == pytest.approx(1 / 7)


def test_remove_stopwords_without_stopwords_changes_nothing():
    assert remove_stopwords(["我们 的\n模型"], ()) == (["我们 的\n模型"], 0)


@pytest.mark.parametrize("documents", [[], [""]])
def test_without_words_the_share_removed_is_0(documents):
    assert remove_stopwords(documents) == ([], 0)
