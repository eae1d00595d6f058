"""Runtime: what everything stands on. The backend and its devices, hardware, files that are written whole, numba.

In: what the system, Keras and TensorFlow or JAX offer. Out: `keras` and `tf`, loaded quietly; locks and whole files.
Public: `use_devices`.
"""
