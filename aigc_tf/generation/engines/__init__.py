"""Engines: the ways to compute the logits after the newest token, each token read once (KV cache, LSTM state).

In: a model or its weights, token ids. Out: logits `float32 (R, V)`, or token ids where a whole loop is compiled.
All engines compute the same: `numpy_engine.py`, `numba_engine.py`, `device_loop.py` (GPU and TPU) and `model_engine.py`
(any model). `engine.py` says what they have in common, `choose.py` which one writes.
"""
