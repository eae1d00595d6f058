"""Keras internals: what is used of Keras and TensorFlow beyond their public interfaces, and whether it exists."""

import importlib
import sys


def source_of(tensor):
    """Return the node of the graph that a tensor comes from: it has an `operation` and `input_tensors`."""
    operation, node, _ = tensor._keras_history
    return operation._inbound_nodes[node]


def inner_layers(model) -> list:
    """Return all layers of a model that are of Keras' own classes, including nested ones."""
    return [layer for layer in model._flatten_layers(include_self=False) if is_keras_class(layer)]


def is_masked(tensor) -> bool:
    """Return whether a tensor carries a Keras mask."""
    return getattr(tensor, "_keras_mask", None) is not None


def has_masks(model) -> bool:
    """Return whether any layer in the graph of a model passes on a mask."""
    graph = getattr(model, "_functional", None) or model  # of a Sequential
    nodes = (node for at_depth in graph._nodes_by_depth.values() for node in at_depth)
    return any(is_masked(tensor) for node in nodes for tensor in node.outputs)


def is_keras_class(instance) -> bool:
    """Return whether an object is of a class of Keras, not of a subclass that a user wrote."""
    return type(instance).__module__.split(".")[0] == "keras"


def computes_its_graph(model) -> bool:
    """Return whether a functional model computes its graph: no subclass of a user overrides the call."""
    own = (getattr(getattr(model, name), "__module__", "") for name in ("__call__", "call"))
    return all(module.split(".")[0] == "keras" for module in own)


def has_dict_input(model) -> bool:
    """Return whether a functional model takes a dict, which the `input_shape` of a single input does not show."""
    return isinstance(getattr(model, "_inputs_struct", None), dict)


def has_dict_output(model) -> bool:
    """Return whether a functional model returns a dict, which the `output_shape` of a single output does not show."""
    return isinstance(getattr(model, "_outputs_struct", None), dict)


def attention_dropout(attention):
    """Return the dropout layer of an attention layer, which holds the state of its random numbers."""
    return attention._dropout_layer


def attention_problem(attention) -> str | None:
    """Describe the internals that a built attention layer lacks; None if it has all that are used here."""
    parts = ("query_dense", "key_dense", "value_dense", "output_dense", "_dropout_layer")
    return _lacks(attention, parts if attention.dropout else parts[:-1])


def adamw_state(optimizer, variables: list) -> tuple[list, list, list[float]]:
    """Return the state of AdamW for variables: momenta, velocities, and the weight decay of each."""
    numbers = [optimizer._get_variable_index(v) for v in variables]
    decays = [float(optimizer.weight_decay or 0) if optimizer._use_weight_decay(v) else 0.0 for v in variables]
    return [optimizer._momentums[i] for i in numbers], [optimizer._velocities[i] for i in numbers], decays


def adamw_problem(optimizer) -> str | None:
    """Describe the internals that a built AdamW optimizer lacks; None if it has all that are used here."""
    problem = _lacks(optimizer, ("_get_variable_index", "_use_weight_decay", "_momentums", "_velocities"))
    # The number of steps, the learning rate unless it is a schedule, and two variables for each weight.
    if not problem and len(optimizer.variables) - len(optimizer._momentums) - len(optimizer._velocities) not in (1, 2):
        problem = "AdamW keeps other variables than momenta and velocities"
    return problem


def clipping_problem(optimizer) -> str | None:
    """Describe what an optimizer lacks for a subclass to change its clipping; None if it lacks nothing."""
    return _lacks(optimizer, ("_clip_gradients",))


def _lacks(instance, names: tuple[str, ...]) -> str | None:
    missing = [name for name in names if not hasattr(instance, name)]
    return f"{type(instance).__name__} lacks {', '.join(missing)}" if missing else None


def legacy_text_tokenizer() -> type:
    """Return `tf.keras.preprocessing.text.Tokenizer`, which Keras 3 still has, so that TensorFlow is not needed."""
    return importlib.import_module("keras._tf_keras.keras.preprocessing.text").Tokenizer


def forget_retracing(function) -> None:
    """Keep a `tf.function` from warning about frequent retracing."""
    function._omit_frequent_tracing_warning = True


def registered_gradients() -> dict:
    """Return the gradient functions that TensorFlow registers for graphs, by name; empty if it keeps them elsewhere."""
    ops = sys.modules.get("tensorflow.python.framework.ops")
    return getattr(getattr(ops, "gradient_registry", None), "_registry", {})
