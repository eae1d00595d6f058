"""Explanation: what each character cost a model, and where its attention heads look; figures, and views as HTML."""

import html
import math
import re
from collections.abc import Iterable

import numpy as np

from ..corpus.tokenizer import Tokenizer
from ..models.contract import check_model
from ..models.ngram import Ngram
from ..models.weights import LstmWeights, TransformerWeights
from ..runtime.backend import keras
from ..runtime.distribution import predict
from .bits import batches, weights_nats

_SCALE_BITS = 16  # where the colours of a strip end; the same for all models, so that strips can be compared
_MAX_MAP_TOKENS = 128  # a larger table can neither be read nor scrolled
# White mixed with one orange: lightness (CIE L*) falls evenly from 100 to 59, and dark text stays readable on it.
_ORANGE = np.array([232, 105, 11])
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # HTML cannot hold these
# Notebooks stripe and colour the rows of tables, in the dark theme dark: hence the !important.
_STYLE = """
.aigc-tf { background: #fff; color: #111; padding: 14px 16px; border-radius: 6px; font: 15px/1.5 sans-serif; }
.aigc-tf p { margin: 0; }
.aigc-tf .note { color: #555; font-size: 13px; }
.aigc-tf .key { float: right; margin-left: 16px; font-size: 12px; }
.aigc-tf .key span { display: inline-block; min-width: 32px; text-align: center; line-height: 20px; }
.aigc-tf .key span, .aigc-tf .strip span { box-shadow: inset 0 0 0 1px rgba(0, 0, 0, 0.07); }
.aigc-tf .strip { clear: both; margin-top: 10px; font-size: 22px; line-height: 1.9; white-space: break-spaces; }
.aigc-tf .strip span { padding: 3px 2px; margin-right: 2px; border-radius: 3px; }
.aigc-tf .strip .newline::before { content: "↵"; opacity: 0.45; }
.aigc-tf .strip .end { font-size: 12px; padding: 6px 5px; vertical-align: 2px; }
.aigc-tf .map { clear: both; overflow-x: auto; padding-top: 10px; }
.aigc-tf .map table { width: auto; margin: 0; border: 0; border-collapse: separate; border-spacing: 1px; }
.aigc-tf .map thead { border: 0; }
.aigc-tf .map tr { background: #fff !important; }
.aigc-tf .map th { color: #111; border: 0; font-size: 16px; font-weight: normal; line-height: 22px; }
.aigc-tf .map th { padding: 0 5px 0 0; text-align: right; white-space: nowrap; }
.aigc-tf .map thead th { padding: 0 0 4px; vertical-align: bottom; text-align: center; }
.aigc-tf .map .long { writing-mode: vertical-rl; text-align: right; }
.aigc-tf .plain { width: auto; margin: 0; border: 0; border-collapse: collapse; }
.aigc-tf .plain tr { background: #fff !important; }
.aigc-tf .plain th, .aigc-tf .plain td { color: #111; border: 0; padding: 2px 20px 2px 0; text-align: right; }
.aigc-tf .plain :first-child { text-align: left; }
.aigc-tf .map td { padding: 0; border: 0; width: 22px; min-width: 22px; height: 22px; outline: 1px solid #e4e4e4; }
"""


class Html(str):
    """HTML that a notebook shows as what it draws; for everything else it is the `str` of its source."""

    def _repr_html_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"<Html of {len(self):,} characters: a notebook shows it, and it can be written to a file>"


def surprisal(model: keras.Model | Ngram, tokenizer: Tokenizer, text: str) -> list[tuple[str, float]]:
    """Measure how many bits each piece of a text cost a model: -log2 of the probability it gave to it.

    The text is read as one whole document, as `evaluate` reads it: the bits add up to its "bits_per_char"
    times the characters. A piece is a token, or a character with the bits of all its bytes if the vocabulary
    spells it in bytes.

    Args:
        model: ids `int32 (B, T)` to logits `float32 (B, T, V)`, causal; an `Ngram`; or what `aigc_tf.load_writer`
            gives.
        tokenizer: the tokenizer the model was trained with.
        text: the text; it may be longer than the context.

    Returns:
        `list[tuple[str, float]]` of pieces and bits; the pieces joined are the text, and the last one, which
        is empty, is the end of the document.

    Raises:
        ValueError: the text is empty, or model and tokenizer do not belong together.

    Example:
        >>> from aigc_tf.models.networks import lstm
        >>> tokenizer = Tokenizer.train(["春眠不觉晓，"])
        >>> [(piece, round(bits)) for piece, bits in surprisal(lstm(tokenizer.vocab_size, 4), tokenizer, "春晓")]
        [('春', 8), ('晓', 8), ('', 8)]
    """
    check_model(model, tokenizer)
    _check_text(text)
    bits = _nats(model, tokenizer, text) / math.log(2)
    pieces, num_tokens = _pieces(tokenizer, tokenizer.encode(text))
    starts = np.cumsum([0, *num_tokens])
    return list(zip([*pieces, ""], np.add.reduceat(bits, starts).tolist(), strict=True))


def surprisal_html(model: keras.Model | Ngram, tokenizer: Tokenizer, text: str) -> Html:
    """Draw a text with each piece coloured by the bits it cost: white was expected, orange was a surprise.

    The colours mean the same for every model and text: call it for two models to compare them.

    Args:
        model: see `surprisal`.
        tokenizer: see `surprisal`.
        text: see `surprisal`.

    Returns:
        `Html`, which a notebook shows; pointing at a piece tells its bits and its probability.

    Raises:
        ValueError: see `surprisal`.

    Example:
        >>> from aigc_tf.models.networks import lstm
        >>> tokenizer = Tokenizer.train(["春眠不觉晓，"])
        >>> surprisal_html(lstm(tokenizer.vocab_size, 4), tokenizer, "春晓")
        <Html of ... characters: a notebook shows it, and it can be written to a file>
    """
    *pieces, (_, end_bits) = surprisal(model, tokenizer, text)
    bits_per_char = (sum(bits for _, bits in pieces) + end_bits) / len(text)
    spans = [_bits_span(_escape(piece), bits, "newline" if piece == "\n" else "") for piece, bits in pieces]
    spans.append(_bits_span("EOS", end_bits, "end"))
    ticks = {bits: f"{bits}" for bits in range(0, _SCALE_BITS, 4)} | {_SCALE_BITS: f"{_SCALE_BITS}+"}
    return _page(
        _key("bits", {label: bits / _SCALE_BITS for bits, label in ticks.items()}),
        f"<p>{_escape(_name(model))}: <b>{bits_per_char:.2f} bits per character</b></p>",
        f'<div class="strip" lang="zh">{"".join(spans)}</div>',
    )


def attention_maps(model: keras.Model, tokenizer: Tokenizer, text: str, layer: int = 0) -> np.ndarray:
    """Compute where each position of a text looks, in all attention heads of one block.

    Position 0 is begin of document, then come the tokens of the text. Position t has read token t and is
    about to predict token t + 1.

    Args:
        model: a Transformer with attention layers named `block_{i}_attention`, as `transformer` builds it.
        tokenizer: the tokenizer the model was trained with.
        text: the text; begin of document and its tokens must fit into the context.
        layer: the number of the block, from 0.

    Returns:
        `float32 (H, N, N)` for N - 1 tokens of text: in head h, position t gives to position s the share
        `[h, t, s]` of its attention. Rows sum to 1 (under a 16-bit precision policy, nearly), and no
        position looks at a later one.

    Raises:
        ValueError: the text is empty or too long, the model has no such layer, or model and tokenizer do
            not belong together.

    Example:
        >>> from aigc_tf.models.networks import transformer
        >>> tokenizer = Tokenizer.train(["春眠不觉晓，"])
        >>> model = transformer(tokenizer.vocab_size, context=8, num_layers=1)
        >>> attention_maps(model, tokenizer, "春晓").shape
        (4, 3, 3)
    """
    attention = _attention_layer(model, layer)
    check_model(model, tokenizer)
    _check_text(text)
    ids, context = [tokenizer.BOS, *tokenizer.encode(text)], model.input_shape[1]
    if len(ids) > context:
        raise ValueError(
            f"For attention the text must fit into the context, at most {context - 1} tokens, got {len(ids) - 1}. "
            "Take a shorter passage."
        )
    # Padding stands to the right, where a causal model does not look.
    window = np.full((1, context), tokenizer.PAD, np.int32)
    window[0, : len(ids)] = ids
    # The layer gets its input as arrays: called on the graph's own tensors it would leave a trace in the user's model.
    query, value = keras.Model(model.inputs, attention.input)([window], training=False)
    _, scores = attention(query, value, use_causal_mask=True, return_attention_scores=True)
    return keras.ops.convert_to_numpy(keras.ops.cast(scores, "float32"))[0, :, : len(ids), : len(ids)]


def attention_html(model: keras.Model, tokenizer: Tokenizer, text: str, layer: int = 0, head: int = 0) -> Html:
    """Draw one attention head as a table: a row for the position that looks, a column for where it looks.

    The colours follow the square root of the share: most shares are small, and would all look white.

    Args:
        model: see `attention_maps`.
        tokenizer: see `attention_maps`.
        text: see `attention_maps`; about 30 tokens read well, and 127 are the most.
        layer: see `attention_maps`.
        head: the number of the head, from 0.

    Returns:
        `Html`, which a notebook shows; pointing at a cell tells its share.

    Raises:
        ValueError: see `attention_maps`; or there is no such head.
    """
    maps = attention_maps(model, tokenizer, text, layer)
    if not 0 <= head < len(maps):
        raise ValueError(f"head must lie from 0 to {len(maps) - 1}, got {head}.")
    if maps.shape[1] > _MAX_MAP_TOKENS:
        raise ValueError(
            f"An attention table shows at most {_MAX_MAP_TOKENS - 1} tokens, got {maps.shape[1] - 1}. "
            "Take a shorter passage, or the figures of attention_maps."
        )
    labels = _labels(tokenizer, text)
    long = ["long" if len(label) > 1 else "" for label in labels]
    labels = [_escape(label) for label in labels]
    columns = "".join(f'<th scope="col"{_class(c)}>{label}</th>' for label, c in zip(labels, long, strict=True))
    rows = [
        f'<tr><th scope="row">{label}</th>'
        + "".join(
            f'<td style="background-color: {_colour(math.sqrt(share))}" '
            f'title="{label} looks at {labels[s]}: {share:.3f}"></td>'
            for s, share in enumerate(maps[head, t, : t + 1].tolist())
        )
        + "</tr>"
        for t, label in enumerate(labels)
    ]
    return _page(
        _key("share of attention", {f"{share:g}": math.sqrt(share) for share in (0, 0.05, 0.2, 0.5, 1)}),
        f"<p>{_escape(_name(model))}: <b>block {layer}, head {head}</b></p>",
        '<p class="note">Row: the position that looks, about to predict what follows it. '
        "Column: where it looks. Each row sums to 1.</p>",
        f'<div class="map" lang="zh"><table><thead><tr><th></th>{columns}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>",
    )


def table_html(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Html:
    """Draw a table, whose columns line up with Han characters in them too: in plain text they are seldom two wide.

    Args:
        head: the name of each column.
        rows: the cells of each row; the first column stands to the left, the others, figures, to the right.

    Returns:
        `Html`, which a notebook shows.

    Raises:
        ValueError: a row has more or fewer cells than the head.

    Example:
        >>> table_html(["模型", "比特/字"], [["LSTM", "7.10"], ["五元语法", "7.84"]])
        <Html of ... characters: a notebook shows it, and it can be written to a file>
    """
    head, lines = list(head), []
    for row in rows:
        cells = list(row)
        if len(cells) != len(head):
            raise ValueError(f"Each row must have a cell for each of {head}, got {cells}.")
        lines.append("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in cells) + "</tr>")
    names = "".join(f'<th scope="col">{_escape(name)}</th>' for name in head)
    return _page(
        f'<table class="plain" lang="zh"><thead><tr>{names}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    )


def _check_text(text: str) -> None:
    if not text:
        raise ValueError("The text to explain must have at least one character, got ''.")


def _nats(model: keras.Model | Ngram, tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return -log p of each token of a text and of the end of document, `float64` (N + 1,)."""
    if isinstance(model, Ngram):
        return model.nats(next(tokenizer.encode_documents([text])))
    nats = []
    # Window by window through the model itself: it is compiled once for all calls, in the shape that generation
    # uses too. A scorer would be compiled again at every call.
    for inputs, targets, counted in batches(tokenizer, [text], model.input_shape[1], batch_size=1):
        if isinstance(model, TransformerWeights | LstmWeights):
            nats.append(weights_nats(model, inputs, targets)[counted])
            continue
        logits = predict(model, inputs)
        losses = keras.ops.sparse_categorical_crossentropy(targets, logits, from_logits=True)
        nats.append(keras.ops.convert_to_numpy(losses)[counted])
    return np.concatenate(nats, dtype=np.float64)


def _name(model: keras.Model | Ngram) -> str:
    return f"{model.order}-gram" if isinstance(model, Ngram) else model.name


def _pieces(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], list[int]]:
    """Return the pieces that ids spell and the tokens of each: several where bytes make one character."""
    pieces, num_tokens, waiting = [], [], []

    def read():
        for i in ids:
            waiting.append(i)
            yield i

    for piece in tokenizer.decode_stream(read()):
        pieces.append(piece)
        num_tokens.append(len(waiting))
        waiting.clear()
    return pieces, num_tokens


def _labels(tokenizer: Tokenizer, text: str) -> list[str]:
    """Name begin of document and each token of a text; bytes are numbered within their character."""
    labels = ["BOS"]
    for piece, n in zip(*_pieces(tokenizer, tokenizer.encode(text)), strict=True):
        shown = ("↵" if piece == "\n" else "␣") if piece.isspace() else piece
        labels += [shown] if n == 1 else [shown + chr(ord("₁") + i) for i in range(n)]
    return labels


def _attention_layer(model: keras.Model, layer: int) -> keras.layers.Layer:
    if isinstance(model, TransformerWeights | LstmWeights):
        raise ValueError("Attention maps need the model itself, got what load_writer gives. Load it with load.")
    found = {each.name: each for each in getattr(model, "layers", ())}
    num_blocks = sum(re.fullmatch(r"block_\d+_attention", name) is not None for name in found)
    if not num_blocks:
        raise ValueError(
            f"Attention maps need a Transformer, with layers named block_0_attention and so on, got {_name(model)!r}."
        )
    if not 0 <= layer < num_blocks:
        raise ValueError(f"layer must lie from 0 to {num_blocks - 1}, got {layer}.")
    return found[f"block_{layer}_attention"]


def _colour(share: float) -> str:
    """Mix white and `share` of the orange, as #rrggbb."""
    red, green, blue = np.round(255 + (_ORANGE - 255) * min(share, 1.0)).astype(int)
    return f"#{red:02x}{green:02x}{blue:02x}"


def _escape(text: str) -> str:
    return html.escape(_UNPRINTABLE.sub("\ufffd", text))


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _bits_span(content: str, bits: float, css_class: str) -> str:
    return (
        f'<span{_class(css_class)} style="background-color: {_colour(bits / _SCALE_BITS)}" '
        f'title="{bits:.2f} bits, probability {2**-bits:.2g}">{content}</span>'
    )


def _key(unit: str, ticks: dict[str, float]) -> str:
    """Draw the scale: its labels, each on its colour."""
    swatches = (f'<span style="background-color: {_colour(share)}">{label}</span>' for label, share in ticks.items())
    return f'<p class="key">{unit} {"".join(swatches)}</p>'


def _page(*parts: str) -> Html:
    return Html(f'<div class="aigc-tf" lang="en"><style>{_STYLE}</style>{"".join(parts)}</div>')
