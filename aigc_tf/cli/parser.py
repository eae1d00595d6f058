"""Parser: make_parser(), the commands and their options."""

import argparse

from .. import __version__
from .options import add_document_options, add_generate_options, add_model_options


class _HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        has_default = action.default is not None and action.default is not False and action.default != []
        return super()._get_help_string(action) if has_default else action.help


class _Command(argparse.ArgumentParser):
    """The parser of one command: options may stand before, between and after positional arguments."""

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
    """Make the parser of all commands, whose result has the name of the one given as `command`.

    Args:
        train_settings: defaults of `train` that replace the usual ones, by their names in `run_pipeline`.
    """
    parser = argparse.ArgumentParser(
        prog="aigc-tf",
        description="Train language models on Chinese text, evaluate them, and generate text with them.",
        epilog="Set AIGC_TF_TRACEBACK=1 to see the traceback of an error.",
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
        "bits per character on held-out poems with baselines, an n-gram among them; write poems with both.",
        "--out runs/demo",
    )
    demo.add_argument(
        "--out", metavar="FOLDER", help="a new folder, or that of a demo to resume (default: one under runs/)"
    )
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="the seed of all random numbers")
    demo.add_argument(
        "--steps-fraction", type=float, default=1.0, metavar="F", help="the fraction of the usual training steps"
    )

    train = add(
        "train",
        "train a model on your own text",
        "Train a language model on text files, and save it in a run folder with its tokenizer, its settings "
        "and its figures on held-out documents. The same command resumes a run that was stopped or killed, "
        "from its newest checkpoint.",
        "my_texts/ --model lstm --size small --out runs/mine",
    )
    add_document_options(train)
    train.add_argument("--out", metavar="FOLDER", help="a new run folder, or one to resume (default: one under runs/)")
    train.add_argument(
        "--config", metavar="FILE", help="take settings from this run.json; options that are given take precedence"
    )
    add_model_options(train)
    train.add_argument("--user-dict", metavar="FILE", help="a jieba user dictionary, for --unit word")
    train.add_argument(
        "--remove-stopwords",
        dest="stopwords",
        metavar="LIST",
        help="remove stopwords from the text to learn from: cn, classical or a file (for experiments)",
    )
    train.add_argument("--learning-rate", type=float, default=1e-3, metavar="R", help="the peak learning rate")
    train.add_argument("--weight-decay", type=float, default=0.1, metavar="W", help="the weight decay of AdamW")
    train.add_argument(
        "--validations", type=int, default=10, metavar="N", help="how often at most to validate on held-out documents"
    )
    train.add_argument("--seed", type=int, default=0, metavar="N", help="the seed of weights, dropout and data order")
    train.add_argument(
        "--devices", type=int, metavar="N", help="the number of devices that share each batch; 0 uses all of them"
    )
    train.add_argument(
        "--model-parallel", type=int, default=1, metavar="N", help="the number of devices that share one model (JAX)"
    )
    train.add_argument(
        "--num-microbatches",
        type=int,
        default=1,
        metavar="N",
        help="gradient accumulation: compute each batch in N parts, to save memory",
    )
    train.add_argument("--checkpoint-minutes", type=float, default=5.0, metavar="M", help="minutes between checkpoints")
    train.add_argument("--checkpoint-steps", type=int, metavar="N", help="steps between checkpoints")
    train.add_argument("--keep-checkpoints", type=int, default=2, metavar="K", help="the number of checkpoints to keep")

    train.set_defaults(**(train_settings or {}))

    estimate = add(
        "estimate",
        "estimate what a training run costs",
        "Estimate what a training run costs: parameters, FLOPs and memory by formulas; hours and kilowatt-hours by "
        "a few seconds of real training steps on this device. Takes the options of train that affect the cost.",
        "my_texts/ --size base --steps 100000",
    )
    add_document_options(estimate)
    add_model_options(estimate)
    estimate.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="how long to run training steps; 0 runs none"
    )
    estimate.add_argument(
        "--watts", type=float, metavar="W", help="the power draw of this machine (default: read where it is reported)"
    )

    tune = add(
        "tune",
        "search for better settings",
        "Search for the settings of train with the lowest bits per character on held-out documents. The same command "
        "resumes a search that was stopped. Needs KerasTuner: pip install 'keras-tuner[bayesian]'.",
        "my_texts/ --trials 30 --set learning_rate=1e-4..1e-2 --set batch_size=16,32 --set steps=500",
    )
    add_document_options(tune)
    tune.add_argument("--out", metavar="FOLDER", help="the folder of the search (default: one under runs/)")
    tune.add_argument(
        "--trials", type=int, metavar="N", help="the number of trials in all (default: 20, unless --minutes is given)"
    )
    tune.add_argument("--minutes", type=float, metavar="M", help="start no trial after so many minutes")
    tune.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUES",
        help="a setting of train to search over a range low..high or a choice a,b,c, or to fix to one value; may be "
        "repeated (default: search model, learning_rate, hidden_dim, dropout and batch_size)",
    )
    tune.add_argument("--seed", type=int, default=0, metavar="N", help="the seed of the proposals and of each run")

    evaluate = add(
        "evaluate",
        "measure how well a model predicts documents",
        "Measure how well a model predicts documents: bits per character, perplexity, tokens per character.",
        "runs/mine my_texts/ --held-out",
    )
    evaluate.add_argument("folder", metavar="RUN", help="a run folder")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    add_document_options(evaluate)
    evaluate.add_argument(
        "--held-out", action="store_true", help="evaluate only the documents that the split of the run holds out"
    )

    generate = add(
        "generate",
        "continue a prompt",
        "Generate text that continues a prompt, and show it while it is generated.",
        "runs/poems 春风 --min-p 0.05 --force 明月 --stop 。 --num-samples 3",
    )
    add_generate_options(generate)

    info = add(
        "info",
        "show the settings and figures of a run",
        "Show what a run folder records: settings, figures, versions.",
        "runs/mine --json",
    )
    info.add_argument("--json", action="store_true", help="print JSON")
    info.add_argument(
        "folder", nargs="?", metavar="RUN", help="a run folder; without one, the installed versions are shown"
    )
    return parser
