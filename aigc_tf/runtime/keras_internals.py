"""Keras internals: what is used here of Keras and TensorFlow beyond their public interfaces, and if it is there."""

import sys


def source_of(tensor):
    """Return the call of a layer that a tensor of a graph comes from: it has an `operation` and `input_tensors`."""
    operation, node, _ = tensor._keras_history
    return operation._inbound_nodes[node]


def inner_layers(model) -> list:
    """Return the layers of a model that are Keras' own, and those that they are made of."""
    return [layer for layer in model._flatten_layers(include_self=False) if is_keras_own(layer)]


def is_masked(tensor) -> bool:
    """Tell whether a tensor has a mask, which layers pass on with it."""
    return getattr(tensor, "_keras_mask", None) is not None


def has_masks(model) -> bool:
    """Tell whether a layer in the graph of a model passes on a mask."""
    graph = getattr(model, "_functional", None) or model  # of a Sequential
    nodes = (node for at_depth in graph._nodes_by_depth.values() for node in at_depth)
    return any(is_masked(tensor) for node in nodes for tensor in node.outputs)


def is_keras_own(thing) -> bool:
    """Tell whether a thing is of a class of Keras, and not of one that a user derived from it."""
    return type(thing).__module__.split(".")[0] == "keras"


def is_its_graph(model) -> bool:
    """Tell whether a functional model computes what its graph says, and not what a user's class makes of it."""
    own = (getattr(getattr(model, name), "__module__", "") for name in ("__call__", "call"))
    return all(module.split(".")[0] == "keras" for module in own)


def takes_by_name(model) -> bool:
    """Tell whether a functional model takes a dict, which its `input_shape` does not tell of a single input."""
    return isinstance(getattr(model, "_inputs_struct", None), dict)


def gives_by_name(model) -> bool:
    """Tell whether a functional model gives a dict, which its `output_shape` does not tell of a single output."""
    return isinstance(getattr(model, "_outputs_struct", None), dict)


def attention_dropout(attention):
    """Return the layer by which an attention layer drops some of its probabilities, which has the state of chance."""
    return attention._dropout_layer


def attention_problem(attention) -> str | None:
    """Tell what a built attention layer lacks of what is used of it here; None if nothing."""
    parts = ("query_dense", "key_dense", "value_dense", "output_dense", "_dropout_layer")
    return _lacks(attention, parts if attention.dropout else parts[:-1])


def adamw_state(optimizer, variables: list) -> tuple[list, list, list[float]]:
    """Return what AdamW keeps for variables: momenta, velocities, and the share of each that its decay takes."""
    numbers = [optimizer._get_variable_index(v) for v in variables]
    decays = [float(optimizer.weight_decay or 0) if optimizer._use_weight_decay(v) else 0.0 for v in variables]
    return [optimizer._momentums[i] for i in numbers], [optimizer._velocities[i] for i in numbers], decays


def adamw_problem(optimizer) -> str | None:
    """Tell what a built AdamW optimizer lacks of what is used of it here; None if nothing."""
    problem = _lacks(optimizer, ("_get_variable_index", "_use_weight_decay", "_momentums", "_velocities"))
    # The number of steps, the learning rate if it is no schedule, and two for each weight.
    if not problem and len(optimizer.variables) - len(optimizer._momentums) - len(optimizer._velocities) not in (1, 2):
        problem = "AdamW keeps something else than momenta and velocities"
    return problem


def clipping_problem(optimizer) -> str | None:
    """Tell what an optimizer lacks for a class derived from its own to change how it clips; None if nothing."""
    return _lacks(optimizer, ("_clip_gradients",))


def _lacks(thing, names: tuple[str, ...]) -> str | None:
    missing = [name for name in names if not hasattr(thing, name)]
    return f"{type(thing).__name__} lacks {', '.join(missing)}" if missing else None


def forget_retracing(function) -> None:
    """Keep a `tf.function` from warning that it is traced often."""
    function._omit_frequent_tracing_warning = True


def registered_gradients() -> dict:
    """Return the gradient functions that TensorFlow keeps for graphs, by name; empty where it keeps them elsewhere."""
    ops = sys.modules.get("tensorflow.python.framework.ops")
    return getattr(getattr(ops, "gradient_registry", None), "_registry", {})
