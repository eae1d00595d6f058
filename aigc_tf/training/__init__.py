"""Training: step 4 of the article. A model and batches in, the best weights and a history out.

In: a model, a dataset, held-out documents. Out: the trained model, `log.csv`, TensorBoard's logs, checkpoints.
Public: `train`.
"""
