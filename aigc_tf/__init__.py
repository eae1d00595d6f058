"""Chinese text generation on Keras: from a folder of Chinese text to a language model that writes.

The package rests on one convention: a language model is a `keras.Model` from token ids `int32 (B, T)` to logits
`float32 (B, T, V)`, causal: `logits[:, t]` depends on `ids[:, :t+1]` alone.

Shapes: B sequences in a batch, T positions (the context), D hidden dimension, H attention heads, V vocabulary size.
Between the folders pass mostly plain types: `str`, `list[int]`, NumPy arrays, `tf.data.Dataset`, `keras.Model` and
`dict[str, float]`; the one class to know is `Tokenizer`.

Importing this package is cheap: each name below loads its module, and TensorFlow, when first used.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "corpus.cleaning": ("clean",),
    "corpus.documents": ("iter_documents", "load_documents"),
    "corpus.corpora": ("load_corpus",),
    "corpus.splitting": ("split",),
    "corpus.segmentation": ("keywords", "load_stopwords", "load_user_dict", "remove_stopwords", "segment"),
    "corpus.tokenizer": ("Tokenizer",),
    "runtime.distribution": ("use_devices",),
    "corpus.store": ("make_store", "open_store"),
    "corpus.dataset": ("make_dataset",),
    "models.networks": ("lstm", "transformer"),
    "models.initialisation": ("initialise",),
    "models.ngram": ("kneser_ney",),
    "evaluation.bits": ("evaluate",),
    "evaluation.baselines": ("baselines",),
    "training.train": ("train",),
    "generation.generate": ("generate", "generate_batch", "stream"),
    "generation.show": ("show",),
    "runs.folder": ("load", "load_writer", "read_run", "save"),
    "runs.versions": ("versions",),
    "runs.estimate": ("estimate", "memory_warning"),
    "runs.pipeline": ("run_pipeline",),
    "runs.tune": ("tune",),
    "evaluation.surprisal": ("surprisal",),
    "evaluation.attention": ("attention_maps",),
    "evaluation.views": ("attention_html", "surprisal_html", "table_html"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
