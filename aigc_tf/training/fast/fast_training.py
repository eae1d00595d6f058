"""Fast training: fast_training(), what is known to be faster than Keras alone, with the same result up to rounding.

What is trained is another graph with the same weights. Where a layer's own way is slow, a layer of ours stands in it,
and computes the same with the variables of the one that it holds. Neither the model nor Keras is changed.
"""

import contextlib
import functools
from collections.abc import Iterator

from ...runtime.backend import freed_graphs, fused, keras, tf, uses_accelerator
from ...runtime.keras_internals import (
    adamw_problem,
    attention_problem,
    has_masks,
    inner_layers,
    is_keras_own,
    source_of,
)
from ...runtime.numba_availability import numba_problem

# 2 or 3 minutes of a CPU, in which it makes up for the time that it takes to compile.
_OPERATIONS_WORTH_FUSING = 3e13


@contextlib.contextmanager
def fast_training(model: keras.Model, num_tokens: float) -> Iterator[tuple[keras.Model, list[str]]]:
    """Train as fast as is known for this device, as long as this is open.

    Args:
        model: the model, compiled.
        num_tokens: how many it shall learn from.

    Returns:
        The model to train, which is `model` itself where Keras alone does as well, and else another one with the same
        weights and optimizer, compiled: what it computes is the same but for rounding. And in words, what is done.
    """
    with freed_graphs():
        if keras.backend.backend() != "tensorflow" or uses_accelerator() or tf.distribute.has_strategy():
            yield model, []
            return
        from .lstm_loop import OwnLoop

        problem = passes_problem(model)
        trained = fast_model(model, with_passes=problem is None)
        is_worth_fusing = 6 * model.count_params() * num_tokens > _OPERATIONS_WORTH_FUSING
        with fused() if is_worth_fusing and problem else contextlib.nullcontext() as is_fused:
            methods = {
                "LSTM layers in a loop of our own": any(isinstance(layer, OwnLoop) for layer in trained.layers),
                "elementwise operations in passes compiled by numba": not problem,
                "elementwise operations fused by XLA": is_fused,
                f"elementwise operations by TensorFlow ({problem})": problem and not is_fused,
            }
            lacking = [] if problem else _lacking(model)
            try:
                yield trained, [*(words for words, is_so in methods.items() if is_so), *lacking]
            finally:
                if not problem:
                    from . import fused_ops

                    fused_ops.let_go_of_memory()


def passes_problem(model: keras.Model) -> str | None:
    """Tell why a compiled model does not train by the passes of numba on a CPU with TensorFlow; None if it does."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True).get_config()
    if not _is_graph(model):
        return f"{type(model).__name__} is no graph of Keras' own"
    if type(model.loss) is not keras.losses.SparseCategoricalCrossentropy or model.loss.get_config() != loss:
        return "the loss is not the mean cross-entropy of logits"
    if has_masks(model):
        return "a layer passes on a mask"
    return numba_problem()


def _lacking(model) -> list[str]:
    """Tell what a model's attention or optimizer lacks of what passes use of Keras beyond its public interface."""
    attentions = [layer for layer in inner_layers(model) if type(layer) is keras.layers.MultiHeadAttention]
    of_attention = next(filter(None, map(attention_problem, attentions)), None)
    from .fused_optimizer import is_usual_adamw

    of_optimizer = adamw_problem(model.optimizer) if is_usual_adamw(model.optimizer) else None
    problems = {"attention": of_attention, "AdamW": of_optimizer}
    return [f"{name} as Keras has it ({problem})" for name, problem in problems.items() if problem]


def _is_graph(model) -> bool:
    return is_keras_own(model) and bool(getattr(model, "inputs", None))


def fast_model(model: keras.Model, with_passes: bool) -> keras.Model:
    """Build the model to train in place of another one; see `fast_training`.

    Args:
        model: the model, compiled.
        with_passes: whether norms, GELU, the softmax of attention, the loss and AdamW are computed in one pass over
            memory each. What is not one of Keras' own layers, with settings that this package's models have, stays.

    Returns:
        The compiled model, or `model` itself if nothing in it would be another.
    """
    if not _is_graph(model):
        return model
    from .lstm_loop import own_loop

    stand_ins, make_graph, optimizer = [own_loop], keras.Model, model.optimizer
    if with_passes:
        from .fused_layers import ModelWithPasses, attention_pass, gelu_pass, norm_pass, without_cast
        from .fused_optimizer import OnePassAdamW, is_plain_adamw

        last = source_of(model.outputs[0]).operation
        stand_ins += [functools.partial(without_cast, last), gelu_pass, norm_pass, attention_pass]
        make_graph = ModelWithPasses
        optimizer = OnePassAdamW(optimizer) if is_plain_adamw(optimizer) else optimizer
    num_replaced = 0

    def call(operation, *args, **kwargs):
        nonlocal num_replaced
        given = {name: value for name, value in kwargs.items() if value is not None and name != "training"}
        for stand_in in stand_ins:
            output = stand_in(operation, args, given.copy())
            if output is not None:
                num_replaced += 1
                return output
        return operation(*args, **kwargs)

    graph = make_graph(*(xs if len(xs) > 1 else xs[0] for xs in (model.inputs, model.outputs)), name=model.name)
    trained = keras.models.clone_model(graph, clone_function=lambda layer: layer, call_function=call)
    if not with_passes and not num_replaced:
        return model
    trained.compile(optimizer, model.loss, jit_compile=False, auto_scale_loss=False)
    return trained
