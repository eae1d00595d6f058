"""Graphs: recognising by its layer graph a model that `models/networks.py` built, and reading its weights.

The graph is walked from the logits backwards, as the model's configuration describes it, so that a file can be read
without Keras. Every setting must be the one that `models/networks.py` uses; settings unknown here must be off.
"""

import contextlib
import re
from collections.abc import Callable

import numpy as np

from .weights import Block, LstmWeights, TransformerWeights

# The settings that affect the results of a layer, by its class, as `models/networks.py` sets them.
_SETTINGS = {
    "InputLayer": {"dtype": "int32"},
    "OnesLike": {"dtype": None},
    "Cumsum": {"axis": 1, "dtype": None},
    "Subtract": {},
    "Add": {},
    "Gelu": {"approximate": True},
    "Identity": {},
    "Dropout": {},
    "Embedding": {},
    "ReversibleEmbedding": {"tie_weights": True},
    "LayerNormalization": {"axis": [-1], "epsilon": 1e-5, "center": True, "scale": True},
    "Dense": {"activation": "linear", "use_bias": True},
    "MultiHeadAttention": {"use_bias": True, "attention_axes": [1], "use_causal_mask": True},
    "LSTM": {"return_sequences": True, "activation": "tanh", "recurrent_activation": "sigmoid", "use_bias": True},
}
# Settings that do not affect inference, and sizes, which the shapes of the weights show.
_IGNORED = re.compile(
    "name|trainable|seed|rate|noise_shape|dropout|recurrent_dropout|unit_forget_bias|unroll|zero_output_for_mask"
    "|(.*_)?(initializer|regularizer|constraint)"
    "|batch_shape|input_dim|output_dim|units|num_heads|key_dim|value_dim"
)
_FLOATS = ("float64", "float32", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")


class _OtherGraphError(Exception):
    """The graph is not one that `models/networks.py` builds."""


class _Graph:
    """A functional model's configuration, walked from the logits backwards."""

    def __init__(self, config: dict):
        output = config["output_layers"]
        # One output stands alone or in a list of one, by version of Keras.
        self.output = output[0] if isinstance(output[0], list) and len(output) == 1 else output
        self.layers = {layer["name"]: layer for layer in config["layers"]}

    def step(self, tensor: list, class_name: str, **expected) -> tuple[str, list]:
        """Return the name and the inputs of the layer that made a tensor, skipping dropout."""
        name, node, of_several = tensor
        layer = self.layers[name]
        if layer["class_name"] == "Dropout" and class_name != "Dropout":
            _, (x,) = self.step(tensor, "Dropout")
            return self.step(x, class_name, **expected)
        called = layer["inbound_nodes"][node] if layer["inbound_nodes"] else {"args": [], "kwargs": {}}
        if (
            of_several != 0
            or layer["class_name"] != class_name
            or layer["module"].split(".")[0] != "keras"
            or layer.get("registered_name") not in (None, class_name)
        ):
            raise _OtherGraphError
        _check_settings({**layer["config"], **called["kwargs"]}, {**_SETTINGS[class_name], **expected})
        return name, [x["config"]["keras_history"] if isinstance(x, dict) else x for x in called["args"]]

    def size(self, name: str, key: str) -> int:
        return self.layers[name]["config"][key]


def _check_settings(settings: dict, expected: dict) -> None:
    for key in settings.keys() | expected.keys():
        value = settings.get(key)
        if key in ("dtype", "reverse_dtype") and key not in expected:
            policy = value["config"]["name"] if isinstance(value, dict) else value
            is_plain = not isinstance(value, dict) or value["class_name"] == "DTypePolicy"  # not a quantised one
            fits = is_plain and policy in (None, *_FLOATS)
        else:  # a setting missing in the file of an earlier Keras is off
            fits = _IGNORED.fullmatch(key) or (value or None) == (expected.get(key) or None)
        if not fits:
            raise _OtherGraphError


def read_weights(config: dict, layer_weights: Callable[[str], list]) -> TransformerWeights | LstmWeights | None:
    """Read the weights of a model that `models/networks.py` builds.

    Args:
        config: the configuration of the functional model in JSON types: `json.loads(json.dumps(model.get_config()))`.
        layer_weights: returns the weights of a layer, given its name.

    Returns:
        The weights, float32, or None if the graph differs.
    """

    def weights(name, *shapes):
        stored = layer_weights(name)
        if [tuple(array.shape) for array in stored] != [*shapes]:
            raise _OtherGraphError
        arrays = [np.asarray(array) for array in stored]
        if any(array.dtype.kind in "iub" for array in arrays):  # quantised
            raise _OtherGraphError
        return [array.astype(np.float32, copy=False) for array in arrays]

    try:
        graph = _Graph(config)
        _, (logits,) = graph.step(graph.output, "Identity")
        with contextlib.suppress(_OtherGraphError, ValueError):
            return _read_transformer(graph, logits, weights)
        return _read_lstm(graph, logits, weights)
    except Exception:  # an unknown configuration can fail anywhere: not such a model
        return None


def _read_transformer(graph: _Graph, logits, weights) -> TransformerWeights:
    embedding, (x,) = graph.step(logits, "ReversibleEmbedding", reverse=True)
    final_norm, (x,) = graph.step(x, "LayerNormalization")
    blocks = []
    while True:
        _, (x, update) = graph.step(x, "Add")
        if graph.layers[update[0]]["class_name"] == "Embedding":
            break
        project, (y,) = graph.step(update, "Dense")
        _, (y,) = graph.step(y, "Gelu")
        expand, (y,) = graph.step(y, "Dense")
        mlp_norm, residual = graph.step(y, "LayerNormalization")
        _same([x], residual)
        _, (before, update) = graph.step(x, "Add")
        attention, (query, value, *key) = graph.step(update, "MultiHeadAttention")
        attention_norm, residual = graph.step(query, "LayerNormalization")
        _same([query, before, *key], [value, *residual, *[query] * min(1, len(key))])
        blocks.append((attention_norm, attention, mlp_norm, expand, project))
        x = before
    position_embedding, (positions,) = graph.step(update, "Embedding")
    _, (counted, one) = graph.step(positions, "Subtract")
    _, (ones,) = graph.step(counted, "Cumsum")
    _, (ids,) = graph.step(ones, "OnesLike")
    table, inputs = graph.step(x, "ReversibleEmbedding")
    name, _ = graph.step(ids, "InputLayer")
    _same([table, inputs, one], [embedding, [ids], 1])
    num_heads = graph.size(blocks[0][1], "num_heads")
    dim = graph.size(embedding, "output_dim")
    _, context = graph.layers[name]["config"]["batch_shape"]
    _same([context, dim], [graph.size(position_embedding, key) for key in ("input_dim", "output_dim")])
    return TransformerWeights(
        token_embedding=weights(embedding, (graph.size(embedding, "input_dim"), dim))[0],
        position_embedding=weights(position_embedding, (context, dim))[0],
        blocks=[_read_block(graph, names, weights, dim, num_heads) for names in reversed(blocks)],
        final_norm=np.stack(weights(final_norm, (dim,), (dim,))),
        num_heads=num_heads,
    )


def _read_block(graph: _Graph, names, weights, dim: int, num_heads: int) -> Block:
    attention_norm, attention, mlp_norm, expand, project = names
    width, head_dim = graph.size(expand, "units"), dim // num_heads
    _same(
        [num_heads, head_dim, head_dim], [graph.size(attention, key) for key in ("num_heads", "key_dim", "value_dim")]
    )
    _same([dim], [graph.size(project, "units")])
    into, bias = (dim, num_heads, head_dim), (num_heads, head_dim)
    q, bq, k, bk, v, bv, output, output_bias = weights(
        attention, into, bias, into, bias, into, bias, (num_heads, head_dim, dim), (dim,)
    )
    return Block(
        np.stack(weights(attention_norm, (dim,), (dim,))),
        np.concatenate([kernel.reshape(dim, dim) for kernel in (q, k, v)], axis=1),
        np.concatenate([bq.ravel(), bk.ravel(), bv.ravel()]),
        output.reshape(dim, dim),
        output_bias,
        np.stack(weights(mlp_norm, (dim,), (dim,))),
        *weights(expand, (dim, width), (width,)),
        *weights(project, (width, dim), (dim,)),
    )


def _same(tensors: list, others: list) -> None:
    if tensors != others:
        raise _OtherGraphError


def _read_lstm(graph: _Graph, logits, weights) -> LstmWeights:
    head, layers, tied = [], [], None
    x = logits
    with contextlib.suppress(_OtherGraphError):
        tied, (x,) = graph.step(logits, "ReversibleEmbedding", reverse=True)
    with contextlib.suppress(_OtherGraphError):
        name, (x,) = graph.step(x, "Dense")
        head.append(name)
    with contextlib.suppress(_OtherGraphError):
        while True:
            name, (x,) = graph.step(x, "LSTM")
            layers.insert(0, name)
    embedding, (ids,) = graph.step(x, "ReversibleEmbedding")
    name, _ = graph.step(ids, "InputLayer")
    _, context = graph.layers[name]["config"]["batch_shape"]
    if not layers or tied not in (None, embedding):
        raise _OtherGraphError
    sizes = [graph.size(embedding, "output_dim"), *(graph.size(name, "units") for name in (*layers, *head))]
    (table,) = weights(embedding, (graph.size(embedding, "input_dim"), sizes[0]))
    read = []
    for name, num_inputs, dim in zip(layers, sizes, sizes[1:], strict=False):
        *matrices, bias = weights(name, (num_inputs, 4 * dim), (dim, 4 * dim), (4 * dim,))
        read.append((np.concatenate(matrices), bias))
    matrices = [tuple(weights(name, tuple(sizes[-2:]), (sizes[-1],))) for name in head]
    if tied:
        matrices.append((table.T, np.zeros(len(table), np.float32)))
    _same([len(table)], [len(matrices[-1][1])])
    return LstmWeights(table, read, matrices, context)
