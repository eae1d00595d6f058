"""Beams: the search for the likeliest text, several kept at a time."""

import math
from collections.abc import Callable

import numpy as np

from .batch import Batch
from .processors import log_softmax, top_k
from .sampler import Sampler


def search_beams(
    texts: Batch,
    sampler: Sampler,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float,
    is_stopped: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Search for the likeliest text after each prompt.

    A prompt's search ends when it has found `num_beams` texts that end, each better than the best one that goes on
    is now; or when the tokens run out.

    Args:
        texts: `num_beams` equal rows for each prompt, nothing written.
        sampler: what adjusts the logits.
        num_beams: K, how many texts are kept for each prompt.
        max_new_tokens: how many tokens a text may have.
        length_penalty: the log-probability of a text is divided by its number of tokens to this power.
        is_stopped: tells whether ids written end at a stop string; None if there is none.

    Returns:
        For each prompt the ids written, the last of them the end of document unless the tokens ran out.
    """
    prompts = range(len(texts.ids) // num_beams)
    scores = {prompt: np.zeros(1) for prompt in prompts}  # of the living beams: one at first, as all begin equal
    ended = {prompt: [] for prompt in prompts}  # pairs of rank and ids
    searching = list(prompts)
    for length in range(1, max_new_tokens + 1):
        if not searching:
            break
        rows = np.concatenate([prompt * num_beams + np.arange(len(scores[prompt])) for prompt in searching])
        log_probabilities = log_softmax(sampler.process(texts.read(rows), texts, rows))
        parents, tokens = np.arange(len(texts.ids)), np.full(len(texts.ids), sampler.eos)
        first = 0
        for prompt in list(searching):
            living = len(scores[prompt])
            total = scores[prompt][:, None] + log_probabilities[first : first + living]
            first += living
            vocab_size = total.shape[1]
            # So many that K go on even if every beam might end.
            best, places = top_k(total.reshape(1, -1), 2 * num_beams)
            going = []
            for i in np.argsort(-best[0], kind="stable"):
                row, token = prompt * num_beams + places[0, i] // vocab_size, places[0, i] % vocab_size
                if np.isneginf(best[0, i]) or len(going) == num_beams:
                    break
                if token == sampler.eos or (is_stopped and is_stopped([*_written(texts, row), int(token)])):
                    ids = [*_written(texts, row), int(token)]
                    ended[prompt].append((_rank(best[0, i], length, length_penalty), ids))
                else:
                    going.append((best[0, i], row, token))
            ended[prompt] = sorted(ended[prompt], key=lambda pair: -pair[0])[:num_beams]
            scores[prompt] = np.array([score for score, _, _ in going])
            for i, (_, row, token) in enumerate(going):
                parents[prompt * num_beams + i], tokens[prompt * num_beams + i] = row, token
            enough = len(ended[prompt]) == num_beams
            if not going or (enough and ended[prompt][-1][0] >= _rank(going[0][0], length, length_penalty)):
                scores[prompt] = np.zeros(0)
                searching.remove(prompt)
        texts.copy(parents)
        texts.write(np.arange(len(tokens)), tokens)
    for prompt in searching:
        for i, score in enumerate(scores[prompt]):
            ids = _written(texts, prompt * num_beams + i)
            ended[prompt].append((_rank(score, max(1, len(ids)), length_penalty), ids))
    return [max(ended[prompt], key=lambda pair: pair[0])[1] for prompt in prompts]


def _rank(log_probability: float, length: int, length_penalty: float) -> float:
    """Return what orders texts as log_probability / length ** length_penalty does, without overflow of the power."""
    return length_penalty * math.log(length) - (math.log(-log_probability) if log_probability < 0 else -math.inf)


def _written(texts: Batch, row: int) -> list[int]:
    (ids,) = texts.written(np.array([row]))
    return ids[ids >= 0].tolist()
