"""Generate: the public functions that write text: generate(), generate_batch() and stream()."""

from collections.abc import Iterable, Iterator

import numpy as np

from ..corpus.tokenizer import Tokenizer
from ..models.contract import check_model
from .engines.choose import choose_engine
from .settings import check_generation
from .writer import Text, Writer


def generate(model, tokenizer: Tokenizer, prompt: str = "", **settings) -> Text:
    """Continue a prompt, until the model ends the text or `max_new_tokens` are written.

    The next token is drawn from the model's distribution, which the settings change in this order: `logit_bias`,
    `no_repeat_ngram`, `banned`, the penalties, `temperature`, `top_k`, `typical_p`, `top_p`, `min_p`.

    A text may be longer than the context. An LSTM carries its state along without limit. A Transformer whose context of
    T tokens is full drops all but the newest T / 2, so from then on it sees between T / 2 and T tokens. Any other
    `keras.Model` sees the newest T tokens.

    Args:
        model: from ids `int32 (B, T)` to logits `float32 (B, T, V)`, causal: a `keras.Model`, the n-gram model of
            `kneser_ney`, or what `load_writer` returns.
        tokenizer: the tokenizer that the model was trained with.
        prompt: how the text begins. It may be empty, or longer than the context.
        **settings: any of these, with their defaults:

            Length and repeatability:
            max_new_tokens (100): how many tokens to write at most.
            stop (none): a string, or several. The text ends before the first of them that would come.
            seed (None): a whole number that makes the text repeatable on one machine and engine. None takes another
                each time.

            Sampling:
            temperature (0.8): below 1 sharpens the distribution, above 1 flattens it; 0 takes the likeliest token.
            top_k (None): draw from the k likeliest tokens only.
            top_p (0.9): draw from the fewest likeliest tokens whose probabilities sum to at least this. None draws from
                all.
            min_p (None): leave out tokens less likely than this times the probability of the likeliest.
            typical_p (None): draw from the fewest tokens whose probabilities sum to at least this, those with a
                surprisal nearest to the entropy first.

            Repetition:
            repetition_penalty (1): raise the probability of each token that the prompt or the text already contains to
                this power. Above 1 repeats less.
            presence_penalty (0): subtract this from the logit of each token written already.
            frequency_penalty (0): subtract this from it once for each time the token was written.
            no_repeat_ngram (None): n. No n tokens in a row come twice.
            exempt (none): words that the penalties and `no_repeat_ngram` ignore, each a single token. Punctuation and
                function words have to repeat: `exempt=load_stopwords("cn") | set("，。")`.

            Words:
            banned (none): words that are never written, whatever tokens they are made of.
            forced (none): words that are always written. Each is placed where the model finds it likeliest, looking 64
                tokens ahead, and before the end that the model expects. Four texts are drafted and the likeliest is
                kept, which takes several times as long. No forced word completes a banned word or a stop string; if
                there is no room for tokens that separate them, that is an error.
            logit_bias (none): a mapping from tokens, each as its text or its id, to numbers added to their logits.
                `-inf` bans a token.

            Search:
            best_of (1): write this many texts, and return the one with the highest mean log-probability per token.
            num_beams (1): above 1, beam search: look for the likeliest text, keeping this many at each step. It is
                deterministic.
            length_penalty (1): beam search ranks texts by log-probability / length ** length_penalty; more favours
                longer texts.

            Output and speed:
            log_probability (False): whether to compute `Text.log_probability`.
            engine ("auto"): "numba" (compiled for the CPU, in 16-bit integers), "numpy", "device" (a compiled loop on
                the device that Keras uses, such as a GPU or TPU), or "model" (calls the model on a whole window for
                each token: slow, but works with any model). "auto" takes the device if it is a GPU or TPU and there are
                no beams and no banned or forced words, else numba if it is installed, else NumPy; NumPy for small
                models from `load_writer`, where loading numba would take longer than writing; and "model" for models
                that `aigc_tf` did not build. Engines round differently, so one seed may give different texts on
                different engines.

    Returns:
        A `Text`: a `str` of the prompt and what follows, with the attributes `new` (without the prompt), `ids`,
        `finish_reason` ("stop" or "length") and `log_probability`. A character of which only the first bytes were
        written is left out.

    Raises:
        ValueError: a setting is unknown or invalid, or model and tokenizer do not belong together.
        TypeError: an argument is of the wrong type, such as a list as a prompt.

    Example:
        >>> from aigc_tf import Tokenizer, generate, kneser_ney
        >>> poems = ["白日依山尽，黄河入海流。"]
        >>> tokenizer = Tokenizer.train(poems)
        >>> text = generate(kneser_ney(poems, tokenizer), tokenizer, "白日", temperature=0, max_new_tokens=4)
        >>> text, text.new, text.finish_reason
        ('白日依山尽，', '依山尽，', 'length')

    Source:
        Of each sampling method, at its function in `processors.py`. Beam search follows Y. Wu et al., "Google's neural
        machine translation system" (2016), with a plain power as length penalty.
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
    """Continue several prompts as a batch, which is much faster than one by one.

    The text of prompt i is what `generate` returns for it with `seed + i`, so several samples of one prompt are
    `[prompt] * n`. If not all texts fit into memory, they are written in smaller batches.

    Args:
        model: see `generate`.
        tokenizer: see `generate`.
        prompts: how the texts begin, of any lengths.
        max_new_tokens: see `generate`; for each text.
        stop: see `generate`.
        seed: see `generate`.
        best_of: see `generate`.
        num_beams: see `generate`.
        length_penalty: see `generate`.
        log_probability: see `generate`.
        engine: see `generate`.
        **sampling: see `generate`.

    Returns:
        `list[Text]`, a text for each prompt.

    Raises:
        ValueError: see `generate`.
        TypeError: see `generate`.
    """
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be a list of texts, got {prompts!r}. For one prompt call generate.")
    prompts = list(prompts)
    _check_arguments(model, tokenizer, *prompts)
    settings, stop = check_generation(max_new_tokens, seed, best_of, num_beams, length_penalty, stop, **sampling)
    engine, source = choose_engine(model, engine, settings, num_beams)
    writer = Writer(tokenizer, engine, source, settings, max_new_tokens, stop)
    for prompt in prompts:
        writer.check_prompt(prompt)
    seed = _seed(seed)
    best_of, num_beams, written = int(best_of), int(num_beams), []
    per_batch = writer.texts_per_batch(best_of * num_beams) if len(prompts) > 1 else 1
    for first in range(0, len(prompts), per_batch):
        prefixes = [[tokenizer.BOS, *tokenizer.encode(prompt)] for prompt in prompts[first : first + per_batch]]
        if num_beams > 1:
            written += writer.search(prefixes, num_beams, length_penalty, log_probability)
        else:
            written += writer.write(prefixes, seed + first, best_of, log_probability)
    return [writer.text(prompt, *result) for prompt, result in zip(prompts, written, strict=True)]


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
    """Do what `generate` does, and yield the text as it is written: first the prompt, then whole characters.

    Stop iterating, and nothing more is written. Several streams may be read in turns or by threads. What may be the
    beginning of a stop string is held back until that is decided. With forced words, the text up to the last of them
    comes in one piece. `best_of` and `num_beams` are not supported, as their text is known only at the end.

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
        An iterator over `str`, which joined equal what `generate` returns.

    Raises:
        ValueError: see `generate`; raised by the call itself, not by the first piece.
        TypeError: see `generate`.

    Example:
        >>> from aigc_tf import Tokenizer, kneser_ney, stream
        >>> poems = ["白日依山尽，黄河入海流。"]
        >>> tokenizer = Tokenizer.train(poems)
        >>> list(stream(kneser_ney(poems, tokenizer), tokenizer, "白日", temperature=0, max_new_tokens=3))
        ['白日', '依', '山', '尽']
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
    """Raise TypeError if model, tokenizer or a prompt is of the wrong type, as when an argument was forgotten."""
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"The second argument must be the model's Tokenizer, got {tokenizer!r}.")
    if not hasattr(model, "output_shape"):
        raise TypeError(f"model must be a language model, got {model!r}. Load that of a run folder with aigc_tf.load.")
    check_model(model, tokenizer)
    for prompt in prompts:
        if not isinstance(prompt, str):
            several = isinstance(prompt, list | tuple)
            way_out = "For several prompts call generate_batch." if several else 'For no prompt give "".'
            raise TypeError(f"A prompt must be a text, got {prompt!r}. {way_out}")


def _seed(seed: int | None) -> int:
    return int(np.random.default_rng().integers(2**31) if seed is None else seed)
