"""Segmentation: cutting text into words with jieba; stopwords; keywords."""

import functools
import os
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from ..runtime.cores import usable_cores
from ..runtime.files import read_text, shipped_file
from .documents import check_documents

_HAN_WORD = re.compile(r"[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]{2,}")
_MAX_LINE_CHARS = 200  # of a user dictionary
_STOPWORD_LISTS = ("cn", "classical")
# What is used of jieba beyond its documented functions.
_JIEBA_INTERNALS = ("FREQ", "gen_pfdict", "get_dict_file", "initialized", "total")


def segment(
    text: str, stopwords: Collection[str] | str = (), *, user_dict: Sequence[str] | str = (), hmm: bool = False
) -> list[str]:
    """Cut text into words with jieba, and leave out stopwords if there are any.

    Without stopwords nothing is lost: the words joined are the text, blanks and newlines included.

    Args:
        text: any string.
        stopwords: the words to leave out, or the name or file of a list (see `load_stopwords`).
        user_dict: a user dictionary, its file or its lines (see `load_user_dict`).
        hmm: let jieba's hidden Markov model combine characters to words that are in no dictionary. By default every
            word of several characters is from the dictionary, so that a vocabulary can hold it.

    Returns:
        `list[str]`.

    Raises:
        ValueError: the user dictionary is not UTF-8, or has too long a line.

    Example:
        >>> segment("我们的模型会写诗。")
        ['我们', '的', '模型', '会', '写诗', '。']
        >>> segment("我们的模型会写诗。", stopwords="cn")
        ['模型', '会', '写诗', '。']
    """
    words = segmenter(as_user_dict(user_dict), hmm)(text)
    if not stopwords:
        return words
    stopwords = _as_stopwords(stopwords)
    return [word for word in words if word not in stopwords]


def segmenter(user_dict: tuple[str, ...] = (), hmm: bool = False) -> Callable[[str], list[str]]:
    """Return the function that cuts a text. Its dictionary is loaded once and shared by later calls."""
    if not hmm and uses_rjieba(user_dict):
        return _rust_cut()
    jieba_tokenizer = _jieba_tokenizer(user_dict)
    return functools.partial(jieba_tokenizer.lcut, HMM=hmm)


def uses_rjieba(user_dict: Sequence[str] = ()) -> bool:
    """Return whether rjieba cuts text, in Rust: the extra `fast` is installed, and there is no user dictionary."""
    return not user_dict and _rust_cut() is not None


def default_processes(num_chars: int, unit: str, user_dict: Sequence[str] = ()) -> int:
    """Choose in how many processes to segment and encode text: several only if they repay their start."""
    if unit == "char" or num_chars < (100_000_000 if uses_rjieba(user_dict) else 10_000_000):
        return 1
    return usable_cores()


def load_user_dict(path) -> tuple[str, ...]:
    """Read a jieba user dictionary: one word a line, optionally with its frequency and part of speech.

    Args:
        path: a UTF-8 file of lines such as `大语言模型 100 n`.

    Returns:
        `tuple[str, ...]`, its lines without empty ones.

    Raises:
        ValueError: the file is not UTF-8.
    """
    return tuple(line.strip() for line in read_text(path).splitlines() if line.strip())


def load_stopwords(source: str | os.PathLike = "cn") -> frozenset[str]:
    """Load a list of stopwords: a shipped one, or your own file.

    Stopwords are for keywords, statistics and `segment`; a language model needs every word of its training text.

    Args:
        source: "cn" (function words of modern Chinese), "classical" (a short list for classical Chinese), or the path
            of a UTF-8 file with one word a line.

    Returns:
        `frozenset[str]`.

    Raises:
        FileNotFoundError: `source` is neither a shipped list nor a file.

    Example:
        >>> sorted(load_stopwords("cn") & {"的", "不", "模型"})
        ['不', '的']
    """
    path = shipped_file(f"stopwords_{source}.txt") if source in _STOPWORD_LISTS else source
    try:
        return frozenset(read_text(path).split())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"Stopwords must be one of the lists {', '.join(_STOPWORD_LISTS)} or a file, but there is no file {source}."
        ) from None


def keywords(
    text: str, top_k: int = 10, stopwords: Collection[str] | str = "cn", *, user_dict: Sequence[str] | str = ()
) -> dict[str, float]:
    """Find the most characteristic words of a text, by TF-IDF with jieba's table of document frequencies.

    Counted are words of two or more Chinese characters that are not stopwords; a word that is not in the table gets its
    median.

    Args:
        text: the text, from a sentence to a book.
        top_k: the maximum number of words.
        stopwords: words never to return, or the name or file of a list (see `load_stopwords`).
        user_dict: a user dictionary, its file or its lines (see `load_user_dict`).

    Returns:
        `dict[str, float]` from word to weight, the heaviest first.

    Raises:
        ValueError: `top_k` is below 1.

    Example:
        >>> list(keywords("语言模型从文本学习语言。语言模型写出新的文本，它写诗，也写文章。", top_k=3))
        ['语言', '文本', '模型']

    Source:
        K. Sparck Jones, "A statistical interpretation of term specificity and its application in
        retrieval", Journal of Documentation 28 (1972).
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}.")
    words = (word for word in segment(text, stopwords, user_dict=user_dict) if _HAN_WORD.fullmatch(word))
    counts = Counter(words)
    idf, median = _inverse_document_frequencies()
    weights = {word: n / counts.total() * idf.get(word, median) for word, n in counts.items()}
    return dict(sorted(weights.items(), key=lambda item: -item[1])[:top_k])


def remove_stopwords(
    documents: list[str], stopwords: Collection[str] | str = "cn", *, user_dict: Sequence[str] | str = ()
) -> tuple[list[str], float]:
    """Remove the stopwords from documents, and report how much is removed.

    This is for analysis and experiments. A language model trained on the result does not learn to write the words that
    were removed, negations among them.

    Args:
        documents: the documents.
        stopwords: the words to remove, or the name or file of a list (see `load_stopwords`).
        user_dict: a user dictionary, its file or its lines (see `load_user_dict`).

    Returns:
        The documents without stopwords, `list[str]` (those left empty are dropped), and the share of the words that was
        removed, `float` from 0 to 1.

    Raises:
        ValueError: `documents` is a single text.

    Example:
        >>> remove_stopwords(["我们的模型会写诗。"])
        (['模型会写诗。'], 0.3333333333333333)
    """
    check_documents(documents)
    stopwords, user_dict = _as_stopwords(stopwords), as_user_dict(user_dict)
    cut = segmenter(user_dict)
    kept_documents, num_words, num_kept = [], 0, 0
    for document in documents:
        words = cut(document)
        kept = [word for word in words if word not in stopwords]
        num_words += len(words)
        num_kept += len(kept)
        if kept:
            kept_documents.append("".join(kept))
    return kept_documents, (num_words - num_kept) / max(num_words, 1)


def as_user_dict(user_dict: Sequence[str] | str | os.PathLike) -> tuple[str, ...]:
    """Return the lines of a user dictionary, given its file or its lines; refuse lines that are too long."""
    lines = load_user_dict(user_dict) if isinstance(user_dict, (str, os.PathLike)) else tuple(user_dict)
    # jieba stores every prefix of a word: memory grows with the square of its length.
    if long := next((line for line in lines if len(line) > _MAX_LINE_CHARS), None):
        raise ValueError(
            f"A line of a user dictionary must have at most {_MAX_LINE_CHARS} characters, but one has {len(long):,}: "
            f"{long[:20]!r} ... Put each word on a line of its own."
        )
    return lines


def _as_stopwords(stopwords: Collection[str] | str | os.PathLike) -> Collection[str]:
    # `word in stopwords` would look for substrings of a string.
    return load_stopwords(stopwords) if isinstance(stopwords, (str, os.PathLike)) else stopwords


@functools.cache
def _rust_cut() -> Callable[[str], list[str]] | None:
    """Return rjieba's cutter if the extra `fast` is installed."""
    try:
        import rjieba
    except ImportError:
        return None
    rust_cut = functools.partial(rjieba.Jieba().cut, hmm=False)

    def cut(text: str) -> list[str]:
        try:
            return rust_cut(text)
        except UnicodeEncodeError:
            # Rust strings cannot hold lone surrogates; jieba can, and cuts the same words.
            return _jieba_tokenizer(()).lcut(text, HMM=False)

    return cut


def _import_jieba():
    with warnings.catch_warnings():
        # jieba 0.42.1 has invalid escape sequences, of which Python warns, and imports pkg_resources.
        warnings.simplefilter("ignore")
        import jieba
    return jieba


@functools.lru_cache(maxsize=4)
def _jieba_tokenizer(user_dict: tuple[str, ...]):
    """Make a separate jieba.Tokenizer, so that words added elsewhere in the process have no effect here."""
    tokenizer = _import_jieba().Tokenizer()
    if all(hasattr(tokenizer, name) for name in _JIEBA_INTERNALS):
        # Unlike initialize(), this writes no log lines and no cache file in a shared temporary folder; it is as fast.
        with tokenizer.get_dict_file() as dictionary:
            tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(dictionary)
        tokenizer.initialized = True
    else:  # another version of jieba
        tokenizer.initialize()
    if user_dict:
        # jieba keeps words of frequency 0 in a set that all its tokenizers share: restore it.
        force_split = getattr(_import_jieba().finalseg, "Force_Split_Words", set())
        others = set(force_split)
        tokenizer.load_userdict(user_dict)
        force_split.intersection_update(others)
    return tokenizer


@functools.cache
def _inverse_document_frequencies() -> tuple[dict[str, float], float]:
    """Read the table that jieba ships, without importing jieba.analyse, which also loads a tagger."""
    table = Path(_import_jieba().__file__).parent / "analyse" / "idf.txt"
    pairs = (line.split(" ") for line in read_text(table).splitlines())
    idf = {word: float(weight) for word, weight in pairs}
    return idf, statistics.median_high(idf.values())
