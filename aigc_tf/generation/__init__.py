"""Generation: step 6 of the article, prediction. A model and a prompt in, text out.

In: a model and its tokenizer, a prompt, settings of sampling. Out: `str`, whole or piece by piece.
Public: `generate`, `generate_batch`, `stream`, `show`.
"""
