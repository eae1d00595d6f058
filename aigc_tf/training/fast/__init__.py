"""Fast training: the same step as Keras computes, faster on a CPU.

In: a compiled model. Out: a model of the same weights, whose step is fused, or whose LSTM is a loop of its own.
"""
