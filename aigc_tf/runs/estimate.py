"""Estimate: estimate(), what a training run costs: memory, hours, electricity; memory_warning(), whether it fits."""

import math

from ..evaluation.bits import FINAL_TOKENS, VALIDATION_TOKENS
from ..models.networks import build
from ..models.sizes import check_at_least_1, dimensions
from ..runtime.distribution import resolve_precision
from ..runtime.hardware import available_bytes, process_bytes
from ..training.sampled_softmax import check_num_candidates, default_num_candidates
from .measurement import seconds_and_watts_of_steps, seconds_per_evaluated_token

# The memory that `initialise` and `baselines` take per token counted, measured with 21 MB of text, and how many tokens
# they count at most.
_COUNTING_BYTES, _COUNTED_TOKENS = 118, 10_000_000
# What TensorFlow takes in addition to the arrays of a training step, on a CPU, measured with models of 1 to 4 layers:
# once, and per layer.
_GRAPH_BYTES = {"transformer": (80e6, 50e6), "lstm": (200e6, 23e6)}


def estimate(
    model: str = "transformer",
    size: str = "tiny",
    *,
    vocab_size: int,
    context: int,
    batch_size: int,
    steps: int,
    num_layers: int | None = None,
    num_heads: int | None = None,
    hidden_dim: int | None = None,
    dropout: float = 0.1,
    precision: str = "auto",
    num_candidates: int | None = None,
    train_tokens: int = 0,
    valid_tokens: int = 0,
    validations: int = 10,
    seconds: float = 10.0,
    watts: float | None = None,
) -> dict[str, float]:
    """Estimate what a training run costs: parameters, FLOPs, memory, and after a short measurement time and energy.

    All figures but time and energy are formulas; they build no model, and so also hold for one that does not fit into
    this machine. For time, real training steps of the model run on this device for about `seconds`, if it fits. Memory
    is that of the whole process, including Python and TensorFlow. Its formulas were fitted to models of 1 to 4 layers
    on TensorFlow and a CPU, where they are within 15 % of a real run (`benchmarks/estimate_accuracy.py`); on a
    GPU, and with JAX, they are rough.

    Args:
        model: "transformer" or "lstm".
        size: "tiny", "small" or "base"; `num_layers`, `num_heads` and `hidden_dim` replace its dimensions.
        vocab_size: V, the number of token ids.
        context: T, the number of tokens in a window.
        batch_size: B, the number of windows per step.
        steps: the number of training steps.
        num_layers: see `transformer` and `lstm`.
        num_heads: see `transformer`.
        hidden_dim: see `transformer` and `lstm`.
        dropout: see `transformer` and `lstm`; for the measurement, as the formulas assume some.
        precision: "float32", "mixed_bfloat16", "mixed_float16", or "auto", see `run_pipeline`.
        num_candidates: see `train`; for the measurement, as the formulas assume steps over all tokens.
        train_tokens: the number of tokens to learn from, which are counted before and after training.
        valid_tokens: the number of tokens of the held-out documents. Training validates on about 200,000 of them at
            most, and evaluates on 1,000,000 at its end.
        validations: see `train`.
        seconds: how long to measure; 0 measures nothing.
        watts: the power that the machine draws while it trains; by default it is read where the system
            reports it (RAPL counters of the processor, `nvidia-smi` for a GPU).

    Returns:
        `dict[str, float]`: "parameters"; "forward_flops_per_token", "train_flops_per_token" (three times as
        many) and "train_flops" of all steps; in bytes "weights_bytes", "gradients_bytes", "optimizer_bytes"
        (AdamW's two moments), "activations_bytes" (kept for the backward pass, logits among them),
        "overhead_bytes" (temporaries, graph, allocator), "runtime_bytes" (this process as it is now; 0 if the system
        does not report it), "peak_memory_bytes" (their sum, or what counting `train_tokens` takes if that is more),
        "generation_bytes_per_text" (KV cache or LSTM state), and "available_memory_bytes" (missing where the system
        does not report it, as on macOS). If measured: "num_candidates", "step_seconds" (the median; with sampled
        softmax the weighted mean of both kinds of steps), "tokens_per_second", "validation_hours", "hours" (steps and
        validations); and if the power is known: "watts", "kilowatt_hours".

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> figures = estimate(
        ...     "transformer", "base", vocab_size=50_257, context=1024, batch_size=8, steps=1000, seconds=0
        ... )
        >>> figures["parameters"], round(figures["train_flops"] / 1e15)
        (124439808.0, 7)

    Source:
        Operations are counted as in J. Kaplan et al., "Scaling laws for neural language models" (2020): two for
        each weight of a matrix product, and the backward pass twice the forward one; the products of attention
        and of the head are added.
    """
    replaced = {"num_layers": num_layers, "num_heads": num_heads, "hidden_dim": hidden_dim}
    chosen = dimensions(model, size, **replaced)
    check_at_least_1(vocab_size=vocab_size, context=context, batch_size=batch_size, steps=steps)
    precision = resolve_precision(precision)
    check_num_candidates(num_candidates or 0, batch_size * context, vocab_size)
    if not seconds >= 0 or (watts is not None and not watts > 0):
        raise ValueError(f"seconds must be at least 0 and watts above 0, got {seconds} and {watts}.")
    count = _count_transformer if model == "transformer" else _count_lstm
    parameters, flops, activations, temporaries, cache = count(
        vocab_size, context, batch_size, bytes_per_float=4 if precision == "float32" else 2, **chosen
    )
    graph, graph_per_layer = _GRAPH_BYTES[model]
    figures = {
        "parameters": parameters,
        "forward_flops_per_token": flops,
        "train_flops_per_token": 3 * flops,
        "train_flops": 3 * flops * steps * batch_size * context,
        "weights_bytes": 4 * parameters,
        "gradients_bytes": 4 * parameters,
        "optimizer_bytes": 8 * parameters,
        "activations_bytes": activations,
        "overhead_bytes": graph + graph_per_layer * chosen["num_layers"] + 4 * parameters + temporaries,  # best weights
        "runtime_bytes": process_bytes() or 0.0,
    }
    counting = (
        _COUNTING_BYTES * min(train_tokens, _COUNTED_TOKENS) + figures["weights_bytes"] + figures["runtime_bytes"]
    )
    training = sum(value for name, value in figures.items() if name.endswith("_bytes"))
    figures["peak_memory_bytes"] = max(training, counting)
    figures["generation_bytes_per_text"] = cache
    if (available := available_bytes()) is not None:
        figures["available_memory_bytes"] = available
    if seconds and _fits(figures):
        built = build(model, vocab_size, context, size, **replaced, dropout=dropout, precision=precision)
        if num_candidates is None:
            num_candidates = default_num_candidates(built, batch_size * context, vocab_size)
        step_seconds, read_watts = seconds_and_watts_of_steps(
            built, vocab_size, context, batch_size, steps, num_candidates, seconds
        )
        evaluated = validations * min(valid_tokens, VALIDATION_TOKENS) + min(valid_tokens, FINAL_TOKENS)
        validation_seconds = 0.0
        if evaluated:
            validation_seconds = evaluated * seconds_per_evaluated_token(built, vocab_size, context, seconds)
        del built
        figures["num_candidates"] = num_candidates
        figures["step_seconds"] = step_seconds
        figures["tokens_per_second"] = batch_size * context / step_seconds
        figures["validation_hours"] = validation_seconds / 3600
        figures["hours"] = (step_seconds * steps + validation_seconds) / 3600
        watts = read_watts if watts is None else watts
        if watts is not None:
            figures["watts"], figures["kilowatt_hours"] = watts, figures["hours"] * watts / 1000
    return {name: float(value) for name, value in figures.items()}


def memory_warning(model: str = "transformer", size: str = "tiny", *, batch_size: int, context: int, **settings) -> str:
    """Return a warning if training does not fit into the memory of this device, with a change that would make it fit.

    Args:
        model: see `estimate`.
        size: see `estimate`.
        batch_size: see `estimate`.
        context: see `estimate`.
        **settings: the other settings of `estimate`.

    Returns:
        `str`, two sentences; empty if it fits.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> memory_warning("transformer", "tiny", vocab_size=6000, context=36, batch_size=16, steps=1)
        ''
    """
    settings = {**settings, "seconds": 0}
    figures = estimate(model, size, batch_size=batch_size, context=context, **settings)
    if _fits(figures):
        return ""
    needed, available = figures["peak_memory_bytes"], figures["available_memory_bytes"] + figures["runtime_bytes"]
    problem = f"This training needs about {needed / 1e9:.1f} GB of memory, but {available / 1e9:.1f} GB are free"
    smaller_batches = [batch_size >> k for k in range(1, batch_size.bit_length())]
    changes = [({"batch_size": b}, f"batch_size {b}") for b in smaller_batches]
    changes += [
        ({"batch_size": 1, "context": c}, f"batch_size 1 and context {c}") for c in (context // 2, context // 4) if c
    ]
    sizes = ("small", "tiny") if size == "base" else ("tiny",)
    for other in sizes:
        changes += [({"size": other, "num_layers": None, "num_heads": None, "hidden_dim": None}, f"size {other}")]
        changes += [
            ({"size": other, "num_layers": None, "num_heads": None, "hidden_dim": None, "batch_size": b},
             f"size {other} and batch_size {b}")
            for b in smaller_batches
        ]  # fmt: skip
    for change, words in changes:
        given = {"model": model, "size": size, "batch_size": batch_size, "context": context, **settings, **change}
        if _fits(estimate(**given)):
            return f"{problem}. It would fit with {words}."
    return f"{problem}. No smaller batch, context or size fits with this vocabulary: use a machine with more memory."


# In the next two functions, the activations and temporaries are those that TensorFlow held at the peak of a training
# step on a CPU, as the sizes of its allocations showed: so many arrays of each shape.


def _count_transformer(vocab, context, batch, bytes_per_float, num_layers, num_heads, hidden_dim):
    v, t, d, m, f = vocab, context, hidden_dim, 4 * hidden_dim, bytes_per_float
    parameters = (v + t) * d + num_layers * (4 * d * d + 2 * d * m + 9 * d + m) + 2 * d
    flops = num_layers * (2 * (4 * d * d + 2 * d * m) + 4 * t * d) + 2 * v * d
    # Expanded, GELU and its parts; norms, projections, residuals and dropout masks; scores before and after softmax.
    wide, narrow, scores = 5 * m * f, d * (42 if f == 4 else 35), num_heads * t * (2 * f + 1)
    activations = batch * t * (num_layers * (wide + narrow + scores) + 16 * d + v * _logit_bytes(f))
    # Copies of each matrix while its gradient is clipped and applied, and what the allocator keeps for the next step.
    temporaries = 8 * parameters + 0.2 * activations
    return parameters, flops, activations, temporaries, 2 * num_layers * t * d * f


def _count_lstm(vocab, context, batch, bytes_per_float, num_layers, hidden_dim, embedding_dim):
    v, t, d, e, f = vocab, context, hidden_dim, embedding_dim, bytes_per_float
    widths_in = [e] + [d] * (num_layers - 1)
    project = 0 if e == d else d * e
    parameters = v * e + sum(4 * d * (w + d + 1) for w in widths_in) + (project + e if project else 0)
    flops = sum(8 * d * (w + d) for w in widths_in) + 2 * project + 2 * v * e
    logits = batch * t * v * _logit_bytes(f)
    # Gates, hidden states and float32 cell states of each step, and the inputs before and after dropout.
    activations = batch * t * sum(5 * d * f + 4 * d + 2.25 * w * f for w in widths_in) + logits
    # The gradients of a layer's gates, step by step and as a whole, when the logits are freed already; and copies of
    # each matrix while its gradient is clipped and applied.
    temporaries = max(0, batch * t * 8 * d * f - logits) + 4 * parameters
    return parameters, flops, activations, temporaries, 2 * num_layers * d * f


def _logit_bytes(bytes_per_float: int) -> int:
    """Return the bytes per logit: one array in float32, in mixed precision also what it was cast from and to."""
    return 4 if bytes_per_float == 4 else 10


def _fits(figures: dict[str, float]) -> bool:
    available = figures.get("available_memory_bytes", math.inf)
    return figures["peak_memory_bytes"] - figures["runtime_bytes"] <= available
