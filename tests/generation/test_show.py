import itertools
import sys
import types

import pytest
from conftest import spread

from aigc_tf import Tokenizer, lstm, save, show
from aigc_tf.cli.commands import main
from aigc_tf.generation import show as show_module


def interrupted(pieces):
    yield from pieces
    raise KeyboardInterrupt


def test_texts_are_shown_one_after_another_and_returned(capsys):
    assert show(iter(["白日", "依山尽"]), iter(["黄河"])) == ["白日依山尽", "黄河"]
    assert capsys.readouterr().out == "白日依山尽\n黄河\n"
    assert show() == []


def test_an_interrupt_keeps_what_was_written(capsys):
    assert show(interrupted(["白", "日"]), iter(["黄河"])) == ["白日", ""]
    assert capsys.readouterr().out == "白日\n"


def test_streams_of_any_lengths_are_read_in_turns():
    order = []

    def noted(name, pieces):
        for piece in pieces:
            order.append(name)
            yield piece

    texts = [""] * 3
    for _ in show_module._in_turns([noted(0, "白日"), noted(1, ""), noted(2, "黄河水")], texts):
        pass
    assert texts == ["白日", "", "黄河水"]
    assert order == [0, 2, 0, 2, 2]


def test_a_notebook_shows_any_text_as_it_is():
    shown = show_module._side_by_side(["<b>白</b>\n日", "&"])
    assert "&lt;b&gt;白&lt;/b&gt;\n日" in shown
    assert "<b>" not in shown
    assert "&amp;" in shown
    assert shown.count("white-space: pre-wrap") == 2


@pytest.fixture
def drawn(monkeypatch):
    """What the kernel of a notebook would show, taken where it is handed to IPython, which need not be there."""
    drawn = []

    class Area:
        def update(self, drawing):
            drawn.append(drawing)

    display = types.ModuleType("IPython.display")
    display.HTML, display.display = str, lambda *_, display_id: Area()
    ipython = types.ModuleType("IPython")
    ipython.display = display
    ipython.get_ipython = type("ZMQInteractiveShell", (), {})
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return drawn


def test_a_notebook_draws_while_it_is_written(monkeypatch, drawn):
    monkeypatch.setattr(show_module, "_SECONDS_BETWEEN", 0)
    assert show(iter("白日依")) == ["白日依"]
    assert len(drawn) >= 3
    assert "白日依" in drawn[-1]
    assert "白日依" not in drawn[0]


def test_a_notebook_is_not_drawn_at_every_piece(monkeypatch, drawn):
    now = itertools.count(1.0, show_module._SECONDS_BETWEEN / 10)  # the clock, a tenth of that later at each look
    monkeypatch.setattr(show_module, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    assert show(iter("白日依山尽" * 40), iter("黄")) == ["白日依山尽" * 40, "黄"]
    assert 10 < len(drawn) < 40
    assert "白日依山尽" * 40 in drawn[-1]


def test_what_was_written_is_drawn_where_the_writing_is_interrupted(drawn):
    assert show(interrupted(["白", "日"])) == ["白日"]
    assert "白日" in drawn[-1]


@pytest.mark.parametrize(("shell", "expected"), [("ZMQInteractiveShell", True), ("TerminalInteractiveShell", False)])
def test_a_notebook_is_recognised_by_its_shell(monkeypatch, shell, expected):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))  # which any script may import
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not show_module.in_notebook()
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = type(shell, (), {})
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert show_module.in_notebook() == expected


def test_a_terminal_gets_no_commands(monkeypatch, capsys):
    hostile = "白\x1b]0;title\x07\x9b2J\r\x7f日\u202e依\u2066\t山\n"
    shown = "白\ufffd]0;title\ufffd\ufffd2J\ufffd\ufffd日\ufffd依\ufffd\t山\n"
    assert show(iter([hostile])) == [hostile]
    assert capsys.readouterr().out == hostile + "\n"  # a file gets what was written
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert show(iter(hostile)) == [hostile]
    assert capsys.readouterr().out == shown + "\n"


def test_a_terminal_gets_no_commands_from_messages_and_generate(monkeypatch, capsys, tmp_path):
    for file in (sys.stdout, sys.stderr):
        monkeypatch.setattr(file, "isatty", lambda: True)
    assert main(["info", str(tmp_path / "\x1b[2Jx")]) == 2
    assert "\x1b" not in capsys.readouterr().err
    tokenizer = Tokenizer.train(["白\x1b"])
    save(tmp_path, spread(lstm(tokenizer.vocab_size, 8, hidden_dim=8)), tokenizer)
    for options in ([], ["--best-of", "2"]):
        assert (
            main(["generate", str(tmp_path), "\x1b[2J", "--raw", "--max-new-tokens", "2", "--seed", "0", *options]) == 0
        )
        assert capsys.readouterr().out.startswith("\ufffd[2J")
