"""Fast training: fast_training(), a model that trains faster than by Keras alone, with the same result up to rounding.

It is another graph with the same variables, in which faster layers stand in for some of Keras'. Neither the original
model nor Keras is changed.
"""

import contextlib
import functools
from collections.abc import Iterator

from ...runtime.backend import free_graphs_afterwards, keras, tf, uses_accelerator, xla_fusion
from ...runtime.keras_internals import (
    adamw_problem,
    attention_problem,
    has_masks,
    inner_layers,
    is_keras_class,
    source_of,
)
from ...runtime.numba_availability import numba_problem

# 2 or 3 minutes of a CPU, in which fusion by XLA makes up for its compilation.
_OPERATIONS_WORTH_XLA = 3e13


@contextlib.contextmanager
def fast_training(model: keras.Model, num_tokens: float) -> Iterator[tuple[keras.Model, list[str]]]:
    """Give a model to train in place of another one, with what is fastest on this device.

    Args:
        model: the compiled model.
        num_tokens: how many tokens it will be trained on.

    Returns:
        As long as the context is open, the compiled model to train, and the optimisations in words. It shares the
        weights and the optimizer of `model`, and is `model` itself where Keras alone is as fast.
    """
    with free_graphs_afterwards():
        if keras.backend.backend() != "tensorflow" or uses_accelerator() or tf.distribute.has_strategy():
            yield model, []
            return
        from .lstm_loop import FastLstm

        problem = fusion_problem(model)
        trained = fast_model(model, use_fused_ops=problem is None)
        is_worth_xla = 6 * model.count_params() * num_tokens > _OPERATIONS_WORTH_XLA
        with xla_fusion() if is_worth_xla and problem else contextlib.nullcontext() as uses_xla:
            optimisations = {
                "a faster loop for LSTM layers": any(isinstance(layer, FastLstm) for layer in trained.layers),
                "elementwise operations fused by numba": not problem,
                "elementwise operations fused by XLA": uses_xla,
                f"elementwise operations not fused ({problem})": problem and not uses_xla,
            }
            unfused = [] if problem else _unfused_parts(model)
            try:
                yield trained, [*(words for words, is_used in optimisations.items() if is_used), *unfused]
            finally:
                if not problem:
                    from . import fused_ops

                    fused_ops.release_buffers()


def fusion_problem(model: keras.Model) -> str | None:
    """Return why a compiled model cannot use the fused operations of numba; None if it can."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True).get_config()
    if not _is_graph(model):
        return f"{type(model).__name__} is not a graph of Keras layers"
    if type(model.loss) is not keras.losses.SparseCategoricalCrossentropy or model.loss.get_config() != loss:
        return "the loss is not the mean cross-entropy of logits"
    if has_masks(model):
        return "a layer passes on a mask"
    return numba_problem()


def _unfused_parts(model) -> list[str]:
    """Describe which of attention and AdamW this version of Keras does not allow to fuse, and why."""
    attentions = [layer for layer in inner_layers(model) if type(layer) is keras.layers.MultiHeadAttention]
    of_attention = next(filter(None, map(attention_problem, attentions)), None)
    from .fused_optimizer import has_supported_settings

    of_adamw = adamw_problem(model.optimizer) if has_supported_settings(model.optimizer) else None
    problems = {"attention": of_attention, "AdamW": of_adamw}
    return [f"{name} not fused ({problem})" for name, problem in problems.items() if problem]


def _is_graph(model) -> bool:
    return is_keras_class(model) and bool(getattr(model, "inputs", None))


def fast_model(model: keras.Model, use_fused_ops: bool) -> keras.Model:
    """Build the model to train in place of another one; see `fast_training`.

    Args:
        model: the compiled model.
        use_fused_ops: whether to fuse norms, GELU, the softmax of attention, the loss and AdamW. Only Keras' own
            layers with the settings that this package's models use are replaced.

    Returns:
        The compiled model, or `model` itself if nothing in it would be replaced.
    """
    if not _is_graph(model):
        return model
    from .lstm_loop import replace_lstm

    replacements, make_graph, optimizer = [replace_lstm], keras.Model, model.optimizer
    if use_fused_ops:
        from .fused_layers import FusedLossModel, replace_attention, replace_gelu, replace_layer_norm, skip_logits_cast
        from .fused_optimizer import FusedAdamW, can_fuse

        last = source_of(model.outputs[0]).operation
        replacements += [
            functools.partial(skip_logits_cast, last),
            replace_gelu,
            replace_layer_norm,
            replace_attention,
        ]
        make_graph = FusedLossModel
        optimizer = FusedAdamW(optimizer) if can_fuse(optimizer) else optimizer
    num_replaced = 0

    def call(operation, *args, **kwargs):
        nonlocal num_replaced
        given = {name: value for name, value in kwargs.items() if value is not None and name != "training"}
        for replace in replacements:
            output = replace(operation, args, given.copy())
            if output is not None:
                num_replaced += 1
                return output
        return operation(*args, **kwargs)

    graph = make_graph(*(xs if len(xs) > 1 else xs[0] for xs in (model.inputs, model.outputs)), name=model.name)
    trained = keras.models.clone_model(graph, clone_function=lambda layer: layer, call_function=call)
    if not use_fused_ops and not num_replaced:
        return model
    trained.compile(optimizer, model.loss, jit_compile=False, auto_scale_loss=False)
    return trained
