"""Show: show(), which displays texts while they are written, and text made safe for a terminal."""

import html
import json
import re
import sys
import time
from collections.abc import Iterator

# What a terminal would obey, not show: control characters except newline and tab, and those that change direction.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_ESCAPED = re.compile(f"{_COMMANDS.pattern}|[\ud800-\udfff]")
_SECONDS_BETWEEN = 0.05  # updates in a notebook: more often is not seen, and slows the writing


def show(*streams: Iterator[str]) -> list[str]:
    """Display streams while they are written: side by side in a notebook, one after another in a terminal.

    Ctrl-C, or the interrupt button of a notebook, ends the writing; what was written up to then is returned.

    Args:
        *streams: what `stream` returned, or other iterators over `str`.

    Returns:
        `list[str]`, the whole text of each stream.

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
    """Return a text to print to a file (default: standard output), without control characters if it is a terminal."""
    return _COMMANDS.sub("\ufffd", text) if (file or sys.stdout).isatty() else text


def as_json(content, **layout) -> str:
    """Write content as JSON, with escapes for control characters and for what UTF-8 cannot encode."""
    text = json.dumps(content, ensure_ascii=False, **layout)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def in_notebook() -> bool:
    """Return whether this process runs the cells of a notebook, not just a script that imports IPython."""
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
    """Take a piece of each stream in turn, and append it to its text."""
    unfinished = dict(enumerate(streams))
    while unfinished:
        for i in list(unfinished):
            try:
                texts[i] += next(unfinished[i])
            except StopIteration:
                del unfinished[i]
            yield


def _side_by_side(texts) -> str:
    column = '<div style="flex: 1 1 12em; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6">{}</div>'
    columns = "".join(column.format(html.escape(text)) for text in texts)
    return f'<div style="display: flex; flex-wrap: wrap; gap: 2em">{columns}</div>'
