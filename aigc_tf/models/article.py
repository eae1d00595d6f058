"""The article: its two formulas and its Keras example, as printed, and what they can and cannot do.

The article is a Chinese introduction to large models that write text (AIGC). Where to find each of its parts:

    2 concepts: large models, natural language       models/networks.py (three sizes)
    3 step 1, preprocessing                          corpus/cleaning.py, corpus/segmentation.py,
                                                     corpus/tokenizer.py, corpus/dataset.py
    3 step 2, the model                              models/networks.py
    3 step 3, initial parameters                     models/networks.py, models/initialisation.py
    3 step 4, training                               training/train.py
    3 step 5, evaluation                             evaluation/bits.py
    3 step 6, prediction                             generation/processors.py, generation/generate.py
    3 formula of the RNN                             RNNCell, here; how far it remembers: copy_accuracy
    3 formula of attention                           attention, here; in a model: transformer
    4 the Keras example                              example, here; a model that generates: lstm
"""

import math
import random
import warnings
from collections.abc import Callable

import numpy as np

from ..runtime.backend import keras
from ..runtime.keras_internals import legacy_text_tokenizer

layers, ops = keras.layers, keras.ops

_BATCH_SIZE = 64
_NUM_SCORED = 16  # symbols to recall in each sequence, at every distance
_NUM_TEST = 256  # sequences that the accuracy is measured on


@keras.saving.register_keras_serializable("aigc_tf")
class RNNCell(layers.Layer):
    """Compute the article's recurrent network, as printed: f(W x_t + R sigma(W x_{t-1} + b) + c).

    Use it in `keras.layers.RNN`, to compare it with the recurrent layers of Keras. Nothing of step t - 1 but its input
    enters step t, where the usual recurrent network uses its output: the memory is exactly one step long, and a stack
    of n layers sees n steps back. The `state` carried from a step to the next is sigma(W x_{t-1} + b), and zeros before
    the first input.

    The article calls c "the hidden state", but gives it no index t and no rule by which it changes. As the last output
    it would need that rule and weights of its own, and W and R are both taken; as sigma(W x_{t-1} + b) it would occur
    twice in the formula. So c is read as the formula has it, a learned vector that is the same at every step: a second
    bias.

    Args:
        units: the size of the output and of the state.
        activation: f, a Keras activation or its name.
        recurrent_activation: sigma, likewise.
        **kwargs: `name`, `dtype`, `trainable`, as for every Keras layer.

    The weights are `W` (D, units), used twice, `R` (units, units), `b` and `c` (units), with vectors as rows. The cell
    maps inputs `float (B, D)` and a state `(B, units)` to outputs `(B, units)` and the next state. A saved model that
    contains it loads where this module has been imported.

    Raises:
        ValueError: `units` is below 1.

    Example:
        >>> layer = keras.layers.RNN(RNNCell(4), return_sequences=True)
        >>> tuple(layer(np.ones((2, 5, 3), "float32")).shape), layer.count_params()
        ((2, 5, 4), 36)

    Source:
        The article, section 3.
    """

    def __init__(self, units: int, activation="tanh", recurrent_activation="sigmoid", **kwargs):
        if units < 1:
            raise ValueError(f"units must be at least 1, got {units}.")
        super().__init__(**kwargs)
        self.units = self.state_size = self.output_size = units
        self.activation = keras.activations.get(activation)
        self.recurrent_activation = keras.activations.get(recurrent_activation)

    def build(self, input_shape):
        """Create the weights, initialised like those of `keras.layers.SimpleRNN`."""
        self.W = self.add_weight((input_shape[-1], self.units), initializer="glorot_uniform", name="W")
        self.R = self.add_weight((self.units, self.units), initializer="orthogonal", name="R")
        self.b = self.add_weight((self.units,), initializer="zeros", name="b")
        self.c = self.add_weight((self.units,), initializer="zeros", name="c")

    def call(self, inputs, states):
        """Compute one step: inputs `(B, D)` and [state] to outputs `(B, units)` and [next state]."""
        projected = ops.matmul(inputs, self.W)
        outputs = self.activation(projected + ops.matmul(states[0], self.R) + self.c)
        return outputs, [self.recurrent_activation(projected + self.b)]

    def get_config(self):
        """Return the settings, from which Keras recreates the cell."""
        return {
            **super().get_config(),
            "units": self.units,
            "activation": keras.activations.serialize(self.activation),
            "recurrent_activation": keras.activations.serialize(self.recurrent_activation),
        }


def rnn(units: int) -> layers.Layer:
    """Make a layer of the article's recurrent network that returns its output at every step.

    Args:
        units: the size of the output.

    Returns:
        A `keras.layers.RNN` over a fresh `RNNCell`: inputs `float (B, T, D)` to outputs `(B, T, units)`.

    Example:
        >>> copy_accuracy(lambda: rnn(8), distance=1, steps=1) > 0
        True
    """
    return layers.RNN(RNNCell(units), return_sequences=True)


def copy_accuracy(
    make_layer: Callable[[], layers.Layer], distance: int, *, num_symbols: int = 8, steps: int = 200, seed: int = 0
) -> float:
    """Measure whether a recurrent layer can remember what it read `distance` steps ago.

    The task is the delayed copy: at each step t of a sequence of random symbols, name the symbol at t - distance. A
    small model (one-hot symbols, the layer, a `Dense` onto the symbols) is trained with Adam at a learning rate of
    0.01, 64 sequences a step, and then tested on new sequences. As every symbol in between has to be kept too, the
    figure measures the length of the memory, not its use in a text: a matrix that only shifts what it holds does well.
    `RNNCell` is perfect at distances 0 and 1 and guesses from 2 on.

    Args:
        make_layer: a function without arguments that returns a new layer, or stack of layers, with
            `return_sequences=True`: inputs `float32 (B, T, num_symbols)` to outputs `(B, T, anything)`.
        distance: how many steps ago; 0 is the symbol just read.
        num_symbols: the number of different symbols.
        steps: the number of training steps; the default takes 2 to 4 seconds on two cores.
        seed: the seed of the weights and the symbols. The state of Python's `random` is left unchanged.

    Returns:
        The share of correct answers, `float` from 0 to 1; guessing gives 1 / num_symbols.

    Raises:
        ValueError: a number is too small, or the layer does not return a sequence.

    Example:
        >>> copy_accuracy(lambda: keras.layers.RNN(RNNCell(16), return_sequences=True), 1, num_symbols=2, steps=60)
        1.0

    Source:
        S. Hochreiter and J. Schmidhuber, "Long short-term memory", Neural Computation 9 (1997), use such tasks.
    """
    for name, value, least in (("distance", distance, 0), ("num_symbols", num_symbols, 2), ("steps", steps, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    ids = np.random.default_rng(seed).integers(
        num_symbols, size=(steps * _BATCH_SIZE + _NUM_TEST, distance + _NUM_SCORED)
    )
    symbols, targets = np.eye(num_symbols, dtype=np.float32)[ids], ids[:, :_NUM_SCORED]
    model = _copy_model(make_layer, distance, num_symbols, seed)
    optimizer = keras.optimizers.Adam(0.01, global_clipnorm=1.0)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(symbols[_NUM_TEST:], targets[_NUM_TEST:], batch_size=_BATCH_SIZE, shuffle=False, verbose=0)
    logits = ops.convert_to_numpy(model(symbols[:_NUM_TEST]))
    return float((logits.argmax(axis=-1) == targets[:_NUM_TEST]).mean())


def _copy_model(make_layer, distance: int, num_symbols: int, seed: int) -> keras.Model:
    # Keras takes the seeds of initialisers without one from Python's generator.
    state = random.getstate()
    random.seed(seed)
    try:
        inputs = keras.Input((distance + _NUM_SCORED, num_symbols))
        outputs = make_layer()(inputs)
        if len(outputs.shape) != 3 or outputs.shape[1] != inputs.shape[1]:
            raise ValueError(
                f"The layer must return an output for each of the {inputs.shape[1]} steps, got the shape "
                f"{outputs.shape}. Make it with return_sequences=True."
            )
        logits = layers.Dense(num_symbols, dtype="float32")(outputs[:, distance:])
        return keras.Model(inputs, logits)
    finally:
        random.setstate(state)


def attention_scores(query, key, mask=None):
    """Compute how much each query attends to each key: softmax(Q K^T / sqrt(d_k)).

    Args:
        query: Q, `float (..., T, d_k)`, a vector for each of T positions; heads are a leading axis.
        key: K, `float (..., S, d_k)`, a vector for each of S positions to attend to.
        mask: `bool`, broadcastable to `(..., T, S)`, True where a query may attend to a key; `np.tri(T, dtype=bool)` is
            a causal mask.

    Returns:
        Weights `float (..., T, S)` from 0 to 1; each row sums to 1. The row of a query that may attend to nothing is
        zero, as in Keras.

    Raises:
        ValueError: the shapes do not fit, or the mask is not boolean.

    Example:
        >>> ops.convert_to_numpy(attention_scores(np.eye(2), np.zeros((2, 2)), np.tri(2, dtype=bool))).tolist()
        [[1.0, 0.0], [0.5, 0.5]]

    Source:
        The article, section 3; A. Vaswani et al., "Attention is all you need" (2017), equation 1.
    """
    query, key = ops.convert_to_tensor(query), ops.convert_to_tensor(key)
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"Queries and keys must have the same size d_k, got {query.shape[-1]} and {key.shape[-1]}.")
    logits = ops.matmul(query, ops.swapaxes(key, -1, -2)) / math.sqrt(key.shape[-1])
    if mask is None:
        return ops.softmax(logits)
    mask = _checked_mask(mask, logits.shape)
    # With minus infinity a row without a key, and its gradient, would be undefined.
    lowest = -3e4 if keras.backend.standardize_dtype(logits.dtype) == "float16" else -1e9
    return ops.where(mask, ops.softmax(ops.where(mask, logits, lowest)), 0.0)


def attention(query, key, value, mask=None):
    """Compute the article's attention, as printed: softmax(Q K^T / sqrt(d_k)) V.

    It has no weights: Q, K and V are the text, projected by learned matrices. With the projections of
    `keras.layers.MultiHeadAttention`, and heads as a leading axis, the result is that of the layer, and so that of the
    layers `block_{i}_attention` of `aigc_tf.transformer`.

    Args:
        query: Q, `float (..., T, d_k)`.
        key: K, `float (..., S, d_k)`.
        value: V, `float (..., S, d_v)`.
        mask: see `attention_scores`.

    Returns:
        `float (..., T, d_v)`: for each query the mean of the values, weighted by `attention_scores`.

    Raises:
        ValueError: the shapes do not fit, or the mask is not boolean.

    Example:
        >>> ops.convert_to_numpy(attention(np.zeros((1, 2)), np.zeros((2, 2)), np.array([[0.0], [4.0]]))).tolist()
        [[2.0]]

    Source:
        The article, section 3; A. Vaswani et al., "Attention is all you need" (2017), equation 1.
    """
    value = ops.convert_to_tensor(value)
    scores = attention_scores(query, key, mask)
    if scores.shape[-1] != value.shape[-2]:
        raise ValueError(f"There must be one value for each key, got {value.shape[-2]} and {scores.shape[-1]}.")
    return ops.matmul(scores, value)


def _checked_mask(mask, shape: tuple):
    mask = ops.convert_to_tensor(mask)
    if keras.backend.standardize_dtype(mask.dtype) != "bool":
        raise ValueError(f"The mask must be bool, True where a query may attend to a key, got {mask.dtype}.")
    sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
    if len(mask.shape) > len(shape) or any(
        size not in (1, wanted) and None not in (size, wanted) for size, wanted in sizes
    ):
        raise ValueError(f"The mask must be broadcastable to {tuple(shape)}, got {tuple(mask.shape)}.")
    return mask


def example() -> dict:
    """Run the article's Keras example, as printed.

    The statements are the article's, unchanged. Two are out of date: `Tokenizer`, which Keras 3 dropped from its
    documentation, and `input_length`, which Keras ignores with a warning; only that warning is silenced here. The
    article sets no seed: call `keras.utils.set_random_seed` first for the same figures every time.

    The example does not show what the article says. Its `Tokenizer` splits at blanks and ASCII punctuation, and the
    sentence has neither: it becomes one word, id 1. In any other text that word is missing, so nothing is left of it
    but padding, id 0. The model returns one probability for a whole sequence, and its only label is 1: it learns to
    answer 1. After 10 epochs it says 0.52 for the sentence and 0.51 for padding. Without words to choose from, and
    without an output that chooses one, it cannot generate text. `aigc_tf.lstm` can.

    Returns:
        `dict` of "text", "tokenizer", "word_index" (`dict[str, int]`), "padded_sequences" `int32 (1, 1)`, "model"
        (trained; ids to a probability `float32 (B, 1)`) and "loss" (`list[float]`, one per epoch, of 10).

    Example:
        >>> shown = example()
        >>> shown["word_index"], shown["padded_sequences"].tolist(), shown["model"].count_params()
        ({'这是一个示例文本，用于演示如何使用ai大模型生成文本。': 1}, [[1]], 161101)

    Source:
        The article, section 4.
    """
    text = "这是一个示例文本，用于演示如何使用AI大模型生成文本。"
    tokenizer = legacy_text_tokenizer()()
    tokenizer.fit_on_texts([text])
    word_index = tokenizer.word_index
    sequences = tokenizer.texts_to_sequences([text])
    padded_sequences = keras.preprocessing.sequence.pad_sequences(sequences, padding="post")
    model = keras.models.Sequential()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Argument `input_length` is deprecated", UserWarning)
        model.add(layers.Embedding(len(word_index) + 1, 100, input_length=padded_sequences.shape[1]))
    model.add(layers.LSTM(100, return_sequences=True))
    model.add(layers.LSTM(100))
    model.add(layers.Dense(1, activation="sigmoid"))
    model.compile(loss="binary_crossentropy", optimizer="adam", metrics=["accuracy"])
    history = model.fit(padded_sequences, np.ones(padded_sequences.shape[0]), epochs=10, verbose=0)
    return {
        "text": text,
        "tokenizer": tokenizer,
        "word_index": word_index,
        "padded_sequences": padded_sequences,
        "model": model,
        "loss": [float(loss) for loss in history.history["loss"]],
    }
