"""Attention maps: where the heads of a Transformer look."""

import re

import numpy as np

from ..corpus.tokenizer import Tokenizer
from ..models.contract import check_model
from ..models.weights import LstmWeights, TransformerWeights
from ..runtime.backend import keras
from .surprisal import check_text


def attention_maps(model: keras.Model, tokenizer: Tokenizer, text: str, layer: int = 0) -> np.ndarray:
    """Compute where each position of a text looks, for all attention heads of one block.

    Position 0 is the beginning of the document, then come the tokens of the text. Position t has read token t and is
    about to predict token t + 1.

    Args:
        model: a Transformer with attention layers named `block_{i}_attention`, as `transformer` builds it.
        tokenizer: the tokenizer the model was trained with.
        text: the text; with the beginning of the document, its tokens must fit into the context.
        layer: the number of the block, from 0.

    Returns:
        `float32 (H, N, N)` for N - 1 tokens of text: in head h, position t gives the share `[h, t, s]` of its attention
        to position s. Each row sums to 1 (under a 16-bit precision policy, nearly), and no position looks at a later
        one.

    Raises:
        ValueError: the text is empty or too long, the model has no such layer, or the model and the tokenizer do not
            belong together.

    Example:
        >>> from aigc_tf.models.networks import transformer
        >>> tokenizer = Tokenizer.train(["春眠不觉晓，"])
        >>> model = transformer(tokenizer.vocab_size, context=8, num_layers=1)
        >>> attention_maps(model, tokenizer, "春晓").shape
        (4, 3, 3)
    """
    attention = _layer(model, layer)
    check_model(model, tokenizer)
    check_text(text)
    ids, context = [tokenizer.BOS, *tokenizer.encode(text)], model.input_shape[1]
    if len(ids) > context:
        raise ValueError(
            f"For attention maps the text must fit into the context, at most {context - 1} tokens, got {len(ids) - 1}. "
            "Use a shorter passage."
        )
    # Padding is on the right, where a causal model does not look.
    window = np.full((1, context), tokenizer.PAD, np.int32)
    window[0, : len(ids)] = ids
    # The layer is called on arrays: called on tensors of the graph, it would become another node of the user's model.
    query, value = keras.Model(model.inputs, attention.input)([window], training=False)
    _, scores = attention(query, value, use_causal_mask=True, return_attention_scores=True)
    return keras.ops.convert_to_numpy(keras.ops.cast(scores, "float32"))[0, :, : len(ids), : len(ids)]


def _layer(model: keras.Model, layer: int) -> keras.layers.Layer:
    if isinstance(model, TransformerWeights | LstmWeights):
        raise ValueError(
            "Attention maps need the model itself, got the weights that load_writer returns. Load it with aigc_tf.load."
        )
    found = {each.name: each for each in getattr(model, "layers", ())}
    num_blocks = sum(re.fullmatch(r"block_\d+_attention", name) is not None for name in found)
    if not num_blocks:
        raise ValueError(
            f"Attention maps need a Transformer, with layers named block_0_attention and so on, got {model.name!r}."
        )
    if not 0 <= layer < num_blocks:
        raise ValueError(f"layer must lie from 0 to {num_blocks - 1}, got {layer}.")
    return found[f"block_{layer}_attention"]
