"""Search space: which settings tune() searches, and over which values."""

import math

from .pipeline import SETTINGS

# What `aigc-tf tune` searches when it is told nothing else.
DEFAULT_SPACE = {
    "model": ["transformer", "lstm"],
    "learning_rate": (1e-3, 1e-2),
    "hidden_dim": [64, 128, 256],
    "dropout": [0.0, 0.1, 0.2],
    "batch_size": [8, 16, 32],
}

TYPES = {name: int if default is None else type(default) for name, default in SETTINGS.items()}
TYPES |= {"user_dict": str, "stopwords": str}


def parse_space(texts: list[str]) -> tuple[dict[str, list | tuple], dict]:
    """Read what to search and what to keep fixed from a command line.

    Args:
        texts: one `name=value` a setting: `low..high` is a range, `a,b,c` a choice, a single value is fixed.

    Returns:
        The space and the fixed settings, as `tune` takes them.

    Raises:
        ValueError: a text is not of that form, names no setting, or its value has the wrong type.

    Example:
        >>> parse_space(["learning_rate=1e-3..1e-2", "model=transformer,lstm", "steps=300"])
        ({'learning_rate': (0.001, 0.01), 'model': ['transformer', 'lstm']}, {'steps': 300})
    """
    space, fixed = {}, {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise ValueError(f"{text!r} must be name=value, such as steps=300 or learning_rate=1e-3..1e-2.")
        _check_name(name)
        if name in space or name in fixed:
            raise ValueError(f"{name} must be named once, got it again in {text!r}.")
        # Two dots are part of file names such as ../words.txt, of which there are no ranges.
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
    """Refuse what is no setting of `run_pipeline` or has not its type, and return the others; None is the default."""
    checked = {}
    for name, value in settings.items():
        _check_name(name)
        if isinstance(value, list) and name == "user_dict" and all(isinstance(line, str) for line in value):
            checked[name] = value  # its lines
        elif value is not None:
            checked[name] = _typed(name, value)
    return checked


def check_space(space: dict, fixed: dict) -> dict:
    """Refuse a space that cannot be searched, and return it with each value in its setting's type."""
    for name in (*space, *fixed):
        _check_name(name)
    if not space:
        raise ValueError("There is nothing to search: give at least one setting a list or a range.")
    if both := set(space) & set(fixed):
        raise ValueError(f"{min(both)} is both searched and fixed. Give it once.")
    if "valid_fraction" in space:
        raise ValueError("valid_fraction must be fixed: figures on different held-out documents cannot be compared.")
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


def _typed(name: str, value):
    expected = TYPES[name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number and expected(value) == value if expected is not str else isinstance(value, str)):
        raise ValueError(f"{name} must be of type {expected.__name__}, got {value!r}.")
    return expected(value)
