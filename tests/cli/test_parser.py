import re
import shlex
import subprocess
import sys

import pytest

from aigc_tf.cli.commands import main
from aigc_tf.cli.parser import make_parser
from aigc_tf.runs.search_space import DEFAULT_SPACE, parse_space


def test_an_unknown_option_value_is_a_usage_error(capsys):
    for arguments in (["train", "x", "--model", "rnn"], ["train", "x", "--unit", "字"], ["nonsense"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert "usage: aigc-tf" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "train", "estimate", "tune", "evaluate", "generate", "info"])
def test_the_example_in_the_help_of_a_command_can_be_parsed(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    out = capsys.readouterr().out
    words = shlex.split(re.search("^Example: aigc-tf (.*)$", out, re.MULTILINE)[1])
    assert make_parser().parse_args(words).command == words[0] == command
    parse_space(getattr(make_parser().parse_args(words), "set", []))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("generate RUN --seed 1 春风", {"folder": "RUN", "seed": 1, "prompt": "春风"}),
        ("generate --seed 1 RUN --frequency-penalty -5 -- -x", {"prompt": "-x", "frequency_penalty": -5.0}),
        ("generate RUN --seed 1", {"folder": "RUN", "prompt": ""}),
        ("train a --model lstm b --steps 3 c", {"paths": ["a", "b", "c"], "model": "lstm", "steps": 3}),
        ("estimate --seconds 1 a --watts 2 b", {"paths": ["a", "b"], "seconds": 1.0}),
        ("tune a --set x=1 b --set y=2", {"paths": ["a", "b"], "set": ["x=1", "y=2"]}),
        ("evaluate RUN --held-out a --json b", {"folder": "RUN", "paths": ["a", "b"], "held_out": True}),
        ("info --json RUN", {"folder": "RUN", "json": True}),
    ],
)
def test_options_may_stand_anywhere(words, expected):
    options = vars(make_parser().parse_args(words.split()))
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize("words", ["generate RUN a --seed 1 b", "evaluate RUN --json", "train --steps 3", "info a b"])
def test_too_many_or_too_few_arguments_are_usage_errors(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert "usage: aigc-tf" in capsys.readouterr().err


def test_help_needs_no_tensorflow_and_names_every_command():
    code = (
        "import sys; from aigc_tf.cli.commands import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'tensorflow', 'keras'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("demo", "train", "estimate", "tune", "evaluate", "generate", "info"):
        assert f"\n    {command}" in done.stdout


def test_the_help_of_tune_names_what_it_searches(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit, match="0"):
        main(["tune", "--help"])
    *names, last = DEFAULT_SPACE
    assert f"(default: search {', '.join(names)} and {last})" in capsys.readouterr().out
