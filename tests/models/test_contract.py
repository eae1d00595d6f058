"""What is refused as a language model."""

import numpy as np
import pytest

from aigc_tf import evaluate, generate, surprisal
from aigc_tf.runtime.backend import keras


def test_a_model_has_one_input_of_fixed_length_and_one_output(tokenizer, documents):
    def ids(size=8, name=None):
        return keras.Input((size,), dtype="int32", name=name)

    embed = keras.layers.Embedding(tokenizer.vocab_size, tokenizer.vocab_size)
    a, b, free = ids(name="a"), ids(name="b"), ids(None)
    for model in (
        keras.Model(free, embed(free)),
        keras.Model([a, b], embed(a) + embed(b)),
        keras.Model(a, [embed(a), embed(a)]),
        keras.Model(a, {"logits": embed(a)}),
        keras.Model({"a": a}, embed(a)),
        keras.Model(a, embed(a)[:, -1]),
    ):
        for use, text in ((generate, "白"), (evaluate, documents[:2]), (surprisal, "白日")):
            with pytest.raises(ValueError, match=r"one input, ids \(batch, T\) with T fixed.* Wrap it: "):
                use(model, tokenizer, text)
    assert np.isfinite(evaluate(keras.Model(a, embed(a)), tokenizer, documents[:2])["bits_per_char"])
