"""Encoded text: the tokenizer and the token ids of a text, made once and kept in a folder that runs share."""

import contextlib
import hashlib
import shutil
from pathlib import Path

import numpy as np

from .. import __version__
from ..corpus.documents import documents_sha256
from ..corpus.segmentation import default_processes
from ..corpus.store import make_store, open_store
from ..corpus.tokenizer import Tokenizer
from ..runtime.distribution import num_hosts
from ..runtime.files import rename, temporary_path, to_json
from ..runtime.locks import hold_lock


def encode_or_open(
    documents: list[str], unit: str, vocab_size: int | None, user_dict, folder: Path
) -> tuple[Tokenizer, np.ndarray]:
    """Train a tokenizer and encode documents with it, or open what another call has kept in `folder`.

    Args:
        documents: the documents to learn from.
        unit: see `Tokenizer.train`.
        vocab_size: see `Tokenizer.train`.
        user_dict: see `Tokenizer.train`.
        folder: the folder, which may hold other texts too. Of several calls one encodes, and the others wait.

    Returns:
        The tokenizer, and the token ids as `make_store` returns them.
    """
    num_chars = sum(map(len, documents))
    processes = default_processes(num_chars, unit, user_dict)

    def trained():
        return Tokenizer.train(documents, unit, vocab_size, user_dict=user_dict, processes=processes)

    if num_hosts() > 1:  # they may share the folder
        tokenizer = trained()
        return tokenizer, make_store(documents, tokenizer, processes=processes)
    key = to_json([documents_sha256(documents), unit, vocab_size, user_dict, __version__])
    folder = folder / hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def opened():
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        return tokenizer, open_store(folder / "tokens", tokenizer)

    with contextlib.suppress(FileNotFoundError, ValueError):  # missing or damaged
        return opened()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder.with_name(f".{folder.name}.lock"), wait=True):  # until another run has encoded the same text
        try:
            return opened()
        except (FileNotFoundError, ValueError):
            if folder.exists():
                shutil.rmtree(folder)
        with temporary_path(folder) as new:
            new.mkdir()
            tokenizer = trained()
            make_store(documents, tokenizer, new / "tokens", processes)
            tokenizer.save(new / "tokenizer.json")
            if not folder.exists():  # without locks, as on some network drives, another run may have been faster
                rename(new, folder)
        return opened()
