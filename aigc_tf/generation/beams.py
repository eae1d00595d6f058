"""Beam search: the likeliest text, found by keeping several candidates at each step."""

import math
from collections.abc import Callable

import numpy as np

from .batch import TextBatch
from .processors import log_softmax, select_top_k
from .sampler import Sampler


def search_beams(
    texts: TextBatch,
    sampler: Sampler,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float,
    is_stopped: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Search for the likeliest text after each prompt.

    The search after a prompt ends when `num_beams` texts have ended, each ranked above the best unfinished one; or when
    `max_new_tokens` are written.

    Args:
        texts: `num_beams` equal rows for each prompt, nothing written.
        sampler: what processes the logits.
        num_beams: K, how many texts are kept for each prompt.
        max_new_tokens: how many tokens to write at most.
        length_penalty: texts are ranked by their log-probability divided by their number of tokens to this power.
        is_stopped: from the ids written to whether they contain a stop string; None if there are no stop strings.

    Returns:
        For each prompt the ids written, the end of document last if the model ended the text.
    """
    prompts = range(len(texts.ids) // num_beams)
    scores = {prompt: np.zeros(1) for prompt in prompts}  # of the unfinished beams: one at first, as all rows are equal
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
            num_alive = len(scores[prompt])
            total = scores[prompt][:, None] + log_probabilities[first : first + num_alive]
            first += num_alive
            vocab_size = total.shape[1]
            # Enough that K continue even if every beam can end.
            best, places = select_top_k(total.reshape(1, -1), 2 * num_beams)
            alive = []
            for i in np.argsort(-best[0], kind="stable"):
                row, token = prompt * num_beams + places[0, i] // vocab_size, places[0, i] % vocab_size
                if np.isneginf(best[0, i]) or len(alive) == num_beams:
                    break
                if token == sampler.eos or (is_stopped and is_stopped([*_written(texts, row), int(token)])):
                    ids = [*_written(texts, row), int(token)]
                    ended[prompt].append((_rank(best[0, i], length, length_penalty), ids))
                else:
                    alive.append((best[0, i], row, token))
            ended[prompt] = sorted(ended[prompt], key=lambda pair: -pair[0])[:num_beams]
            scores[prompt] = np.array([score for score, _, _ in alive])
            for i, (_, row, token) in enumerate(alive):
                parents[prompt * num_beams + i], tokens[prompt * num_beams + i] = row, token
            enough = len(ended[prompt]) == num_beams
            if not alive or (enough and ended[prompt][-1][0] >= _rank(alive[0][0], length, length_penalty)):
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
    """Return a number that orders texts as log_probability / length ** length_penalty does, without overflow."""
    return length_penalty * math.log(length) - (math.log(-log_probability) if log_probability < 0 else -math.inf)


def _written(texts: TextBatch, row: int) -> list[int]:
    (ids,) = texts.written(np.array([row]))
    return ids[ids >= 0].tolist()
