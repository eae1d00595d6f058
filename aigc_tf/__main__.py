"""The commands: `aigc-tf demo | train | estimate | tune | evaluate | generate | info`, also as `python -m aigc_tf`.

Each is a thin layer over the Python functions of the same name.
"""

import argparse
import os
import sys
from pathlib import Path

from . import __version__

_CORPUS = "corpus:"


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None takes the process's own.

    Returns:
        The exit code: 0 done, 2 a wrong option or input (said in one line), 130 stopped by Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
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
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()


def _demo(options) -> None:
    from .demo import run_demo

    folder = _new_folder(options.out, "demo")
    run_demo(folder, steps_fraction=options.steps_fraction, seed=options.seed)


def _train(options) -> None:
    from .pipeline import run_pipeline

    folder = _new_folder(options.out, f"{_stem(options)}-{options.model}")
    run_pipeline(_documents(options), folder, **_pipeline_settings(options))
    print(f"kept in {folder}; write with it: aigc-tf generate {folder} ...")


def _stem(options) -> str:
    return Path(options.paths[0].removeprefix(_CORPUS)).stem


def _documents(options) -> list[str]:
    """Load the files and the named corpora of a command."""
    from .corpora import load_corpus
    from .text import load_documents

    files = [path for path in options.paths if not path.startswith(_CORPUS)]
    documents = load_documents(files, options.field) if files else []
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
    names = ("context", "batch_size", "steps", "num_layers", "num_heads", "hidden_dim", "precision")
    settings = {"vocab_size": tokenizer.vocab_size, **{name: getattr(options, name) for name in names}}
    if warning := memory_warning(options.model, options.size, **settings):
        print(f"warning: {warning}")
    figures = estimate(options.model, options.size, **settings, seconds=options.seconds, watts=options.watts)
    print(describe(figures))
    if "hours" in figures and "watts" not in figures:
        print("kilowatt hours: this system does not tell its power; name it with --watts")


def _tune(options) -> None:
    from .tuning import DEFAULT_SPACE, describe_trials, parse_space, tune

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


def _generate(options) -> None:
    from .generation import check_sampling, stream

    sampling = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
    }
    check_sampling(**sampling)
    if options.num_samples < 1:
        raise ValueError(f"--num-samples must be at least 1, got {options.num_samples}.")
    from .saving import load

    model, tokenizer = load(options.folder)
    for i in range(options.num_samples):
        if i:
            print()
        seed = None if options.seed is None else options.seed + i
        for piece in stream(model, tokenizer, options.prompt, seed=seed, **sampling):
            print(piece, end="", flush=True)
        print()


def _info(options) -> None:
    import json

    from .saving import read_run, versions

    print(json.dumps(read_run(options.folder) if options.folder else versions(), ensure_ascii=False, indent=1))


def _new_folder(name: str | None, default: str) -> Path:
    """Choose the folder of a run: the one named, which must be new, or a new one under runs/."""
    if name is None:
        candidates = [Path("runs", default), *(Path("runs", f"{default}-{i}") for i in range(2, 1000))]
        folder = next(path for path in candidates if not path.exists())
    else:
        folder = Path(name)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} exists and is not empty. Name another folder with --out.")
    return folder


class _HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="aigc-tf",
        description="Train language models on Chinese text, measure them, and let them write.",
        epilog="Set AIGC_TF_TRACEBACK=1 to see where an error came from.",
    )
    parser.add_argument("--version", action="version", version=f"aigc_tf {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")

    def add(name, run, help, description):
        command = commands.add_parser(name, help=help, description=description, formatter_class=_HelpWithDefaults)
        command.set_defaults(run=run)
        return command

    demo = add(
        "demo",
        _demo,
        "train both models on the Tang poems that ship with the package, compare them, write poems",
        "Train an LSTM and a Transformer on 14,343 Tang quatrains, a few minutes on two cores; compare their "
        "bits per character on held-out poems with simpler models, an n-gram among them; write poems with both.",
    )
    demo.add_argument("--out", metavar="FOLDER", help="where to keep it: a new folder (default: runs/demo)")
    demo.add_argument("--seed", type=int, default=0, help="the seed of everything")
    demo.add_argument(
        "--steps-fraction", type=float, default=1.0, metavar="F", help="do this share of the training steps"
    )

    train = add(
        "train",
        _train,
        "train a model on your own text",
        "Train a language model on text files, and keep it in a run folder with its tokenizer, its settings "
        "and its figures on held-out documents.",
    )
    _add_paths(train)
    train.add_argument("--out", metavar="FOLDER", help="a new folder for the run (default: one under runs/)")
    _add_model(train)
    train.add_argument("--dropout", type=float, default=0.1, metavar="P", help="dropout in training")
    train.add_argument("--user-dict", metavar="FILE", help="a jieba user dictionary, for --unit word")
    train.add_argument(
        "--remove-stopwords",
        dest="stopwords",
        metavar="LIST",
        help="take stopwords out of the text to learn from: cn, classical or a file (for experiments)",
    )
    train.add_argument("--learning-rate", type=float, default=1e-3, metavar="R", help="the highest learning rate")
    train.add_argument("--weight-decay", type=float, default=0.1, metavar="W", help="weight decay of AdamW")
    train.add_argument("--validations", type=int, default=10, metavar="N", help="evaluations on the held-out side")
    train.add_argument("--seed", type=int, default=0, help="the seed of weights, dropout and order")

    estimate = add(
        "estimate",
        _estimate,
        "tell what a training would cost",
        "Tell what a training would cost: parameters, FLOPs, memory, and after a few seconds of real training steps "
        "on this device hours and kilowatt-hours. Takes the options of train that matter.",
    )
    _add_paths(estimate)
    _add_model(estimate)
    estimate.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="how long to measure; 0 measures nothing"
    )
    estimate.add_argument(
        "--watts", type=float, metavar="W", help="the power of this machine (default: read where the system tells)"
    )

    tune = add(
        "tune",
        _tune,
        "search for settings that predict better",
        "Search for the settings of train with the lowest bits per character on held-out documents. Called again, it "
        "goes on where it was stopped. Needs the extra: pip install 'aigc_tf[tune]'.",
    )
    _add_paths(tune)
    tune.add_argument("--out", metavar="FOLDER", help="the folder of the search (default: one under runs/)")
    tune.add_argument("--trials", type=int, metavar="N", help="trials in all (default: 20, if --minutes is not given)")
    tune.add_argument("--minutes", type=float, metavar="M", help="begin no trial after so many minutes")
    tune.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUES",
        help="low..high to search a range, a,b,c a choice, one value to fix a setting of train; may be repeated",
    )
    tune.add_argument("--seed", type=int, default=0, help="the seed of the proposals and the runs")

    evaluate = add(
        "evaluate",
        _evaluate,
        "measure a model on documents",
        "Measure how well a model predicts documents: bits per character, perplexity, tokens per character.",
    )
    evaluate.add_argument("folder", metavar="RUN", help="a run folder")
    _add_paths(evaluate)
    evaluate.add_argument(
        "--held-out", action="store_true", help="only the documents that the run's own split holds out"
    )

    generate = add("generate", _generate, "write on from a prompt", "Write on from a prompt, shown as it is written.")
    generate.add_argument("folder", metavar="RUN", help="a run folder")
    generate.add_argument("prompt", nargs="?", default="", metavar="PROMPT", help="how the text begins")
    generate.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="tokens to write at the most")
    generate.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0 takes the likeliest token each time"
    )
    generate.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    generate.add_argument(
        "--top-p", type=float, default=0.9, metavar="P", help="choose among the likeliest tokens of this probability"
    )
    generate.add_argument("--num-samples", type=int, default=1, metavar="N", help="how many texts")
    generate.add_argument("--seed", type=int, help="makes the text repeatable (default: another each time)")

    info = add("info", _info, "tell what a run folder holds", "Tell what a run folder holds, as JSON.")
    info.add_argument(
        "folder", nargs="?", metavar="RUN", help="a run folder; without one, the versions in use are told"
    )
    return parser


def _add_paths(command) -> None:
    command.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="text files, folders of .txt and .jsonl files, or corpora by name: corpus:laws, corpus:sanguo, "
        "corpus:tang_quatrains",
    )
    command.add_argument("--field", default="text", metavar="NAME", help="the text's field in .jsonl records")


def _add_model(command) -> None:
    """Add what decides the size of a training."""
    add = command.add_argument
    add("--model", choices=("transformer", "lstm"), default="transformer", help="the architecture")
    add("--size", choices=("tiny", "small", "base"), default="tiny", help="its dimensions")
    add("--num-layers", type=int, metavar="N", help="layers, instead of those of --size")
    add("--hidden-dim", type=int, metavar="N", help="width, instead of that of --size")
    add("--num-heads", type=int, metavar="N", help="attention heads, instead of those of --size")
    add("--unit", choices=("char", "word"), default="char", help="characters, or jieba words too")
    add("--vocab-size", type=int, metavar="N", help="the largest vocabulary (default: 6000 char, 20000 word)")
    add("--valid-fraction", type=float, default=0.05, metavar="F", help="share of held-out documents")
    add("--context", type=int, default=128, metavar="T", help="tokens the model looks back")
    add("--batch-size", type=int, default=16, metavar="B", help="windows in a step")
    add("--steps", type=int, default=2000, metavar="N", help="training steps")
    add(
        "--precision",
        choices=("float32", "mixed_bfloat16", "mixed_float16"),
        default="float32",
        help="the arithmetic; mixed_bfloat16 for GPUs, TPUs and CPUs that have it",
    )


if __name__ == "__main__":
    sys.exit(main())
