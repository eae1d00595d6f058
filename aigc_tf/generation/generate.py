"""Generation: generate(), generate_batch(), stream(): read the prompts, then choose and read a token at a time."""

from collections.abc import Iterable, Iterator

import numpy as np

from ..corpus.tokenizer import Tokenizer
from ..models.contract import check_model
from .engines.choose import choose_engine
from .settings import check_generation
from .writer import Text, Writer


def generate(model, tokenizer: Tokenizer, prompt: str = "", **settings) -> Text:
    """Write on from a prompt, until the model ends the document or `max_new_tokens` are written.

    The model sees begin of document, the prompt and what it wrote. An LSTM's state has no limit of length. A
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
            stop (none): strings, or one, before which the text ends; none of them is in what is written.
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
            forced (none): words that must be written. Each comes where the model finds it likeliest as a whole, looking
            64 tokens ahead, and before the end that the model expects; four texts are written for it, and the likeliest
            is taken (with `best_of`, the likeliest of so many such). That takes several times as long. None completes
            a banned word or a stop string: where there is no room for a token that parts them, that is an error.
            logit_bias (none): from a token (its text, or its id) to what is added to its logit; minus infinity
            bans it.
            best_of (1): write so many texts, and keep the one whose tokens the model finds likeliest on average.
            num_beams (1): above 1, deterministic: search for the likeliest text with so many texts kept at a time.
            length_penalty (1): of such texts the one with the highest log-probability over its number of tokens
            to this power is kept; more prefers longer texts.
            log_probability (False): whether to tell the log-probability of what was written.
            engine ("auto"): what computes: "numba" (compiled for the CPU, in 16-bit whole numbers), "numpy", "device"
            (a loop on the device of Keras, such as a GPU), or "model" (the model itself, window by window, slowly).
            "auto" takes the device if it is a GPU or TPU and no words are banned or forced, else numba if it is there,
            else NumPy; for what `load_writer` gives NumPy below 50 million parameters, to answer at once; and "model"
            for a model that `aigc_tf` did not build. On one machine and engine a seed gives the same text each time;
            engines round differently, so now and then another token is drawn.

    Returns:
        `Text`, a `str`: the prompt and what was written. If the last token ends amidst a character, that is left out.
        Its attributes: `new`, what was written alone; `ids`, its tokens; `finish_reason`, "stop" or "length"; and
        `log_probability`, of the model itself, a natural logarithm.

    Raises:
        ValueError: a setting is unknown or out of range, or model and tokenizer do not belong together.
        TypeError: an argument is of another kind, such as a list for a prompt.

    Source:
        Of each way to choose, at its function in `processors.py`; beam search after Y. Wu et al., "Google's neural
        machine translation system" (2016), with the plain power of the length.
    """
    return generate_batch(model, tokenizer, [prompt], **settings)[0]


def generate_batch(
    model,
    tokenizer: Tokenizer,
    prompts: list[str],
    *,
    max_new_tokens: int = 100,
    stop: str | list[str] = (),
    seed: int | None = None,
    best_of: int = 1,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    log_probability: bool = False,
    engine: str = "auto",
    **sampling,
) -> list[Text]:
    """Write on from several prompts at once; for several samples repeat a prompt.

    Prompt i gives what `generate` gives alone with `seed + i`. Of very many prompts, or texts of `best_of`, as many are
    written at a time as fit into memory.

    Args:
        model: see `generate`.
        tokenizer: see `generate`.
        prompts: how each text begins, of any lengths.
        max_new_tokens: see `generate`; so many for each.
        stop: see `generate`.
        seed: see `generate`.
        best_of: see `generate`.
        num_beams: see `generate`.
        length_penalty: see `generate`.
        log_probability: see `generate`.
        engine: see `generate`.
        **sampling: see `generate`.

    Returns:
        `list[Text]`, each prompt and what was written.

    Raises:
        ValueError: see `generate`.
        TypeError: see `generate`.
    """
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be a list of texts, got {prompts!r}. For one text call generate.")
    prompts = list(prompts)
    _check_arguments(model, tokenizer, *prompts)
    settings, stop = check_generation(max_new_tokens, seed, best_of, num_beams, length_penalty, stop, **sampling)
    engine, source = choose_engine(model, engine, settings, num_beams)
    writer = Writer(tokenizer, engine, source, settings, max_new_tokens, stop)
    for prompt in prompts:
        writer.check_prompt(prompt)
    seed = _seed(seed)
    best_of, num_beams, written = int(best_of), int(num_beams), []
    at_once = writer.num_texts_at_once(best_of * num_beams) if len(prompts) > 1 else 1
    for first in range(0, len(prompts), at_once):
        begins = [[tokenizer.BOS, *tokenizer.encode(prompt)] for prompt in prompts[first : first + at_once]]
        if num_beams > 1:
            written += writer.search(begins, num_beams, length_penalty, log_probability)
        else:
            written += writer.write(begins, seed + first, best_of, log_probability)
    return [writer.text(prompt, *how) for prompt, how in zip(prompts, written, strict=True)]


def stream(
    model,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_new_tokens: int = 100,
    stop: str | list[str] = (),
    seed: int | None = None,
    engine: str = "auto",
    **sampling,
) -> Iterator[str]:
    """Do what `generate` does, and give the text as it is written: the prompt, then whole characters.

    Stop reading to stop the writing. Several streams may be read in turns, or by threads. What may be the beginning of
    a stop string is held back until that is known; with forced words the text comes when all are placed. `best_of` and
    `num_beams` know their text only at the end, and are refused.

    Args:
        model: see `generate`.
        tokenizer: see `generate`.
        prompt: see `generate`.
        max_new_tokens: see `generate`.
        stop: see `generate`.
        seed: see `generate`.
        engine: see `generate`.
        **sampling: see `generate`.

    Returns:
        An iterator over `str`; joined they equal what `generate` returns.

    Raises:
        ValueError: see `generate`; raised at the call, before the first piece.
        TypeError: see `generate`.
    """
    if late := {"best_of", "num_beams", "length_penalty", "log_probability"} & set(sampling):
        raise ValueError(f"stream() does not support {', '.join(sorted(late))}, known only at the end. Call generate.")
    _check_arguments(model, tokenizer, prompt)
    settings, stop = check_generation(max_new_tokens, seed, stop=stop, **sampling)
    engine, source = choose_engine(model, engine, settings)
    writer = Writer(tokenizer, engine, source, settings, max_new_tokens, stop)
    writer.check_prompt(prompt)
    seed = _seed(seed)

    def pieces():
        yield prompt
        yield from writer.pieces(writer.stream([tokenizer.BOS, *tokenizer.encode(prompt)], seed))

    return pieces()


def _check_arguments(model, tokenizer, *prompts) -> None:
    """Refuse arguments of another kind, as they come where one is forgotten."""
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"The second argument must be the model's Tokenizer, got {tokenizer!r}.")
    if not hasattr(model, "output_shape"):
        raise TypeError(f"model must be a language model, got {model!r}. aigc_tf.load gives that of a run folder.")
    check_model(model, tokenizer)
    for prompt in prompts:
        if not isinstance(prompt, str):
            way = "For several prompts call generate_batch." if isinstance(prompt, list | tuple) else 'Without: "".'
            raise TypeError(f"A prompt must be a text, got {prompt!r}. {way}")


def _seed(seed: int | None) -> int:
    return int(np.random.default_rng().integers(2**31) if seed is None else seed)
