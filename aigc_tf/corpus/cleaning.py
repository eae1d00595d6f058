"""Cleaning: clean(), which drops invisible characters and unifies line ends, blanks and full-width letters."""

import re

# Line ends other than "\n", as str.splitlines and editors see them.
_NEWLINE = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
# Zero-width and bidirectional marks, soft hyphen, Hangul fillers, byte order mark, control characters
# except tab and newline, ideographic variation selectors: nothing that a reader sees.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200c\u200e\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\U000e0100-\U000e01ef]"
)
# Inside an emoji, variation selectors and joiners are part of the picture; elsewhere they are noise.
_EMOJI = "#*0-9©®\u203c\u2049\u2100-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"
_STRAY_SELECTOR = re.compile(f"(?<![{_EMOJI}])[\ufe00-\ufe0f]")
# What a joiner may join. Digits take a selector (keycaps) but no joiner.
_JOINED = "\u2190-\u2bff\U0001f000-\U0001faff"
_STRAY_JOINER = re.compile(f"(?<![{_JOINED}\ufe0f])\u200d|\u200d(?![{_JOINED}])")
_FULL_WIDTH = {
    ord(wide): ord(wide) - 0xFEE0
    for first, last in ("０９", "ＡＺ", "ａｚ")
    for wide in map(chr, range(ord(first), ord(last) + 1))
}
# A match starts only at the first blank of a run: tried at each one, a long run within a line takes quadratic time.
_LINE_TAIL = re.compile(r"(?<![^\S\n])[^\S\n]+(?=\n|\Z)")
_BLANK_LINES = re.compile(r"\n{3,}")


def clean(text: str) -> str:
    """Normalise what a reader cannot see, and leave everything else as it is.

    All line ends become "\\n". Blanks at line ends and repeated blank lines are removed, and so are zero-width, control
    and bidirectional characters (joiners inside emoji stay). Full-width letters and digits become ASCII. Unlike Unicode
    NFKC, it leaves Chinese punctuation alone. Cleaning a clean text changes nothing.

    Args:
        text: any string.

    Returns:
        `str`, without newlines at the beginning or end.

    Example:
        >>> clean("\\ufeff２０２６年，ＡＩ写诗！ \\r\\n春风\\u200b。")
        '2026年，AI写诗！\\n春风。'
    """
    text = _INVISIBLE.sub("", text)
    text = _STRAY_JOINER.sub("", _STRAY_SELECTOR.sub("", text))
    text = _NEWLINE.sub("\n", text).translate(_FULL_WIDTH)
    return _BLANK_LINES.sub("\n\n", _LINE_TAIL.sub("", text)).strip("\n")
