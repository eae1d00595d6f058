"""Options: those that commands share, and those of `generate`."""

import argparse
import os


def _text(argument: str) -> str:
    """Refuse an argument that is not UTF-8: Python keeps other bytes as lone surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(
            f"must be UTF-8, got {os.fsencode(argument)!r}. Set the terminal to UTF-8, or use --prompt-file."
        ) from None
    return argument


def add_generate_options(command) -> None:
    """Add the options of `generate`: prompts, output, length, sampling, repetition, words and search."""
    command.add_argument("folder", metavar="RUN", help="a run folder")
    command.add_argument(
        "prompt", type=_text, nargs="?", default="", metavar="PROMPT", help="the beginning of the text (default: empty)"
    )
    command.add_argument("--prompt-file", metavar="FILE", help="a file with one prompt per line; - for standard input")
    command.add_argument("--raw", action="store_true", help="use prompts as they are, without cleaning them")
    command.add_argument("--num-samples", type=int, default=1, metavar="N", help="the number of texts per prompt")
    command.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="the seed, which repeats a text on the same machine and engine (default: a new one each time)",
    )
    command.add_argument("--new-only", action="store_true", help="print the text without its prompt")
    command.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per line: prompt, text, new, finish_reason, log_probability, seed",
    )
    command.add_argument(
        "--engine",
        choices=("auto", "numba", "numpy", "device"),
        default="auto",
        help="what computes the model: compiled code or NumPy on the CPU, or the device of Keras",
    )

    add = command.add_argument_group("length").add_argument
    add("--max-new-tokens", type=int, default=100, metavar="N", help="the largest number of new tokens")
    add("--stop", type=_text, action="append", metavar="TEXT", help="end before this text; may be repeated")

    add = command.add_argument_group("sampling").add_argument
    add(
        "--temperature",
        type=float,
        metavar="X",
        help="below 1 unlikely tokens get rarer; 0 always takes the likeliest (default: 0.8)",
    )
    add("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens (default: all)")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="nucleus sampling: from the fewest tokens, likeliest first, with a total probability of P (default: 0.9)",
    )
    add("--min-p", type=float, metavar="P", help="drop tokens under P times as likely as the likeliest (default: 0)")
    add(
        "--typical-p",
        type=float,
        metavar="P",
        help="typical sampling: from the fewest tokens, those nearest the expected surprisal first, with a total "
        "probability of P (default: 1)",
    )

    add = command.add_argument_group("repetition").add_argument
    add(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="raise the probability of tokens that occur in the text to this power; above 1 repeats less (default: 1)",
    )
    add(
        "--presence-penalty",
        type=float,
        metavar="X",
        help="subtract X from the logits of tokens that were generated before (default: 0)",
    )
    add(
        "--frequency-penalty",
        type=float,
        metavar="X",
        help="subtract X from a token's logit for each time it was generated (default: 0)",
    )
    add("--no-repeat-ngram", type=int, metavar="N", help="never generate the same N tokens in a row twice")
    add("--exempt", metavar="LIST", help="stopwords that may repeat, with punctuation: cn, classical or a file")

    add = command.add_argument_group("words").add_argument
    add("--ban", type=_text, dest="banned", action="append", metavar="WORD", help="never write it; may be repeated")
    add(
        "--force",
        type=_text,
        dest="forced",
        action="append",
        metavar="WORD",
        help="write it where it fits best; may be repeated",
    )

    add = command.add_argument_group("search").add_argument
    add("--best-of", type=int, metavar="N", help="generate N texts, and keep the likeliest")
    add(
        "--num-beams",
        type=int,
        metavar="N",
        help="beam search for the likeliest text, with N beams, and no sampling",
    )
    add(
        "--length-penalty",
        type=float,
        metavar="X",
        help="with --num-beams: above 1 favours longer texts, below 1 shorter ones (default: 1)",
    )


def add_document_options(command) -> None:
    """Add the documents of a command."""
    command.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="text files, folders of .txt and .jsonl files, or corpora by name: corpus:laws, corpus:sanguo, "
        "corpus:tang_quatrains",
    )
    command.add_argument("--field", default="text", metavar="NAME", help="the field of .jsonl records with the text")


def add_model_options(command) -> None:
    """Add the options that `train` and `estimate` share: all that affects the cost."""
    add = command.add_argument
    add("--model", choices=("transformer", "lstm"), default="transformer", help="the architecture")
    add("--size", choices=("tiny", "small", "base"), default="tiny", help="the dimensions of the model")
    add("--num-layers", type=int, metavar="N", help="the number of layers (default: that of --size)")
    add("--hidden-dim", type=int, metavar="N", help="the hidden dimension (default: that of --size)")
    add("--num-heads", type=int, metavar="N", help="the number of attention heads (default: that of --size)")
    add("--dropout", type=float, default=0.1, metavar="P", help="the dropout rate")
    add("--unit", choices=("char", "word"), default="char", help="what tokens are: characters, or jieba words as well")
    add("--vocab-size", type=int, metavar="N", help="the largest vocabulary size (default: 6000 char, 20000 word)")
    add("--valid-fraction", type=float, default=0.05, metavar="F", help="the fraction of documents to hold out")
    add("--context", type=int, default=128, metavar="T", help="the context length, in tokens")
    add("--batch-size", type=int, default=16, metavar="B", help="the number of windows per batch")
    add(
        "--steps",
        type=int,
        metavar="N",
        help="the number of training steps (default: nine passes over the text, but 500 to 10,000 steps)",
    )
    add(
        "--num-candidates",
        type=int,
        metavar="C",
        help="sampled softmax: over how many tokens it runs in the first nine tenths of the steps; 0 for all tokens "
        "(default: chosen by device and vocabulary)",
    )
    add(
        "--precision",
        choices=("auto", "float32", "mixed_bfloat16", "mixed_float16"),
        default="auto",
        help="the precision policy; auto takes the best one for this device, float32 on a CPU",
    )
