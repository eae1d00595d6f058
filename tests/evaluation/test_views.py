"""Views: what a page, a strip of text and a table show."""

import html.parser
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from conftest import message_of, spread

from aigc_tf import (
    Tokenizer,
    attention_html,
    attention_maps,
    evaluate,
    surprisal,
    surprisal_html,
    table_html,
    transformer,
)
from aigc_tf.evaluation.views import Html
from aigc_tf.runtime.backend import keras

T = 16


@pytest.fixture(scope="module")
def model(build, tokenizer):
    return spread(build(tokenizer.vocab_size, T))


@pytest.fixture(scope="module")
def attentive(tokenizer):
    return spread(transformer(tokenizer.vocab_size, T, num_layers=2, num_heads=2, hidden_dim=16))


def uniform_model(vocab_size, context=T):
    ids = keras.Input((context,), dtype="int32")
    return keras.Model(ids, keras.layers.Embedding(vocab_size, vocab_size, embeddings_initializer="zeros")(ids))


def total_bits(model, tokenizer, text):
    return evaluate(model, tokenizer, [text])["bits_per_char"] * len(text)


def strip_of(drawn):
    return ElementTree.fromstring(drawn).find(".//div[@class='strip']").findall("span")


def table_of(drawn):
    return ElementTree.fromstring(drawn).find(".//table")


class Balance(html.parser.HTMLParser):
    """Note the tags that are open, and what was in the page, as a browser reads it."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.data = [], set(), set(), []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] != "style":
            self.data.append(data)


def test_a_strip_of_words_names_the_bits_per_character():
    tokenizer = Tokenizer(["白日", "依山尽"], unit="word", user_dict=["白日", "依山尽"])
    drawn = surprisal_html(uniform_model(tokenizer.vocab_size), tokenizer, "白日依山尽")
    assert f"<b>{3 * math.log2(tokenizer.vocab_size) / 5:.2f} bits per character</b>" in drawn


@pytest.mark.parametrize("draw", [surprisal_html, attention_html])
def test_a_page_is_well_formed_and_self_contained(attentive, tokenizer, draw):
    text = "白<&\">'\x00\ud800日\n"
    drawn = draw(attentive, tokenizer, text)
    page = Balance()
    page.feed(drawn)
    page.close()
    assert page.open == []
    assert page.tags <= {"div", "style", "p", "b", "span", "table", "thead", "tbody", "tr", "th", "td"}
    assert page.attributes <= {"class", "lang", "style", "title", "scope"}  # none that loads or runs
    assert not re.search(r"url\(|@import|https?:", drawn)
    ElementTree.fromstring(drawn)
    drawn.encode("utf-8")
    shown = "".join(page.data)
    assert "<&\">'" in shown.replace(" ", "")
    assert re.search(r'class="(strip|map)" lang="zh"', drawn)


def test_a_strip_holds_the_text_once_and_in_order(model, tokenizer):
    text = "白日 <b>&amp;\"'\n\n　依山🐉尽。\n"
    *spans, end = strip_of(surprisal_html(model, tokenizer, text))
    assert "".join(span.text for span in spans) == text
    assert (end.text, end.get("class")) == ("EOS", "end")
    assert [span.get("class") for span in spans] == ["newline" if piece == "\n" else None for piece in text]
    assert "white-space: break-spaces" in surprisal_html(model, tokenizer, text)  # a browser keeps them too


def test_a_strip_has_a_span_for_each_word():
    tokenizer = Tokenizer.train(["我们的模型会写诗，我们的模型"], unit="word")
    drawn = surprisal_html(uniform_model(tokenizer.vocab_size), tokenizer, "我们的模型，写龘诗")
    assert [span.text for span in strip_of(drawn)] == ["我们", "的", "模型", "，", "写", "龘", "诗", "EOS"]


def test_a_strip_shows_and_colours_the_bits(model, tokenizer):
    text = "白日依山尽。"
    pieces = surprisal(model, tokenizer, text)
    drawn = surprisal_html(model, tokenizer, text)
    spans = strip_of(drawn)
    for (_, bits), span in zip(pieces, spans, strict=True):
        told = re.fullmatch(r"(.+) bits, probability (.+)", span.get("title"))
        assert float(told[1]) == pytest.approx(bits, abs=0.0051)
        assert float(told[2]) == pytest.approx(2**-bits, rel=0.06)
    by_bits = [channels_of(spans[i]) for i in np.argsort([bits for _, bits in pieces])]
    assert by_bits == sorted(by_bits, reverse=True)  # the more bits, the darker
    assert len(set(by_bits)) > 1
    assert f"{total_bits(model, tokenizer, text) / len(text):.2f} bits per character" in drawn
    assert f"<p>{model.name}: " in drawn


def channels_of(element):
    colour = re.fullmatch(r"background-color: #(..)(..)(..)", element.get("style"))
    return tuple(int(channel, 16) for channel in colour.groups())


def test_the_colours_go_from_white_to_one_orange_and_stay_readable(tokenizer):
    model = uniform_model(tokenizer.vocab_size)
    (i,) = tokenizer.encode("白")

    def colour(logit):
        """Draw 白 by a model that gives it this logit, and 0 to all others."""
        logits = np.zeros((tokenizer.vocab_size, tokenizer.vocab_size), np.float32)
        logits[:, i] = logit
        model.layers[-1].embeddings.assign(logits)
        return channels_of(strip_of(surprisal_html(model, tokenizer, "白"))[0])

    assert colour(50.0) == (255, 255, 255)
    assert colour(-50.0) == colour(-100.0)
    assert contrast(colour(-50.0), (0x11, 0x11, 0x11)) > 4.5  # what WCAG asks of text


def contrast(a, b):
    def luminance(channels):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in channels)]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted([luminance(a), luminance(b)])
    return (light + 0.05) / (dark + 0.05)


def test_a_notebook_shows_a_page_and_a_shell_does_not_print_it(model, tokenizer):
    drawn = surprisal_html(model, tokenizer, "白日")
    assert isinstance(drawn, Html)
    assert isinstance(drawn, str)
    assert drawn._repr_html_() == str(drawn) == drawn[:]
    assert len(repr(drawn)) < 100


def test_an_attention_table_has_a_row_and_a_column_for_each_token(attentive, tokenizer):
    text = "白<\n 龘日"
    maps = attention_maps(attentive, tokenizer, text, layer=1)
    drawn = attention_html(attentive, tokenizer, text, layer=1, head=1)
    labels = ["BOS", "白", "<", "↵", "␣", "龘₁", "龘₂", "龘₃", "日"]
    head, *rows = table_of(drawn).iter("tr")
    assert [cell.text for cell in head] == [None, *labels]
    assert [row.find("th").text for row in rows] == labels
    assert [cell.get("class") for cell in head[1:]] == ["long" if len(label) > 1 else None for label in labels]
    for t, row in enumerate(rows):
        cells = row.findall("td")
        assert len(cells) == t + 1
        for s, cell in enumerate(cells):
            assert cell.get("title") == f"{labels[t]} looks at {labels[s]}: {maps[1, t, s]:.3f}"
            assert channels_of(cell)[2] == pytest.approx(255 - 244 * math.sqrt(maps[1, t, s]), abs=0.51)
    assert "<b>block 1, head 1</b>" in drawn
    assert "Row: the position that looks" in drawn


@pytest.mark.parametrize("function", [surprisal, surprisal_html, attention_maps, attention_html])
def test_empty_text_is_refused(attentive, tokenizer, function):
    assert "at least one character" in message_of(ValueError, function, attentive, tokenizer, "")


def test_a_head_that_does_not_exist_is_refused(attentive, tokenizer):
    for head in (-1, 2):
        message = message_of(ValueError, attention_html, attentive, tokenizer, "白", 0, head)
        assert message == f"head must lie from 0 to 1, got {head}."


def test_a_text_longer_than_a_table_is_refused(tokenizer):
    wide = transformer(tokenizer.vocab_size, 200, num_layers=1, num_heads=1, hidden_dim=8)
    attention_html(wide, tokenizer, "白" * 127)
    assert "at most 127 tokens, got 128" in message_of(ValueError, attention_html, wide, tokenizer, "白" * 128)


def test_a_table_holds_its_cells_and_refuses_a_row_of_another_length():
    drawn = table_html(["模型", "比特/字"], [["<LSTM>", "7.10"], ["五元语法", "7.84"]])
    assert isinstance(drawn, Html)
    rows = [[cell.text for cell in row] for row in table_of(drawn).iter("tr")]
    assert rows == [["模型", "比特/字"], ["<LSTM>", "7.10"], ["五元语法", "7.84"]]
    message = message_of(ValueError, table_html, ["模型", "比特/字"], [["LSTM"]])
    assert message == "Each row must have a cell for each of ['模型', '比特/字'], got ['LSTM']."
