"""The commands: `aigc-tf demo | train | estimate | tune | evaluate | generate | info`, also as `python -m aigc_tf`.

Each is a thin layer over the Python functions of the same name.
"""

import os
import sys
from pathlib import Path

from .parser import make_parser

_CORPUS = "corpus:"


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None takes the process's own.

    Returns:
        The exit code: 0 done, 2 a wrong option or input (said in one line), 130 stopped by Ctrl-C.
    """
    options = make_parser().parse_args(arguments)
    try:
        _COMMANDS[options.command](options)
        return 0
    except KeyboardInterrupt:
        print("aigc-tf: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get("AIGC_TF_TRACEBACK"):
            raise
        print(f"aigc-tf: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    from .live import printable

    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return printable(" ".join(text.split()).encode("utf-8", "backslashreplace").decode(), sys.stderr)


def _demo(options) -> None:
    from .demo import run_demo

    folder = _new_folder(options.out, "demo")
    run_demo(folder, steps_fraction=options.steps_fraction, seed=options.seed)


def _train(options) -> None:
    from .distribution import use_devices
    from .pipeline import run_pipeline

    if options.devices is not None or options.model_parallel > 1:
        print(use_devices(options.devices or None, model_parallel=options.model_parallel, precision=options.precision))
    folder = _new_folder(options.out, f"{_stem(options)}-{options.model}")
    names = ("checkpoint_minutes", "checkpoint_steps", "keep_checkpoints")
    checkpoints = {name: getattr(options, name) for name in names}
    run_pipeline(_documents(options), folder, **_pipeline_settings(options), **checkpoints)
    print(f"kept in {folder}; write with it: aigc-tf generate {folder} ...")


def _stem(options) -> str:
    return Path(options.paths[0].removeprefix(_CORPUS)).stem


def _documents(options) -> list[str]:
    """Load the files and the named corpora of a command."""
    import warnings

    from .corpora import load_corpus
    from .documents import load_documents

    files = [path for path in options.paths if not path.startswith(_CORPUS)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        documents = load_documents(files, options.field) if files else []
    for warning in caught:
        print(f"aigc-tf: {warning.message}", file=sys.stderr)
    for path in options.paths:
        if path.startswith(_CORPUS):
            documents += load_corpus(path.removeprefix(_CORPUS))
    return list(dict.fromkeys(documents))


def _estimate(options) -> None:
    from .estimation import describe, estimate, memory_warning
    from .text import split
    from .tokenizer import Tokenizer

    documents = _documents(options)
    train_documents, _ = split(documents, options.valid_fraction)
    tokenizer = Tokenizer.train(train_documents, options.unit, options.vocab_size)
    names = ("context", "batch_size", "steps", "num_layers", "num_heads", "hidden_dim", "dropout", "precision",
             "num_candidates")  # fmt: skip
    settings = {"vocab_size": tokenizer.vocab_size, **{name: getattr(options, name) for name in names}}
    if warning := memory_warning(options.model, options.size, **settings):
        print(f"warning: {warning}")
    figures = estimate(options.model, options.size, **settings, seconds=options.seconds, watts=options.watts)
    print(describe(figures))
    if "hours" in figures and "watts" not in figures:
        print("kilowatt hours: this system does not tell its power; name it with --watts")


def _tune(options) -> None:
    from .search_space import DEFAULT_SPACE, parse_space
    from .tuning import describe_trials, tune

    space, fixed = parse_space(options.set)
    space = space or {name: values for name, values in DEFAULT_SPACE.items() if name not in fixed}
    if options.trials is None and options.minutes is None:
        options.trials = 20
    # Always the same folder, as the search goes on there.
    folder = Path(options.out or Path("runs", f"{_stem(options)}-tune"))
    trials = tune(
        _documents(options),
        folder,
        space,
        trials=options.trials,
        minutes=options.minutes,
        **{"seed": options.seed, **fixed},
    )
    print(describe_trials(trials))
    print(f"the best is kept in {folder / 'best'}; write with it: aigc-tf generate {folder / 'best'} ...")


def _pipeline_settings(options) -> dict:
    from .pipeline import SETTINGS

    return {name: value for name, value in vars(options).items() if name in SETTINGS and value is not None}


def _evaluate(options) -> None:
    from .evaluation import evaluate
    from .pipeline import describe_figure
    from .saving import load, read_run
    from .text import split

    run = read_run(options.folder)
    documents = _documents(options)
    if options.held_out:
        documents = split(documents, run.get("settings", {}).get("valid_fraction", 0.05))[1]
    model, tokenizer = load(options.folder)
    for name, value in evaluate(model, tokenizer, documents).items():
        print(describe_figure(name, value))


_PUNCTUATION = "，。、；：？！“”‘’（）《》…—\n"


def _generate(options) -> None:
    from .generation import check_generation, generate, stream
    from .sampler import Settings

    names = {"max_new_tokens", "best_of", "num_beams", "length_penalty", *Settings._fields}
    settings = {name: value for name, value in vars(options).items() if name in names and value is not None}
    if options.exempt:
        from .segmentation import load_stopwords

        settings["exempt"] = load_stopwords(options.exempt) | set(_PUNCTUATION)
    check_generation(**settings)
    if options.num_samples < 1:
        raise ValueError(f"--num-samples must be at least 1, got {options.num_samples}.")
    from .live import printable
    from .saving import load_writer

    model, tokenizer = load_writer(options.folder)
    settings["engine"] = options.engine
    at_once = "best_of" in settings or "num_beams" in settings
    for i in range(options.num_samples):
        if i:
            print()
        seed = None if options.seed is None else options.seed + i
        if at_once:
            print(printable(generate(model, tokenizer, options.prompt, seed=seed, **settings)), end="")
        else:
            for piece in stream(model, tokenizer, options.prompt, seed=seed, **settings):
                print(printable(piece), end="", flush=True)
        print()


def _info(options) -> None:
    import json

    from .saving import read_run, versions

    print(json.dumps(read_run(options.folder) if options.folder else versions(), ensure_ascii=False, indent=1))


def _new_folder(name: str | None, default: str) -> Path:
    """Choose the folder of a run: the one named, or one under runs/; a new one, or one whose training is not done."""
    from .checkpoints import CHECKPOINTS

    def is_free(folder):
        return not folder.exists() or (folder / CHECKPOINTS).is_dir()

    if name is None:
        candidates = [Path("runs", default), *(Path("runs", f"{default}-{i}") for i in range(2, 1000))]
        folder = next(filter(is_free, candidates))
    else:
        folder = Path(name)
        if not is_free(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} exists and is not empty. Name another folder with --out.")
    return folder


_COMMANDS = {
    "demo": _demo,
    "train": _train,
    "estimate": _estimate,
    "tune": _tune,
    "evaluate": _evaluate,
    "generate": _generate,
    "info": _info,
}


if __name__ == "__main__":
    sys.exit(main())
