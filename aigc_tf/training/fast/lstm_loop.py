"""Recurrence: the loop of an LSTM layer for training on a CPU, where Keras' own takes twice as long.

Keras multiplies with both matrices in each step, and on the way back adds up the gradients of both in each step. Here
the loop holds what depends on the step before, and each of the other products is one, over all steps.
"""

from ...runtime.backend import keras, num_threads, tf
from ...runtime.keras_internals import is_masked

_FEWEST_ROWS = 16  # of a half of a batch: with fewer, a product takes as long as with twice as many


def own_loop(operation, args: tuple, kwargs: dict):
    """Give the output of an LSTM layer by this loop, for its call in a graph; None where it does not serve.

    It serves layers that differ from Keras' default in their width and what they return alone, on TensorFlow.

    Args:
        operation: what is called, a layer of any kind.
        args: with what.
        kwargs: likewise.
    """
    if not is_plain(operation, keras.layers.LSTM, "units", "return_sequences", "return_state"):
        return None
    state = kwargs.pop("initial_state", None)
    if len(args) != 1 or kwargs or is_masked(args[0]):
        return None
    return OwnLoop(operation)(args[0], *(state or ()))


def is_plain(operation, kind: type, *free: str, any_dtype: bool = False) -> bool:
    """Tell whether an operation is a layer as Keras makes it by default, but for some settings that are free.

    Its name, its first values and the seeds of its chance are free too. It computes in float32 or bfloat16, or in
    `any_dtype`.
    """
    if type(operation) is not kind or not (any_dtype or operation.compute_dtype in ("float32", "bfloat16")):
        return False
    config = operation.get_config()
    # Without these Keras takes seeds from Python's own generator, which is the user's.
    chance = {name: "zeros" for name in config if name.endswith("_initializer")}
    chance |= {"seed": 0} if "seed" in config else {}
    plain = kind(**{name: config[name] for name in free}, **chance).get_config()
    free = {*free, "name", "dtype", "trainable", "seed"}
    names = {name for name in {**config, **plain} if name not in free and not name.endswith("_initializer")}
    return all(config.get(name) == plain.get(name) for name in names)


class OwnLoop(keras.layers.Layer):
    """Run an LSTM layer by this loop."""

    def __init__(self, layer: keras.layers.LSTM):
        super().__init__(name=f"aigc_tf_{layer.name}", dtype=layer.dtype_policy)
        self.layer, self.built = layer, True

    def call(self, x, *state):
        """Compute what the layer does of sequences (B, T, I) and of a state given or of zeros."""
        cell, dtype = self.layer.cell, self.compute_dtype
        state = state or self.layer.get_initial_state(tf.shape(x)[0])
        values = (x, *state, cell.kernel, cell.recurrent_kernel, cell.bias)
        x, hidden, cell, *weights = (tf.cast(tf.convert_to_tensor(v), dtype) for v in values)
        parts = zip(*(tf.split(v, _parts(x.shape[0])) for v in (x, hidden, cell)), strict=True)
        results = [lstm_sequence(*part, *weights) for part in parts]
        hidden, last_hidden, last_cell = (tf.concat(those, axis=0) for those in zip(*results, strict=True))
        output = hidden if self.layer.return_sequences else last_hidden
        return [output, last_hidden, last_cell] if self.layer.return_state else output

    def compute_output_spec(self, x, *state):
        """Tell the shapes of the output, which are the layer's."""
        return self.layer.compute_output_spec(x, initial_state=list(state) or None)


def _parts(num_rows: int | None) -> list[int] | int:
    """Divide a batch into halves whose loops are computed side by side, where there is a thread for each.

    What stands between two products is done by one thread, and the other would wait.
    """
    if (num_rows or 0) < 2 * _FEWEST_ROWS or min(num_threads("intra"), num_threads("inter")) < 2:
        return 1
    return [num_rows // 2, num_rows - num_rows // 2]


@tf.custom_gradient
def lstm_sequence(x, hidden, cell, kernel, recurrent_kernel, bias):
    """Run an LSTM layer over sequences.

    Args:
        x: (B, T, I).
        hidden: the state before the first step, (B, D).
        cell: likewise, (B, D).
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
    before = tf.nn.bias_add(_of_all_steps(x, kernel), bias)  # in the pass of the product
    # In the loop the weights stand on the left of a product, where oneDNN takes them as they lie: on the right it would
    # lay them out anew in each step, which takes as long as the product.
    turned = tf.transpose(recurrent_kernel)
    first_hidden, first_cell = hidden, tf.cast(cell, tf.float32)
    shapes = [(hidden.shape[0], width * hidden.shape[1]) for width in (4, 1, 1)]
    kept = [_array(t, steps, shape) for t, shape in zip((dtype, tf.float32, dtype), shapes, strict=True)]

    def step(t, hidden, cell, *kept):
        gates, cell, hidden = _step(before[t], tf.matmul(turned, hidden, transpose_b=True), cell)
        return t + 1, hidden, cell, *(a.write(t, value) for a, value in zip(kept, (gates, cell, hidden), strict=True))

    _, last_hidden, last_cell, *kept = _loop(step, steps, (first_hidden, first_cell, *kept))
    gates, cells, hiddens = (array.stack() for array in kept)

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
            tf.transpose(_of_all_steps(d_gates, tf.transpose(kernel)), (1, 0, 2)),
            tf.transpose(d_hidden),
            tf.cast(d_cell, dtype),
            *(tf.matmul(tf.reshape(y, (-1, y.shape[2])), flat, transpose_a=True) for y in (x, hiddens_before)),
            # A sum over rows, as a product: TensorFlow's own takes as long as a quarter of the products here.
            tf.matmul(tf.ones((1, tf.shape(flat)[0]), dtype), flat)[0],
        )

    return (tf.transpose(hiddens, (1, 0, 2)), last_hidden, tf.cast(last_cell, dtype)), gradient


def _of_all_steps(x, matrix):
    shape = tf.shape(x)
    return tf.reshape(tf.matmul(tf.reshape(x, (-1, x.shape[2])), matrix), (shape[0], shape[1], matrix.shape[1]))


def _array(dtype, steps, shape):
    return tf.TensorArray(dtype, size=steps, element_shape=shape)


def _loop(step, steps, state):
    return tf.while_loop(lambda t, *_: t < steps, step, (tf.constant(0), *state), maximum_iterations=steps)


@tf.function(jit_compile=True, autograph=False)
def _step(x, y, cell):
    """Return the gates (B, 4 D), the cell state in float32 and the hidden state from products x and, turned, y."""
    put, forget, candidate, out = tf.split(tf.cast(x, tf.float32) + tf.cast(tf.transpose(y), tf.float32), 4, axis=1)
    put, forget, out = tf.sigmoid(put), tf.sigmoid(forget), tf.sigmoid(out)
    candidate = tf.tanh(candidate)
    cell = forget * cell + put * candidate
    gates = tf.concat([put, forget, candidate, out], axis=1)
    return tf.cast(gates, x.dtype), cell, tf.cast(out * tf.tanh(cell), x.dtype)


@tf.function(jit_compile=True, autograph=False)
def _step_back(gates, cell, cell_before, d_hidden, d_turned, d_cell):
    """Return the gradients of the sums that the gates are made of, (B, 4 D), and of the cell state before.

    That of the hidden state comes in two parts, from the layer's output and, turned, from the step after.
    """
    put, forget, candidate, out = tf.split(tf.cast(gates, tf.float32), 4, axis=1)
    d_hidden = tf.cast(d_hidden, tf.float32) + tf.cast(tf.transpose(d_turned), tf.float32)
    squashed = tf.tanh(cell)
    d_cell += d_hidden * out * (1 - squashed**2)
    d_put = d_cell * candidate * put * (1 - put)
    d_forget = d_cell * cell_before * forget * (1 - forget)
    d_candidate = d_cell * put * (1 - candidate**2)
    d_out = d_hidden * squashed * out * (1 - out)
    return tf.cast(tf.concat([d_put, d_forget, d_candidate, d_out], axis=1), gates.dtype), d_cell * forget
