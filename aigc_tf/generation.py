"""Generation: generate(), generate_batch(), stream(): read the prompts, then choose and read a token at a time."""

import time
from collections.abc import Iterator

import numpy as np

from .beams import search_beams
from .decoding import decoder
from .engines import choose_engine
from .forcing import Forcing
from .sampler import Sampler, Settings, check_number, check_settings
from .sampling import log_softmax
from .texts import Texts
from .tokenizer import Tokenizer, check_vocabulary


def generate(model, tokenizer: Tokenizer, prompt: str = "", **settings) -> str:
    """Write on from a prompt, until the model ends the document or `max_new_tokens` are written.

    The model sees begin of document, the prompt and what it wrote. An LSTM carries its state on for ever. A
    Transformer whose context of T tokens is full goes on with the newest T / 2, which move to the first
    positions, and sees between T / 2 and T tokens from then on. Another `keras.Model` sees the newest T tokens.

    The next token is drawn from the model's distribution, changed in this order by the settings that are given:
    `logit_bias`, `no_repeat_ngram`, `banned`, the penalties, `temperature`, `top_k`, `typical_p`, `top_p`, `min_p`.

    Args:
        model: ids `int32 (B, T)` to logits `float32 (B, T, V)`, causal: a `keras.Model`, an `Ngram`, or what
            `aigc_tf.load_writer` gives.
        tokenizer: the tokenizer the model was trained with.
        prompt: how the text begins; it may be empty, or longer than the context.
        **settings: by name:

            max_new_tokens (100): how many tokens to write at the most.
            seed (None): makes the text repeatable; None takes another each time.
            temperature (0.8): 0 takes the likeliest token each time; below 1 is more careful than the model, above
            1 more daring.
            top_k (None): choose among the k likeliest tokens only.
            top_p (0.9): choose among the fewest likeliest tokens that together have at least this probability;
            None chooses among all, the model as it is.
            min_p (None): leave out tokens less than this times as likely as the likeliest.
            typical_p (None): choose among the fewest tokens of nearly the expected surprisal that together have
            at least this probability.
            repetition_penalty (1): the power to which the probability of a token is raised that stands in the
            prompt or the text already; above 1 repeats less.
            presence_penalty (0), frequency_penalty (0): taken off the logit of a token that was written already,
            once or for each time.
            no_repeat_ngram (None): n; no n tokens in a row come twice.
            exempt (none): words that the penalties and the n-gram rule leave alone, each a token by itself, such
            as `aigc_tf.load_stopwords("cn")` and punctuation: 的 and ， repeat by right.
            banned (none): words that must not be written, however they are spelt in tokens.
            forced (none): words that must be written; each comes where it is likely compared with the text before,
            and at the latest when the tokens run out.
            logit_bias (none): from a token (its text, or its id) to what is added to its logit; minus infinity
            bans it.
            best_of (1): write so many texts, and keep the one whose tokens the model finds likeliest on average.
            num_beams (1): above 1, no chance: search for the likeliest text with so many texts kept at a time.
            length_penalty (1): of such texts the one with the highest log-probability over its number of tokens
            to this power is kept; more prefers longer texts.
            engine ("auto"): what computes: "numba" (compiled for the CPU, in 16-bit whole numbers), "numpy", "device"
            (a loop on the device of Keras, such as a GPU), or "model" (the model itself, window by window, slowly).
            "auto" takes the device if it is a GPU or TPU and no words are banned or forced, else numba if it is there,
            else NumPy; for what `load_writer` gives NumPy below 50 million parameters, to answer at once; and "model"
            for a model that `aigc_tf` did not build. On one machine and engine a seed gives the same text each time;
            engines round differently, so now and then another token is drawn.

    Returns:
        `str`, the prompt and what was written. If the last token ends amidst a character, that is left out.

    Raises:
        ValueError: a setting is unknown or out of range, or model and tokenizer do not belong together.

    Source:
        Of each way to choose, at its function in `sampling.py`; beam search after Y. Wu et al., "Google's neural
        machine translation system" (2016), with the plain power of the length.
    """
    return generate_batch(model, tokenizer, [prompt], **settings)[0]


def generate_batch(
    model,
    tokenizer: Tokenizer,
    prompts: list[str],
    *,
    max_new_tokens: int = 100,
    seed: int | None = None,
    best_of: int = 1,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    engine: str = "auto",
    **sampling,
) -> list[str]:
    """Write on from several prompts at once; for several samples repeat a prompt.

    Prompt i gives what `generate` gives alone with `seed + i`.

    Args:
        model: see `generate`.
        tokenizer: see `generate`.
        prompts: how each text begins, of any lengths.
        max_new_tokens: see `generate`; so many for each.
        seed: see `generate`.
        best_of: see `generate`.
        num_beams: see `generate`.
        length_penalty: see `generate`.
        engine: see `generate`.
        **sampling: see `generate`.

    Returns:
        `list[str]`, each prompt and what was written.

    Raises:
        ValueError: see `generate`.
    """
    settings = check_generation(max_new_tokens, seed, best_of, num_beams, length_penalty, **sampling)
    max_new_tokens, best_of, num_beams = int(max_new_tokens), int(best_of), int(num_beams)
    check_vocabulary(model, tokenizer)
    if not prompts:
        return []
    num_rows = len(prompts) * best_of * num_beams
    engine, source = choose_engine(model, engine, settings, num_beams)
    sampler = Sampler(tokenizer, settings, compiled=engine == "numba")
    forcings = _forcings(sampler, tokenizer, prompts, best_of, max_new_tokens)
    begins = [[tokenizer.BOS, *tokenizer.encode(prompt)] for prompt in prompts for _ in range(best_of * num_beams)]
    if num_beams > 1:
        texts = Texts(decoder(source, num_rows, engine), begins, max_new_tokens)
        written = search_beams(texts, sampler, num_beams, max_new_tokens, length_penalty)
    else:
        log_probabilities = np.zeros(num_rows)
        uniforms = _uniforms(len(prompts), best_of, max_new_tokens, seed)
        steps = _write(engine, source, sampler, begins, forcings, uniforms, log_probabilities if best_of > 1 else None)
        written = np.array([*steps], int).reshape(-1, num_rows).T
        lengths = np.minimum(np.cumprod(written != tokenizer.EOS, axis=1).sum(axis=1) + 1, written.shape[1])
        average = log_probabilities / np.maximum(1, lengths)
        written = [written[i + average[i : i + best_of].argmax()] for i in range(0, num_rows, best_of)]
    return [
        prompt + "".join(tokenizer.decode_stream(ids, cut=True)) for prompt, ids in zip(prompts, written, strict=True)
    ]


def stream(
    model,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_new_tokens: int = 100,
    seed: int | None = None,
    engine: str = "auto",
    **sampling,
) -> Iterator[str]:
    """Do what `generate` does, and give the text as it is written: the prompt, then whole characters.

    Stop reading to stop the writing. Several streams may be read in turns, or by threads. `best_of` and
    `num_beams` know their text only at the end, and are refused.

    Args:
        model: see `generate`.
        tokenizer: see `generate`.
        prompt: see `generate`.
        max_new_tokens: see `generate`.
        seed: see `generate`.
        engine: see `generate`.
        **sampling: see `generate`.

    Returns:
        An iterator over `str`; joined they equal what `generate` returns.

    Raises:
        ValueError: see `generate`; raised at the call, before the first piece.
    """
    if late := {"best_of", "num_beams", "length_penalty"} & set(sampling):
        raise ValueError(
            f"A stream shows its text at once, and {', '.join(sorted(late))} would know it only at the end."
        )
    settings = check_generation(max_new_tokens, seed, **sampling)
    max_new_tokens = int(max_new_tokens)
    check_vocabulary(model, tokenizer)
    engine, source = choose_engine(model, engine, settings)
    sampler = Sampler(tokenizer, settings, compiled=engine == "numba")
    forcings = _forcings(sampler, tokenizer, [prompt], 1, max_new_tokens)
    uniforms = _uniforms(1, 1, max_new_tokens, seed)

    def pieces():
        yield prompt
        steps = _write(engine, source, sampler, [[tokenizer.BOS, *tokenizer.encode(prompt)]], forcings, uniforms)
        yield from tokenizer.decode_stream((int(ids[0]) for ids in steps), cut=True)

    return pieces()


_SEARCH_CANNOT_HEED = ("temperature", "top_k", "top_p", "min_p", "typical_p", "forced")


def check_generation(
    max_new_tokens: int = 100,
    seed: int | None = None,
    best_of: int = 1,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    **sampling,
) -> Settings:
    """Refuse settings that mean nothing, and return those of sampling."""
    for name, number, least in (
        ("max_new_tokens", max_new_tokens, 0),
        ("best_of", best_of, 1),
        ("num_beams", num_beams, 1),
        ("seed", 0 if seed is None else seed, 0),
    ):
        words = f"a whole number of at least {least}"
        check_number(name, number, lambda x, least=least: x >= least and x == int(x), words)
    check_number("length_penalty", length_penalty, lambda x: True, "a finite number")
    if num_beams > 1 and best_of > 1:
        raise ValueError("Beam search leaves nothing to chance: give num_beams or best_of, not both.")
    if num_beams > 1 and (given := [name for name in _SEARCH_CANNOT_HEED if name in sampling]):
        raise ValueError(f"Beam search looks for the likeliest text and cannot heed {', '.join(given)}.")
    return check_settings(**sampling)


def _forcings(sampler, tokenizer, prompts, samples, max_new_tokens) -> list[Forcing]:
    if not sampler.settings.forced:
        return []
    return [Forcing(sampler, tokenizer, prompt, max_new_tokens) for prompt in prompts for _ in range(samples)]


def _uniforms(num_prompts: int, samples: int, max_new_tokens: int, seed: int | None) -> np.ndarray:
    """Draw the chance of all steps, (rows, steps), so that a text does not depend on those beside it."""
    seed = int(np.random.default_rng().integers(2**31) if seed is None else seed)
    seeds = [(seed + i, j) if j else seed + i for i in range(num_prompts) for j in range(samples)]
    return np.array([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds])


def _write(engine, source, sampler, begins, forcings, uniforms, log_probabilities=None) -> Iterator[np.ndarray]:
    """Write on from the ids that the texts begin with, and give the ids of each step."""
    if engine == "device":
        from . import loop

        return loop.steps(source, sampler, begins, uniforms, log_probabilities=log_probabilities)
    texts = Texts(decoder(source, len(begins), engine), begins, uniforms.shape[1])
    return _steps(texts, sampler, forcings, uniforms, log_probabilities)


_SECONDS_AT_A_TIME = 0.02  # that compiled code may write before the reader of a stream sees it


def _steps(texts, sampler, forcings, uniforms, log_probabilities=None) -> Iterator[np.ndarray]:
    """Write the texts, and give the ids of each step, (rows,), the end of document for a text that has ended.

    Where `log_probabilities` (rows,) is given, those that the model itself gives to the tokens are added to it.
    """
    going, step, at_a_time = np.arange(len(uniforms)), 0, 1
    at_once = not forcings and not sampler.depends_on_text
    while step < uniforms.shape[1] and len(going):
        if at_once and log_probabilities is None and (room := texts.can_write_on(going)):
            began = time.perf_counter()
            ids = texts.write_on(going, uniforms[going, step : step + min(room, at_a_time)], sampler)
            at_a_time = 2 * at_a_time if time.perf_counter() - began < _SECONDS_AT_A_TIME / 2 else (at_a_time + 1) // 2
        else:
            logits = texts.read(going)
            if at_once:
                ids = sampler.choose_at_once(logits, uniforms[going, step])
            else:
                adjusted = sampler.adjust(logits, texts, going)
                for i, row in enumerate(going if forcings else ()):
                    forcings[row].constrain(adjusted[i], uniforms.shape[1] - step)
                ids = sampler.choose(adjusted, uniforms[going, step])
                for i, row in enumerate(going if forcings else ()):
                    forcings[row].note(int(ids[i]))
            if log_probabilities is not None:
                log_probabilities[going] += log_softmax(logits)[np.arange(len(going)), ids]
            texts.write(going, ids)
            ids = ids[:, None]
        for column in ids.T:
            of_all = np.full(len(uniforms), sampler.eos)
            of_all[going] = np.where(column >= 0, column, sampler.eos)
            yield of_all
        step += ids.shape[1]
        going = going[(ids[:, -1] >= 0) & (ids[:, -1] != sampler.eos)]
