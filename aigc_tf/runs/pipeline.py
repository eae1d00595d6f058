"""Pipeline: run_pipeline(), the six steps from documents to a run folder in one call."""

import contextlib
import inspect
import math
from collections.abc import Iterator
from pathlib import Path

from ..corpus.dataset import as_seed, make_dataset
from ..corpus.documents import documents_sha256
from ..corpus.segmentation import as_user_dict, remove_stopwords
from ..corpus.splitting import MAX_PIECE_CHARS, split
from ..evaluation.baselines import baselines
from ..evaluation.bits import FINAL_TOKENS, evaluate, sample_documents
from ..generation.generate import generate
from ..models.initialisation import initialise
from ..models.networks import build
from ..models.sizes import check_at_least_1
from ..runtime.distribution import is_first_host, num_replicas, resolve_precision
from ..runtime.locks import locked
from ..training.checkpoints import CHECKPOINTS, delete_checkpoints, list_checkpoints
from ..training.optimizer import check_optimizer_settings
from ..training.train import train
from .encoded_text import encode_or_open
from .estimate import memory_warning
from .folder import add_to_run, has_run, save
from .tables import figure_line, in_words

_PASSES, _LEAST_STEPS, _MOST_STEPS = 9, 500, 10_000
_TRAINING_FILES = {CHECKPOINTS, "log.csv", "tensorboard"}


def run_pipeline(
    documents: list[str],
    folder,
    *,
    model: str = "transformer",
    size: str = "tiny",
    num_layers: int | None = None,
    num_heads: int | None = None,
    hidden_dim: int | None = None,
    dropout: float = 0.1,
    unit: str = "char",
    vocab_size: int | None = None,
    user_dict=(),
    stopwords: str | None = None,
    valid_fraction: float = 0.05,
    context: int = 128,
    batch_size: int = 16,
    steps: int | None = None,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    validations: int = 10,
    num_microbatches: int = 1,
    num_candidates: int | None = None,
    precision: str = "auto",
    seed: int = 0,
    checkpoint_minutes: float | None = 5.0,
    checkpoint_steps: int | None = None,
    keep_checkpoints: int = 2,
    text_dir=None,
    progress: bool = True,
) -> dict[str, float]:
    """Preprocess, build, initialise, train, evaluate, predict: from documents to a run folder.

    Called again with the same arguments, it resumes a run that was stopped or killed from its newest checkpoint,
    as `train` does; when all is done, the checkpoints are deleted.

    `aigc-tf train` is this function, and `tune` calls it for each trial. To change a step, call the functions it
    consists of instead: `split`, `Tokenizer.train`, `make_dataset`, `transformer` or `lstm`, `initialise`, `train`,
    `evaluate`, `generate`, `save`.

    Args:
        documents: the documents, clean (see `load_documents`).
        folder: the run folder to write, or one to resume; it appears when training begins.
        model: "transformer" or "lstm".
        size: the dimensions of the model, see `transformer` and `lstm`; the next three settings replace them.
        num_layers: the number of Transformer blocks or LSTM layers.
        num_heads: the number of attention heads, for a Transformer only.
        hidden_dim: the hidden dimension.
        dropout: see `transformer`.
        unit: "char" or "word", see `Tokenizer.train`.
        vocab_size: the largest vocabulary, see `Tokenizer.train`.
        user_dict: a jieba user dictionary, its file or its lines, for `unit="word"`.
        stopwords: a list of words to remove from the text to learn from, see `remove_stopwords`; for experiments.
        valid_fraction: the share of held-out documents.
        context: T, the number of tokens the model sees.
        batch_size: B, the number of windows per step.
        steps: the number of training steps; by default nine passes over the text, but 500 to 10,000 steps.
        learning_rate: see `train`.
        weight_decay: see `train`.
        validations: see `train`.
        num_microbatches: see `train`.
        num_candidates: see `train`.
        precision: the dtype policy, "float32", "mixed_bfloat16", "mixed_float16", or "auto" for the best one on
            this device (see `use_devices`).
        seed: the seed of the weights, dropout, the order of the data and the first text.
        checkpoint_minutes: see `train`.
        checkpoint_steps: see `train`.
        keep_checkpoints: see `train`.
        text_dir: a folder for the tokenizer and the token ids of the text, which are reused if they exist: of several
            runs on one text the first makes them, and the others wait. None keeps them with the checkpoints.
        progress: show the progress on standard output.

    Returns:
        The figures of `evaluate` on about 1,000,000 tokens of the held-out documents at most ("documents" and
        "tokens" say how many), and "steps_done". The run folder also holds the settings, the baselines and a first
        text ("sample" in `run.json`).

    Raises:
        ValueError: a setting is out of range, two do not fit together, or the checkpoints in the folder are of another
            training.
        BlockingIOError: another training run is using the folder.
    """
    given = locals()
    settings = {name: given[name] for name in SETTINGS}
    show = print if progress and is_first_host() else _show_nothing
    if user_dict and unit != "word":
        raise ValueError('user_dict is for unit="word": characters need no dictionary. Remove it, or set unit="word".')
    settings["user_dict"] = user_dict = as_user_dict(user_dict)
    settings["precision"] = precision = resolve_precision(precision)
    check_at_least_1(steps=1 if steps is None else steps, num_microbatches=num_microbatches)
    check_optimizer_settings(learning_rate, weight_decay)
    settings["seed"] = seed = as_seed(seed)

    with locked(folder) if is_first_host() else contextlib.nullcontext(), _cleaned_up_if_refused(folder):
        # 1. preprocess
        train_documents, valid_documents = split(documents, valid_fraction)
        num_chars = sum(map(len, documents))
        show(
            f"{len(documents):,} documents, {num_chars:,} characters: {len(train_documents):,} documents to learn "
            f"from, {len(valid_documents):,} held out"
        )
        if len(train_documents) + len(valid_documents) > len(documents):
            show(f"documents of over {MAX_PIECE_CHARS:,} characters are cut at line ends, and their pieces are split")
        if stopwords:
            train_documents, share = remove_stopwords(train_documents, stopwords)
            show(
                f"stopwords: {share:.1%} of the words to learn from are removed, and the model does not learn to "
                "write them; the held-out documents are unchanged"
            )
        text_dir = Path(folder, CHECKPOINTS, "text") if text_dir is None else Path(text_dir)
        tokenizer, ids = encode_or_open(train_documents, unit, vocab_size, user_dict, text_dir)
        train_data = make_dataset(ids, tokenizer, context, batch_size, seed)
        settings["steps"] = steps = steps or default_steps(len(ids), batch_size * context)

        dimensions = {
            "num_layers": num_layers, "num_heads": num_heads, "hidden_dim": hidden_dim, "precision": precision
        }  # fmt: skip
        sizes = {"vocab_size": tokenizer.vocab_size, "context": context, "steps": steps, "train_tokens": len(ids)}
        sizes["batch_size"] = max(1, batch_size // num_microbatches // num_replicas())
        if warning := memory_warning(model, size, **sizes, **dimensions, dropout=dropout):
            show(f"warning: {warning}")

        # 2. build, and 3. initialise: the weights come from the seed, the embedding from the text too
        language_model = build(
            model,
            tokenizer.vocab_size,
            context,
            size,
            **dimensions,
            dropout=dropout,
            seed=seed,
        )
        initialise(language_model, tokenizer, ids, seed)
        passes = steps * batch_size * context / len(ids)
        show(
            f"{model}: {language_model.count_params():,} parameters, a vocabulary of {tokenizer.vocab_size:,} tokens, "
            f"{len(ids):,} tokens to learn from, seen {passes:.3g} times in {steps:,} steps"
        )

        # 4. train
        history = train(
            language_model,
            train_data,
            tokenizer,
            valid_documents,
            steps=steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            validations=validations,
            num_microbatches=num_microbatches,
            num_candidates=num_candidates,
            run_dir=folder,
            checkpoint_minutes=checkpoint_minutes,
            checkpoint_steps=checkpoint_steps,
            keep_checkpoints=keep_checkpoints,
            progress=progress,
        )
        steps_done = history["step"][-1]
        if steps_done < steps:
            show(
                f"stopped after {steps_done:.0f} of {steps} steps; what was learned is kept, and the same command or "
                "call resumes training"
            )
        data = {"documents": len(documents), "characters": num_chars, "sha256": documents_sha256(documents)}
        # Before the evaluation, which may fail.
        save(folder, language_model, tokenizer, settings=settings, data=data, figures={"steps_done": steps_done})

        # 5. evaluate, with baselines to compare
        measured = sample_documents(valid_documents, tokenizer, FINAL_TOKENS)
        if len(measured) < len(valid_documents):
            show(f"measured on {len(measured):,} of the {len(valid_documents):,} held-out documents")
        figures = {**evaluate(language_model, tokenizer, measured), "steps_done": steps_done}
        baseline_figures = baselines(tokenizer, ids, measured)
        for name, value in figures.items():
            show(figure_line(name, value))
        show("bits per character of the baselines")
        for name, value in baseline_figures.items():
            show(figure_line(f"  {in_words(name)}", value))

        # 6. predict
        sample = generate(language_model, tokenizer, max_new_tokens=context, seed=seed)
        show(f"\n{sample}\n")
        add_to_run(folder, figures=figures, baselines=baseline_figures, sample=sample)
        if steps_done == steps and is_first_host():
            delete_checkpoints(folder)
        return figures


def is_unfinished_run(folder: Path) -> bool:
    """Check whether a folder holds a run to resume, and nothing that resuming would overwrite."""
    if list_checkpoints(folder / CHECKPOINTS):
        return True
    # It was killed before its first checkpoint, or has just been locked. Hidden files are locks and leftovers.
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return not has_run(folder) and names <= _TRAINING_FILES


@contextlib.contextmanager
def _cleaned_up_if_refused(folder) -> Iterator[None]:
    """Delete what a run that is refused before its first checkpoint has written."""
    checkpoints = Path(folder, CHECKPOINTS)
    try:
        yield
    except ValueError:
        if is_first_host() and not list_checkpoints(checkpoints):
            delete_checkpoints(folder)
        raise


def default_steps(num_tokens: int, tokens_per_step: int) -> int:
    """Choose how long to train: nine passes over the text, but 500 to 10,000 steps.

    Args:
        num_tokens: the number of tokens to learn from.
        tokens_per_step: the number of tokens in a batch.

    Returns:
        The number of steps.

    Example:
        >>> default_steps(455_000, 16 * 128)
        2000
    """
    return min(max(math.ceil(_PASSES * num_tokens / tokens_per_step), _LEAST_STEPS), _MOST_STEPS)


# Arguments without an effect on the result.
_NOT_SETTINGS = ("checkpoint_minutes", "checkpoint_steps", "keep_checkpoints", "text_dir", "progress")
# The settings of a run and their defaults, by name.
SETTINGS = {
    name: parameter.default
    for name, parameter in inspect.signature(run_pipeline).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in _NOT_SETTINGS
}


def _show_nothing(line: str) -> None: ...
