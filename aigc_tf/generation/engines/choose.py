"""Choose: choose_engine(), which picks the engine for a model, a device and settings."""

from ...models.weights import LstmWeights, TransformerWeights
from ...runtime.numba_availability import numba_is_usable, numba_problem
from ..settings import Settings
from .engine import cached_weights

ENGINES = ("auto", "numba", "numpy", "device", "model")

# Loading numba and its compiled code takes about a second, in which NumPy writes a hundred tokens with a model of this
# size. Callers that pass weights (from `load_writer`) have not loaded Keras, and want a first answer soon.
_PARAMETERS_WORTH_LOADING_NUMBA = 50e6


def choose_engine(model, engine: str, settings: Settings, num_beams: int = 1):
    """Choose the engine that writes. The choice never depends on how much is to be written.

    Args:
        model: see `generate`.
        engine: see `generate`.
        settings: the settings of sampling.
        num_beams: see `generate`.

    Returns:
        The name of the engine, not "auto"; and what it reads: weights, or for "model" the model itself.

    Raises:
        ValueError: the engine is unknown, or cannot be used with this model, these settings or this machine.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}.")
    is_weights = isinstance(model, TransformerWeights | LstmWeights)
    if engine == "model":
        if is_weights:
            raise ValueError('engine="model" needs the model itself, got its weights. Load it with aigc_tf.load.')
        return engine, model
    weights = cached_weights(model)
    if weights is None:
        if engine == "auto":
            return "model", model
        raise ValueError(
            f'engine="{engine}" supports the models of aigc_tf.lstm and aigc_tf.transformer, and this one computes '
            'something else. Use engine="model".'
        )
    not_on_device = [name for name in ("banned", "forced") if getattr(settings, name)]
    if num_beams > 1:
        not_on_device.append("num_beams")
    if engine == "auto":
        if not is_weights and not not_on_device and _has_accelerator():
            return "device", weights
        if is_weights and weights.num_parameters < _PARAMETERS_WORTH_LOADING_NUMBA:
            return "numpy", weights
        return "numba" if numba_is_usable() else "numpy", weights
    if engine == "device" and not_on_device:
        raise ValueError(f'engine="device" does not support {", ".join(not_on_device)}. Use another engine.')
    if engine == "numba" and (problem := numba_problem()):
        raise ValueError(f'engine="numba" cannot be used: {problem}. Use engine="numpy".')
    return engine, weights


def _has_accelerator() -> bool:
    from ...runtime import backend

    return backend.uses_accelerator()
