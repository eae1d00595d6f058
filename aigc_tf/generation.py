"""Generation: generate(), generate_batch(), stream(): read the prompts, then draw and read a token at a time."""

from collections.abc import Iterator

import numpy as np

from . import sampling
from .decoding import decoder
from .devices import keras
from .evaluation import check_vocabulary
from .tokenizer import Tokenizer


def generate(
    model: keras.Model,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.9,
    seed: int | None = None,
) -> str:
    """Write on from a prompt, until the model ends the document or `max_new_tokens` are written.

    The model sees begin of document, the prompt and what it wrote. An LSTM carries its state on for ever. A
    Transformer whose context of T tokens is full goes on with the newest T / 2, which move to the first
    positions, and sees between T / 2 and T tokens from then on. Another `keras.Model` sees the newest T tokens.

    Args:
        model: ids `int32 (B, T)` to logits `float32 (B, T, V)`, causal.
        tokenizer: the tokenizer the model was trained with.
        prompt: how the text begins; it may be empty, or longer than the context.
        max_new_tokens: how many tokens to write at the most.
        temperature: 0 takes the likeliest token each time; below 1 is more careful than the model, above 1
            more daring.
        top_k: choose among the k likeliest tokens only.
        top_p: choose among the fewest likeliest tokens that together have at least this probability; None
            chooses among all, the model as it is.
        seed: makes the text repeatable; None takes another each time.

    Returns:
        `str`, the prompt and what was written.

    Raises:
        ValueError: a setting is out of range, or model and tokenizer do not belong together.
    """
    return "".join(
        stream(
            model,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
    )


def generate_batch(
    model: keras.Model,
    tokenizer: Tokenizer,
    prompts: list[str],
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.9,
    seed: int | None = None,
) -> list[str]:
    """Write on from several prompts at once; for several samples repeat a prompt.

    Prompt i gives what `generate` gives alone with `seed + i`.

    Args:
        model: ids `int32 (B, T)` to logits `float32 (B, T, V)`, causal.
        tokenizer: the tokenizer the model was trained with.
        prompts: how each text begins, of any lengths.
        max_new_tokens: how many tokens to write at the most, for each.
        temperature: see `generate`.
        top_k: see `generate`.
        top_p: see `generate`.
        seed: see `generate`.

    Returns:
        `list[str]`, each prompt and what was written.

    Raises:
        ValueError: see `generate`.
    """
    written = [[] for _ in prompts]
    steps = _generate_ids(model, tokenizer, prompts, max_new_tokens, temperature, top_k, top_p, seed)
    for ids in steps:
        for row, i in enumerate(ids):
            written[row].append(i)
    return [prompt + tokenizer.decode(ids) for prompt, ids in zip(prompts, written, strict=True)]


def stream(
    model: keras.Model,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.9,
    seed: int | None = None,
) -> Iterator[str]:
    """Do what `generate` does, and give the text as it is written: the prompt, then whole characters.

    Args:
        model: see `generate`.
        tokenizer: see `generate`.
        prompt: see `generate`.
        max_new_tokens: see `generate`.
        temperature: see `generate`.
        top_k: see `generate`.
        top_p: see `generate`.
        seed: see `generate`.

    Returns:
        An iterator over `str`; joined they equal what `generate` returns.

    Raises:
        ValueError: see `generate`; raised at the call, before the first piece.
    """
    steps = _generate_ids(model, tokenizer, [prompt], max_new_tokens, temperature, top_k, top_p, seed)
    return _pieces(prompt, tokenizer, steps)


def _pieces(prompt, tokenizer, steps) -> Iterator[str]:
    yield prompt
    yield from tokenizer.decode_stream(int(ids[0]) for ids in steps)


def _generate_ids(model, tokenizer, prompts, max_new_tokens, temperature, top_k, top_p, seed) -> Iterator[np.ndarray]:
    """Check the settings, and return an iterator over the new ids, (B,) a step; a row that ended gives EOS."""
    check_vocabulary(model, tokenizer)
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
    sequences = [[tokenizer.BOS, *tokenizer.encode(prompt)] for prompt in prompts]
    generators = [np.random.default_rng(seed + row) for row in range(len(prompts))]
    return _steps(model, tokenizer, sequences, generators, max_new_tokens, temperature, top_k, top_p)


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse settings that mean nothing."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be at least 0, got {temperature}; 0 takes the likeliest token.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}. Leave it out to choose among all tokens.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}.")


def _steps(model, tokenizer, sequences, generators, max_new_tokens, temperature, top_k, top_p):
    if not sequences:
        return
    decode, num_positions = decoder(model, len(sequences))
    starts, read = [0] * len(sequences), [0] * len(sequences)
    ended = np.zeros(len(sequences), bool)
    for _ in range(max_new_tokens):
        going = np.flatnonzero(~ended)
        if not len(going):
            return
        unread = []
        for row in going:
            end = len(sequences[row])
            if num_positions is not None and end - starts[row] > num_positions:
                starts[row] = read[row] = end - max(1, num_positions // 2)
            unread += [(row, at - starts[row], sequences[row][at]) for at in range(read[row], end)]
            read[row] = end
        logits = decode(*np.array(unread, np.int64).T.copy())
        logits[:, [tokenizer.PAD, tokenizer.BOS]] = -np.inf
        uniforms = np.array([generators[row].random() for row in going])
        new = np.full(len(sequences), tokenizer.EOS)
        new[going] = _choose(logits, uniforms, temperature, top_k, top_p)
        ended |= new == tokenizer.EOS
        for row in going:
            sequences[row].append(int(new[row]))
        yield new


def _choose(logits: np.ndarray, uniforms: np.ndarray, temperature, top_k, top_p) -> np.ndarray:
    if temperature == 0:
        return logits.argmax(axis=-1)
    logits = sampling.apply_temperature(logits, temperature)
    if top_k is not None:
        logits = sampling.keep_top_k(logits, top_k)
    if top_p is not None:
        logits = sampling.keep_top_p(logits, top_p)
    return sampling.draw(logits, uniforms)
