"""The pipeline: run_pipeline(), the six steps from documents to a run folder in one call."""

import contextlib
import hashlib
import inspect
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from .. import __version__
from ..corpus.dataset import as_seed, make_dataset, make_store, open_store
from ..corpus.documents import documents_sha256
from ..corpus.segmentation import as_user_dict, default_processes, remove_stopwords
from ..corpus.splitting import MAX_PIECE_CHARS, split
from ..corpus.tokenizer import Tokenizer
from ..evaluation.bits import FINAL_TOKENS, baselines, evaluate, sample_documents
from ..generation.generate import generate
from ..models.initialisation import initialise
from ..models.networks import build
from ..runtime.distribution import is_first_host, known_precision, num_hosts, num_replicas
from ..runtime.files import hold_lock, locked, rename, temporary_path
from ..training.checkpoints import CHECKPOINTS, delete_checkpoints, list_checkpoints
from ..training.optimizer import check_optimization
from ..training.train import train
from .estimate import memory_warning
from .folder import add_to_run, has_run, save
from .tables import figure_line, in_words

_PASSES, _LEAST_STEPS, _MOST_STEPS = 9, 500, 10_000
_OF_A_TRAINING = {CHECKPOINTS, "log.csv", "tensorboard"}


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

    Called again with the same arguments, it goes on after the newest checkpoint of a training that was stopped or
    killed, as `train` does; when all is done the checkpoints are deleted.

    `aigc-tf train` is this function, and `tune` calls it for each trial. Whoever wants to change a step
    calls the functions it is made of instead: `split`, `Tokenizer.train`, `make_dataset`, `transformer` or
    `lstm`, `initialise`, `train`, `evaluate`, `generate`, `save`.

    Args:
        documents: the documents, clean (see `load_documents`).
        folder: the run folder to write, or to go on in; it appears when training begins.
        model: "transformer" or "lstm".
        size: the dimensions of the model, see `transformer` and `lstm`; the next three replace its own.
        num_layers: the number of blocks or LSTM layers.
        num_heads: the number of attention heads, of a Transformer only.
        hidden_dim: the width.
        dropout: see `transformer`.
        unit: "char" or "word", see `Tokenizer.train`.
        vocab_size: the largest vocabulary, see `Tokenizer.train`.
        user_dict: a jieba user dictionary, its file or its lines, for `unit="word"`.
        stopwords: a list to take out of the text to learn from, see `remove_stopwords`; for experiments.
        valid_fraction: the share of held-out documents.
        context: T, the tokens the model looks back.
        batch_size: B, the windows in a step.
        steps: the number of training steps; None takes nine passes over the text, but from 500 to 10,000 steps.
        learning_rate: see `train`.
        weight_decay: see `train`.
        validations: see `train`.
        num_microbatches: see `train`.
        num_candidates: see `train`.
        precision: the dtype policy, "float32", "mixed_bfloat16", "mixed_float16", or "auto" for what the device
            computes best in (see `use_devices`).
        seed: the seed of weights, dropout, order and the first text.
        checkpoint_minutes: see `train`.
        checkpoint_steps: see `train`.
        keep_checkpoints: see `train`.
        text_dir: a folder for the tokenizer and the token ids of the text, which are not made anew where they are
            there: for several runs on one text, of which one makes them and others wait. None keeps them with the
            checkpoints.
        progress: show on standard output what happens.

    Returns:
        What `evaluate` tells of the held-out documents, of at most some 1,000,000 tokens of them ("documents" and
        "tokens" say how many), and "steps_done". The run folder also holds the settings, the baselines and a first
        text ("sample" in `run.json`).

    Raises:
        ValueError: a setting is out of range, two do not go together, or the checkpoints in the folder are of another
            training.
        BlockingIOError: another training is going on in the folder.
    """
    given = locals()
    settings = {name: given[name] for name in SETTINGS}
    show = print if progress and is_first_host() else _show_nothing
    if user_dict and unit != "word":
        raise ValueError('user_dict is for unit="word": characters need no dictionary.')
    settings["user_dict"] = user_dict = as_user_dict(user_dict)
    settings["precision"] = precision = known_precision(precision)
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    check_optimization(learning_rate, weight_decay)
    settings["seed"] = seed = as_seed(seed)

    with locked(folder) if is_first_host() else contextlib.nullcontext(), _tidied(folder):
        # 1. preprocess
        train_documents, valid_documents = split(documents, valid_fraction)
        num_chars = sum(map(len, documents))
        show(
            f"{len(documents):,} documents, {num_chars:,} characters: {len(train_documents):,} documents to learn "
            f"from, {len(valid_documents):,} held out"
        )
        if len(train_documents) + len(valid_documents) > len(documents):
            show(f"documents of over {MAX_PIECE_CHARS:,} characters are cut at line ends, and their pieces are divided")
        if stopwords:
            train_documents, share = remove_stopwords(train_documents, stopwords)
            show(
                f"stopwords: {share:.1%} of the words to learn from are gone, and the model does not learn to write "
                "them; the held-out documents stay whole"
            )
        text_dir = Path(folder, CHECKPOINTS, "text") if text_dir is None else Path(text_dir)
        tokenizer, ids = _encode(train_documents, unit, vocab_size, user_dict, text_dir)
        train_data = make_dataset(ids, tokenizer, context, batch_size, seed)
        settings["steps"] = steps = steps or usual_steps(len(ids), batch_size * context)

        dimensions = {
            "num_layers": num_layers, "num_heads": num_heads, "hidden_dim": hidden_dim, "precision": precision
        }  # fmt: skip
        sizes = {"vocab_size": tokenizer.vocab_size, "context": context, "steps": steps, "train_tokens": len(ids)}
        sizes["batch_size"] = max(1, batch_size // num_microbatches // num_replicas())
        if warning := memory_warning(model, size, **sizes, **dimensions, dropout=dropout):
            show(f"warning: {warning}")

        # 2. build, and 3. initialise: the seed draws the weights, and the text has its say in the embedding
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
                f"stopped after {steps_done:.0f} of {steps} steps; what was learned is kept, and the same again goes on"
            )
        data = {"documents": len(documents), "characters": num_chars, "sha256": documents_sha256(documents)}
        # First, as what comes now may fail.
        save(folder, language_model, tokenizer, settings=settings, data=data, figures={"steps_done": steps_done})

        # 5. evaluate, beside simpler models
        measured = sample_documents(valid_documents, tokenizer, FINAL_TOKENS)
        if len(measured) < len(valid_documents):
            show(f"measured on {len(measured):,} of the {len(valid_documents):,} held-out documents")
        figures = {**evaluate(language_model, tokenizer, measured), "steps_done": steps_done}
        simpler = baselines(tokenizer, ids, measured)
        for name, value in figures.items():
            show(figure_line(name, value))
        show("bits per character of simpler models")
        for name, value in simpler.items():
            show(figure_line(f"  {in_words(name)}", value))

        # 6. predict
        sample = generate(language_model, tokenizer, max_new_tokens=context, seed=seed)
        show(f"\n{sample}\n")
        add_to_run(folder, figures=figures, baselines=simpler, sample=sample)
        if steps_done == steps and is_first_host():
            delete_checkpoints(folder)
        return figures


def is_unfinished(folder: Path) -> bool:
    """Tell whether a folder holds a run to go on with, and nothing that would be lost by it."""
    if list_checkpoints(folder / CHECKPOINTS):
        return True
    # One that was killed before it had any, or whose lock has just been made.
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}  # without what a kill has left
    return not has_run(folder) and names <= _OF_A_TRAINING


@contextlib.contextmanager
def _tidied(folder) -> Iterator[None]:
    """Leave nothing of a run that ends in a mistake before it has a checkpoint."""
    checkpoints = Path(folder, CHECKPOINTS)
    try:
        yield
    except ValueError:
        if is_first_host() and not list_checkpoints(checkpoints):
            delete_checkpoints(folder)
        raise


def _encode(documents: list[str], unit: str, vocab_size: int | None, user_dict, folder: Path):
    """Train the tokenizer and encode the documents to learn from, or take what an earlier start kept in `folder`."""
    num_chars = sum(map(len, documents))
    processes = default_processes(num_chars, unit, user_dict)

    def trained():
        return Tokenizer.train(documents, unit, vocab_size, user_dict=user_dict, processes=processes)

    if num_hosts() > 1:  # they may share the folder
        tokenizer = trained()
        return tokenizer, make_store(documents, tokenizer, processes=processes)
    key = json.dumps([documents_sha256(documents), unit, vocab_size, user_dict, __version__])
    folder = folder / hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def opened():
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        return tokenizer, open_store(folder / "tokens", tokenizer)

    with contextlib.suppress(FileNotFoundError, ValueError):  # there is none yet, or it is damaged
        return opened()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder.with_name(f".{folder.name}.lock"), wait=True):  # until another run has encoded the same text
        try:
            return opened()
        except (FileNotFoundError, ValueError):
            if folder.exists():
                shutil.rmtree(folder)
        with temporary_path(folder) as new:
            new.mkdir()
            tokenizer = trained()
            make_store(documents, tokenizer, new / "tokens", processes)
            tokenizer.save(new / "tokenizer.json")
            if not folder.exists():  # where there are no locks, another run may have been sooner
                rename(new, folder)
        return opened()


def usual_steps(num_tokens: int, tokens_per_step: int) -> int:
    """Choose how long to train: nine passes over the text, but from 500 to 10,000 steps.

    Args:
        num_tokens: the tokens to learn from.
        tokens_per_step: the tokens in a batch.

    Returns:
        The number of steps.

    Example:
        >>> usual_steps(455_000, 16 * 128)
        2000
    """
    return min(max(math.ceil(_PASSES * num_tokens / tokens_per_step), _LEAST_STEPS), _MOST_STEPS)


_NOT_OF_THE_RESULT = ("checkpoint_minutes", "checkpoint_steps", "keep_checkpoints", "text_dir", "progress")
# The settings of a run and their defaults, by name.
SETTINGS = {
    name: parameter.default
    for name, parameter in inspect.signature(run_pipeline).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in _NOT_OF_THE_RESULT
}


def _show_nothing(line: str) -> None: ...
