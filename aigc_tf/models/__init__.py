"""Models: steps 2 and 3 of the article, building and initialising. Dimensions in, a language model out.

In: the size of the vocabulary, the context, dimensions. Out: a `keras.Model` from ids `int32 (B, T)` to logits
`float32 (B, T, V)`, with initial weights; an n-gram model to compare it with; and the article's formulas.
Public: `transformer`, `lstm`, `initialise`, `kneser_ney`.
"""
