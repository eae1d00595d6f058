"""Trials: the records of a search in `trials.json`, the run folder of the best one, and both as text."""

import json
import math
import os
import shutil
from pathlib import Path

from ..runtime.files import parse_json, write_json
from .search_space import allows, effective_settings

TRIALS, BEST = "trials.json", "best"
_OF_A_TRIAL = ("trial", "settings", "bits_per_char", "seconds", "error")


def read_trials(folder: Path, search: dict, space: dict) -> list[dict]:
    """Read the trials of an earlier call, or begin the folder of a new search.

    Args:
        folder: the folder of the search.
        search: what identifies the search, as JSON has it.
        space: the space, checked (see `check_space`).

    Returns:
        One dict per trial, in the order in which they ran.

    Raises:
        ValueError: the folder is of another search or holds other files, or `trials.json` is damaged.
    """
    file = folder / TRIALS
    if not file.exists():
        if folder.exists() and (not folder.is_dir() or any(p for p in folder.iterdir() if p.name[0] != ".")):
            raise ValueError(f"{folder} exists, is not empty, and holds no {TRIALS}. Name another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        write_trials(folder, search, [])
    try:
        found = parse_json(file.read_text("utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("trials"), list):
            raise ValueError("it must be an object with a list of trials")
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}. Name another folder.") from None
    # Compared as text, as the order of the settings and of the choices decides what the seed proposes.
    differs = [name for name in search if json.dumps(found.get(name)) != json.dumps(search[name])]
    if differs:
        raise ValueError(
            f"{folder} belongs to a search that differs in {' and '.join(differs)}. "
            "Search with the same documents and settings, or name another folder."
        )
    for i, trial in enumerate(found["trials"], 1):
        if not _is_trial(trial, space):
            raise ValueError(f"{file} is damaged: entry {i} is not a trial of this search. Name another folder.")
    return found["trials"]


def _is_trial(trial, space: dict) -> bool:
    """Check an entry of `trials.json`, which may have been edited by hand: its names, their types, and the settings."""
    if not isinstance(trial, dict) or trial.keys() != {*_OF_A_TRIAL}:
        return False
    number, settings, bits, seconds, error = (trial[name] for name in _OF_A_TRIAL)
    has_failed = bits is None and isinstance(error, str) and error != ""
    try:
        return (
            (has_failed or (error is None and _is_finite(bits)))
            and type(number) is int
            and number > 0
            and _is_finite(seconds)
            and isinstance(settings, dict)
            and effective_settings({**dict.fromkeys(space), **settings}).keys() <= settings.keys() <= space.keys()
            and all(allows(space, name, value) for name, value in settings.items())
        )
    except OverflowError:  # an integer that no float can hold
        return False


def _is_finite(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def write_trials(folder: Path, search: dict, trials: list[dict]) -> None:
    """Write `trials.json`: what identifies the search, and its trials."""
    write_json(folder / TRIALS, {**search, "trials": trials})


def keep_best(folder: Path, trials: list[dict]) -> None:
    """Rename the run folder of the best trial to `best`, and delete those of the others that are recorded.

    Wherever a process was killed, the next call ends in the same state.
    """
    best = best_trial(trials)
    for trial in trials:
        path = folder / f"trial-{trial['trial']}"
        if not path.is_dir():
            continue
        if trial is best:
            shutil.rmtree(folder / BEST, ignore_errors=True)
            os.replace(path, folder / BEST)
        else:
            shutil.rmtree(path)


def sort_key(trial: dict) -> tuple:
    """Return the key that sorts trials: best first, failed last."""
    return trial["error"] is not None, trial["bits_per_char"] or 0.0, trial["trial"]


def best_trial(trials: list[dict]) -> dict | None:
    """Return the best trial, or None if none has succeeded."""
    return min((trial for trial in trials if not trial["error"]), key=sort_key, default=None)


def count_in_words(trials: list[dict]) -> str:
    """Return the number of trials in words: "1 trial", "2 trials"."""
    return "1 trial" if len(trials) == 1 else f"{len(trials)} trials"


def trials_table(trials: list[dict]) -> str:
    """Write the trials of `tune` as a table, best first, one line per trial.

    Example:
        >>> trial = {"trial": 1, "settings": {"dropout": 0.1}, "bits_per_char": 7.5, "seconds": 61.2, "error": None}
        >>> print(trials_table([trial]))
        trial  bits/char  seconds  settings
            1     7.5000       61  dropout 0.1
    """
    lines = ["trial  bits/char  seconds  settings"]
    for trial in sorted(trials, key=sort_key):
        bits = "failed" if trial["error"] else f"{trial['bits_per_char']:.4f}"
        reason = f": {trial['error']}" if trial["error"] else ""
        settings = _settings_in_words(trial["settings"])
        lines.append(f"{trial['trial']:>5}  {bits:>9}  {trial['seconds']:7.0f}  {settings}{reason}")
    return "\n".join(lines)


def progress_line(trials: list[dict], most: int | None) -> str:
    """Write the last trial as a line, given how many there are to be at most."""
    trial, best = trials[-1], best_trial(trials)
    number = f"trial {trial['trial']}" + (f"/{most}" if most else "")
    settings = _settings_in_words(trial["settings"])
    if trial["error"]:
        figure = f"failed: {trial['error']}"
    else:
        figure = f"{trial['bits_per_char']:.3f} bits/char  (best {best['bits_per_char']:.3f})"
    return f"{number}  {settings}  {figure}  {trial['seconds']:.0f} s"


def _settings_in_words(settings: dict) -> str:
    shown = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in settings.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())
