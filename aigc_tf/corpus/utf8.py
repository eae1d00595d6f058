"""UTF-8: which bytes may follow which in whole characters, as tables over what is pending of a character."""

import functools
import re

import numpy as np

SURROGATE = re.compile("[\ud800-\udfff]")  # UTF-8 has none
# By what is pending of a character: the first and last of the bytes that may come, and what is pending after them.
# 0 is nothing, 1 to 3 are so many bytes. After E0, F0 (4, 6) some bytes would spell a character in more of them than it
# needs, after ED (5) half of a surrogate pair, and after F4 (7) what is beyond the last character.
_FOLLOWING = (
    (
        (0x00, 0x7F, 0), (0xC2, 0xDF, 1), (0xE0, 0xE0, 4), (0xE1, 0xEC, 2), (0xED, 0xED, 5), (0xEE, 0xEF, 2),
        (0xF0, 0xF0, 6), (0xF1, 0xF3, 3), (0xF4, 0xF4, 7),
    ),
    ((0x80, 0xBF, 0),),
    ((0x80, 0xBF, 1),),
    ((0x80, 0xBF, 2),),
    ((0xA0, 0xBF, 1),),
    ((0x80, 0x9F, 1),),
    ((0x90, 0xBF, 2),),
    ((0x80, 0x8F, 2),),
)  # fmt: skip


@functools.cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """Return which bytes may come, and what is pending after each, by what is pending before.

    A byte that may not come, such as one of half a surrogate pair in a prompt, begins anew.

    Returns:
        `bool (8, 256)` and `int8 (8, 256)`.

    Example:
        >>> may_come, after = tables()
        >>> pending = after[0, 0xE4]
        >>> int(pending), bool(may_come[pending, 0xB8]), bool(may_come[pending, 0x41])
        (2, True, False)

    Source:
        The Unicode Standard, table 3-7, "Well-formed UTF-8 byte sequences".
    """
    may_come = np.zeros((len(_FOLLOWING), 256), bool)
    after = np.zeros((len(_FOLLOWING), 256), np.int8)
    for pending, ranges in enumerate(_FOLLOWING):
        after[pending] = after[0]
        for first, last, left in ranges:
            may_come[pending, first : last + 1] = True
            after[pending, first : last + 1] = left
    return may_come, after


def complete_characters(data: bytes) -> tuple[str, bytes]:
    """Split bytes into the characters they complete and the rest that may still become one."""
    characters = ""
    while data:
        first = data[0]
        size = 1 if first < 0x80 else 2 if 0xC2 <= first < 0xE0 else 3 if first < 0xF0 else 4
        valid = (first < 0x80 or 0xC2 <= first < 0xF5) and all(0x80 <= b < 0xC0 for b in data[1:size])
        if valid and len(data) < size:
            break
        try:
            characters += data[:size].decode("utf-8", "surrogatepass") if valid else "\ufffd"
        except UnicodeDecodeError:
            valid = False
            characters += "\ufffd"
        data = data[size if valid else 1 :]
    return characters, data
