"""Commands: main() and what each command does, a thin layer over the Python functions of the same names."""

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .inputs import (
    default_run_name,
    name_unseen_characters,
    pipeline_settings,
    read_documents,
    read_prompts,
    read_settings,
)
from .parser import make_parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None takes that of the process.

    Returns:
        The exit code: 0 for success; 2 for a wrong option or input and 1 for another failure, either of which is
        explained in one line; 130 after Ctrl-C.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the shell has closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open until the process ends)
    try:
        parser = make_parser()
        try:
            options = parser.parse_args(arguments)
        except SystemExit:  # after the help, or a wrong option
            sys.stdout.flush()
            raise
        if options.command is None:
            parser.print_help()
            sys.stdout.flush()
            return 0
        if getattr(options, "config", None):
            options = make_parser(read_settings(Path(options.config))).parse_args(arguments)
        _COMMANDS[options.command](options)
        sys.stdout.flush()  # here, where an error is still reported
        return 0
    except KeyboardInterrupt:
        print("aigc-tf: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        _drop_unwritable()
        return 0
    except Exception as error:
        if os.environ.get("AIGC_TF_TRACEBACK"):
            raise
        is_input_error = isinstance(error, ValueError | OSError)
        kind = "" if is_input_error else f"{type(error).__name__}: "
        print(f"aigc-tf: error: {kind}{_one_line(error)}", file=sys.stderr)
        _drop_unwritable()
        return 2 if is_input_error else 1


def _drop_unwritable() -> None:
    """Flush standard output, or drop what it cannot write: Python would try again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(error: Exception) -> str:
    from ..generation.show import printable

    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return printable(" ".join(text.split()).encode("utf-8", "backslashreplace").decode(), sys.stderr)


def _demo(options) -> None:
    from .demo import is_unfinished_demo, run_demo

    def run(folder):
        run_demo(folder, steps_fraction=options.steps_fraction, seed=options.seed)

    _run_in_folder(run, options.out, "demo", is_unfinished_demo)


def _train(options) -> None:
    from ..runs.pipeline import is_unfinished_run, run_pipeline
    from ..runtime.distribution import use_devices

    if options.devices is not None or options.model_parallel > 1:
        print(use_devices(options.devices or None, model_parallel=options.model_parallel, precision=options.precision))
    names = ("checkpoint_minutes", "checkpoint_steps", "keep_checkpoints")
    settings = {**pipeline_settings(options), **{name: getattr(options, name) for name in names}}
    documents = None

    def run(folder):
        nonlocal documents
        documents = documents or read_documents(options)
        run_pipeline(documents, folder, **settings)

    folder = _run_in_folder(run, options.out, f"{default_run_name(options)}-{options.model}", is_unfinished_run)
    print(f"saved in {folder}; generate text with it: aigc-tf generate {folder} ...")


def _estimate(options) -> None:
    from ..corpus.splitting import split
    from ..corpus.tokenizer import Tokenizer
    from ..runs.estimate import estimate, memory_warning
    from ..runs.pipeline import default_steps
    from ..runs.tables import estimate_table

    train_documents, valid_documents = split(read_documents(options), options.valid_fraction)
    tokenizer = Tokenizer.train(train_documents, options.unit, options.vocab_size)
    num_tokens = {
        f"{side}_tokens": sum(map(len, tokenizer.encode_documents(documents)))
        for side, documents in (("train", train_documents), ("valid", valid_documents))
    }
    tokens_per_step = options.context * options.batch_size
    steps = default_steps(num_tokens["train_tokens"], tokens_per_step) if options.steps is None else options.steps
    names = ("context", "batch_size", "num_layers", "num_heads", "hidden_dim", "dropout", "precision",
             "num_candidates")  # fmt: skip
    settings = {name: getattr(options, name) for name in names}
    settings |= {"vocab_size": tokenizer.vocab_size, "steps": steps, **num_tokens}
    if warning := memory_warning(options.model, options.size, **settings):
        print(f"warning: {warning}")
    figures = estimate(options.model, options.size, **settings, seconds=options.seconds, watts=options.watts)
    passes = steps * tokens_per_step / num_tokens["train_tokens"]
    print(f"{num_tokens['train_tokens']:,} tokens to learn from, seen {passes:.3g} times in {steps:,} steps")
    print(estimate_table(figures))
    if "hours" in figures and "watts" not in figures:
        print("energy: unknown, as this system does not report its power; set it with --watts")


def _tune(options) -> None:
    from ..runs.search_space import DEFAULT_SPACE, parse_space
    from ..runs.trials import trials_table
    from ..runs.tune import tune

    space, fixed = parse_space(options.set)
    space = space or {name: values for name, values in DEFAULT_SPACE.items() if name not in fixed}
    if options.trials is None and options.minutes is None:
        options.trials = 20
    # Always the same folder, where the search resumes.
    folder = Path(options.out or Path("runs", f"{default_run_name(options)}-tune"))
    trials = tune(
        read_documents(options),
        folder,
        space,
        trials=options.trials,
        minutes=options.minutes,
        **{"seed": options.seed, **fixed},
    )
    print(trials_table(trials))
    best = folder / "best"
    print(f"the best run is saved in {best}; generate text with it: aigc-tf generate {best} ...")


def _evaluate(options) -> None:
    from ..corpus.splitting import split
    from ..evaluation.bits import evaluate
    from ..runs.folder import load, read_run
    from ..runs.tables import figure_line

    run = read_run(options.folder)
    documents = read_documents(options)
    if options.held_out:
        documents = split(documents, run.get("settings", {}).get("valid_fraction", 0.05))[1]
    model, tokenizer = load(options.folder)
    figures = evaluate(model, tokenizer, documents)
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(figure_line(name, value))


_PUNCTUATION = "，。、；：？！“”‘’（）《》…—\n"


def _generate(options) -> None:
    from ..generation.generate import generate_batch, stream
    from ..generation.settings import Settings, check_generation
    from ..generation.show import as_json, printable

    names = {"max_new_tokens", "stop", "best_of", "num_beams", "length_penalty", *Settings._fields}
    settings = {name: value for name, value in vars(options).items() if name in names and value is not None}
    if options.exempt:
        from ..corpus.segmentation import load_stopwords

        settings["exempt"] = load_stopwords(options.exempt) | set(_PUNCTUATION)
    check_generation(seed=options.seed, **settings)
    if options.num_samples < 1:
        raise ValueError(f"--num-samples must be at least 1, got {options.num_samples}.")
    prompts = [prompt for prompt in read_prompts(options) for _ in range(options.num_samples)]
    from ..runs.folder import load_writer

    model, tokenizer = load_writer(options.folder)
    name_unseen_characters(tokenizer, prompts)
    seed = int.from_bytes(os.urandom(4), "big") if options.seed is None else options.seed
    settings.update(engine=options.engine, seed=seed)
    if len(prompts) == 1 and not options.json and not {"best_of", "num_beams"} & set(settings):
        pieces = stream(model, tokenizer, prompts[0], **settings)
        if options.new_only:
            next(pieces)
        for piece in pieces:
            print(printable(piece), end="", flush=True)
        print()
        return
    texts = generate_batch(model, tokenizer, prompts, log_probability=options.json, **settings)
    for i, text in enumerate(texts):
        if options.json:
            fields = {"prompt": prompts[i], "text": text, "seed": seed + i}
            fields |= {name: getattr(text, name) for name in ("new", "finish_reason", "log_probability")}
            print(as_json(fields))
            continue
        if i:
            print()
        if len(texts) > 1 and sys.stdout.isatty():
            print(f"[{i + 1}]")
        print(printable(text.new if options.new_only else text))


def _info(options) -> None:
    from ..generation.show import as_json, printable
    from ..runs.folder import read_run
    from ..runs.tables import run_table
    from ..runs.versions import versions

    content = read_run(options.folder) if options.folder else versions()
    if options.json:
        print(as_json(content, indent=1))
        return
    print(printable(run_table(content).encode("utf-8", "backslashreplace").decode()))


def _run_in_folder(run: Callable[[Path], None], name: str | None, default: str, is_unfinished) -> Path:
    """Run in the folder that is named, or else in one under `runs/` that is new or to be resumed, and return it."""

    def is_free(folder):
        return not folder.exists() or (folder.is_dir() and (is_unfinished(folder) or not any(folder.iterdir())))

    if name is not None:
        folder = Path(name)
        if not is_free(folder):
            raise FileExistsError(f"{folder} exists and is not empty. Name another folder with --out.")
        run(folder)
        return folder
    for i in itertools.count(1):
        folder = Path("runs", f"{default}-{i}" if i > 1 else default)
        if is_free(folder):
            try:
                run(folder)
                return folder
            except BlockingIOError as error:  # another process runs there
                if error.filename != str(folder):
                    raise
    raise AssertionError("there is always a next name")


_COMMANDS = {
    "demo": _demo,
    "train": _train,
    "estimate": _estimate,
    "tune": _tune,
    "evaluate": _evaluate,
    "generate": _generate,
    "info": _info,
}
