"""Evaluation: step 5 of the article. A model and held-out documents in, figures and pictures out.

In: a model, its tokenizer, documents. Out: bits per character, baselines, surprisal, attention maps, views in HTML.
Public: `evaluate`, `baselines`, `surprisal`, `surprisal_html`, `attention_maps`, `attention_html`, `table_html`.
"""
