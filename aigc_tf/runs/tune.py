"""Tuning: tune(), the search for the settings that predict held-out documents best."""

import contextlib
import json
import logging
import math
import operator
import random
import shutil
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..corpus.dataset import as_seed
from ..corpus.documents import documents_sha256
from ..runtime.locks import locked
from .folder import read_run
from .pipeline import run_pipeline
from .search_space import TYPES, check_space, effective_settings
from .trials import best_trial, count_in_words, keep_best, progress_line, read_trials, sort_key, write_trials

_TEXT = ".text"  # the token ids, shared by trials that tokenise alike
# What the proposals use of KerasTuner that it may change without notice.
_PRIVATE = (
    "engine.trial.Trial",
    "oracles.BayesianOptimizationOracle.populate_space",
    "engine.hyperparameters.HyperParameter.random_sample",
)
_RANDOM_TRIALS = 5  # before the Gaussian process is asked
_HOPELESS_TRIALS = 10  # as many failures without a success are due to what all trials share


def tune(
    documents: list[str],
    folder,
    space: dict[str, list | tuple],
    *,
    trials: int | None = None,
    minutes: float | None = None,
    seed: int = 0,
    progress: bool = True,
    **fixed,
) -> list[dict]:
    """Search for the settings of `run_pipeline` with the lowest bits per character on held-out documents.

    Each trial is a whole run with settings proposed by KerasTuner's Bayesian optimisation: the first few
    are drawn at random, then a Gaussian process fitted to all trials so far proposes where the figure may be
    lowest. No settings are tried twice; when none are left, the search ends.

    Called again on the same folder, the search resumes, however it ended: with the unfinished trial, from its newest
    checkpoint (see `train`). A trial whose settings do not fit together, that runs out of memory or diverges is
    recorded as failed, and the search continues. The figure of the best of many trials is slightly optimistic, as the
    documents that measured it also chose it.

    Args:
        documents: the documents, clean (see `load_documents`); every trial holds out the same ones.
        folder: a new folder or that of an earlier call. It gets `trials.json` and, as `best/`, the run
            folder of the best trial; the run folders of the others are deleted, except that of an unfinished trial.
        space: from a setting's name to a list of values to choose from, or to a range, a tuple (low, high) of
            integers, or of floats, which are searched on a logarithmic scale if low is above 0.
        trials: the number of trials in all, including those of earlier calls.
        minutes: start no trial after this time, counted from this call. The first one always starts.
        seed: the seed of the proposals, and of each run.
        progress: print one line per trial on standard output.
        **fixed: settings that are the same in all trials.

    Returns:
        One dict per trial, best first and failed last: "trial" (int, from 1), "settings" (those searched;
        without "num_heads" if the model searched is an LSTM), "bits_per_char" (float, None if failed),
        "seconds" (float, since it was last started or resumed), "error" (str, None if it succeeded).

    Raises:
        BlockingIOError: another search is running in the folder.
        ValueError: the space or the budget is invalid, the folder belongs to another search, `trials.json` is
            damaged, KerasTuner is missing, or all trials failed.
        KeyboardInterrupt: Ctrl-C.

    Source:
        Snoek, Larochelle and Adams, "Practical Bayesian Optimization of Machine Learning Algorithms", 2012.
    """
    space = check_space(space, fixed)
    if trials is None and minutes is None:
        raise ValueError("A search needs a limit: give trials, minutes or both.")
    if trials is not None and trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}.")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes must be above 0, got {minutes}.")
    seed = as_seed(seed)
    _keras_tuner()
    folder = Path(folder)
    search = {
        "documents": documents_sha256(documents),
        "space": {name: list(v) if isinstance(v, list) else {"low": v[0], "high": v[1]} for name, v in space.items()},
        "fixed": fixed,
        "seed": seed,
    }
    # As JSON has it, to compare with what is read. str is for paths.
    search = json.loads(json.dumps(search, ensure_ascii=False, default=str))
    show = print if progress else _show_nothing
    began = time.monotonic()
    with locked(folder):
        records = read_trials(folder, search, space)
        keep_best(folder, records)
        if records:
            show(f"resuming after {count_in_words(records)}, kept in {folder}", flush=True)
        try:
            while (trials is None or len(records) < trials) and not _is_hopeless(records):
                settings = _propose(space, records, seed)
                if settings is None:
                    show("all settings of the space have been tried", flush=True)
                    break
                records.append(_run_trial(documents, folder, len(records) + 1, settings, {"seed": seed, **fixed}))
                write_trials(folder, search, records)
                keep_best(folder, records)
                show(progress_line(records, trials), flush=True)
                if minutes is not None and time.monotonic() - began >= 60 * minutes:
                    break
        except KeyboardInterrupt:
            show(
                f"stopped after {count_in_words(records)}, kept in {folder}; the same call resumes the search",
                flush=True,
            )
            raise
        shutil.rmtree(folder / _TEXT, ignore_errors=True)
    if best_trial(records) is None:
        raise ValueError(
            f"{'The only trial' if len(records) == 1 else f'All {len(records)} trials'} failed. "
            f"The last error was: {records[-1]['error']} Search another space, in another folder."
        )
    return sorted(records, key=sort_key)


def _keras_tuner():
    try:
        import keras_tuner
        import scipy.optimize  # noqa: F401
        import sklearn.gaussian_process  # noqa: F401 (KerasTuner needs both, but is imported without them)
    except ImportError as error:  # six: KerasTuner needs it too, but does not require it, as TensorFlow does
        raise ValueError(
            f"tune() needs KerasTuner, scikit-learn and six: pip install 'keras-tuner[bayesian]' six ({error})."
        ) from None
    for name in _PRIVATE:
        try:
            operator.attrgetter(name)(keras_tuner)
        except AttributeError:
            raise ValueError(
                f"tune() needs keras_tuner.{name}, which KerasTuner {keras_tuner.__version__} does not have: "
                "pip install 'keras-tuner>=1.4,<1.5'"
            ) from None
    return keras_tuner


def _propose(space: dict, records: list[dict], seed: int) -> dict | None:
    """Choose the settings of the next trial, a function of the arguments alone; None if all were tried.

    KerasTuner's oracle is rebuilt from our records, so that a resumed search proposes what an uninterrupted one does.
    """
    keras_tuner = _keras_tuner()
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    rng = random.Random(f"{seed} {len(records)}")
    hyperparameters = _hyperparameters(space)
    oracle = keras_tuner.oracles.BayesianOptimizationOracle(
        objective=keras_tuner.Objective("bits_per_char", "min"),
        hyperparameters=hyperparameters,
        num_initial_points=_RANDOM_TRIALS,
        seed=rng.randint(1, 2**31),  # for KerasTuner 0 is no seed
    )
    worst = max((r["bits_per_char"] for r in records if not r["error"]), default=None)
    for record in records:
        # A failed trial counts as the worst one, which leads the search away from such settings.
        if worst is not None:
            tried = hyperparameters.copy()
            tried.values = dict(record["settings"])
            trial = keras_tuner.engine.trial.Trial(tried, trial_id=str(record["trial"]), status="COMPLETED")
            trial.score = worst if record["error"] else record["bits_per_char"]
            oracle.trials[trial.trial_id] = trial
    # On such small matrices several threads take twice as long as one.
    with warnings.catch_warnings(), threadpool_limits(1):
        # The Gaussian process warns at the bounds of its length scale, which it reaches with few trials.
        warnings.simplefilter("ignore")
        settings = effective_settings(oracle.populate_space("next")["values"])
    tried = [record["settings"] for record in records]
    # In a finite space, so many draws miss the last settings left less than once in e^50 times.
    for _ in range(100 * (len(records) + 1)):
        if settings not in tried:
            return settings
        settings = effective_settings({hp.name: hp.random_sample(rng.getrandbits(32)) for hp in hyperparameters.space})
    return None


def _hyperparameters(space: dict):
    hyperparameters = _keras_tuner().HyperParameters()
    for name, values in space.items():
        if isinstance(values, list):
            hyperparameters.Choice(name, values)
        elif TYPES[name] is int:
            hyperparameters.Int(name, *values)
        else:
            hyperparameters.Float(name, *values, sampling="log" if values[0] > 0 else "linear")
    return hyperparameters


def _run_trial(documents: list[str], folder: Path, number: int, settings: dict, fixed: dict) -> dict:
    run_folder = folder / f"trial-{number}"
    began = time.monotonic()
    bits = error = None
    given = effective_settings(settings, fixed)
    try:
        with _quiet_tensorflow():
            figures = run_pipeline(documents, run_folder, **given, text_dir=folder / _TEXT, progress=False)
        if figures["steps_done"] < read_run(run_folder)["settings"]["steps"]:
            raise KeyboardInterrupt
        bits = figures["bits_per_char"]
        if not math.isfinite(bits):
            raise ValueError(f"The bits per character became {bits}.")
    except Exception as caught:
        if not _is_failure_of_settings(caught):
            raise
        bits, error = None, textwrap.shorten(str(caught), 500, placeholder=" ...") or type(caught).__name__
    seconds = round(time.monotonic() - began, 3)
    return {"trial": number, "settings": settings, "bits_per_char": bits, "seconds": seconds, "error": error}


@contextlib.contextmanager
def _quiet_tensorflow() -> Iterator[None]:
    """Silence TensorFlow's warning that functions are retraced: each trial has a new model."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _is_hopeless(records: list[dict]) -> bool:
    return len(records) >= _HOPELESS_TRIALS and best_trial(records) is None


def _is_failure_of_settings(error: Exception) -> bool:
    # The errors of TensorFlow and of JAX for too little memory, by the name and the text that they have.
    is_out_of_memory = isinstance(error, MemoryError) or (
        type(error).__name__ == "ResourceExhaustedError"
        or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error))
    )
    return is_out_of_memory or isinstance(error, ValueError)


def _show_nothing(line: str, flush: bool) -> None: ...
