import math

import numpy as np
import pytest

from aigc_tf.runtime.backend import keras
from aigc_tf.training.optimizer import adamw


def test_weight_decay_excludes_biases_and_norms(build, tokenizer):
    model = build(tokenizer.vocab_size, 20)
    for weight in model.trainable_weights:
        weight.assign(np.ones(weight.shape))
    optimizer = adamw(0.5, weight_decay=0.1, clip_norm=1.0)
    optimizer.build(model.trainable_weights)
    optimizer.apply([keras.ops.zeros(weight.shape) for weight in model.trainable_weights])
    for weight in model.trainable_weights:
        excluded = weight.path.endswith(("bias", "beta", "gamma"))
        np.testing.assert_allclose(np.asarray(weight), 1.0 if excluded else 0.95, rtol=1e-6, err_msg=weight.path)


def test_gradients_are_clipped_by_their_global_norm():
    optimizer = adamw(1.0, weight_decay=0.0, clip_norm=1.0)
    clipped = optimizer._clip_gradients([keras.ops.full((2,), 30.0), keras.ops.full((2,), 40.0)])
    norm = math.sqrt(sum(float(keras.ops.sum(g * g)) for g in clipped))
    assert norm == pytest.approx(1.0, rel=1e-5)


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX clips the sum already")
def test_a_keras_that_cannot_clip_summed_gradients_is_refused(monkeypatch):
    monkeypatch.setattr("aigc_tf.training.optimizer.num_replicas", lambda: 2)
    owner = next(kind for kind in keras.optimizers.AdamW.__mro__ if "_clip_gradients" in vars(kind))
    monkeypatch.delattr(owner, "_clip_gradients")  # as another Keras may have it
    with pytest.raises(RuntimeError, match="cannot clip the summed gradients .*: AdamW lacks _clip_gradients"):
        adamw(1.0, weight_decay=0.0, clip_norm=1.0)
    adamw(1.0, weight_decay=0.0, clip_norm=None)
