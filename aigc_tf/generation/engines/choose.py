"""Engines: the ways to compute a text, which one is taken, and why one that is asked for cannot be."""

from ...models.weights import LstmWeights, TransformerWeights
from ...runtime.numba_tools import numba_is_usable, numba_problem
from ..settings import Settings
from .engine import model_weights

ENGINES = ("auto", "numba", "numpy", "device", "model")

# Loading numba and its compiled code takes about a second, in which NumPy writes a hundred tokens of a model of so
# many parameters. Whoever comes with bare weights has not loaded Keras, and waits for a first answer.
_PARAMETERS_WORTH_LOADING_NUMBA = 50e6


def choose_engine(model, engine: str, settings: Settings, num_beams: int = 1):
    """Choose the engine that writes: by the model, the device and the settings, never by how much is to be written.

    Args:
        model: see `generation.generate`.
        engine: see `generation.generate`.
        settings: of sampling.
        num_beams: see `generation.generate`.

    Returns:
        The engine's name, not "auto"; and what it reads: weights, or for "model" the model itself.

    Raises:
        ValueError: the engine is unknown, or cannot be used with this model, these settings or this machine.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}.")
    is_bare = isinstance(model, TransformerWeights | LstmWeights)
    if engine == "model":
        if is_bare:
            raise ValueError('engine="model" needs the model itself, got its weights. Load it with `load`.')
        return engine, model
    weights = model_weights(model)
    if weights is None:
        if engine == "auto":
            return "model", model
        raise ValueError(
            f'engine="{engine}" reads the models of `lstm` and `transformer`, and this one computes something else. '
            'Take engine="model".'
        )
    on_host_alone = [name for name in ("banned", "forced") if getattr(settings, name)]
    if num_beams > 1:
        on_host_alone.append("num_beams")
    if engine == "auto":
        if not is_bare and not on_host_alone and _has_accelerator():
            return "device", weights
        if is_bare and weights.num_parameters < _PARAMETERS_WORTH_LOADING_NUMBA:
            return "numpy", weights
        return "numba" if numba_is_usable() else "numpy", weights
    if engine == "device" and on_host_alone:
        raise ValueError(f'engine="device" does not support {", ".join(on_host_alone)}. Take another engine.')
    if engine == "numba" and (problem := numba_problem()):
        raise ValueError(f'engine="numba" cannot be used: {problem}. Take engine="numpy".')
    return engine, weights


def _has_accelerator() -> bool:
    from ...runtime import backend

    return backend.uses_accelerator()
