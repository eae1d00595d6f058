"""Weights: those of a model that `models.py` builds, as arrays, told by the graph and not by its name.

The graph is walked from the logits backwards, as it stands in the model's configuration, so that a model which
differs in one activation is told from ours, and a file can be read without Keras.
"""

import contextlib
import dataclasses
import io
import json
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_NORM = {"epsilon": 1e-5, "center": True, "scale": True, "rms_scaling": False, "axis": [-1]}
_DENSE = {"activation": "linear", "use_bias": True}
_ATTENTION = {
    "use_causal_mask": True,
    "use_bias": True,
    "use_gate": False,
    "output_shape": None,
    "attention_axes": [1],
    "sliding_window": None,
}
_LSTM = {
    "return_sequences": True,
    "go_backwards": False,
    "stateful": False,
    "activation": "tanh",
    "recurrent_activation": "sigmoid",
    "use_bias": True,
}


class Block(NamedTuple):
    """The weights of a Transformer's block; matrices are (inputs, outputs), norms (2, D): scale and offset."""

    attention_norm: np.ndarray
    attention: np.ndarray  # (D, 3 D): query, key and value
    attention_bias: np.ndarray
    output: np.ndarray
    output_bias: np.ndarray
    mlp_norm: np.ndarray
    expand: np.ndarray
    expand_bias: np.ndarray
    project: np.ndarray
    project_bias: np.ndarray


@dataclasses.dataclass(eq=False)
class TransformerWeights:
    """The weights of a Transformer."""

    token_embedding: np.ndarray
    position_embedding: np.ndarray
    blocks: list[Block]
    final_norm: np.ndarray
    num_heads: int

    @property
    def output_shape(self) -> tuple[None, None, int]:
        """As of the model."""
        return None, None, len(self.token_embedding)

    @property
    def num_parameters(self) -> int:
        """Of the matrices that each token is multiplied with."""
        return self.token_embedding.size + sum(array.size for block in self.blocks for array in block)


@dataclasses.dataclass(eq=False)
class LstmWeights:
    """The weights of an LSTM; a layer is a matrix from input and state to its gates, as Keras orders them: i f c o."""

    token_embedding: np.ndarray
    layers: list[tuple[np.ndarray, np.ndarray]]  # (inputs + D, 4 D) and its bias
    head: list[tuple[np.ndarray, np.ndarray]]  # dense layers up to the logits

    @property
    def output_shape(self) -> tuple[None, None, int]:
        """As of the model."""
        return None, None, len(self.head[-1][1])

    @property
    def num_parameters(self) -> int:
        """Of the matrices that each token is multiplied with."""
        return sum(matrix.size for matrix, _ in (*self.layers, *self.head))


class _OtherGraphError(Exception):
    """The graph is not one that `models.py` builds."""


class _Graph:
    """A functional model's configuration, walked from the logits backwards."""

    def __init__(self, config: dict):
        output = config.get("output_layers")
        if not output:  # of a Sequential model, among others
            raise _OtherGraphError
        # One output stands alone or in a list of one, by version of Keras.
        self.output = output[0] if isinstance(output[0], list) else output
        self.layers = {layer["name"]: layer for layer in config["layers"]}

    def step(self, tensor: list, class_name: str, **expected) -> tuple[str, list]:
        """Return the name and the inputs of the layer that made a tensor, dropout passed over."""
        name, node, _ = tensor
        layer = self.layers[name]
        inbound = layer["inbound_nodes"][node] if layer["inbound_nodes"] else {"args": [], "kwargs": {}}
        inputs = [x["config"]["keras_history"] if isinstance(x, dict) else x for x in inbound["args"]]
        if layer["class_name"] == "Dropout" and class_name != "Dropout":
            return self.step(inputs[0], class_name, **expected)
        settings = {**layer["config"], **inbound["kwargs"]}
        if layer["class_name"] != class_name or any(settings.get(key) != value for key, value in expected.items()):
            raise _OtherGraphError
        return name, inputs


def read_weights(config: dict, layer_weights: Callable[[str], list]) -> TransformerWeights | LstmWeights | None:
    """Read the weights of a model that `models.py` builds.

    Args:
        config: the configuration of the functional model, as JSON has it: `json.loads(json.dumps(model.get_config()))`.
        layer_weights: from the name of a layer to its weights.

    Returns:
        The weights, float32, or None if the graph is another.
    """

    def weights(name):
        return [np.asarray(weight, np.float32) for weight in layer_weights(name)]

    try:
        graph = _Graph(config)
        _, (logits,) = graph.step(graph.output, "Identity")
        try:
            return _read_transformer(graph, logits, weights)
        except (_OtherGraphError, ValueError):
            return _read_lstm(graph, logits, weights)
    except (_OtherGraphError, ValueError):  # the second where a layer has another number of inputs
        return None


def read_file(path) -> TransformerWeights | LstmWeights | None:
    """Read the weights of a model that `models.py` built from its file, without loading Keras.

    Args:
        path: a `.keras` file.

    Returns:
        The weights, float32, or None if the graph is another, or of a precision that is not float32 in the file.
    """
    import h5py  # Keras brings it

    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json")).get("config", {})
        with h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as file:
            groups = {group["vars"].attrs.get("name"): group for group in file.get("layers", {}).values()}
            try:
                return read_weights(config, lambda name: _arrays(groups[name]))
            except KeyError:  # the file is laid out in another way
                return None


_SUBLAYERS = ("cell", "query_dense", "key_dense", "value_dense", "output_dense")


def _arrays(group) -> list[np.ndarray]:
    """Return the arrays of a layer's group in the file, in the order of `get_weights`."""
    arrays = [group["vars"][key][()] for key in sorted(group["vars"])]
    for name in _SUBLAYERS:
        if name in group:
            arrays += _arrays(group[name])
    return arrays


def _read_transformer(graph: _Graph, logits, weights) -> TransformerWeights:
    embedding, (x,) = graph.step(logits, "ReversibleEmbedding", reverse=True, tie_weights=True, logit_soft_cap=None)
    final_norm, (x,) = graph.step(x, "LayerNormalization", **_NORM)
    blocks = []
    while True:
        _, (x, update) = graph.step(x, "Add")
        if graph.layers[update[0]]["class_name"] == "Embedding":
            break
        project, (y,) = graph.step(update, "Dense", **_DENSE)
        _, (y,) = graph.step(y, "Gelu", approximate=True)
        expand, (y,) = graph.step(y, "Dense", **_DENSE)
        mlp_norm, residual = graph.step(y, "LayerNormalization", **_NORM)
        _same(x, *residual)
        _, (before, update) = graph.step(x, "Add")
        attention, inputs = graph.step(update, "MultiHeadAttention", **_ATTENTION)
        attention_norm, residual = graph.step(inputs[0], "LayerNormalization", **_NORM)
        _same(inputs[0], *inputs[1:])
        _same(before, *residual)
        blocks.append((attention_norm, attention, mlp_norm, expand, project))
        x = before
    position_embedding, (positions,) = graph.step(update, "Embedding", mask_zero=False)
    _, (counted, one) = graph.step(positions, "Subtract")
    _, (ones,) = graph.step(counted, "Cumsum", axis=1)
    _, (ids,) = graph.step(ones, "OnesLike")
    table, inputs = graph.step(x, "ReversibleEmbedding", mask_zero=False)
    name, _ = graph.step(ids, "InputLayer")
    if graph.layers[position_embedding]["config"]["input_dim"] != graph.layers[name]["config"]["batch_shape"][1]:
        raise _OtherGraphError
    if (table, inputs, one) != (embedding, [ids], 1):
        raise _OtherGraphError
    return TransformerWeights(
        token_embedding=weights(embedding)[0],
        position_embedding=weights(position_embedding)[0],
        blocks=[_read_block(*map(weights, names)) for names in reversed(blocks)],
        final_norm=np.stack(weights(final_norm)),
        num_heads=graph.layers[blocks[0][1]]["config"]["num_heads"],
    )


def _read_block(attention_norm, attention, mlp_norm, expand, project) -> Block:
    q, bq, k, bk, v, bv, output, output_bias = attention
    dim = len(q)
    return Block(
        np.stack(attention_norm),
        np.concatenate([kernel.reshape(dim, dim) for kernel in (q, k, v)], axis=1),
        np.concatenate([bq.ravel(), bk.ravel(), bv.ravel()]),
        output.reshape(dim, dim),
        output_bias,
        np.stack(mlp_norm),
        *expand,
        *project,
    )


def _same(tensor, *others) -> None:
    if any(other != tensor for other in others):
        raise _OtherGraphError


def _read_lstm(graph: _Graph, logits, weights) -> LstmWeights:
    head = []
    x = logits
    with contextlib.suppress(_OtherGraphError):
        embedding, (x,) = graph.step(logits, "ReversibleEmbedding", reverse=True, tie_weights=True, logit_soft_cap=None)
        table = weights(embedding)[0]
        head.append((table.T, np.zeros(len(table), np.float32)))
    with contextlib.suppress(_OtherGraphError):
        name, (x,) = graph.step(x, "Dense", **_DENSE)
        kernel, bias = weights(name)
        head.insert(0, (kernel, bias))
    layers = []
    while True:
        try:
            name, (x,) = graph.step(x, "LSTM", **_LSTM)
        except _OtherGraphError:
            break
        kernel, recurrent_kernel, bias = weights(name)
        layers.insert(0, (np.concatenate([kernel, recurrent_kernel]), bias))
    name, (ids,) = graph.step(x, "ReversibleEmbedding", mask_zero=False)
    graph.step(ids, "InputLayer")
    if not head or not layers:
        raise _OtherGraphError
    return LstmWeights(weights(name)[0], layers, head)
