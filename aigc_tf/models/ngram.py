"""N-grams: kneser_ney(), the traditional language model that neural ones are compared with."""

from collections.abc import Iterable, Sequence

import numpy as np

from ..corpus.tokenizer import Tokenizer

# What is taken from counts of 1, of 2, and of 3 and more where there is too little text to estimate it: near
# the best of the values tried on 3 to 1,000 poems.
_USUAL_DISCOUNTS = (0.75, 1.25, 1.5)


def kneser_ney(documents: Iterable[str], tokenizer: Tokenizer, order: int = 5) -> "Ngram":
    """Count an n-gram language model with interpolated, modified Kneser-Ney smoothing.

    The strongest of the classical models, and counted in seconds: what a neural model has to beat. The
    longest grams count as often as they stand in the documents, a shorter one as often as different tokens
    stand before it; one that begins its document, which nothing can precede, counts as it stands. Each count
    gives up a discount, which is estimated from the counts of its order; what the tokens seen after a context
    give up is shared out as the context one token shorter would, in the end evenly to every token. So every
    token but padding and begin of document has a probability above 0.

    Args:
        documents: the training documents.
        tokenizer: the tokenizer; with `unit="char"` the grams are of characters.
        order: the length of the longest grams: each token is predicted from the `order - 1` before it.

    Returns:
        An `Ngram`, which `aigc_tf.evaluate` measures and `aigc_tf.generate` writes with.

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
        raise ValueError("An n-gram model needs at least one document to count in, got none.")
    return kneser_ney_from_ids(np.concatenate(encoded), tokenizer.vocab_size, order)


class Ngram:
    """An n-gram language model; `kneser_ney` makes one.

    In `aigc_tf.generate` it stands where a `keras.Model` stands: its log-probabilities are logits too.

    Args:
        vocab_size: V, the number of token ids.
        levels: for the grams of each length k from 1 up: their keys, `int64`, sorted, and behind them one
            larger than any; the probability of the last id of each after the others; and for each gram of
            length k - 1 the share of the next id's probability that is left to a context one id shorter, with
            1 as the last, for one never seen. A gram's number is its place among the keys, and its key is
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
        """Measure how unexpected each token is after those before it.

        Args:
            ids: token ids, from a begin of document or from amidst one; several documents may follow one
                another, each framed by begin and end, and do not see each other.

        Returns:
            -log p of `ids[1:]` in nats, `float64` (len(ids) - 1,); infinite for a begin of document, which is
            never predicted.

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
            context_ids: the token ids before it, however many, with begin of document if it is among them.

        Returns:
            `float64` (V,), which sums to 1: 0 for padding and begin of document, above 0 for all others.

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
                break  # nor was a longer one seen
            keys, probability, backoff = self._levels[k]
            first, end = np.searchsorted(keys, [context * self.vocab_size, (context + 1) * self.vocab_size])
            p *= backoff[context]
            p[keys[first:end] % self.vocab_size] = probability[first:end]
        return p

    def predict_on_batch(self, ids: np.ndarray) -> np.ndarray:
        """Compute log-probabilities of the next token at every position, as a `keras.Model` does logits.

        Args:
            ids: `int32 (B, T)`, of any T.

        Returns:
            `float32 (B, T, V)`, minus infinity for padding and begin of document.

        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        p = np.array([[self.probabilities(row[: t + 1]) for t in range(len(row))] for row in ids], np.float32)
        with np.errstate(divide="ignore"):
            return np.log(p)

    def _find(self, ids: np.ndarray) -> list[np.ndarray]:
        """Find the number of each gram that the ids hold, (N - k + 1,) for each length k; -1 if never seen."""
        numbers = [ids]
        for k, (keys, _, _) in enumerate(self._levels[1:], 2):
            wanted = self.vocab_size * numbers[-1][:-1] + ids[k - 1 :]  # after -1 below 0, which is no key
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
    """Do what `kneser_ney` does, given the ids of all documents in one row, each framed by begin and end.

    Discounts may be given instead of estimated: for each length of gram, what to take from counts of 1, of 2,
    and of 3 and more.
    """
    grams = _count(ids, vocab_size, order)
    # The level below the first: one empty context, after which every token that can come is as likely.
    num_contexts, below = 1, np.full(vocab_size, 1 / (vocab_size - 2))
    below[[Tokenizer.PAD, Tokenizer.BOS]] = 0.0
    levels = []
    for k, (keys, suffixes, counts) in enumerate(grams):
        contexts = keys // vocab_size
        taken = np.array([0.0, *(discounts[k] if discounts else _discounts(counts))])[np.minimum(counts, 3)]
        totals = np.bincount(contexts, counts, num_contexts)
        # All is left to the shorter context where nothing follows, as after an end of document, and at the place
        # of the number -1 that `_find` gives what was never seen.
        backoff = np.ones(num_contexts + 1)
        np.divide(np.bincount(contexts, taken, num_contexts), totals, out=backoff[:-1], where=totals > 0)
        below = (counts - taken) / totals[contexts] + backoff[contexts] * below[suffixes]
        levels.append((np.append(keys, np.iinfo(np.int64).max), below, backoff))
        num_contexts = len(keys)
    return Ngram(vocab_size, levels)


def _count(ids: np.ndarray, vocab_size: int, order: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return for each length k of gram the keys, the numbers of the last k - 1 ids of each, and the counts."""
    # A gram that goes on with a begin has left its document; one more begin ends the last document.
    small = np.int32 if len(ids) < 2**31 - 1 else np.int64  # memory is what limits the text
    ids = np.append(ids, Tokenizer.BOS).astype(small)
    starts, numbers = np.arange(len(ids) - 1, dtype=small), ids.copy()  # numbers[i] is that of the gram starting at i
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
        # Only what begins a document has no predecessor, and keeps its count. (Padding each document with begins
        # gives the same bits per character on the poems, continuation counts there 0.02 more.)
        grams.append((keys, suffixes, np.where(predecessors > 0, predecessors, counts)))
        keys, suffixes = longer, suffixes_of_longer
        counts = np.bincount(inverse, minlength=len(longer)).astype(small)
        numbers[starts] = inverse
    grams.append((keys, suffixes, counts))
    grams[0][2][Tokenizer.BOS] = 0  # never predicted
    return grams


def _numbered(keys: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return the different keys, sorted, and the number of each key among them, like `np.unique` in half its memory."""
    order = np.argsort(keys)
    keys = keys[order]
    is_first = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=is_first[1:])
    numbers = np.empty(len(keys), dtype)
    numbers[order] = np.cumsum(is_first, dtype=dtype) - 1
    return keys[is_first], numbers


def _discounts(counts: np.ndarray) -> Sequence[float]:
    """Estimate what to take from counts of 1, of 2, and of 3 and more, by Chen and Goodman's formula."""
    n = np.bincount(np.minimum(counts, 5), minlength=5)[1:5]  # how many grams have a count of 1, 2, 3, 4
    if not n.all():
        return _USUAL_DISCOUNTS
    i = np.arange(1, 4)
    discounts = i - (i + 1) * n[0] / (n[0] + 2 * n[1]) * n[1:] / n[:-1]
    # Without a discount, what was never seen would have no probability.
    return discounts if (discounts > 0).all() else _USUAL_DISCOUNTS
