"""Draw the picture of the README: what each character of a held-out poem costs an n-gram and a Transformer.

    aigc-tf demo
    python notebooks/surprisal_strip.py runs/demo/transformer

The strips are those of `aigc_tf.surprisal_html`, as an SVG, which a README can show. The result, surprisal.svg, goes
beside this file.
"""

import argparse
import re
from pathlib import Path

import aigc_tf

PICTURE = Path(__file__).with_name("surprisal.svg")
POEM = "众鸟高飞尽，孤云独去闲。\n相看两不厌，只有敬亭山。"  # Li Bai, among the poems held out by `aigc_tf.split`
CELL, ROW, MARGIN = 27, 92, 20
HAN = "'Noto Sans CJK SC', 'Source Han Sans SC', 'PingFang SC', 'Microsoft YaHei', 'WenQuanYi Zen Hei', sans-serif"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="the folder of the demo's Transformer: runs/demo/transformer")
    model, tokenizer = aigc_tf.load(parser.parse_args().run)
    train_poems, held_out = aigc_tf.split(aigc_tf.load_corpus("tang_quatrains"))
    if POEM not in held_out:
        raise SystemExit("The poem is no longer held out: choose another one.")
    ngram = aigc_tf.kneser_ney(train_poems, tokenizer, 5)
    rows = [
        row(number, name, model, tokenizer)
        for number, (name, model) in enumerate((("5-gram, Kneser-Ney", ngram), ("Transformer", model)))
    ]
    width, height = 2 * MARGIN + CELL * (len(POEM) + 1), 2 * ROW + 8
    # A card of its own colour, so that it is read on white and on dark pages.
    PICTURE.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="{HAN}" fill="#111">\n'
        "<title>What each character costs two models, in bits</title>\n"
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" fill="#fff" stroke="#d0d7de"/>\n'
        + "".join(rows)
        + "</svg>\n",
        "utf-8",
    )


def row(number: int, name: str, model, tokenizer) -> str:
    """Draw one strip: the model's name and its bits per character, the pieces on their colours, their bits below."""
    spans = re.findall(
        r'<span[^>]*background-color: (#\w+)" title="([\d.]+) bits[^>]*>([^<]*)<',
        aigc_tf.surprisal_html(model, tokenizer, POEM),
    )
    assert len(spans) == len(POEM) + 1, "one piece for each character, and the end"
    total = sum(float(bits) for _, bits, _ in spans) / len(POEM)
    top = number * ROW
    parts = [
        f'<text x="{MARGIN}" y="{top + 27}" font-size="14">{name}: '
        f'<tspan font-weight="bold">{total:.2f} bits per character</tspan></text>\n'
    ]
    for position, (colour, bits, piece) in enumerate(spans):
        x, middle = MARGIN + position * CELL, MARGIN + (position + 0.5) * CELL
        shown, size = {"\n": ("↵", 16), "EOS": ("EOS", 10)}.get(piece, (piece, 20))
        parts.append(
            f'<rect x="{x + 1}" y="{top + 38}" width="{CELL - 2}" height="34" rx="3" fill="{colour}" '
            'stroke="#000" stroke-opacity="0.08"/>'
            f'<text x="{middle}" y="{top + 55}" dy="0.36em" font-size="{size}" text-anchor="middle">{shown}</text>'
            f'<text x="{middle}" y="{top + 85}" font-size="10" fill="#57606a" text-anchor="middle">'
            f"{float(bits):.1f}</text>\n"
        )
    return "".join(parts)


if __name__ == "__main__":
    main()
