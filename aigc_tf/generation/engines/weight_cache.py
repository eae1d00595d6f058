"""Weight cache (not the KV cache): the weights of a Keras model as arrays, read again only after it has changed."""

import json
import os
import threading
import warnings
import weakref

import numpy as np

from ...models.graph import read_weights
from ...models.weights import LstmWeights, TransformerWeights
from ...runtime.keras_internals import computes_its_graph
from .numpy_engine import numpy_engine

_NUM_COMPARED = 16  # tokens

_cache = weakref.WeakKeyDictionary()  # model -> snapshots of its layers and variables, and its weights
_lock = threading.Lock()  # on JAX, a model that two threads call at the same time has lost its state to one of them
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def cached_weights(model) -> TransformerWeights | LstmWeights | None:
    """Return the weights of a model that `aigc_tf` built, the same object while they are equal; None for others."""
    if isinstance(model, TransformerWeights | LstmWeights):
        return model
    is_keras_model = hasattr(model, "get_layer")
    if not is_keras_model or not computes_its_graph(model):
        return None
    with _lock:
        return _read_if_changed(model)


def _read_if_changed(model) -> TransformerWeights | LstmWeights | None:
    from .weight_watch import LayerSnapshot, VariableSnapshot

    layers, variables, weights = _cache.get(model, (None, None, None))
    is_new = layers is None or not layers.is_current(model)
    if not is_new and variables.is_current(model):
        return weights
    if is_new and layers is not None:
        from ...runtime.distribution import forget_compiled

        forget_compiled(model)
    layers, variables = LayerSnapshot(model), VariableSnapshot(model)
    try:
        config = json.loads(json.dumps(model.get_config()))
    except (NotImplementedError, TypeError):  # a user's layer without a configuration, or with one that is not JSON
        config = {}
    weights = read_weights(
        config, lambda name: [variables.array(variable) for variable in model.get_layer(name).weights]
    )
    if weights is not None and is_new and not _agree(model, weights):
        warnings.warn(
            "The model has the layers and settings of one that aigc_tf built, but computes something else. "
            "It is called for each token, which is slow.",
            stacklevel=3,
        )
        weights = None
    _cache[model] = layers, variables, weights
    return weights


def _agree(model, weights) -> bool:
    """Compare the logits of a model after a few ids with those of its weights in NumPy, loosely: precision may be low.

    The model reads a whole window, so it must not look ahead to agree.
    """
    from ...runtime.distribution import predict

    length = model.input_shape[1] if isinstance(model.input_shape[1], int) else _NUM_COMPARED
    window = np.random.default_rng(0).integers(0, len(weights.token_embedding), length)
    ids = window[:_NUM_COMPARED]  # a window of 1,024 would take NumPy several times as long as the model
    expected = np.asarray(predict(model, window[None].astype(np.int32)))[0, len(ids) - 1].astype(np.float32)
    with np.errstate(all="ignore"):
        logits = numpy_engine(weights, 1)[0](np.zeros(len(ids), np.int64), np.arange(len(ids)), ids)[0]
        # Logits that are not finite are an error later, when a token is chosen.
        size, error = np.sqrt(np.square(expected).mean()), np.abs(logits - expected)
        return not (error.mean() > 0.1 * size or error.max() > size)  # another model may change a single token
