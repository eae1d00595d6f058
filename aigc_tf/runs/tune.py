"""Tuning: tune(), the search for the settings that predict held-out documents best."""

import contextlib
import json
import logging
import math
import operator
import os
import random
import shutil
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..corpus.cleaning import documents_sha256
from ..corpus.dataset import as_seed
from ..runtime.backend import tf
from ..runtime.files import locked, parse_json, write_json
from .folder import read_run
from .pipeline import run_pipeline
from .search_space import TYPES, check_space

_TRIALS, _BEST = "trials.json", "best"
_TEXT = ".text"  # the tokens, which trials that cut the text alike share
# What KerasTuner does not promise to keep, and the proposals are made with.
_PRIVATE = (
    "engine.trial.Trial",
    "oracles.BayesianOptimizationOracle.populate_space",
    "engine.hyperparameters.HyperParameter.random_sample",
)
_RANDOM_TRIALS = 5  # before the Gaussian process is asked
_HOPELESS_TRIALS = 10  # so many failures without a success are the fault of what is the same in all of them
# Settings that exist for one value of another; a search over both values leaves them out for the other ones.
_ONLY_FOR = {"num_heads": ("model", "transformer"), "user_dict": ("unit", "word")}


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
    are drawn at random, then a Gaussian process over all trials so far proposes where the figure may be
    lowest. Settings are not tried twice; when none are left, the search ends.

    Called again on the same folder, the search goes on, however it ended: with the trial in hand, after its newest
    checkpoint (see `train`). A trial whose settings do not go together, that runs out of memory or diverges is
    recorded as failed, and the search goes on. The figure of the best of many trials is a little too good, as it was
    chosen by the same documents that measured it.

    Args:
        documents: the documents, clean (see `load_documents`); the same part is held out in each trial.
        folder: a new folder or that of an earlier call. It gets `trials.json` and, as `best/`, the run
            folder of the best trial; the run folders of the others are deleted, but for that of a trial to go on with.
        space: a setting's name to a list, of which one value is chosen, or to a tuple (low, high), a range:
            of integers, or of floats, on a logarithmic scale if low is above 0.
        trials: how many trials to have in the end, those of earlier calls among them.
        minutes: begin no further trial after that time, counted anew in each call. The first always begins.
        seed: the seed of the proposals, and of each run.
        progress: print a line a trial on standard output.
        **fixed: settings that are the same in all trials.

    Returns:
        One dict a trial, best first and failed last: "trial" (int, from 1), "settings" (those searched;
        without "num_heads" where the model searched is an LSTM), "bits_per_char" (float, None if failed),
        "seconds" (float, since it last went on), "error" (str, None if it went well).

    Raises:
        BlockingIOError: a search is going on in the folder.
        ValueError: the space or the budget is wrong, the folder belongs to another search, KerasTuner is
            missing, or all trials failed.
        KeyboardInterrupt: Ctrl-C.

    Source:
        Snoek, Larochelle and Adams, "Practical Bayesian Optimization of Machine Learning Algorithms", 2012.
    """
    space = check_space(space, fixed)
    if trials is None and minutes is None:
        raise ValueError("A search needs an end: give trials, minutes or both.")
    if trials is not None and trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}.")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes must be above 0, got {minutes}.")
    seed = as_seed(seed)
    if "seed" in fixed:
        fixed["seed"] = as_seed(fixed["seed"])
    _keras_tuner()
    folder = Path(folder)
    search = {
        "documents": documents_sha256(documents),
        "space": {name: list(v) if isinstance(v, list) else {"low": v[0], "high": v[1]} for name, v in space.items()},
        "fixed": fixed,
        "seed": seed,
    }
    # As JSON has it, to compare with what was read. str is for paths.
    search = json.loads(json.dumps(search, ensure_ascii=False, default=str))
    show = print if progress else _show_nothing
    began = time.monotonic()
    with locked(folder):
        records = _read_records(folder, search, space)
        _keep_best(folder, records)
        if records:
            show(f"{_counted(records)} kept in {folder} from an earlier call", flush=True)
        try:
            while (trials is None or len(records) < trials) and not _is_hopeless(records):
                settings = _propose(space, records, seed)
                if settings is None:
                    show("all there is to try has been tried", flush=True)
                    break
                records.append(_run_trial(documents, folder, len(records) + 1, settings, {"seed": seed, **fixed}))
                write_json(folder / _TRIALS, {**search, "trials": records})
                _keep_best(folder, records)
                show(_progress_line(records, trials), flush=True)
                if minutes is not None and time.monotonic() - began >= 60 * minutes:
                    break
        except KeyboardInterrupt:
            show(f"stopped; {_counted(records)} kept in {folder}, and the same call continues the search", flush=True)
            raise
        shutil.rmtree(folder / _TEXT, ignore_errors=True)
    if _best(records) is None:
        raise ValueError(
            f"{'The only trial' if len(records) == 1 else f'All {len(records)} trials'} failed. "
            f"The last error was: {records[-1]['error']} Search another space, in another folder."
        )
    return sorted(records, key=_rank)


def describe_trials(trials: list[dict]) -> str:
    """Write the trials of `tune` as a table, best first, one line a trial.

    Example:
        >>> trial = {"trial": 1, "settings": {"dropout": 0.1}, "bits_per_char": 7.5, "seconds": 61.2, "error": None}
        >>> print(describe_trials([trial]))
        trial  bits/char  seconds  settings
            1     7.5000       61  dropout 0.1
    """
    lines = ["trial  bits/char  seconds  settings"]
    for record in sorted(trials, key=_rank):
        bits = "failed" if record["error"] else f"{record['bits_per_char']:.4f}"
        reason = f": {record['error']}" if record["error"] else ""
        settings = _describe_settings(record["settings"])
        lines.append(f"{record['trial']:>5}  {bits:>9}  {record['seconds']:7.0f}  {settings}{reason}")
    return "\n".join(lines)


def _keras_tuner():
    try:
        import keras_tuner
        import scipy.optimize  # noqa: F401
        import sklearn.gaussian_process  # noqa: F401 (KerasTuner needs both, and is imported without them too)
    except ImportError as error:
        raise ValueError(
            f"tune() needs KerasTuner and scikit-learn: pip install 'keras-tuner[bayesian]' ({error})."
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
    """Choose the settings of the next trial, a function of the arguments alone; None when all were tried.

    KerasTuner's oracle is made anew from our records, so that a resumed search goes on as if it had not
    been interrupted.
    """
    keras_tuner = _keras_tuner()
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    rng = random.Random(f"{seed} {len(records)}")
    hyperparameters = _hyperparameters(space)
    oracle = keras_tuner.oracles.BayesianOptimizationOracle(
        objective=keras_tuner.Objective("bits_per_char", "min"),
        hyperparameters=hyperparameters,
        num_initial_points=_RANDOM_TRIALS,
        seed=rng.randint(1, 2**31),  # KerasTuner takes 0 for none
    )
    worst = max((r["bits_per_char"] for r in records if not r["error"]), default=None)
    for record in records:
        # A failed trial counts as the worst, which leads away from settings such as that.
        if worst is not None:
            tried = hyperparameters.copy()
            tried.values = dict(record["settings"])
            trial = keras_tuner.engine.trial.Trial(tried, trial_id=str(record["trial"]), status="COMPLETED")
            trial.score = worst if record["error"] else record["bits_per_char"]
            oracle.trials[trial.trial_id] = trial
    # The matrices are so small that several threads take twice as long as one.
    with warnings.catch_warnings(), threadpool_limits(1):
        # The Gaussian process warns when it meets the bounds of its length scale, as it does with few trials.
        warnings.simplefilter("ignore")
        settings = _without_idle(oracle.populate_space("next")["values"])
    tried = [record["settings"] for record in records]
    # So many draws miss the last settings left, of a choice among finitely many, less than once in e^50 times.
    for _ in range(100 * (len(records) + 1)):
        if settings not in tried:
            return settings
        settings = _without_idle({hp.name: hp.random_sample(rng.getrandbits(32)) for hp in hyperparameters.space})
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


def _without_idle(settings: dict, fixed: dict | None = None) -> dict:
    """Leave out what the searched value of another setting has no use for: the attention heads of an LSTM."""
    idle = {name for name, (other, only) in _ONLY_FOR.items() if settings.get(other, only) != only}
    return {name: value for name, value in {**(fixed or {}), **settings}.items() if name not in idle}


def _run_trial(documents: list[str], folder: Path, number: int, settings: dict, fixed: dict) -> dict:
    run_folder = folder / f"trial-{number}"
    began = time.monotonic()
    bits = error = None
    given = _without_idle(settings, fixed)
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
    """Hold back TensorFlow's warning that a function is traced again and again: each trial has a new model."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _is_hopeless(records: list[dict]) -> bool:
    return len(records) >= _HOPELESS_TRIALS and _best(records) is None


def _is_failure_of_settings(error: Exception) -> bool:
    # JAX has no error type of its own for memory that is too small.
    is_out_of_memory = isinstance(error, (MemoryError, tf.errors.ResourceExhaustedError)) or (
        isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )
    return is_out_of_memory or isinstance(error, ValueError)


def _read_records(folder: Path, search: dict, space: dict) -> list[dict]:
    """Read the trials of an earlier call, or begin the folder of a new search."""
    file = folder / _TRIALS
    if not file.exists():
        if folder.exists() and (not folder.is_dir() or any(p for p in folder.iterdir() if p.name[0] != ".")):
            raise ValueError(f"{folder} exists, is not empty, and holds no {_TRIALS}. Name another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, {**search, "trials": []})
    damaged = ValueError(f"{file} is damaged. Name another folder.")
    try:
        found = parse_json(file.read_text("utf-8"))
        records = found["trials"]
        # json.dumps, as the order of the settings and of the choices decides what the seed proposes
        differs = [name for name in search if json.dumps(found.get(name)) != json.dumps(search[name])]
        is_whole = isinstance(records, list) and all(differs or _is_record(space, **record) for record in records)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise damaged from None
    if differs:
        raise ValueError(
            f"{folder} belongs to a search with another {' and another '.join(differs)}. "
            "Call tune() as before, or name another folder."
        )
    if not is_whole:
        raise damaged
    return records


def _is_record(space: dict, trial: int, settings: dict, bits_per_char: float | None, seconds: float, error) -> bool:
    """Tell whether these are of a trial: numbers, settings of the space, and either a figure or an error."""

    def is_one_of(name, value):
        if isinstance(space[name], list):
            return value in space[name]
        low, high = space[name]
        # What is proposed at an end may lie beyond it by a rounding.
        return low <= value <= high or math.isclose(value, low) or math.isclose(value, high)

    has_failed = isinstance(error, str) and error and bits_per_char is None
    return (
        (has_failed or (error is None and math.isfinite(bits_per_char)))
        and isinstance(trial, int)
        and math.isfinite(seconds)
        and all(is_one_of(name, value) for name, value in settings.items())
    )


def _keep_best(folder: Path, records: list[dict]) -> None:
    """Make the best trial's run folder `best`, and delete those of the others, but not of the one to go on with.

    It does what is still to do: wherever a process was killed, the next call ends in the same state.
    """
    best = _best(records)
    for record in records:
        path = folder / f"trial-{record['trial']}"
        if not path.is_dir():
            continue
        if record is best:
            shutil.rmtree(folder / _BEST, ignore_errors=True)
            os.replace(path, folder / _BEST)
        else:
            shutil.rmtree(path)


def _counted(records: list[dict]) -> str:
    return "1 trial is" if len(records) == 1 else f"{len(records)} trials are"


def _rank(record: dict) -> tuple:
    return record["error"] is not None, record["bits_per_char"] or 0.0, record["trial"]


def _best(records: list[dict]) -> dict | None:
    return min((record for record in records if not record["error"]), key=_rank, default=None)


def _describe_settings(settings: dict) -> str:
    shown = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in settings.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _progress_line(records: list[dict], trials: int | None) -> str:
    record, best = records[-1], _best(records)
    number = f"trial {record['trial']}" + (f"/{trials}" if trials else "")
    settings = _describe_settings(record["settings"])
    if record["error"]:
        figure = f"failed: {record['error']}"
    else:
        figure = f"{record['bits_per_char']:.3f} bits/char  (best {best['bits_per_char']:.3f})"
    return f"{number}  {settings}  {figure}  {record['seconds']:.0f} s"


def _show_nothing(line: str, flush: bool) -> None: ...
