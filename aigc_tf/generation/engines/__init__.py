"""Engines: the ways to compute the logits after the newest token, each token read once (KV cache, LSTM state).

In: a model or its weights, token ids. Out: logits `float32 (R, V)`, or, where a whole loop is compiled, token ids.
NumPy, numba, a loop on a GPU or TPU, and the model itself compute the same; `choose.py` decides which one writes.
"""
