"""Views: surprisal, attention and tables drawn as HTML, which notebooks show."""

import html
import math
import re
from collections.abc import Iterable

import numpy as np

from ..corpus.tokenizer import Tokenizer
from ..models.ngram import Ngram
from ..runtime.backend import keras
from .attention import attention_maps
from .surprisal import group_tokens, surprisal

_SCALE_BITS = 16  # the darkest colour; the same for all models, so that they can be compared
_MAX_MAP_TOKENS = 128  # a larger table can neither be read nor scrolled
# White mixed with one orange: lightness (CIE L*) falls evenly from 100 to 59, and dark text stays readable on it.
_ORANGE = np.array([232, 105, 11])
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # HTML cannot hold these
# Notebooks colour the rows of tables, dark in a dark theme: hence the !important.
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
    """HTML that a notebook renders; everywhere else it is the `str` of its source."""

    def _repr_html_(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"<Html of {len(self):,} characters: a notebook shows it, and it can be written to a file>"


def surprisal_html(model: keras.Model | Ngram, tokenizer: Tokenizer, text: str) -> Html:
    """Draw a text with each piece coloured by its surprisal: white was expected, orange was a surprise.

    The colours mean the same for every model and text, so two models can be compared side by side.

    Args:
        model: see `surprisal`.
        tokenizer: see `surprisal`.
        text: see `surprisal`.

    Returns:
        `Html`, which a notebook shows; hovering over a piece shows its bits and its probability.

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
        f"<p>{_escape(model.name)}: <b>{bits_per_char:.2f} bits per character</b></p>",
        f'<div class="strip" lang="zh">{"".join(spans)}</div>',
    )


def attention_html(model: keras.Model, tokenizer: Tokenizer, text: str, layer: int = 0, head: int = 0) -> Html:
    """Draw one attention head as a table: a row for each position that looks, a column for each it looks at.

    The colours follow the square root of the share, as most shares are small and would all look white.

    Args:
        model: see `attention_maps`.
        tokenizer: see `attention_maps`.
        text: see `attention_maps`; about 30 tokens are easy to read, 127 are the maximum.
        layer: see `attention_maps`.
        head: the number of the head, from 0.

    Returns:
        `Html`, which a notebook shows; hovering over a cell shows its share.

    Raises:
        ValueError: see `attention_maps`; or there is no such head.
    """
    maps = attention_maps(model, tokenizer, text, layer)
    if not 0 <= head < len(maps):
        raise ValueError(f"head must lie from 0 to {len(maps) - 1}, got {head}.")
    if maps.shape[1] > _MAX_MAP_TOKENS:
        raise ValueError(
            f"An attention table shows at most {_MAX_MAP_TOKENS - 1} tokens, got {maps.shape[1] - 1}. "
            "Use a shorter passage, or the numbers of attention_maps."
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
        f"<p>{_escape(model.name)}: <b>block {layer}, head {head}</b></p>",
        '<p class="note">Row: the position that looks, about to predict what follows it. '
        "Column: where it looks. Each row sums to 1.</p>",
        f'<div class="map" lang="zh"><table><thead><tr><th></th>{columns}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>",
    )


def table_html(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Html:
    """Draw a table whose columns line up even with Chinese characters, whose width in plain text varies.

    Args:
        head: the name of each column.
        rows: the cells of each row. The first column is aligned to the left, the others, for figures, to the right.

    Returns:
        `Html`, which a notebook shows.

    Raises:
        ValueError: a row does not have one cell for each column.

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


def _labels(tokenizer: Tokenizer, text: str) -> list[str]:
    """Name the beginning of the document and each token of a text; bytes are numbered within their character."""
    labels = ["BOS"]
    for piece, n in zip(*group_tokens(tokenizer, tokenizer.encode(text)), strict=True):
        shown = ("↵" if piece == "\n" else "␣") if piece.isspace() else piece
        labels += [shown] if n == 1 else [shown + chr(ord("₁") + i) for i in range(n)]
    return labels


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
    """Draw the colour scale, each label on its colour."""
    swatches = (f'<span style="background-color: {_colour(share)}">{label}</span>' for label, share in ticks.items())
    return f'<p class="key">{unit} {"".join(swatches)}</p>'


def _page(*parts: str) -> Html:
    return Html(f'<div class="aigc-tf" lang="en"><style>{_STYLE}</style>{"".join(parts)}</div>')
