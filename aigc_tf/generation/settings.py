"""Settings: the settings of generation and sampling, their defaults, and the checks that refuse invalid ones."""

import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

_COLDEST = 1e-6  # temperatures below it leave only the likeliest token, given the differences float32 logits can hold
_LARGEST = 1e6  # of temperature and penalties: more changes nothing, and could overflow float32 where penalties add up
_OPTIONAL = ("top_k", "top_p", "min_p", "typical_p", "no_repeat_ngram")


class Settings(NamedTuple):
    """The settings of sampling and their defaults; `generate` explains them."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = 0.9
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int | None = None
    exempt: Collection[str] = ()
    banned: Collection[str] = ()
    forced: Collection[str] = ()
    logit_bias: Mapping[str | int, float] = {}


_NAMES = (
    "max_new_tokens", "stop", "seed", "best_of", "num_beams", "length_penalty", "log_probability", "engine",
    *Settings._fields,
)  # fmt: skip
_NOT_FOR_BEAMS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "forced")


def check_generation(
    max_new_tokens: int = 100,
    seed: int | None = None,
    best_of: int = 1,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    stop: str | Iterable[str] = (),
    **sampling,
) -> tuple[Settings, tuple[str, ...]]:
    """Check all settings of `generate`.

    Returns:
        The settings of sampling, with defaults filled in, and the stop strings.

    Raises:
        ValueError: a setting is unknown, out of range, or does not go together with another.
    """
    for name, number, least in (
        ("max_new_tokens", max_new_tokens, 0),
        ("best_of", best_of, 1),
        ("num_beams", num_beams, 1),
        ("seed", 0 if seed is None else seed, 0),
    ):
        rule = f"a whole number of at least {least}"
        check_number(name, number, lambda x, least=least: x >= least and x == int(x), rule)
    check_number("length_penalty", length_penalty, lambda x: True, "a finite number")
    if length_penalty != 1 and num_beams == 1:
        raise ValueError("length_penalty ranks the texts of a beam search. Give num_beams > 1 too.")
    if num_beams > 1 and best_of > 1:
        raise ValueError("num_beams > 1 does not support best_of > 1: a search draws no samples. Give one of them.")
    settings = check_sampling(**sampling)
    for name in _NOT_FOR_BEAMS if num_beams > 1 else ():
        if name in sampling:
            raise ValueError(f"num_beams > 1 does not support {name}. Remove {name}, or set num_beams=1.")
    stop = _check_words("stop", stop)
    for word in settings.forced:
        for end in stop:
            if end in word:
                raise ValueError(f"{word!r} is forced and contains the stop string {end!r}. Remove one of them.")
    return settings, stop


def check_sampling(**sampling) -> Settings:
    """Check the settings of sampling, and fill in the defaults of those that are not given.

    Raises:
        ValueError: a setting is unknown or out of range.
    """
    for name in sorted(sampling.keys() - set(Settings._fields)):
        close = difflib.get_close_matches(name, _NAMES, 1)
        meant = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"There is no setting {name!r}.{meant} The settings are {', '.join(_NAMES)}.")
    given = Settings(**sampling)._asdict()
    finite = (lambda x: abs(x) <= _LARGEST, f"a finite number of at most {_LARGEST:.0f}; 0 changes nothing")
    rules = {
        "temperature": (
            lambda x: 0 <= x <= _LARGEST,
            f"at least 0, at most {_LARGEST:.0f}; 0 takes the likeliest token",
        ),
        "top_k": (_at_least_1, "a whole number of at least 1, or None for all tokens"),
        "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1, or None for all tokens"),
        "min_p": (lambda x: 0 <= x <= 1, "from 0 to 1, or None for all tokens"),
        "typical_p": (lambda x: 0 < x <= 1, "above 0 and at most 1, or None for all tokens"),
        "repetition_penalty": (lambda x: 0 < x <= _LARGEST, f"above 0, at most {_LARGEST:.0f}; 1 changes nothing"),
        "presence_penalty": finite,
        "frequency_penalty": finite,
        "no_repeat_ngram": (_at_least_1, "a whole number of at least 1, or None"),
    }
    for name, (rule, words) in rules.items():
        if given[name] is not None or name not in _OPTIONAL:
            check_number(name, given[name], rule, words)
            given[name] = (int if rule is _at_least_1 else float)(given[name])
    if given["temperature"] < _COLDEST:
        given["temperature"] = 0.0
    for name in ("exempt", "banned", "forced"):
        if isinstance(given[name], str):
            raise ValueError(f"{name} must be a list of words, none of them empty, got {given[name]!r}.")
        given[name] = _check_words(name, given[name])
    for word in given["forced"]:
        if contained := [other for other in given["banned"] if other in word]:
            raise ValueError(f"{word!r} is forced and contains {contained[0]!r}, which is banned. Remove one of them.")
    if not isinstance(given["logit_bias"], Mapping):
        raise ValueError(f"logit_bias must map tokens to numbers, got {given['logit_bias']!r}.")
    return Settings(**given)


def check_number(name: str, value, rule, words: str) -> None:
    """Check that a value is a finite number that follows a rule, which `words` state."""
    try:
        fits = math.isfinite(value) and rule(value)
    except (TypeError, OverflowError):  # not a number, or an integer too large for a float
        fits = False
    if not fits:
        raise ValueError(f"{name} must be {words}, got {value!r}.")


def _at_least_1(x) -> bool:
    return x >= 1 and x == int(x)


def _check_words(name: str, words) -> tuple[str, ...]:
    """Check that something is a list of words, or a single word, and return a tuple of them."""
    given = [words] if isinstance(words, str) else list(words) if isinstance(words, Iterable) else words
    if not isinstance(given, list) or not all(isinstance(word, str) and word for word in given):
        raise ValueError(f"{name} must be a list of words, none of them empty, got {given!r}.")
    return tuple(given)
