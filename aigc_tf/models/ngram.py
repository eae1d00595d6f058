"""N-grams: kneser_ney(), the classical language model that neural ones are compared with."""

from collections.abc import Iterable, Sequence

import numpy as np

from ..corpus.tokenizer import Tokenizer

# Of counts of 1, of 2, and of 3 or more, if there is too little text to estimate them: near the best of the values
# tried on 3 to 1,000 poems.
_DEFAULT_DISCOUNTS = (0.75, 1.25, 1.5)


def kneser_ney(documents: Iterable[str], tokenizer: Tokenizer, order: int = 5) -> "Ngram":
    """Build an n-gram language model with interpolated, modified Kneser-Ney smoothing.

    It is the strongest classical model and is counted in seconds, so it is the one a neural model has to beat. The
    longest n-grams are counted as often as they occur, shorter ones by the number of different tokens that occur before
    them (those at the beginning of a document, which nothing can precede, as often as they occur). A discount,
    estimated for each length, is subtracted from every count; the probability that this frees in a context is
    distributed as in the context one token shorter, and finally uniformly. So every token except padding and beginning
    of document has a probability above 0.

    Args:
        documents: the training documents.
        tokenizer: the tokenizer; with `unit="char"` the n-grams are of characters.
        order: n, the length of the longest n-grams: each token is predicted from the `order - 1` tokens before it.

    Returns:
        An `Ngram`, for `aigc_tf.evaluate`, `aigc_tf.surprisal` and `aigc_tf.generate`.

    Raises:
        ValueError: `order` is below 1, or there is no document.

    Example:
        >>> tokenizer = Tokenizer.train(["春眠不觉晓，", "春风不度"])
        >>> model = kneser_ney(["春眠不觉晓，", "春风不度"], tokenizer, order=2)
        >>> p = model.probabilities([tokenizer.BOS])
        >>> tokenizer.decode([p.argmax()]), round(float(p.max()), 2), round(float(p.sum()), 12)
        ('春', 0.39, 1.0)

    Source:
        R. Kneser and H. Ney, "Improved backing-off for m-gram language modeling" (1995); the discounts after
        S. Chen and J. Goodman, "An empirical study of smoothing techniques for language modeling" (1999).
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}; 5 is usual.")
    encoded = list(tokenizer.encode_documents(documents))
    if not encoded:
        raise ValueError("An n-gram model needs at least one document, got none.")
    return kneser_ney_from_ids(np.concatenate(encoded), tokenizer.vocab_size, order)


class Ngram:
    """An n-gram language model, made by `kneser_ney`.

    `aigc_tf.generate` takes it like a `keras.Model`: its log-probabilities serve as logits.

    Args:
        vocab_size: V, the number of token ids.
        levels: for each length k from 1 up: the keys of all k-grams, `int64`, sorted, followed by one larger than any;
            the probability of the last id of each k-gram given the others; and for each (k - 1)-gram its backoff, the
            share of the probability of the next id that is left to the context one id shorter, followed by 1 for a
            context that was never seen. The number of a k-gram is its index among the keys, and its key is
            `V * number of its first k - 1 ids + last id`.
    """

    def __init__(self, vocab_size: int, levels: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]):
        self.vocab_size = vocab_size
        self.order = len(levels)
        self.name = f"{self.order}-gram"
        context = max(1, self.order - 1)
        self.input_shape, self.output_shape = (None, context), (None, context, vocab_size)
        self._levels = levels

    def nats(self, ids: Sequence[int]) -> np.ndarray:
        """Compute the surprisal of each token, given those before it.

        Args:
            ids: token ids, from the beginning or the middle of a document. Several documents, each between beginning
                and end of document, may follow one another; they are independent.

        Returns:
            -log p of `ids[1:]` in nats, `float64` (len(ids) - 1,); infinite for a beginning of document, which is never
            predicted.

        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        ids = self._checked(ids)
        numbers = self._find(ids)
        p = self._levels[0][1][ids[1:]]
        for k, (_, probability, backoff) in enumerate(self._levels[1:], 2):
            contexts, grams = numbers[k - 2][:-1], numbers[k - 1]
            # The first k - 2 tokens predicted have no gram of k ids.
            p[k - 2 :] *= backoff[contexts]
            p[k - 2 :][grams >= 0] = probability[grams[grams >= 0]]
        with np.errstate(divide="ignore"):
            return -np.log(p)

    def probabilities(self, context_ids: Sequence[int]) -> np.ndarray:
        """Compute the distribution of the next token.

        Args:
            context_ids: the token ids before it, of any number, including the beginning of the document.

        Returns:
            `float64` (V,), which sums to 1: 0 for padding and beginning of document, above 0 for all others.

        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        ids = self._checked(context_ids)
        ids = ids[max(0, len(ids) - self.order + 1) :]
        numbers = self._find(ids)
        p = self._levels[0][1].copy()
        for k in range(1, len(ids) + 1):
            context = numbers[k - 1][-1]
            if context < 0:
                break  # so no longer one was seen
            keys, probability, backoff = self._levels[k]
            first, end = np.searchsorted(keys, [context * self.vocab_size, (context + 1) * self.vocab_size])
            p *= backoff[context]
            p[keys[first:end] % self.vocab_size] = probability[first:end]
        return p

    def predict_on_batch(self, ids: np.ndarray) -> np.ndarray:
        """Compute the log-probabilities of the next token at every position, as a `keras.Model` computes logits.

        Args:
            ids: `int32 (B, T)`, of any T.

        Returns:
            `float32 (B, T, V)`, minus infinity for padding and beginning of document.

        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        p = np.array([[self.probabilities(row[: t + 1]) for t in range(len(row))] for row in ids], np.float32)
        with np.errstate(divide="ignore"):
            return np.log(p)

    def _find(self, ids: np.ndarray) -> list[np.ndarray]:
        """Return the numbers of all k-grams of the ids, (N - k + 1,) for each length k; -1 if never seen."""
        numbers = [ids]
        for k, (keys, _, _) in enumerate(self._levels[1:], 2):
            wanted = self.vocab_size * numbers[-1][:-1] + ids[k - 1 :]  # below 0 after -1, which is not a key
            found = np.searchsorted(keys, wanted)
            numbers.append(np.where(keys[found] == wanted, found, -1))
        return numbers

    def _checked(self, ids: Sequence[int]) -> np.ndarray:
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(
                f"Ids of this model run from 0 to {self.vocab_size - 1}, got {ids.min()} to {ids.max()}. "
                "Encode with the tokenizer it was counted with."
            )
        return ids


def kneser_ney_from_ids(
    ids: np.ndarray, vocab_size: int, order: int, discounts: Sequence[Sequence[float]] | None = None
) -> Ngram:
    """Do what `kneser_ney` does, given the concatenated ids of all documents, each between beginning and end.

    Discounts may be given instead of estimated: for each length, those of counts of 1, of 2, and of 3 or more.
    """
    grams = _count(ids, vocab_size, order)
    # Below the first level there is one empty context, after which all tokens that may come are equally likely.
    num_contexts, below = 1, np.full(vocab_size, 1 / (vocab_size - 2))
    below[[Tokenizer.PAD, Tokenizer.BOS]] = 0.0
    levels = []
    for k, (keys, suffixes, counts) in enumerate(grams):
        contexts = keys // vocab_size
        taken = np.array([0.0, *(discounts[k] if discounts else _discounts(counts))])[np.minimum(counts, 3)]
        totals = np.bincount(contexts, counts, num_contexts)
        # The shorter context gets everything if nothing follows, as after an end of document, and at index -1, the
        # number that `_find` returns for what was never seen.
        backoff = np.ones(num_contexts + 1)
        np.divide(np.bincount(contexts, taken, num_contexts), totals, out=backoff[:-1], where=totals > 0)
        below = (counts - taken) / totals[contexts] + backoff[contexts] * below[suffixes]
        levels.append((np.append(keys, np.iinfo(np.int64).max), below, backoff))
        num_contexts = len(keys)
    return Ngram(vocab_size, levels)


def _count(ids: np.ndarray, vocab_size: int, order: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return for each length k the keys of the k-grams, the numbers of their last k - 1 ids, and their counts."""
    # A beginning ends the n-grams of the document before it; one more ends those of the last document.
    small = np.int32 if len(ids) < 2**31 - 1 else np.int64  # memory limits the length of the text
    ids = np.append(ids, Tokenizer.BOS).astype(small)
    starts, numbers = np.arange(len(ids) - 1, dtype=small), ids.copy()  # numbers[i]: of the n-gram that starts at i
    keys = suffixes = np.arange(vocab_size)
    counts = np.bincount(ids, minlength=vocab_size)
    grams = []
    for k in range(1, order):
        starts = starts[ids[starts + k] != Tokenizer.BOS]
        longer = numbers[starts].astype(np.int64)
        longer *= vocab_size
        longer += ids[starts + k]
        longer, inverse = _numbered(longer, small)
        suffixes_of_longer = np.empty(len(longer), small)
        suffixes_of_longer[inverse] = numbers[starts + 1]
        predecessors = np.bincount(suffixes_of_longer, minlength=len(keys))
        # Only what begins a document has no predecessor, and keeps its count. (On the poems, padding each document with
        # beginnings gives the same bits per character, and continuation counts there 0.02 more.)
        grams.append((keys, suffixes, np.where(predecessors > 0, predecessors, counts)))
        keys, suffixes = longer, suffixes_of_longer
        counts = np.bincount(inverse, minlength=len(longer)).astype(small)
        numbers[starts] = inverse
    grams.append((keys, suffixes, counts))
    grams[0][2][Tokenizer.BOS] = 0  # never predicted
    return grams


def _numbered(keys: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted unique keys and the index of each key among them, like `np.unique` in half the memory."""
    order = np.argsort(keys)
    keys = keys[order]
    is_first = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=is_first[1:])
    numbers = np.empty(len(keys), dtype)
    numbers[order] = np.cumsum(is_first, dtype=dtype) - 1
    return keys[is_first], numbers


def _discounts(counts: np.ndarray) -> Sequence[float]:
    """Estimate the discounts of counts of 1, of 2, and of 3 or more, by the formula of Chen and Goodman."""
    n = np.bincount(np.minimum(counts, 5), minlength=5)[1:5]  # the number of n-grams with a count of 1, 2, 3, 4
    if not n.all():
        return _DEFAULT_DISCOUNTS
    i = np.arange(1, 4)
    discounts = i - (i + 1) * n[0] / (n[0] + 2 * n[1]) * n[1:] / n[:-1]
    # Without a discount, unseen tokens would have no probability.
    return discounts if (discounts > 0).all() else _DEFAULT_DISCOUNTS
