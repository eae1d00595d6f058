"""Runs: all six steps in one call, an estimate of what they cost, and the search for better settings.

In: documents and settings. Out: a run folder with the model, its tokenizer, settings and figures.
Public: `run_pipeline`, `save`, `load`, `load_writer`, `read_run`, `versions`, `estimate`, `memory_warning`, `tune`.
"""
