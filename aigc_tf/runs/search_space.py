"""Search space: the settings that tune() searches, and their values."""

import math

from .pipeline import SETTINGS

# What `aigc-tf tune` searches by default.
DEFAULT_SPACE = {
    "model": ["transformer", "lstm"],
    "learning_rate": (1e-3, 1e-2),
    "hidden_dim": [64, 128, 256],
    "dropout": [0.0, 0.1, 0.2],
    "batch_size": [8, 16, 32],
}

TYPES = {name: int if default is None else type(default) for name, default in SETTINGS.items()}
TYPES |= {"user_dict": str, "stopwords": str}
# Settings that have an effect with one value of another alone.
_ONLY_FOR = {"num_heads": ("model", "transformer"), "user_dict": ("unit", "word")}


def parse_space(texts: list[str]) -> tuple[dict[str, list | tuple], dict]:
    """Parse what to search and what to keep fixed from a command line.

    Args:
        texts: one `name=value` per setting: `low..high` is a range, `a,b,c` a choice, a single value is fixed.

    Returns:
        The space and the fixed settings, as `tune` takes them.

    Raises:
        ValueError: a text does not have that form, names no setting, or its value has the wrong type.

    Example:
        >>> parse_space(["learning_rate=1e-3..1e-2", "model=transformer,lstm", "steps=300"])
        ({'learning_rate': (0.001, 0.01), 'model': ['transformer', 'lstm']}, {'steps': 300})
    """
    space, fixed = {}, {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise ValueError(f"{text!r} must be name=values, such as steps=300 or learning_rate=1e-3..1e-2.")
        _check_name(name)
        if name in space or name in fixed:
            raise ValueError(f"{name} must be given once, got it again in {text!r}.")
        # Text has no ranges: two dots are part of file names such as ../words.txt.
        if ".." in value and TYPES[name] is not str:
            ends = value.split("..")
            if len(ends) != 2:
                raise ValueError(f"A range must be low..high, got {text!r}.")
            space[name] = tuple(_parse(name, end) for end in ends)
        elif "," in value:
            space[name] = [_parse(name, choice) for choice in value.split(",")]
        else:
            fixed[name] = _parse(name, value)
    return (check_space(space, fixed) if space else space), fixed


def _parse(name: str, text: str):
    try:
        value = TYPES[name](text.strip())
    except ValueError:
        value = ""
    if value == "":
        kind = {int: "an integer", float: "a number", str: "not empty"}[TYPES[name]]
        raise ValueError(f"{name} must be {kind}, got {text!r}.")
    return value


def _check_name(name: str) -> None:
    if name not in SETTINGS:
        raise ValueError(f"There is no setting {name!r}. The settings are {', '.join(SETTINGS)}.")


def check_settings(settings: dict) -> dict:
    """Return settings of `run_pipeline` without those that are None, the default; refuse other names and types."""
    checked = {}
    for name, value in settings.items():
        _check_name(name)
        if isinstance(value, list) and name == "user_dict" and all(isinstance(line, str) for line in value):
            checked[name] = value  # the lines of a dictionary
        elif value is not None:
            checked[name] = _typed(name, value)
    return checked


def check_space(space: dict, fixed: dict) -> dict:
    """Return a space with each value in the type of its setting; refuse one that cannot be searched."""
    for name in (*space, *fixed):
        _check_name(name)
    if not space:
        raise ValueError("There is nothing to search: give a list or a range for at least one setting.")
    if both := set(space) & set(fixed):
        raise ValueError(f"{min(both)} is both searched and fixed. Give it only once.")
    if "valid_fraction" in space:
        raise ValueError(
            "valid_fraction cannot be searched: figures on different held-out documents cannot be compared. Fix it."
        )
    checked = {}
    for name, values in space.items():
        if isinstance(values, list):
            if not values:
                raise ValueError(f"The list of {name} must hold at least one value, got an empty one.")
            checked[name] = list(dict.fromkeys(_typed(name, value) for value in values))
        elif isinstance(values, tuple) and len(values) == 2 and TYPES[name] is not str:
            low, high = checked[name] = tuple(_typed(name, value) for value in values)
            if not low <= high:
                raise ValueError(f"The range of {name} must have low <= high, got {low} and {high}.")
        else:
            ranges = "" if TYPES[name] is str else " or a tuple (low, high)"
            raise ValueError(f"What to search for {name} must be a list{ranges}, got {values!r}.")
    return checked


def allows(space: dict, name: str, value) -> bool:
    """Check whether a space holds a value of a setting, in that setting's type."""
    if type(value) is not TYPES[name] and not (TYPES[name] is float and type(value) is int):
        return False
    if isinstance(space[name], list):
        return value in space[name]
    low, high = space[name]
    # What is proposed at an end may lie beyond it by a rounding error.
    return low <= value <= high or math.isclose(value, low) or math.isclose(value, high)


def effective_settings(settings: dict, fixed: dict | None = None) -> dict:
    """Add fixed settings to those of a trial, and leave out those without an effect: an LSTM has no attention heads."""
    unused = {name for name, (other, only) in _ONLY_FOR.items() if settings.get(other, only) != only}
    return {name: value for name, value in {**(fixed or {}), **settings}.items() if name not in unused}


def _typed(name: str, value):
    expected = TYPES[name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number and expected(value) == value if expected is not str else isinstance(value, str)):
        raise ValueError(f"{name} must be of type {expected.__name__}, got {value!r}.")
    return expected(value)
