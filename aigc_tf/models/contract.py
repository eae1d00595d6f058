"""Contract: check_model(), what every function of this package expects of a language model and its tokenizer."""

from ..corpus.tokenizer import Tokenizer
from ..runtime.keras_internals import has_dict_input, has_dict_output


def check_model(model, tokenizer: Tokenizer) -> None:
    """Refuse a model that is not a language model, or whose vocabulary size is not that of the tokenizer."""
    if not hasattr(model, "output_shape"):
        raise ValueError(
            f"A language model is a functional or sequential keras.Model, got a {type(model).__name__}, whose shapes "
            "are unknown until it is called. Wrap it: ids = keras.Input((context,), dtype='int32'); "
            "keras.Model(ids, model(ids))."
        )
    shapes = model.input_shape, model.output_shape
    by_name = has_dict_input(model), has_dict_output(model)
    shown = ["a dict" if is_dict else shape for is_dict, shape in zip(by_name, shapes, strict=True)]
    is_one = [isinstance(shape, tuple) and len(shape) for shape in shown] == [2, 3]
    if not is_one or (shapes[0][1] is None and hasattr(model, "get_layer")):
        raise ValueError(
            "A language model has one input, ids (batch, T) with T fixed, and one output, logits (batch, T, V), got "
            f"{shown[0]} and {shown[1]}. Wrap it: "
            "ids = keras.Input((context,), dtype='int32'); keras.Model(ids, logits), with logits computed from ids."
        )
    if model.output_shape[-1] != tokenizer.vocab_size:
        raise ValueError(
            f"Model and tokenizer must have the same vocabulary size, got {model.output_shape[-1]} "
            f"and {tokenizer.vocab_size}. Build the model with tokenizer.vocab_size."
        )
