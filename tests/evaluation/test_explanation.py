import html.parser
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from conftest import message_of

from aigc_tf import Tokenizer, evaluate, lstm, transformer
from aigc_tf.evaluation.explanation import Html, attention_html, attention_maps, surprisal, surprisal_html, table_html
from aigc_tf.models.ngram import kneser_ney
from aigc_tf.runtime.backend import keras

T = 16


@pytest.fixture(scope="module")
def model(build, tokenizer):
    """A tiny model with weights far from their start, so that its probabilities differ."""
    model = build(tokenizer.vocab_size, T)
    generator = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(variable + 0.3 * generator.standard_normal(variable.shape, np.float32))
    return model


@pytest.fixture(scope="module")
def attentive(tokenizer):
    """A Transformer whose heads prefer some positions to others."""
    model = transformer(tokenizer.vocab_size, T, num_layers=2, num_heads=2, hidden_dim=16)
    generator = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(variable + 0.5 * generator.standard_normal(variable.shape, np.float32))
    return model


def uniform_model(vocab_size, context=T):
    ids = keras.Input((context,), dtype="int32")
    return keras.Model(ids, keras.layers.Embedding(vocab_size, vocab_size, embeddings_initializer="zeros")(ids))


def total_bits(model, tokenizer, text):
    return evaluate(model, tokenizer, [text])["bits_per_char"] * len(text)


def texts():
    """One shorter than the context, one of just its length with the end, one of several windows; then bytes."""
    line = "白日依山尽，黄河入海流。"
    return [line[:5], (line + line)[: T - 1], "\n".join([line] * 5), "白日龘 <b>🐉"]


@pytest.mark.parametrize("text", texts())
def test_the_bits_are_those_of_the_evaluation(model, tokenizer, text):
    pieces = surprisal(model, tokenizer, text)
    assert [piece for piece, _ in pieces] == [*text, ""]
    assert all(type(bits) is float and bits > 0 for _, bits in pieces)
    assert sum(bits for _, bits in pieces) == pytest.approx(total_bits(model, tokenizer, text), abs=1e-4, rel=0)


@pytest.mark.parametrize("text", texts())
def test_the_bits_of_an_ngram_are_those_of_the_evaluation(documents, tokenizer, text):
    ngram = kneser_ney(documents, tokenizer, order=3)
    pieces = surprisal(ngram, tokenizer, text)
    assert "".join(piece for piece, _ in pieces) == text
    assert sum(bits for _, bits in pieces) == pytest.approx(total_bits(ngram, tokenizer, text), abs=1e-4, rel=0)


def test_the_bits_of_each_token_by_hand(model, tokenizer):
    text = "白日依山"
    ids = [tokenizer.BOS, *tokenizer.encode(text), tokenizer.EOS]
    window = np.zeros((1, T), np.int32)
    window[0, : len(ids) - 1] = ids[:-1]
    logits = np.asarray(model.predict_on_batch(window)[0, : len(ids) - 1], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    by_hand = [-log_p[t, ids[t + 1]] / math.log(2) for t in range(len(ids) - 1)]
    np.testing.assert_allclose([bits for _, bits in surprisal(model, tokenizer, text)], by_hand, rtol=1e-4)


def test_what_comes_later_changes_no_bits(model, tokenizer):
    text = "白日依山尽，黄"
    before = surprisal(model, tokenizer, text)
    for t in range(len(text)):
        after = surprisal(model, tokenizer, text[:t] + "月" + text[t + 1 :])
        assert after[:t] == before[:t]
        assert after[t] != before[t]


@pytest.mark.parametrize("length", [4, 3 * T])
def test_a_uniform_model_gives_each_token_log2_v_bits(tokenizer, length):
    pieces = surprisal(uniform_model(tokenizer.vocab_size), tokenizer, "白" * length)
    assert len(pieces) == length + 1
    assert [bits for _, bits in pieces] == pytest.approx([math.log2(tokenizer.vocab_size)] * (length + 1))


def test_the_bits_of_bytes_go_to_their_character(tokenizer):
    text = "白龘\ufffd🐉<\ud800\udc00"
    bits_per_token = math.log2(tokenizer.vocab_size)
    pieces = surprisal(uniform_model(tokenizer.vocab_size), tokenizer, text)
    assert [piece for piece, _ in pieces] == [*text, ""]
    assert [bits / bits_per_token for _, bits in pieces] == pytest.approx([1, 3, 3, 4, 1, 3, 3, 1])


def test_a_word_is_one_piece():
    tokenizer = Tokenizer.train(["我们的模型会写诗，我们的模型"], unit="word")
    text = "我们的模型，写龘诗"
    pieces = surprisal(uniform_model(tokenizer.vocab_size), tokenizer, text)
    assert [piece for piece, _ in pieces] == ["我们", "的", "模型", "，", "写", "龘", "诗", ""]
    assert sum(bits for _, bits in pieces) / math.log2(tokenizer.vocab_size) == pytest.approx(10)
    drawn = surprisal_html(uniform_model(tokenizer.vocab_size), tokenizer, text)
    assert [span.text for span in strip_of(drawn)] == ["我们", "的", "模型", "，", "写", "龘", "诗", "EOS"]


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


@pytest.mark.parametrize("draw", [surprisal_html, attention_html])
def test_a_page_is_whole_and_needs_nothing_else(attentive, tokenizer, draw):
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


def test_a_strip_tells_and_colours_the_bits(model, tokenizer):
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


def scores_by_hand(model, tokenizer, text, layer):
    """softmax(Q K^T / sqrt d) with the layer's kernels, on what the layer's norm gives."""
    ids = [tokenizer.BOS, *tokenizer.encode(text)]
    window = np.zeros((1, T), np.int32)
    window[0, : len(ids)] = ids
    norm = keras.Model(model.inputs, model.get_layer(f"block_{layer}_attention_norm").output)
    x = np.asarray(norm.predict_on_batch(window), np.float64)[0, : len(ids)]
    attention = model.get_layer(f"block_{layer}_attention")
    query, key = (
        np.einsum("td,dhk->htk", x, np.asarray(dense.kernel, np.float64)) + np.asarray(dense.bias)[:, None]
        for dense in (attention.query_dense, attention.key_dense)
    )
    scores = query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1])
    scores[:, ~np.tri(len(ids), dtype=bool)] = -np.inf
    p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("text", ["白", "白日依山尽，黄", texts()[1]])
def test_attention_is_that_of_the_weights(attentive, tokenizer, text, layer):
    maps = attention_maps(attentive, tokenizer, text, layer)
    n = len(text) + 1
    assert (maps.shape, maps.dtype) == ((2, n, n), np.float32)
    by_hand = scores_by_hand(attentive, tokenizer, text, layer)
    np.testing.assert_allclose(maps, by_hand, atol=1e-5)
    np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-6)
    assert (maps[:, ~np.tri(n, dtype=bool)] == 0).all()
    # The weights are such that a wrong block, head or scale would show.
    assert n == 2 or np.abs(by_hand[0] - by_hand[1]).max() > 0.05
    assert n == 2 or np.abs(by_hand - scores_by_hand(attentive, tokenizer, text, 1 - layer)).max() > 0.05


def test_attention_does_not_depend_on_dropout_or_on_what_comes_later(tokenizer):
    model = transformer(tokenizer.vocab_size, T, num_layers=1, num_heads=2, hidden_dim=16, dropout=0.5)
    maps = attention_maps(model, tokenizer, "白日依山")
    np.testing.assert_array_equal(attention_maps(model, tokenizer, "白日依山"), maps)
    np.testing.assert_allclose(attention_maps(model, tokenizer, "白日依"), maps[:, :4, :4], atol=1e-6)


def test_attention_leaves_the_model_as_it_was(attentive, tokenizer):
    nodes = [len(layer._inbound_nodes) for layer in attentive.layers]
    attention_maps(attentive, tokenizer, "白日", layer=1)
    assert [len(layer._inbound_nodes) for layer in attentive.layers] == nodes


def test_attention_under_mixed_precision(tokenizer):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = transformer(tokenizer.vocab_size, T, num_layers=1, num_heads=2, hidden_dim=16)
    finally:
        keras.config.set_dtype_policy("float32")
    maps = attention_maps(model, tokenizer, "白日依山")
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=0.02)


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


def test_a_model_of_another_vocabulary_is_refused(tokenizer):
    other = transformer(tokenizer.vocab_size + 1, T, num_layers=1, num_heads=1, hidden_dim=8)
    for function in (surprisal, attention_maps):
        assert "same vocabulary size" in message_of(ValueError, function, other, tokenizer, "白")


def test_what_has_no_such_attention_is_said(documents, attentive, tokenizer):
    recurrent = lstm(tokenizer.vocab_size, T, num_layers=1, hidden_dim=8)
    for other, name in ((recurrent, "'lstm'"), (kneser_ney(documents, tokenizer, order=2), "'2-gram'")):
        message = message_of(ValueError, attention_maps, other, tokenizer, "白")
        assert "need a Transformer" in message
        assert name in message
    for layer in (-1, 2):
        message = message_of(ValueError, attention_maps, attentive, tokenizer, "白", layer)
        assert message == f"layer must lie from 0 to 1, got {layer}."
    for head in (-1, 2):
        message = message_of(ValueError, attention_html, attentive, tokenizer, "白", 0, head)
        assert message == f"head must lie from 0 to 1, got {head}."


def test_attention_is_for_texts_that_fit(attentive, tokenizer):
    assert attention_maps(attentive, tokenizer, "白" * (T - 1)).shape == (2, T, T)
    message = message_of(ValueError, attention_maps, attentive, tokenizer, "白" * T)
    assert f"at most {T - 1} tokens, got {T}" in message
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
