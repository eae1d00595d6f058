"""Tokens: class Tokenizer, text <-> ids without loss."""

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

    A word that the vocabulary lacks is spelt in characters, a character that it lacks in UTF-8 bytes; so
    there is no unknown token. `unit="char"` knows characters (verse; the safe choice), `unit="word"` jieba
    words too (prose). Ids: 0 padding, 1 begin of document, 2 end of document, 3-258 bytes, then the pieces
    by falling frequency.

    Args:
        pieces: the characters and words of the vocabulary, in the order of their ids.
        unit: "char" or "word".
        user_dict: a jieba user dictionary, its file or its lines; only for words.

    Raises:
        ValueError: `unit` is unknown, a piece is empty or stands twice, or UTF-8 cannot hold one.

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
            raise ValueError("A vocabulary needs pieces that are all different and not empty.")
        if broken := next(filter(SURROGATE.search, (*self.pieces, *self.user_dict)), None):
            raise ValueError(f"A vocabulary and its user dictionary must be text that UTF-8 can hold, got {broken!a}.")

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
        """Learn a vocabulary: the most frequent characters, and with `unit="word"` words among them.

        Characters and words share one ranking by frequency; a character counts wherever it stands, so
        every character of a word that is kept is kept too.

        Args:
            documents: the training documents.
            unit: "char" or "word".
            vocab_size: the size of the vocabulary at the most, with the 259 special and byte ids;
                by default 6,000 for characters and 20,000 for words.
            user_dict: a jieba user dictionary, its file or its lines; only for words.
            processes: how many processes segment (see `default_processes`).

        Returns:
            A `Tokenizer`.

        Raises:
            ValueError: `vocab_size` leaves no room for a piece, `unit` is unknown, or `documents` is one text.
        """
        check_documents(documents)
        tokenizer = cls((), unit, user_dict)
        vocab_size = DEFAULT_VOCAB_SIZE[unit] if vocab_size is None else vocab_size
        if vocab_size <= _FIRST_PIECE:
            raise ValueError(f"vocab_size must be over {_FIRST_PIECE} (3 special ids and 256 bytes), got {vocab_size}.")
        pieces = rank_pieces(documents, unit, tokenizer.user_dict, processes)
        return cls(pieces[: vocab_size - _FIRST_PIECE], unit, tokenizer.user_dict)

    @property
    def vocab_size(self) -> int:
        """The number of ids, V of the models."""
        return _FIRST_PIECE + len(self.pieces)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of everything that decides an encoding, as hexadecimal digits."""
        return hashlib.sha256(json.dumps(self._as_dict(), sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Encode text into token ids, without begin or end of document.

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
        """Encode documents, each framed by begin and end of document.

        Args:
            documents: the documents.
            processes: how many processes encode (see `train`).

        Returns:
            An iterator over `int32` arrays, one a document, in order.

        Raises:
            ValueError: `documents` is one text.
        """
        check_documents(documents)
        return chain.from_iterable(map_chunks(self._encode_chunk, documents, processes))

    def decode(self, ids: Iterable[int]) -> str:
        """Decode token ids into text; special ids give nothing, broken UTF-8 gives U+FFFD.

        Args:
            ids: token ids.

        Returns:
            `str`.

        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids: Iterable[int], cut: bool = False) -> Iterator[str]:
        """Decode ids as they come, whole characters only: bytes wait until their character is complete.

        Args:
            ids: token ids, possibly from a generator.
            cut: the ids may stop anywhere, so leave out a character whose last bytes are missing at the end, or before
                the end of document.

        Returns:
            An iterator over `str`; joined they equal `decode(ids)`.

        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        waiting = b""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"Ids of this vocabulary run from 0 to {self.vocab_size - 1}, got {i}.")
            if _FIRST_BYTE <= i < _FIRST_PIECE:
                characters, waiting = complete_characters(waiting + bytes([i - _FIRST_BYTE]))
                if characters:
                    yield characters
                continue
            if waiting:
                if not (cut and i == self.EOS):
                    yield "\ufffd"
                waiting = b""
            if i >= _FIRST_PIECE:
                yield self.pieces[i - _FIRST_PIECE]
        if waiting and not cut:
            yield "\ufffd"

    def token_bytes(self, i: int) -> bytes:
        """Return the UTF-8 bytes that a token stands for; a special one stands for none."""
        return self.bytes_of_tokens[i]

    @functools.cached_property
    def bytes_of_tokens(self) -> tuple[bytes, ...]:
        """The UTF-8 bytes that each token stands for, by its id."""
        pieces = (piece.encode() for piece in self.pieces)
        return *([b""] * _FIRST_BYTE), *(bytes([byte]) for byte in range(256)), *pieces

    def piece_id(self, piece: str) -> int | None:
        """Return the id of a piece of the vocabulary, or None if there is none."""
        return self._ids.get(piece)

    def save(self, path) -> None:
        """Write the tokenizer as JSON, whole or not at all.

        Args:
            path: the file to write.
        """
        write_json(path, {**_FORMAT, **self._as_dict()})

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """Read a tokenizer that `save` wrote.

        Args:
            path: the file to read.

        Returns:
            A `Tokenizer`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no tokenizer of this version.
        """
        try:
            state = parse_json(Path(path).read_text("utf-8"))
            if any(state.get(key) != value for key, value in _FORMAT.items()):
                raise ValueError(f"it must say {_FORMAT}")
            for name in ("pieces", "user_dict"):
                if not isinstance(state[name], list) or not all(isinstance(text, str) for text in state[name]):
                    raise ValueError(f"its {name} must be a list of texts")
            return cls(state["pieces"], state["unit"], tuple(state["user_dict"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a tokenizer that this version can read: {error}.") from None

    def _as_dict(self) -> dict:
        return {"unit": self.unit, "user_dict": list(self.user_dict), "pieces": list(self.pieces)}

    def __getstate__(self) -> dict:
        # For another process: what is made from these is made there, and it is larger than they are.
        return {name: self.__dict__[name] for name in ("pieces", "unit", "user_dict", "_ids")}

    @functools.cached_property
    def _cut(self) -> Callable[[str], list[str]]:
        return segmenter(self.user_dict)

    def _spell(self, word: str) -> list[int]:
        """Spell a word that the vocabulary lacks in characters, and those that it lacks in bytes."""
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
