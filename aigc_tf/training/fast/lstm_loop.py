"""LSTM loop: the loop of an LSTM layer for training on a CPU, where Keras' own takes twice as long.

In each step, Keras multiplies by both matrices and accumulates the gradients of both. Here the loop has only what
depends on the previous step; every other product is computed for all steps in one go.
"""

from ...runtime.backend import keras, num_threads, tf
from ...runtime.keras_internals import is_masked

_MIN_HALF_BATCH = 16  # rows; with fewer, a product takes as long as with twice as many


def replace_lstm(operation, args: tuple, kwargs: dict):
    """Return the output of this loop for the call of an LSTM layer in a graph; None if the layer is not supported.

    Only the width of the layer, and what it returns, may differ from Keras' defaults.

    Args:
        operation: the layer or operation that is called.
        args: its arguments by position.
        kwargs: its arguments by name.
    """
    if not has_default_settings(operation, keras.layers.LSTM, "units", "return_sequences", "return_state"):
        return None
    state = kwargs.pop("initial_state", None)
    if len(args) != 1 or kwargs or is_masked(args[0]):
        return None
    return FastLstm(operation)(args[0], *(state or ()))


def has_default_settings(operation, kind: type, *free: str, any_dtype: bool = False) -> bool:
    """Return whether an operation is a layer of a class with the default settings of Keras, except for those named.

    Its name, initializers and seeds may differ too. It must compute in float32 or bfloat16, unless `any_dtype`.
    """
    if type(operation) is not kind or not (any_dtype or operation.compute_dtype in ("float32", "bfloat16")):
        return False
    config = operation.get_config()
    # Without these, Keras would draw seeds from Python's global generator, and so change the user's random numbers.
    seedless = {name: "zeros" for name in config if name.endswith("_initializer")}
    seedless |= {"seed": 0} if "seed" in config else {}
    default = kind(**{name: config[name] for name in free}, **seedless).get_config()
    free = {*free, "name", "dtype", "trainable", "seed"}
    names = {name for name in {**config, **default} if name not in free and not name.endswith("_initializer")}
    return all(config.get(name) == default.get(name) for name in names)


class FastLstm(keras.layers.Layer):
    """An LSTM layer of Keras that runs in this loop."""

    def __init__(self, layer: keras.layers.LSTM):
        super().__init__(name=f"aigc_tf_{layer.name}", dtype=layer.dtype_policy)
        self.layer, self.built = layer, True

    def call(self, x, *state):
        """Compute the output of the layer for sequences (B, T, I), from a given state or zeros."""
        cell, dtype = self.layer.cell, self.compute_dtype
        state = state or self.layer.get_initial_state(tf.shape(x)[0])
        values = (x, *state, cell.kernel, cell.recurrent_kernel, cell.bias)
        x, hidden, cell, *weights = (tf.cast(tf.convert_to_tensor(v), dtype) for v in values)
        parts = zip(*(tf.split(v, _split_sizes(x.shape[0])) for v in (x, hidden, cell)), strict=True)
        results = [lstm_sequence(*part, *weights) for part in parts]
        hidden, last_hidden, last_cell = (tf.concat(those, axis=0) for those in zip(*results, strict=True))
        output = hidden if self.layer.return_sequences else last_hidden
        return [output, last_hidden, last_cell] if self.layer.return_state else output

    def compute_output_spec(self, x, *state):
        """Return the shapes of the output, which are those of the layer."""
        return self.layer.compute_output_spec(x, initial_state=list(state) or None)


def _split_sizes(num_rows: int | None) -> list[int] | int:
    """Split a batch into halves whose loops run in parallel, if there is a thread for each; else keep it whole.

    The operations between two products run in one thread, while the other threads would wait.
    """
    if (num_rows or 0) < 2 * _MIN_HALF_BATCH or min(num_threads("intra"), num_threads("inter")) < 2:
        return 1
    return [num_rows // 2, num_rows - num_rows // 2]


@tf.custom_gradient
def lstm_sequence(x, hidden, cell, kernel, recurrent_kernel, bias):
    """Run an LSTM layer over sequences.

    Args:
        x: (B, T, I).
        hidden: the hidden state before the first step, (B, D).
        cell: the cell state before the first step, (B, D).
        kernel: (I, 4 D): input gate, forget gate, candidate, output gate.
        recurrent_kernel: (D, 4 D).
        bias: (4 D,).

    Returns:
        The hidden states (B, T, D), and the last hidden state and the last cell state (B, D).

    Source:
        S. Hochreiter and J. Schmidhuber, "Long short-term memory", Neural Computation 9 (1997).
    """
    dtype, steps = x.dtype, tf.shape(x)[1]
    x = tf.transpose(x, (1, 0, 2))
    projected = tf.nn.bias_add(_matmul_all_steps(x, kernel), bias)  # TensorFlow fuses both
    # In the loop, weights are the left operand of a product, which oneDNN takes as it is. It would reorder a right
    # operand in each step, which takes as long as the product.
    transposed_kernel = tf.transpose(recurrent_kernel)
    first_hidden, first_cell = hidden, tf.cast(cell, tf.float32)
    shapes = [(hidden.shape[0], width * hidden.shape[1]) for width in (4, 1, 1)]
    history = [_array(t, steps, shape) for t, shape in zip((dtype, tf.float32, dtype), shapes, strict=True)]

    def step(t, hidden, cell, *history):
        gates, cell, hidden = _step(projected[t], tf.matmul(transposed_kernel, hidden, transpose_b=True), cell)
        history = [a.write(t, value) for a, value in zip(history, (gates, cell, hidden), strict=True)]
        return t + 1, hidden, cell, *history

    _, last_hidden, last_cell, *history = _loop(step, steps, (first_hidden, first_cell, *history))
    gates, cells, hiddens = (array.stack() for array in history)

    def gradient(d_hiddens, d_last_hidden, d_last_cell):
        d_hiddens = tf.transpose(d_hiddens, (1, 0, 2))
        cells_before = tf.concat([first_cell[None], cells[:-1]], axis=0)
        hiddens_before = tf.concat([first_hidden[None], hiddens[:-1]], axis=0)
        d_gates = _array(dtype, steps, shapes[0])

        def step_back(i, d_hidden, d_cell, d_gates):
            t = steps - 1 - i
            d_gate, d_cell = _step_back(gates[t], cells[t], cells_before[t], d_hiddens[t], d_hidden, d_cell)
            return i + 1, tf.matmul(recurrent_kernel, d_gate, transpose_b=True), d_cell, d_gates.write(t, d_gate)

        d_last_cell = tf.cast(d_last_cell, tf.float32)
        _, d_hidden, d_cell, d_gates = _loop(step_back, steps, (tf.transpose(d_last_hidden), d_last_cell, d_gates))
        d_gates = d_gates.stack()
        flat = tf.reshape(d_gates, (-1, d_gates.shape[2]))
        return (
            tf.transpose(_matmul_all_steps(d_gates, tf.transpose(kernel)), (1, 0, 2)),
            tf.transpose(d_hidden),
            tf.cast(d_cell, dtype),
            *(tf.matmul(tf.reshape(y, (-1, y.shape[2])), flat, transpose_a=True) for y in (x, hiddens_before)),
            # The sum over rows as a product: tf.reduce_sum takes a quarter of the time of all products here.
            tf.matmul(tf.ones((1, tf.shape(flat)[0]), dtype), flat)[0],
        )

    return (tf.transpose(hiddens, (1, 0, 2)), last_hidden, tf.cast(last_cell, dtype)), gradient


def _matmul_all_steps(x, matrix):
    shape = tf.shape(x)
    return tf.reshape(tf.matmul(tf.reshape(x, (-1, x.shape[2])), matrix), (shape[0], shape[1], matrix.shape[1]))


def _array(dtype, steps, shape):
    return tf.TensorArray(dtype, size=steps, element_shape=shape)


def _loop(step, steps, state):
    return tf.while_loop(lambda t, *_: t < steps, step, (tf.constant(0), *state), maximum_iterations=steps)


@tf.function(jit_compile=True, autograph=False)
def _step(x, y, cell):
    """Return the gates (B, 4 D), the cell state in float32 and the hidden state, from products x and, transposed, y."""
    sums = tf.cast(x, tf.float32) + tf.cast(tf.transpose(y), tf.float32)
    input_, forget, candidate, output = tf.split(sums, 4, axis=1)
    input_, forget, output = tf.sigmoid(input_), tf.sigmoid(forget), tf.sigmoid(output)
    candidate = tf.tanh(candidate)
    cell = forget * cell + input_ * candidate
    gates = tf.concat([input_, forget, candidate, output], axis=1)
    return tf.cast(gates, x.dtype), cell, tf.cast(output * tf.tanh(cell), x.dtype)


@tf.function(jit_compile=True, autograph=False)
def _step_back(gates, cell, cell_before, d_hidden, d_transposed, d_cell):
    """Return the gradients of the gates before their activation, (B, 4 D), and of the previous cell state.

    The gradient of the hidden state has two parts: from the layer's output and, transposed, from the next step.
    """
    input_, forget, candidate, output = tf.split(tf.cast(gates, tf.float32), 4, axis=1)
    d_hidden = tf.cast(d_hidden, tf.float32) + tf.cast(tf.transpose(d_transposed), tf.float32)
    squashed = tf.tanh(cell)
    d_cell += d_hidden * output * (1 - squashed**2)
    d_input = d_cell * candidate * input_ * (1 - input_)
    d_forget = d_cell * cell_before * forget * (1 - forget)
    d_candidate = d_cell * input_ * (1 - candidate**2)
    d_out = d_hidden * squashed * output * (1 - output)
    return tf.cast(tf.concat([d_input, d_forget, d_candidate, d_out], axis=1), gates.dtype), d_cell * forget
