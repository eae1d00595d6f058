"""The cache of weights: those of a Keras model as arrays, read from it once as long as they stay what they are."""

import json
import os
import threading
import warnings
import weakref

import numpy as np

from ...models.graph import read_weights
from ...models.weights import LstmWeights, TransformerWeights
from ...runtime.keras_internals import is_its_graph
from .numpy_engine import numpy_engine

_COMPARED = 16  # tokens

_read_before = weakref.WeakKeyDictionary()  # model -> its layers' settings, a watch over its variables, its weights
_reading = threading.Lock()  # on JAX a model that two threads compute at once has given its state away to one of them
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_reading.acquire, after_in_parent=_reading.release, after_in_child=_reading.release)


def model_weights(model) -> TransformerWeights | LstmWeights | None:
    """Read the weights of a model that `networks.py` builds, or return None; the same object while they are equal."""
    if isinstance(model, TransformerWeights | LstmWeights):
        return model
    if not hasattr(model, "get_layer") or not is_its_graph(model):  # no Keras model, or a class that overrides its call
        return None
    with _reading:
        return _watched_weights(model)


def _watched_weights(model) -> TransformerWeights | LstmWeights | None:
    from .weight_watch import LayerSettings, Watch

    settings, watch, weights = _read_before.get(model, (None, None, None))
    is_new = settings is None or not settings.is_current(model)
    if not is_new and watch.is_current(model):
        return weights
    if is_new and settings is not None:
        from ...runtime.distribution import forget_compiled

        forget_compiled(model)
    settings, watch = LayerSettings(model), Watch(model)
    try:
        config = json.loads(json.dumps(model.get_config()))
    except (NotImplementedError, TypeError):  # a layer of the user's cannot tell its configuration, or not as JSON
        config = {}
    weights = read_weights(config, lambda name: [watch.array(variable) for variable in model.get_layer(name).weights])
    if weights is not None and is_new and not _agree(model, weights):
        warnings.warn(
            "The model has the layers and settings of one of ours, and computes something else: it is read through "
            "itself, slowly.",
            stacklevel=3,
        )
        weights = None
    _read_before[model] = settings, watch, weights
    return weights


def _agree(model, weights) -> bool:
    """Compare what a model makes of a few ids with what its weights give in NumPy, roughly: precisions may be low.

    The model reads a whole window, and what stands right of those ids must not matter to it.
    """
    from ...runtime.distribution import predict

    length = model.input_shape[1] if isinstance(model.input_shape[1], int) else _COMPARED
    window = np.random.default_rng(0).integers(0, len(weights.token_embedding), length)
    ids = window[:_COMPARED]  # in NumPy a window of 1,024 would take several times as long as through the model
    expected = np.asarray(predict(model, window[None].astype(np.int32)))[0, len(ids) - 1].astype(np.float32)
    with np.errstate(all="ignore"):
        logits = numpy_engine(weights, 1)[0](np.zeros(len(ids), np.int64), np.arange(len(ids)), ids)[0]
        # Where they are not finite, that is said when a token is chosen.
        size, error = np.sqrt(np.square(expected).mean()), np.abs(logits - expected)
        return not (error.mean() > 0.1 * size or error.max() > size)  # one token may be what another model changes
