"""Demo: both models trained on the Tang quatrains that ship with the package, evaluated, and their poems."""

import math
import re
from collections.abc import Callable
from pathlib import Path

from ..corpus.dataset import as_seed, make_dataset
from ..corpus.documents import documents_sha256, load_documents
from ..corpus.splitting import split
from ..corpus.tokenizer import Tokenizer
from ..evaluation.baselines import baselines
from ..evaluation.bits import evaluate
from ..generation.generate import generate_batch
from ..models.initialisation import initialise
from ..models.networks import lstm, transformer
from ..runs.folder import load, read_run, save
from ..runtime.backend import keras
from ..runtime.files import shipped_file
from ..runtime.locks import LOCK, locked
from ..training.checkpoints import CHECKPOINTS, delete_checkpoints, list_checkpoints
from ..training.train import train

# A 7-character quatrain has 35 tokens, with its begin and end. In a few minutes on two cores, small models learn most,
# in many small steps.
CONTEXT, BATCH_SIZE = 36, 16
MODELS = {
    "transformer": {"build": transformer, "steps": 1100, "learning_rate": 4e-3},
    "lstm": {"build": lstm, "steps": 500, "learning_rate": 8e-3},
}
_NUM_SAMPLES, _NUM_SHOWN = 100, 4


def is_quatrain(text: str) -> bool:
    """Check whether a text has the form of the corpus: two lines, four clauses of 5 or of 7 characters."""
    return _QUATRAIN.fullmatch(text) is not None


def _quatrain_of(length: int) -> str:
    clause = f"[^，。？！；\\n]{{{length}}}[，。？！；]"
    return f"{clause}{clause}\\n{clause}{clause}"


_QUATRAIN = re.compile(f"{_quatrain_of(5)}|{_quatrain_of(7)}")


def run_demo(
    folder, steps_fraction: float = 1.0, seed: int = 0, show: Callable[[str], None] = print
) -> dict[str, dict[str, float]]:
    """Train both models on the shipped poems, compare them on held-out poems, and let them write.

    Args:
        folder: the folder of the run folders `transformer` and `lstm`: a new one, or that of a demo to resume.
        steps_fraction: the fraction of the usual training steps.
        seed: the seed of all random numbers.
        show: called with each piece of text for the reader.

    Returns:
        The figures of each model, and under "baselines" those of the baselines.

    Raises:
        ValueError: `steps_fraction` or `seed` is out of range, or the folder holds another demo.
        BlockingIOError: another demo is running in the folder.
        KeyboardInterrupt: Ctrl-C. The same call resumes the demo.
    """
    if not 0 < steps_fraction < math.inf:
        raise ValueError(f"steps_fraction must be finite and above 0, got {steps_fraction}.")
    seed = as_seed(seed)
    poems = load_documents(shipped_file("tang_quatrains.txt"))
    train_poems, valid_poems = split(poems)
    tokenizer = Tokenizer.train(train_poems)
    num_chars = sum(map(len, poems))
    show(
        f"{len(poems):,} Tang quatrains, {num_chars:,} characters: {len(train_poems):,} poems to learn from, "
        f"{len(valid_poems):,} held out; a vocabulary of {tokenizer.vocab_size:,} tokens."
    )
    data = {"documents": len(poems), "characters": num_chars, "sha256": documents_sha256(poems)}
    figures, samples = {}, {}
    with locked(folder):
        for name, plan in MODELS.items():
            run_folder = Path(folder, name)
            steps = max(1, round(plan["steps"] * steps_fraction))
            settings = {"steps": steps, "learning_rate": plan["learning_rate"], "batch_size": BATCH_SIZE, "seed": seed}
            if _is_complete(run_folder):
                _require_same(run_folder, {"settings": settings, "data": data})
                show(f"\n{name}: trained before, saved in {run_folder}")
                model, _ = load(run_folder)
            else:
                model = initialise(
                    plan["build"](tokenizer.vocab_size, CONTEXT, seed=seed), tokenizer, train_poems, seed
                )
                show(f"\n{name}: {model.count_params():,} parameters, {steps} steps of {BATCH_SIZE} x {CONTEXT} tokens")
                history = train(
                    model,
                    make_dataset(train_poems, tokenizer, CONTEXT, BATCH_SIZE, seed),
                    tokenizer,
                    valid_poems,
                    steps=steps,
                    learning_rate=plan["learning_rate"],
                    validations=5,
                    run_dir=run_folder,
                )
                if history["step"][-1] < steps:
                    show(f"stopped after {history['step'][-1]:.0f} of {steps} steps; the same command resumes the demo")
                    raise KeyboardInterrupt
            samples[name] = generate_batch(model, tokenizer, [""] * _NUM_SAMPLES, max_new_tokens=CONTEXT, seed=seed)
            figures[name] = evaluate(model, tokenizer, valid_poems)
            figures[name]["well_formed"] = sum(map(is_quatrain, samples[name])) / _NUM_SAMPLES
            if not _is_complete(run_folder):
                save(run_folder, model, tokenizer, settings=settings, data=data, figures=figures[name])
                delete_checkpoints(run_folder)
            keras.backend.clear_session()
        figures["baselines"] = baselines(tokenizer, train_poems, valid_poems)
        _show_results(figures, samples, folder, show)
    return figures


def is_unfinished_demo(folder: Path) -> bool:
    """Check whether a folder holds a demo to resume, and nothing else."""
    names = {path.name for path in folder.iterdir()}
    return names <= {LOCK, *MODELS} and not all(_is_complete(folder / name) for name in MODELS)


def _is_complete(run_folder: Path) -> bool:
    return (run_folder / "run.json").exists() and not list_checkpoints(run_folder / CHECKPOINTS)


def _require_same(run_folder: Path, now: dict) -> None:
    before = read_run(run_folder)
    if any(before.get(name) != value for name, value in now.items()):
        raise ValueError(f"{run_folder} belongs to a demo with other steps, seed or poems. Name another folder.")


def _show_results(figures, samples, folder, show) -> None:
    show(f"\n{'bits per character on the held-out poems':42}{'well-formed of 100 poems written':>36}")
    show(f"  {'uniform over the vocabulary':26}{figures['baselines']['uniform']:12.2f}")
    show(f"  {'character frequencies':26}{figures['baselines']['frequency']:12.2f}")
    show(f"  {'5-gram, Kneser-Ney':26}{figures['baselines']['5-gram']:12.2f}")
    for name in MODELS:
        share = round(100 * figures[name]["well_formed"])
        show(f"  {name:26}{figures[name]['bits_per_char']:12.2f}{share:26}")
    show("  (well-formed: two lines, four clauses, all of 5 or all of 7 characters)")
    for name in MODELS:
        show(f"\nFour poems by the {name}, as they came:\n")
        show("\n\n".join(samples[name][:_NUM_SHOWN]))
    show(f"\nBoth are saved in {folder}. Generate more with one of them:\n  aigc-tf generate {folder}/transformer 春风")
