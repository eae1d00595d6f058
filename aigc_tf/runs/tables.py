"""Tables: figures and settings as text, with names in words, units, and no more digits than matter."""

import math

_WORDS = {
    "aigc_tf": "aigc_tf",
    "chars": "characters",
    "frequency": "token frequencies",
    "hidden_dim": "hidden dimension",
    "num_candidates": "softmax candidates",
    "num_heads": "attention heads",
    "num_layers": "layers",
    "num_microbatches": "microbatches",
    "perplexity": "perplexity per token",
    "tokens": "tokens predicted",
    "uniform": "uniform over the vocabulary",
    "valid_fraction": "held-out fraction",
    "vocab_size": "vocabulary size",
}


def in_words(name: str) -> str:
    """Return the name of a figure or a setting in words."""
    return _WORDS.get(name, name.replace("_per_char", " per character").replace("_", " "))


def format_number(value: float) -> str:
    """Write a number: an integer in full, another to four decimals, or below 1 to four significant digits.

    Example:
        >>> format_number(22084.0), format_number(7.251795), format_number(0.0040012345)
        ('22,084', '7.2518', '0.004001')
    """
    if isinstance(value, int):  # also one that is too large for a float
        return f"{value:,}"
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.4f}" if abs(value) >= 1 else f"{value:.4g}"


def format_si(value: float) -> str:
    """Write a number to three significant digits, with the metric prefix of a unit that follows.

    Example:
        >>> format_si(4_440_000) + "B"
        '4.44 MB'
    """
    value = float(f"{value:.3g}")  # first, or 999,999 would be 1000 k
    power = min(int(math.log10(max(value, 1)) // 3), 6)
    return f"{value / 1000**power:.3g} {'kMGTPE'[power - 1] if power else ''}"


def format_duration(seconds: float) -> str:
    """Write a time in the unit that suits it.

    Example:
        >>> [format_duration(seconds) for seconds in (0.0123, 0.9996, 75, 600, 9000, 400_000)]
        ['12.3 ms', '1 s', '75 s', '10 min', '2.5 h', '4.63 days']
    """
    seconds = float(f"{seconds:.3g}")  # first, or 0.9996 s would be 1000 ms
    for unit, size, until in (("ms", 1e-3, 1), ("s", 1, 100), ("min", 60, 6000), ("h", 3600, 48 * 3600)):
        if seconds < until:
            return f"{seconds / size:.3g} {unit}"
    return f"{float(f'{seconds / 86400:.3g}'):,.12g} days"


def figure_line(name: str, value: float) -> str:
    """Write one figure as a line of a table, with its name in words."""
    return f"{in_words(name):32}{format_number(value):>14}"


def _bytes(value: float) -> str:
    return f"{format_si(value)}B"


# What the figures of `estimate` are called, and how their values are written.
_ESTIMATE = {
    "parameters": ("parameters", format_number),
    "forward_flops_per_token": ("forward pass, per token", lambda n: f"{format_si(n)}FLOPs"),
    "train_flops_per_token": ("training, per token", lambda n: f"{format_si(n)}FLOPs"),
    "train_flops": ("whole training", lambda n: f"{format_si(n)}FLOPs"),
    "weights_bytes": ("weights", _bytes),
    "gradients_bytes": ("gradients", _bytes),
    "optimizer_bytes": ("optimizer", _bytes),
    "activations_bytes": ("activations", _bytes),
    "overhead_bytes": ("temporary arrays and graph", _bytes),
    "runtime_bytes": ("this process before training", _bytes),
    "peak_memory_bytes": ("peak memory", _bytes),
    "generation_bytes_per_text": ("generation, per text", _bytes),
    "available_memory_bytes": ("free memory", _bytes),
    "num_candidates": ("tokens in the softmax", lambda n: format_number(n) if n else "all"),
    "step_seconds": ("time per step", format_duration),
    "tokens_per_second": ("speed", lambda n: f"{n:,.0f} tokens/s"),
    "validation_hours": ("validation time", lambda hours: format_duration(3600 * hours)),
    "hours": ("total time", lambda hours: format_duration(3600 * hours)),
    "watts": ("power", lambda watts: f"{format_si(watts)}W"),
    "kilowatt_hours": ("energy", lambda kilowatt_hours: f"{format_si(1000 * kilowatt_hours)}Wh"),
}


def estimate_table(figures: dict[str, float]) -> str:
    """Write the figures of `estimate` as a table, with names in words and readable units.

    Example:
        >>> print(estimate_table({"parameters": 1_110_400.0, "weights_bytes": 4.44e6, "hours": 0.05, "watts": 65.0}))
        parameters                           1,110,400
        weights                                4.44 MB
        total time                               3 min
        power                                     65 W
    """
    rows = ((_ESTIMATE[name], value) for name, value in figures.items())
    return "\n".join(f"{label:30}{write(value):>16}" for (label, write), value in rows)


def run_table(run: dict) -> str:
    """Write the content of a `run.json` as a table, with an indented block for each group."""
    lines = []
    for name, value in run.items():
        if isinstance(value, dict):
            lines.append(_label(name))
            lines += [_line(f"  {_label(key)}", _shown(one, name == "settings")) for key, one in value.items()]
        else:
            lines.append(_line(_label(name), _shown(value, True)))
    return "\n".join(lines)


def _label(name: str) -> str:
    return in_words(name).replace("\n", " ")  # or a name in a downloaded folder could pass for other lines


def _line(name: str, text: str) -> str:
    return f"{name:33} " + text.replace("\n", "\n" + 34 * " ")


def _shown(value, is_setting: bool) -> str:
    """Write a value; a setting so that it can be typed again."""
    if value is None:
        return "default" if is_setting else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and is_setting:
        return f"{value:.6g}"
    if isinstance(value, int | float):
        return str(value) if is_setting else format_number(value)
    if isinstance(value, list):
        return ", ".join(_shown(one, is_setting) for one in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(one, is_setting)}" for key, one in value.items()) or "none"
    return str(value)
