"""Weight watch: snapshots of a Keras model that tell whether its variables, or settings of its layers, have changed.

Values are compared only if they may have changed, and on the device they are on.
"""

import functools
import operator
import types

import numpy as np

from ...runtime.backend import keras, tf
from ...runtime.keras_internals import inner_layers

_NOT_SETTINGS = ("_called", "_parent_path")  # set by a layer when it is first called


class LayerSnapshot:
    """The plain attributes of all layers at one time, to compare with those at another."""

    def __init__(self, model: keras.Model):
        self._layers = [_plain_attributes(layer) for layer in inner_layers(model)]

    def is_current(self, model: keras.Model) -> bool:
        """Return whether the layers have the same attributes, and the plain ones the same values."""
        layers = inner_layers(model)
        return len(layers) == len(self._layers) and all(
            names <= vars(layer).keys() and all(map(operator.is_, read(vars(layer)), values))
            for layer, (names, read, values) in zip(layers, self._layers, strict=True)
        )


def _plain_attributes(layer) -> tuple:
    # Other attributes are not kept, as some would keep the model alive.
    plain = {name: value for name, value in vars(layer).items() if _is_plain(value) and name not in _NOT_SETTINGS}
    read = operator.itemgetter(*plain, "name", "name")  # with two names it returns a tuple in any case
    return plain.keys(), read, read(vars(layer))


def _is_plain(value) -> bool:
    is_function = isinstance(value, types.FunctionType) and value.__closure__ is None
    return is_function or value is None or isinstance(value, bool | int | float | str)


class VariableSnapshot:
    """The values of a model's variables at one time, to compare with those at another.

    While something holds the old value of a variable, as this does, TensorFlow writes a new one to another place in
    memory, and JAX always does. So a value at the same place has not changed.
    """

    def __init__(self, model: keras.Model):
        self._variables = list(model.weights)
        self._read = _reader(self._variables)
        self._values = self._read()
        self._on_host = all(_is_on_host(value) for value in self._values)
        if self._on_host:
            self._arrays = [np.asarray(value) for value in self._values]
            self._places = [array.__array_interface__["data"][0] for array in self._arrays]

    def array(self, variable) -> np.ndarray:
        """Return the value that a variable had at the time."""
        return np.asarray(self._values[next(i for i, kept in enumerate(self._variables) if kept is variable)])

    def is_current(self, model: keras.Model) -> bool:
        """Return whether the model has the same variables with equal values."""
        variables = model.weights
        if len(variables) != len(self._variables) or any(
            a is not b for a, b in zip(variables, self._variables, strict=True)
        ):
            return False
        now = self._read()
        if keras.backend.backend() == "jax":
            pairs = [(a, b) for a, b in zip(now, self._values, strict=True) if a is not b]
            # Training on JAX deletes old values to reuse their memory.
            return not any(b.is_deleted() for _, b in pairs) and all(bool((a == b).all()) for a, b in pairs)
        if not self._on_host:
            return bool(_comparison()(now, self._values))
        places = [np.asarray(value).__array_interface__["data"][0] for value in now]
        moved = [i for i, (place, before) in enumerate(zip(places, self._places, strict=True)) if place != before]
        return all(np.array_equal(now[i], self._values[i]) for i in moved)


def _reader(variables):
    """Make a function that reads all variables in one call, several times as fast as one by one."""
    if keras.backend.backend() == "jax":
        return lambda: [variable.value for variable in variables]
    values = [variable.value for variable in variables]
    read = tf.function(
        lambda: [value.value() if callable(getattr(value, "value", None)) else value for value in values],
        autograph=False,
    )
    # Its one concrete trace is called, as TensorFlow warns of retracing if the function itself is called per model.
    return read.get_concrete_function()


def _is_on_host(value) -> bool:
    return keras.backend.backend() == "jax" or "CPU" in value.device


@functools.cache
def _comparison():
    """Make a function that compares values on their device, so that one boolean is copied and not all weights."""

    def all_equal(now, before):
        return tf.reduce_all([tf.reduce_all(a == b) for a, b in zip(now, before, strict=True)])

    return tf.function(all_equal, autograph=False, reduce_retracing=True)
