"""Runtime: what all other folders build on: backend and devices, hardware, atomic file writes, numba.

In: what the system, Keras, TensorFlow and JAX offer. Out: `keras` and `tf`, loaded quietly (`tf` is None where JAX
computes), the devices to train on, file locks and atomic writes, functions compiled by numba.
Public: `use_devices`.
"""
