"""The command line: make_parser(), the commands and their options."""

import argparse
import os

from .. import __version__


class _HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        has_default = action.default is not None and action.default is not False and action.default != []
        return super()._get_help_string(action) if has_default else action.help


class _Command(argparse.ArgumentParser):
    """The parser of one command: options may stand before, between and after what has no name."""

    _is_intermixed = False

    def parse_known_args(self, args=None, namespace=None):
        if self._is_intermixed:  # as the method below calls this one
            return super().parse_known_args(args, namespace)
        self._is_intermixed = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_intermixed = False


def make_parser(train_settings: dict | None = None) -> argparse.ArgumentParser:
    """Describe the commands and their options; `command` is the name of the one given.

    Args:
        train_settings: the defaults of `train`, by the names of `run_pipeline`, where they are not the usual ones.
    """
    parser = argparse.ArgumentParser(
        prog="aigc-tf",
        description="Train language models on Chinese text, measure them, and let them write.",
        epilog="Set AIGC_TF_TRACEBACK=1 to see where an error came from.",
    )
    parser.add_argument("--version", action="version", version=f"aigc_tf {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", parser_class=_Command)

    def add(name, help, description, example):
        return commands.add_parser(
            name,
            help=help,
            description=description,
            epilog=f"Example: aigc-tf {name} {example}".rstrip(),
            formatter_class=_HelpWithDefaults,
        )

    demo = add(
        "demo",
        "train both models on the Tang poems that ship with the package, compare them, write poems",
        "Train an LSTM and a Transformer on 14,343 Tang quatrains, a minute or two on two cores; compare their "
        "bits per character on held-out poems with simpler models, an n-gram among them; write poems with both.",
        "--out runs/demo",
    )
    demo.add_argument("--out", metavar="FOLDER", help="where to keep it: a new folder (default: runs/demo)")
    demo.add_argument("--seed", type=int, default=0, help="the seed of everything")
    demo.add_argument(
        "--steps-fraction", type=float, default=1.0, metavar="F", help="do this share of the training steps"
    )

    train = add(
        "train",
        "train a model on your own text",
        "Train a language model on text files, and keep it in a run folder with its tokenizer, its settings "
        "and its figures on held-out documents. The same command again goes on with a training that was stopped or "
        "killed, from its newest checkpoint.",
        "my_texts/ --model lstm --size small --out runs/mine",
    )
    _add_paths(train)
    train.add_argument(
        "--out",
        metavar="FOLDER",
        help="a new folder for the run, or that of a training to go on with (default: one under runs/)",
    )
    train.add_argument(
        "--config", metavar="FILE", help="a run.json: train with its settings, but for the options that are given"
    )
    _add_model(train)
    train.add_argument("--user-dict", metavar="FILE", help="a jieba user dictionary, for --unit word")
    train.add_argument(
        "--remove-stopwords",
        dest="stopwords",
        metavar="LIST",
        help="take stopwords out of the text to learn from: cn, classical or a file (for experiments)",
    )
    train.add_argument("--learning-rate", type=float, default=1e-3, metavar="R", help="the highest learning rate")
    train.add_argument("--weight-decay", type=float, default=0.1, metavar="W", help="weight decay of AdamW")
    train.add_argument(
        "--validations", type=int, default=10, metavar="N", help="at most so many evaluations on the held-out side"
    )
    train.add_argument("--seed", type=int, default=0, help="the seed of weights, dropout and order")
    train.add_argument("--devices", type=int, metavar="N", help="how many devices share a batch; 0 takes all there are")
    train.add_argument(
        "--model-parallel", type=int, default=1, metavar="N", help="among how many devices one model is divided (JAX)"
    )
    train.add_argument(
        "--num-microbatches", type=int, default=1, metavar="N", help="compute a batch in N parts, to save memory"
    )
    train.add_argument("--checkpoint-minutes", type=float, default=5.0, metavar="M", help="minutes between checkpoints")
    train.add_argument("--checkpoint-steps", type=int, metavar="N", help="steps between checkpoints")
    train.add_argument("--keep-checkpoints", type=int, default=2, metavar="K", help="how many of the newest to keep")

    train.set_defaults(**(train_settings or {}))

    estimate = add(
        "estimate",
        "tell what a training would cost",
        "Tell what a training would cost: parameters, FLOPs, memory, and after a few seconds of real training steps "
        "on this device hours and kilowatt-hours. Takes the options of train that matter.",
        "my_texts/ --size base --steps 100000",
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
        "search for settings that predict better",
        "Search for the settings of train with the lowest bits per character on held-out documents. Called again, it "
        "goes on where it was stopped. Needs KerasTuner: pip install 'keras-tuner[bayesian]'.",
        "my_texts/ --trials 30 --set learning_rate=1e-4..1e-2 --set batch_size=16,32 --set steps=500",
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
        "measure a model on documents",
        "Measure how well a model predicts documents: bits per character, perplexity, tokens per character.",
        "runs/mine my_texts/ --held-out",
    )
    evaluate.add_argument("folder", metavar="RUN", help="a run folder")
    evaluate.add_argument("--json", action="store_true", help="as JSON, for programs")
    _add_paths(evaluate)
    evaluate.add_argument(
        "--held-out", action="store_true", help="only the documents that the run's own split holds out"
    )

    generate = add(
        "generate",
        "write on from a prompt",
        "Write on from a prompt, shown as it is written.",
        "runs/poems 春风 --min-p 0.05 --force 明月 --stop 。 --num-samples 3",
    )
    _add_generate(generate)

    info = add("info", "tell what a run folder holds", "Tell what a run folder holds.", "runs/mine --json")
    info.add_argument("--json", action="store_true", help="as JSON, for programs")
    info.add_argument(
        "folder", nargs="?", metavar="RUN", help="a run folder; without one, the versions in use are told"
    )
    return parser


def _text(argument: str) -> str:
    """Refuse an argument whose bytes are no UTF-8, which Python keeps as halves of surrogate pairs."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(
            f"must be UTF-8, got {os.fsencode(argument)!r}. Set the terminal to UTF-8, or use --prompt-file."
        ) from None
    return argument


def _add_generate(command) -> None:
    """Add how to write: what to begin with, how long, how tokens are chosen, and what is shown."""
    command.add_argument("folder", metavar="RUN", help="a run folder")
    command.add_argument(
        "prompt", type=_text, nargs="?", default="", metavar="PROMPT", help="how the text begins; empty without"
    )
    command.add_argument("--prompt-file", metavar="FILE", help="a file of prompts, one a line; - for standard input")
    command.add_argument(
        "--raw", action="store_true", help="keep prompts as they are, and not cleaned as documents are"
    )
    command.add_argument("--num-samples", type=int, default=1, metavar="N", help="texts for each prompt, in one batch")
    command.add_argument(
        "--seed", type=int, metavar="N", help="repeats the text, on one machine and engine (default: another each time)"
    )
    command.add_argument("--new-only", action="store_true", help="leave out the prompt")
    command.add_argument(
        "--json",
        action="store_true",
        help="a JSON object a line: prompt, text, new, finish_reason, log_probability, seed",
    )
    command.add_argument(
        "--engine",
        choices=("auto", "numba", "numpy", "device"),
        default="auto",
        help="what computes: with the same engine and seed a machine writes the same text again",
    )

    add = command.add_argument_group("length").add_argument
    add("--max-new-tokens", type=int, default=100, metavar="N", help="tokens to write at the most")
    add("--stop", type=_text, action="append", metavar="TEXT", help="end before this text; may be repeated")

    add = command.add_argument_group("randomness").add_argument
    add("--temperature", type=float, metavar="X", help="below 1 bolder tokens are rarer, 0 takes the likeliest (0.8)")
    add("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens (all)")
    add("--top-p", type=float, metavar="P", help="choose among the likeliest tokens, of probability P in all (0.9)")
    add("--min-p", type=float, metavar="P", help="leave out tokens less than P times as likely as the likeliest (0)")
    add("--typical-p", type=float, metavar="P", help="choose among tokens of nearly the expected surprisal (1)")

    add = command.add_argument_group("repetition").add_argument
    add(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="raise the probability of a token that stands in the text to this power: above 1 repeats less (1)",
    )
    add("--presence-penalty", type=float, metavar="X", help="subtract X from the logit of a token written before (0)")
    add("--frequency-penalty", type=float, metavar="X", help="the same, for each time that it was written (0)")
    add("--no-repeat-ngram", type=int, metavar="N", help="write no N tokens in a row twice")
    add("--exempt", metavar="LIST", help="stopwords and punctuation that may repeat: cn, classical or a file")

    add = command.add_argument_group("words").add_argument
    add("--ban", type=_text, dest="banned", action="append", metavar="WORD", help="never write it; may be repeated")
    add(
        "--force",
        type=_text,
        dest="forced",
        action="append",
        metavar="WORD",
        help="write it where it fits; may be repeated",
    )

    add = command.add_argument_group("search").add_argument
    add("--best-of", type=int, metavar="N", help="write N texts, and keep the one that the model finds likeliest")
    add("--num-beams", type=int, metavar="N", help="search for the likeliest text, N kept at a time; deterministic")
    add("--length-penalty", type=float, metavar="X", help="of --num-beams: above 1 prefers longer texts, below shorter")


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
    add("--dropout", type=float, default=0.1, metavar="P", help="dropout in training")
    add("--unit", choices=("char", "word"), default="char", help="characters, or jieba words too")
    add("--vocab-size", type=int, metavar="N", help="the largest vocabulary (default: 6000 char, 20000 word)")
    add("--valid-fraction", type=float, default=0.05, metavar="F", help="share of held-out documents")
    add("--context", type=int, default=128, metavar="T", help="tokens the model looks back")
    add("--batch-size", type=int, default=16, metavar="B", help="windows in a step")
    add(
        "--steps",
        type=int,
        metavar="N",
        help="training steps (default: nine passes over the text, but from 500 to 10,000 steps)",
    )
    add("--num-candidates", type=int, metavar="C", help="tokens that the softmax runs over in most steps, 0 for all")
    add(
        "--precision",
        choices=("auto", "float32", "mixed_bfloat16", "mixed_float16"),
        default="auto",
        help="the arithmetic; auto is what the device is best in, float32 on a CPU",
    )
