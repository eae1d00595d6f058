"""Networks: transformer() and lstm(), language models as functional graphs of built-in Keras layers.

Both map token ids `int32 (B, T)` to logits `float32 (B, T, V)`, causally. A saved model loads in plain Keras. The names
of the layers are part of the contract, for code that looks for weights: `token_embedding`, `position_embedding`,
`block_{i}_attention_norm`, `block_{i}_attention`, `block_{i}_mlp_norm`, `block_{i}_mlp_expand`,
`block_{i}_mlp_project`, `final_norm`; `lstm_{i}`, `head`; and last `logits`.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np

from ..runtime.backend import keras
from ..runtime.distribution import resolve_precision
from .sizes import check_at_least_1, dimensions

layers, ops = keras.layers, keras.ops

_GPT2_STDDEV = 0.02
# Large enough to move the gates from the first step: after 400 steps the demo's LSTM is at 8.18 bits per character with
# 0.05, at 7.75 with 0.2.
_LSTM_EMBEDDING_STDDEV = 0.2


def transformer(
    vocab_size: int,
    context: int,
    size: str = "tiny",
    *,
    num_layers: int | None = None,
    num_heads: int | None = None,
    hidden_dim: int | None = None,
    intermediate_dim: int | None = None,
    dropout: float = 0.1,
    seed: int = 0,
) -> keras.Model:
    """Build a Transformer language model with the architecture of GPT-2.

    Learned positions; pre-norm blocks of causal multi-head attention and a GELU (tanh) MLP; a final norm; the token
    embedding is also the head. Weights are initialised as in GPT-2: normal with a standard deviation of 0.02, divided
    by sqrt(2 * num_layers) in the projections into the residual stream; biases are zero. The model has
    (V + T) D + L (4 D^2 + 2 D M + 9 D + M) + 2 D parameters.

    Args:
        vocab_size: V, the number of token ids.
        context: T, the number of positions.
        size: "tiny" (2 layers, 128 wide), "small" (6, 384) or "base" (12, 768; with V = 50,257 and T = 1,024 these are
            the 124 million parameters of GPT-2). The dimensions below override it.
        num_layers: L, the number of blocks.
        num_heads: H, the number of attention heads, a divisor of `hidden_dim`.
        hidden_dim: D, the width of the residual stream.
        intermediate_dim: M, the width of the MLP, by default 4 D.
        dropout: the share of embeddings, attention scores and residual updates set to zero in training.
        seed: the seed of the weights and of dropout.

    Returns:
        A `keras.Model` from ids `int32 (B, T)` to logits `float32 (B, T, V)`, under any dtype policy.

    Raises:
        ValueError: `size` is unknown or a dimension is invalid.

    Example:
        >>> model = transformer(vocab_size=1000, context=32)
        >>> model.output_shape, model.count_params()
        ((None, 32, 1000), 528896)

    Source:
        A. Radford et al., "Language models are unsupervised multitask learners" (2019); attention after
        A. Vaswani et al., "Attention is all you need" (2017).
    """
    chosen = dimensions("transformer", size, num_layers=num_layers, num_heads=num_heads, hidden_dim=hidden_dim)
    num_layers, num_heads, hidden_dim = (chosen[k] for k in ("num_layers", "num_heads", "hidden_dim"))
    intermediate_dim = 4 * hidden_dim if intermediate_dim is None else intermediate_dim
    check_at_least_1(vocab_size=vocab_size, context=context, intermediate_dim=intermediate_dim)
    _check_dropout(dropout)
    # Redrawn below. Without a seed, Keras would take one from Python's global generator, which belongs to the user.
    init = keras.initializers.RandomNormal(stddev=_GPT2_STDDEV, seed=seed % 2**32)
    seeds = _seeds(seed)

    def drop(x):
        return layers.Dropout(dropout, seed=next(seeds))(x) if dropout else x

    ids = keras.Input((context,), dtype="int32", name="ids")
    token_embedding = _token_embedding(vocab_size, hidden_dim, init)
    # Positions are computed from the ids: the weights of a layer called on a constant would not be the model's.
    positions = ops.cumsum(ops.ones_like(ids), axis=1) - 1
    x = token_embedding(ids) + layers.Embedding(
        context, hidden_dim, embeddings_initializer=init, name="position_embedding"
    )(positions)
    x = drop(x)
    for i in range(num_layers):
        y = _norm(f"block_{i}_attention_norm")(x)
        attention = layers.MultiHeadAttention(
            num_heads,
            hidden_dim // num_heads,
            dropout=dropout,
            kernel_initializer=init,
            seed=next(seeds),
            name=f"block_{i}_attention",
        )
        x = x + drop(attention(y, y, use_causal_mask=True))
        y = _norm(f"block_{i}_mlp_norm")(x)
        y = layers.Dense(intermediate_dim, kernel_initializer=init, name=f"block_{i}_mlp_expand")(y)
        y = ops.gelu(y, approximate=True)
        y = layers.Dense(hidden_dim, kernel_initializer=init, name=f"block_{i}_mlp_project")(y)
        x = x + drop(y)
    x = _norm("final_norm")(x)
    model = keras.Model(ids, _logits(token_embedding(x, reverse=True)), name="transformer")
    _initialise_transformer(model, num_layers, seed)
    return model


def lstm(
    vocab_size: int,
    context: int,
    size: str = "tiny",
    *,
    num_layers: int | None = None,
    hidden_dim: int | None = None,
    embedding_dim: int | None = None,
    tie_embeddings: bool = True,
    dropout: float = 0.1,
    seed: int = 0,
) -> keras.Model:
    """Build an LSTM language model: an embedding, stacked LSTM layers, and a head.

    With `tie_embeddings` the head is the token embedding, after a projection `head` from D to E if they differ;
    without, `head` is a separate matrix from D to V.

    Args:
        vocab_size: V, the number of token ids.
        context: T, the number of positions in training.
        size: "tiny" (1 layer, 256 wide), "small" (2, 512) or "base" (3, 1536), each with an embedding half as wide. The
            dimensions below override it.
        num_layers: the number of LSTM layers.
        hidden_dim: D, the width of the state of each layer.
        embedding_dim: E, the width of the token embedding; by default half of D, if D is given.
        tie_embeddings: use the token embedding as the head.
        dropout: the share of the input of each layer set to zero in training.
        seed: the seed of the weights and of dropout.

    Returns:
        A `keras.Model` from ids `int32 (B, T)` to logits `float32 (B, T, V)`, under any dtype policy.

    Raises:
        ValueError: `size` is unknown or a dimension is invalid.

    Example:
        >>> model = lstm(vocab_size=1000, context=32)
        >>> model.output_shape, model.count_params()
        ((None, 32, 1000), 555136)

    Source:
        S. Hochreiter and J. Schmidhuber, "Long short-term memory", Neural Computation 9 (1997); the tied
        head after O. Press and L. Wolf, "Using the output embedding to improve language models" (2017).
    """
    chosen = dimensions("lstm", size, num_layers=num_layers, hidden_dim=hidden_dim, embedding_dim=embedding_dim)
    num_layers, hidden_dim, embedding_dim = (chosen[k] for k in ("num_layers", "hidden_dim", "embedding_dim"))
    check_at_least_1(vocab_size=vocab_size, context=context)
    _check_dropout(dropout)
    seeds = _seeds(seed)

    def drop(x):
        return layers.Dropout(dropout, seed=next(seeds))(x) if dropout else x

    def glorot():
        return keras.initializers.GlorotUniform(seed=next(seeds))

    ids = keras.Input((context,), dtype="int32", name="ids")
    init = keras.initializers.RandomNormal(stddev=_LSTM_EMBEDDING_STDDEV, seed=next(seeds))
    token_embedding = _token_embedding(vocab_size, embedding_dim, init)
    x = token_embedding(ids)
    for i in range(num_layers):
        x = layers.LSTM(
            hidden_dim,
            return_sequences=True,
            kernel_initializer=glorot(),
            recurrent_initializer=keras.initializers.Orthogonal(seed=next(seeds)),
            seed=seed
            % 2**32,  # of its own dropout, which is unused; without one Keras takes it from Python's generator
            name=f"lstm_{i}",
        )(drop(x))
    x = drop(x)
    if not tie_embeddings:
        x = layers.Dense(vocab_size, kernel_initializer=glorot(), name="head")(x)
    else:
        if embedding_dim != hidden_dim:
            x = layers.Dense(embedding_dim, kernel_initializer=glorot(), name="head")(x)
        x = token_embedding(x, reverse=True)
    return keras.Model(ids, _logits(x), name="lstm")


def build(
    model: str,
    vocab_size: int,
    context: int,
    size: str = "tiny",
    *,
    num_layers: int | None = None,
    num_heads: int | None = None,
    hidden_dim: int | None = None,
    dropout: float = 0.1,
    precision: str = "auto",
    seed: int = 0,
) -> keras.Model:
    """Build a model by the name of its architecture, for the command line and the search.

    Args:
        model: "transformer" or "lstm"; see there for the other settings.
        vocab_size: V, the number of token ids.
        context: T, the number of positions.
        size: "tiny", "small" or "base"; the next three override its dimensions.
        num_layers: the number of blocks or LSTM layers.
        num_heads: the number of attention heads, of a Transformer only.
        hidden_dim: the width.
        dropout: the share set to zero in training.
        precision: the dtype policy of the layers, "float32", "mixed_bfloat16", "mixed_float16", or "auto" for the
            best of the device (see `use_devices`).
        seed: the seed of the weights and of dropout.

    Returns:
        A `keras.Model` from ids `int32 (B, T)` to logits `float32 (B, T, V)`.

    Raises:
        ValueError: `model` is unknown, a dimension is invalid, or an LSTM is given attention heads.
    """
    dimensions(model, size, num_layers=num_layers, num_heads=num_heads, hidden_dim=hidden_dim)
    settings = {"num_layers": num_layers, "hidden_dim": hidden_dim, "dropout": dropout, "seed": seed}
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(resolve_precision(precision))  # layers keep the policy under which they are created
    try:
        if model == "lstm":
            return lstm(vocab_size, context, size, **settings)
        return transformer(vocab_size, context, size, num_heads=num_heads, **settings)
    finally:
        keras.config.set_dtype_policy(previous)


def _token_embedding(vocab_size: int, hidden_dim: int, initializer) -> layers.Layer:
    return layers.ReversibleEmbedding(
        vocab_size,
        hidden_dim,
        embeddings_initializer=initializer,
        # Under a mixed policy the head would otherwise multiply in float32, at half the training speed.
        reverse_dtype=keras.config.dtype_policy().compute_dtype,
        name="token_embedding",
    )


def _norm(name: str) -> layers.Layer:
    return layers.LayerNormalization(epsilon=1e-5, name=name)


def _logits(x):
    """Cast to float32, in which a softmax over a vocabulary stays exact."""
    return layers.Identity(dtype="float32", name="logits")(x)


def _seeds(seed: int) -> Iterator[int]:
    """Yield seeds for the parts of a model, different from those of the next seed, and small enough for JAX."""
    return ((seed * 10_000 + part) % 2**32 for part in itertools.count())


def _initialise_transformer(model: keras.Model, num_layers: int, seed: int) -> None:
    """Redraw all matrices from one generator.

    MultiHeadAttention uses one initialiser for its four projections: with a seed, the kernels of query, key and value
    would be equal, and the output projection could not be scaled separately.
    """
    generator = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        if not variable.path.endswith(("kernel", "embeddings")):
            continue
        into_residual = variable.path.endswith(("attention_output/kernel", "mlp_project/kernel"))
        stddev = _GPT2_STDDEV / math.sqrt(2 * num_layers) if into_residual else _GPT2_STDDEV
        variable.assign(stddev * generator.standard_normal(variable.shape, np.float32))


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie from 0 to below 1, got {dropout}.")
