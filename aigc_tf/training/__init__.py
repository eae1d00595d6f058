"""Training: step 4 of the article. A model and batches in, the best weights and a history out.

In: a model, the batches of `make_dataset`, held-out documents. Out: the trained model and its history; in a run folder
`log.csv`, logs for TensorBoard, checkpoints.
Public: `train`.
"""
