"""Evaluation: step 5 of the article. A model and held-out documents in, figures and views out.

In: a model, its tokenizer, documents. Out: bits per character, baselines, the surprisal of each character, attention.
Public: `evaluate`, `baselines`, `surprisal`, `surprisal_html`, `attention_maps`, `attention_html`, `table_html`.
"""
