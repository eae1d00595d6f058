"""Live: show(), texts on the screen while they are written."""

import html
import json
import re
import sys
import time
from collections.abc import Iterator

# What a terminal would obey, not show: control characters but new lines and tabs, and those that turn the direction.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_ESCAPED = re.compile(f"{_COMMANDS.pattern}|[\ud800-\udfff]")
_SECONDS_BETWEEN = 0.05  # of two drawings in a notebook: more often is not seen, and slows the writing


def show(*streams: Iterator[str]) -> list[str]:
    """Show streams while they are written: in a notebook side by side, in a terminal one after another.

    Ctrl-C, or the notebook's button that interrupts, ends the writing, and what was written is returned.

    Args:
        *streams: what `aigc_tf.stream` gave, or other iterators over `str`.

    Returns:
        `list[str]`, the text of each stream.

    Example:
        >>> texts = show(iter(["春", "眠"]))
        春眠
        >>> texts
        ['春眠']
    """
    texts = [""] * len(streams)
    write = _write_in_notebook if in_notebook() else _write_in_terminal
    try:
        write(streams, texts)
    except KeyboardInterrupt:
        print()
    return texts


def printable(text: str, file=None) -> str:
    """Return a text for a file, by default standard output: where that is a terminal, without commands to it."""
    return _COMMANDS.sub("\ufffd", text) if (file or sys.stdout).isatty() else text


def as_json(content, **layout) -> str:
    """Write content as JSON that a terminal only shows: what it would obey, and what UTF-8 lacks, is escaped."""
    text = json.dumps(content, ensure_ascii=False, **layout)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def in_notebook() -> bool:
    """Tell whether this process runs the cells of a notebook; a script that imports what notebooks need does not."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ in ("ZMQInteractiveShell", "Shell")  # Jupyter's and Colab's


def _write_in_terminal(streams, texts) -> None:
    for i, stream in enumerate(streams):
        for piece in stream:
            texts[i] += piece
            print(printable(piece), end="", flush=True)
        print()


def _write_in_notebook(streams, texts) -> None:
    from IPython.display import HTML, display

    area = display(HTML(""), display_id=True)
    try:
        drawn = 0.0
        for _ in _in_turns(streams, texts):
            if time.monotonic() - drawn > _SECONDS_BETWEEN:
                area.update(HTML(_side_by_side(texts)))
                drawn = time.monotonic()
    finally:
        area.update(HTML(_side_by_side(texts)))


def _in_turns(streams, texts) -> Iterator[None]:
    """Take a piece of each stream in turn and add it to its text."""
    going = dict(enumerate(streams))
    while going:
        for i in list(going):
            try:
                texts[i] += next(going[i])
            except StopIteration:
                del going[i]
            yield


def _side_by_side(texts) -> str:
    column = '<div style="flex: 1 1 12em; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6">{}</div>'
    columns = "".join(column.format(html.escape(text)) for text in texts)
    return f'<div style="display: flex; flex-wrap: wrap; gap: 2em">{columns}</div>'
