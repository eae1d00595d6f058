"""Tokenizer: text to token ids and back, without loss."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from ..runtime.files import parse_json, write_json
from .documents import check_documents
from .parallel import map_chunks
from .segmentation import as_user_dict, segmenter
from .utf8 import SURROGATE, complete_characters
from .vocabulary import rank_pieces

UNITS = ("char", "word")
DEFAULT_VOCAB_SIZE = {"char": 6_000, "word": 20_000}
_FORMAT = {"format": "aigc_tf tokenizer", "version": 1}
_FIRST_BYTE = 3
_FIRST_PIECE = _FIRST_BYTE + 256


class Tokenizer:
    """Turn text into token ids and back without loss: `decode(encode(text)) == text` for every string.

    A word that is not in the vocabulary is spelt in characters, and such a character in UTF-8 bytes, so there is no
    unknown token. With `unit="char"` the vocabulary has characters (best for verse, and the safe choice), with
    `unit="word"` also jieba words (best for prose). Ids: 0 padding, 1 beginning and 2 end of document, 3 to 258 bytes,
    then the pieces in descending frequency. `Tokenizer.train` makes a tokenizer from documents.

    Args:
        pieces: the characters and words of the vocabulary, in the order of their ids.
        unit: "char" or "word".
        user_dict: a jieba user dictionary, its file or its lines (see `load_user_dict`); only for words.

    Raises:
        ValueError: `unit` is unknown, or a piece is empty, repeated or cannot be encoded in UTF-8.

    Example:
        >>> tokenizer = Tokenizer.train(["春眠不觉晓，处处闻啼鸟。"])
        >>> tokenizer.encode("春鸟。")
        [263, 268, 260]
        >>> tokenizer.decode(tokenizer.encode("龘 is spelt in bytes 🐉"))
        '龘 is spelt in bytes 🐉'
    """

    PAD, BOS, EOS = 0, 1, 2
    BYTES = slice(_FIRST_BYTE, _FIRST_PIECE)

    def __init__(self, pieces: Sequence[str], unit: str = "char", user_dict: Sequence[str] | str = ()):
        if unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}.")
        self.pieces = tuple(pieces)
        self.unit = unit
        self.user_dict = as_user_dict(user_dict)
        self._ids = {piece: i for i, piece in enumerate(self.pieces, _FIRST_PIECE)}
        if len(self._ids) < len(self.pieces) or "" in self._ids:
            raise ValueError("The pieces of a vocabulary must be all different and not empty.")
        if broken := next(filter(SURROGATE.search, (*self.pieces, *self.user_dict)), None):
            raise ValueError(
                f"A vocabulary and its user dictionary must be text that UTF-8 can encode, got {broken!a}."
            )

    @classmethod
    def train(
        cls,
        documents: Iterable[str],
        unit: str = "char",
        vocab_size: int | None = None,
        *,
        user_dict: Sequence[str] | str = (),
        processes: int = 1,
    ) -> "Tokenizer":
        """Build the vocabulary of documents: their most frequent characters, and with `unit="word"` words.

        Characters and words share one ranking by frequency. A character counts wherever it occurs, so that the
        vocabulary has all characters of its words.

        Args:
            documents: the training documents.
            unit: "char" or "word".
            vocab_size: the maximum size of the vocabulary, including the 259 special ids and bytes; by default 6,000
                for characters and 20,000 for words.
            user_dict: a jieba user dictionary, its file or its lines (see `load_user_dict`); only for words.
            processes: the number of processes that segment. More than one repay their start with `unit="word"` from
                about 10 million characters, or 100 million with the extra `fast`.

        Returns:
            A `Tokenizer`.

        Raises:
            ValueError: `vocab_size` leaves no room for a piece, `unit` is unknown, or `documents` is a single text.

        Example:
            >>> tokenizer = Tokenizer.train(["我们的模型会写诗。", "我们写诗。"], unit="word")
            >>> [tokenizer.decode([i]) for i in tokenizer.encode("我们写诗")]
            ['我们', '写诗']
        """
        check_documents(documents)
        tokenizer = cls((), unit, user_dict)
        vocab_size = DEFAULT_VOCAB_SIZE[unit] if vocab_size is None else vocab_size
        if vocab_size <= _FIRST_PIECE:
            raise ValueError(
                f"vocab_size must be more than {_FIRST_PIECE} (3 special ids and 256 bytes), got {vocab_size}."
            )
        pieces = rank_pieces(documents, unit, tokenizer.user_dict, processes)
        return cls(pieces[: vocab_size - _FIRST_PIECE], unit, tokenizer.user_dict)

    @property
    def vocab_size(self) -> int:
        """The number of ids, V of the models."""
        return _FIRST_PIECE + len(self.pieces)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of everything that determines an encoding, in hexadecimal digits."""
        return hashlib.sha256(json.dumps(self._as_dict(), sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Encode text to token ids, without beginning and end of document.

        Args:
            text: any string.

        Returns:
            `list[int]`, each at least 3 and below `vocab_size`.
        """
        if self.unit == "char":
            return self._encode_characters(text).tolist()
        words = self._cut(text)
        get = self._ids.get
        ids = [get(word) for word in words]
        if None not in ids:
            return ids
        return list(chain.from_iterable(
            (i,) if i is not None else self._spell(word) for i, word in zip(ids, words, strict=True)
        ))  # fmt: skip

    def encode_documents(self, documents: Iterable[str], processes: int = 1) -> Iterator[np.ndarray]:
        """Encode documents, each between beginning and end of document.

        Args:
            documents: the documents.
            processes: the number of processes that encode (see `train`).

        Returns:
            An iterator over `int32` arrays, one for each document, in order.

        Raises:
            ValueError: `documents` is a single text.
        """
        check_documents(documents)
        return chain.from_iterable(map_chunks(self._encode_chunk, documents, processes))

    def decode(self, ids: Iterable[int]) -> str:
        """Decode token ids to text. Special ids are skipped, and invalid UTF-8 becomes U+FFFD.

        Args:
            ids: token ids.

        Returns:
            `str`.

        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids: Iterable[int], cut: bool = False) -> Iterator[str]:
        """Decode ids as they come, in whole characters: bytes are held back until their character is complete.

        Args:
            ids: token ids, possibly from a generator.
            cut: leave out a character that is incomplete at the end, or before the end of document, for ids that may
                stop anywhere. By default it becomes U+FFFD.

        Returns:
            An iterator over `str`, not empty; without `cut`, they join to `decode(ids)`.

        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        pending = b""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"Ids of this vocabulary run from 0 to {self.vocab_size - 1}, got {i}.")
            if _FIRST_BYTE <= i < _FIRST_PIECE:
                characters, pending = complete_characters(pending + bytes([i - _FIRST_BYTE]))
                if characters:
                    yield characters
                continue
            if pending:
                if not (cut and i == self.EOS):
                    yield "\ufffd"
                pending = b""
            if i >= _FIRST_PIECE:
                yield self.pieces[i - _FIRST_PIECE]
        if pending and not cut:
            yield "\ufffd"

    def token_bytes(self, i: int) -> bytes:
        """Return the UTF-8 bytes of a token, empty for a special id."""
        return self.bytes_of_tokens[i]

    @functools.cached_property
    def bytes_of_tokens(self) -> tuple[bytes, ...]:
        """The UTF-8 bytes of each token, by its id."""
        pieces = (piece.encode() for piece in self.pieces)
        return *([b""] * _FIRST_BYTE), *(bytes([byte]) for byte in range(256)), *pieces

    def piece_id(self, piece: str) -> int | None:
        """Return the id of a piece, or None if it is not in the vocabulary."""
        return self._ids.get(piece)

    def save(self, path) -> None:
        """Write the tokenizer to a JSON file, completely or not at all.

        Args:
            path: the file to write.
        """
        write_json(path, {**_FORMAT, **self._as_dict()})

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """Read a tokenizer from a file that `save` wrote.

        Args:
            path: the file to read.

        Returns:
            A `Tokenizer`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a tokenizer that this version can read.
        """
        try:
            state = parse_json(Path(path).read_text("utf-8"))
            if any(state.get(key) != value for key, value in _FORMAT.items()):
                raise ValueError(f"it must contain {_FORMAT}")
            for name in ("pieces", "user_dict"):
                if not isinstance(state[name], list) or not all(isinstance(text, str) for text in state[name]):
                    raise ValueError(f"its {name} must be a list of texts")
            return cls(state["pieces"], state["unit"], tuple(state["user_dict"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a tokenizer that this version can read: {error}.") from None

    def _as_dict(self) -> dict:
        return {"unit": self.unit, "user_dict": list(self.user_dict), "pieces": list(self.pieces)}

    def __getstate__(self) -> dict:
        # For other processes: the cached tables are larger, and can be made there.
        return {name: self.__dict__[name] for name in ("pieces", "unit", "user_dict", "_ids")}

    @functools.cached_property
    def _cut(self) -> Callable[[str], list[str]]:
        return segmenter(self.user_dict)

    def _spell(self, word: str) -> list[int]:
        """Spell a word in characters, and those that are not in the vocabulary in bytes."""
        ids = []
        for character in word:
            i = self._ids.get(character)
            if i is None:
                ids.extend(byte + _FIRST_BYTE for byte in character.encode("utf-8", "surrogatepass"))
            else:
                ids.append(i)
        return ids

    def _encode_chunk(self, documents: list[str]) -> list[np.ndarray]:
        return [self._encode_document(document) for document in documents]

    def _encode_document(self, document: str) -> np.ndarray:
        ids = self._encode_characters(document) if self.unit == "char" else self.encode(document)
        return np.concatenate(([self.BOS], ids, [self.EOS]), dtype=np.int32, casting="unsafe")

    def _encode_characters(self, text: str) -> np.ndarray:
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        ids = self._id_of_code_point[code_points]
        is_unknown = ids < 0
        if not is_unknown.any():
            return ids
        unknown = code_points[is_unknown]
        sizes = np.ones(len(ids), np.int64)
        sizes[is_unknown] = 1 + np.searchsorted((0x80, 0x800, 0x10000), unknown, side="right")
        ids, is_byte = np.repeat(ids, sizes), np.repeat(is_unknown, sizes)
        spelt = unknown.tobytes().decode("utf-32-le", "surrogatepass").encode("utf-8", "surrogatepass")
        ids[is_byte] = np.frombuffer(spelt, np.uint8).astype(np.int32) + _FIRST_BYTE
        return ids

    @functools.cached_property
    def _id_of_code_point(self) -> np.ndarray:
        table = np.full(0x110000, -1, np.int32)
        for piece, i in self._ids.items():
            if len(piece) == 1:
                table[ord(piece)] = i
        return table
