"""Inputs: the documents, prompts and settings that a command is given."""

import os
import sys
from pathlib import Path

from ..runtime.files import not_utf8_error, read_text

_CORPUS = "corpus:"


def read_documents(options) -> list[str]:
    """Load the files and the named corpora that a command is given."""
    import warnings

    from ..corpus.corpora import load_corpus
    from ..corpus.documents import load_documents
    from ..generation.show import printable

    files = [path for path in options.paths if not path.startswith(_CORPUS)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        documents = load_documents(files, options.field) if files else []
    for warning in caught:
        print(f"aigc-tf: {printable(str(warning.message), sys.stderr)}", file=sys.stderr)
    for path in options.paths:
        if path.startswith(_CORPUS):
            documents += load_corpus(path.removeprefix(_CORPUS))
    return list(dict.fromkeys(documents))


def default_run_name(options) -> str:
    """Return the name of a run on the paths of a command: that of the first one."""
    return Path(os.path.abspath(options.paths[0].removeprefix(_CORPUS))).stem  # absolute, or "." would have no name


def read_settings(file: Path) -> dict:
    """Read settings from the `run.json` of a run, or from a JSON file with nothing but settings."""
    from ..runs.search_space import check_settings
    from ..runtime.files import parse_json

    text = read_text(file)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{file} must be JSON: {error}.") from None
    settings = content.get("settings", content) if isinstance(content, dict) else content
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must hold an object of settings, got {type(settings).__name__}.")
    return check_settings(settings)


def pipeline_settings(options) -> dict:
    """Return those options of `train` that are settings of `run_pipeline`, without those that are not given."""
    from ..runs.pipeline import SETTINGS

    return {name: value for name, value in vars(options).items() if name in SETTINGS and value is not None}


def read_prompts(options) -> list[str]:
    """Return the prompts of a command, cleaned as documents are."""
    from ..corpus.cleaning import clean

    if options.prompt_file is None:
        prompts = [options.prompt]
    elif options.prompt:
        raise ValueError("Give a PROMPT or --prompt-file, not both.")
    else:
        # Not splitlines, which also splits at form feeds and the like.
        text = _read_prompt_file(options.prompt_file).replace("\r\n", "\n")
        prompts = text.removesuffix("\n").split("\n") if text else []
    # A line break at the end of a prompt is kept: it begins the next line.
    return prompts if options.raw else [clean(prompt) + "\n" * prompt.endswith("\n") for prompt in prompts]


def _read_prompt_file(file: str) -> str:
    if file != "-":
        return read_text(file)
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8_error("standard input", data, data[error.start], error.start) from None


def name_unseen_characters(tokenizer, prompts: list[str]) -> None:
    """Warn of characters in prompts that are not in the vocabulary."""
    unseen = dict.fromkeys(char for prompt in prompts for char in prompt if tokenizer.piece_id(char) is None)
    if unseen:
        shown = " ".join(char if char.isprintable() else ascii(char) for char in unseen)
        print(f"aigc-tf: this model has never seen {shown}", file=sys.stderr)
