"""Runtime: what all other folders build on: backend and devices, hardware, atomic file writes, numba.

In: what the system, Keras and TensorFlow or JAX offer. Out: `keras` and `tf`, loaded quietly; locks, atomic writes.
Public: `use_devices`.
"""
