"""UTF-8: which bytes may follow which in whole characters, and decoding bytes as they come."""

import functools
import re

import numpy as np

SURROGATE = re.compile("[\ud800-\udfff]")  # Python strings may contain them, UTF-8 may not
# A state machine over the bytes of a character. For each state: ranges of bytes (first, last) that may come, and the
# state after them. State 0 is between characters; in states 1 to 3 so many bytes are missing. After E0 and F0 (states 4
# and 6) some bytes would be overlong encodings, after ED (5) surrogates, after F4 (7) beyond the last character.
_STATES = (
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
def transition_tables() -> tuple[np.ndarray, np.ndarray]:
    """Return which bytes may come in each state, and the state after each.

    A byte that may not come, such as half of a surrogate pair in a prompt, starts a new character.

    Returns:
        `bool (8, 256)` and `int8 (8, 256)`.

    Example:
        >>> may_come, after = transition_tables()
        >>> state = after[0, 0xE4]
        >>> int(state), bool(may_come[state, 0xB8]), bool(may_come[state, 0x41])
        (2, True, False)

    Source:
        The Unicode Standard, table 3-7, "Well-formed UTF-8 byte sequences".
    """
    may_come = np.zeros((len(_STATES), 256), bool)
    after = np.zeros((len(_STATES), 256), np.int8)
    for state, ranges in enumerate(_STATES):
        after[state] = after[0]
        for first, last, next_state in ranges:
            may_come[state, first : last + 1] = True
            after[state, first : last + 1] = next_state
    return may_come, after


def complete_characters(data: bytes) -> tuple[str, bytes]:
    """Split bytes into the characters that are complete, and the rest, which may still become one."""
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
