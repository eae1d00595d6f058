"""Weights: those of a model that `models/networks.py` builds, as arrays, told by the graph and not by its name.

The graph is walked from the logits backwards, as it stands in the model's configuration, so that a file can be read
without Keras. Whatever is set in it must be what is set in ours: a setting that is not known here must be off.
"""

import contextlib
import dataclasses
import io
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ..runtime.files import parse_json

# What may be set in a layer that `models/networks.py` makes, by its class: all that makes a difference to its results.
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
# What makes none where a model writes, and the sizes, which are those of the weights.
_INDIFFERENT = re.compile(
    "name|trainable|seed|rate|noise_shape|dropout|recurrent_dropout|unit_forget_bias|unroll|zero_output_for_mask"
    "|(.*_)?(initializer|regularizer|constraint)"
    "|batch_shape|input_dim|output_dim|units|num_heads|key_dim|value_dim"
)
_FLOATS = ("float64", "float32", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")


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
    name = "transformer"

    @property
    def input_shape(self) -> tuple[None, int]:
        """As of the model."""
        return None, len(self.position_embedding)

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
    context: int | None = None  # of the model; the state has no limit
    name = "lstm"

    @property
    def input_shape(self) -> tuple[None, int | None]:
        """As of the model."""
        return None, self.context

    @property
    def output_shape(self) -> tuple[None, None, int]:
        """As of the model."""
        return None, None, len(self.head[-1][1])

    @property
    def num_parameters(self) -> int:
        """Of the matrices that each token is multiplied with."""
        return sum(matrix.size for matrix, _ in (*self.layers, *self.head))


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
        """Return the name and the inputs of the layer that made a tensor, dropout passed over."""
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
            is_plain = not isinstance(value, dict) or value["class_name"] == "DTypePolicy"  # not one of integers
            fits = is_plain and policy in (None, *_FLOATS)
        else:  # what an earlier version of Keras does not know yet is off there
            fits = _INDIFFERENT.fullmatch(key) or (value or None) == (expected.get(key) or None)
        if not fits:
            raise _OtherGraphError


def read_weights(config: dict, layer_weights: Callable[[str], list]) -> TransformerWeights | LstmWeights | None:
    """Read the weights of a model that `models/networks.py` builds.

    Args:
        config: the configuration of the functional model, as JSON has it: `json.loads(json.dumps(model.get_config()))`.
        layer_weights: from the name of a layer to its weights.

    Returns:
        The weights, float32, or None if the graph is another.
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
    except Exception:  # whatever stands in another model's configuration: it is none of ours
        return None


def read_file(path) -> TransformerWeights | LstmWeights | None:
    """Read the weights of a model that `models/networks.py` built from its file, without loading Keras.

    Args:
        path: a `.keras` file.

    Returns:
        The weights, float32, or None if the graph is another, or the file is laid out in another way.

    Raises:
        ValueError: it is no model file, or damaged.
    """
    with _opened(path) as (config, file):

        def layer_weights(name):
            of_name = [group for group in file["layers"].values() if group["vars"].attrs["name"] == name]
            return _arrays(*of_name)

        return read_weights(config, layer_weights)


def check_file(path) -> None:
    """Refuse a model file that would make its reader read other files, or take more memory than its own size.

    Args:
        path: a `.keras` file, of any model.

    Raises:
        ValueError: it is damaged, holds links or data that lie elsewhere, or is compressed.
    """
    import h5py

    def link(name, link):  # a visit ends with the first result
        return None if isinstance(link, h5py.HardLink) else name

    def elsewhere(name, item):
        is_whole = not isinstance(item, h5py.Dataset) or not (
            item.shape is None  # an empty one, as HDF5 calls it
            or item.external
            or item.is_virtual
            or item.id.get_storage_size() < item.size * item.dtype.itemsize
        )
        return None if is_whole else name

    with _opened(path) as (_, file):
        if (name := file.visititems_links(link)) is not None:  # which follows none of them
            raise ValueError(f"{name!r} in it is a link to elsewhere")
        if (name := file.visititems(elsewhere)) is not None:
            raise ValueError(f"its data {name!r} is not stored in it as it is")


@contextlib.contextmanager
def _opened(path) -> Iterator:
    """Open a `.keras` file: its configuration, and its weights as a file of HDF5, of which nothing is read yet.

    Whatever goes wrong with what stands in it is a `ValueError`: the readers of archives and of HDF5 have errors of
    many kinds for files that are damaged.
    """
    import h5py  # Keras brings it

    with open(path, "rb") as opened:
        try:
            with zipfile.ZipFile(opened) as archive:
                if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                    raise ValueError("it is compressed, which Keras never does")
                config = parse_json(archive.read("config.json")).get("config", {})
                with h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as file:
                    yield config, file
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is refused: {str(error) or type(error).__name__}.") from None


_SUBLAYERS = ("cell", "query_dense", "key_dense", "value_dense", "output_dense")


def _arrays(group) -> list:
    """Return the arrays of a layer's group in the file, in the order of `get_weights`."""
    arrays = [group["vars"][key] for key in sorted(group["vars"])]
    for name in _SUBLAYERS:
        if name in group:
            arrays += _arrays(group[name])
    return arrays


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
