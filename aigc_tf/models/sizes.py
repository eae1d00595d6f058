"""Sizes: the dimensions of "tiny", "small" and "base" models."""

SIZES = {
    "transformer": {
        "tiny": {"num_layers": 2, "num_heads": 4, "hidden_dim": 128},
        "small": {"num_layers": 6, "num_heads": 6, "hidden_dim": 384},
        "base": {"num_layers": 12, "num_heads": 12, "hidden_dim": 768},
    },
    "lstm": {
        "tiny": {"num_layers": 1, "hidden_dim": 256, "embedding_dim": 128},
        "small": {"num_layers": 2, "hidden_dim": 512, "embedding_dim": 256},
        "base": {"num_layers": 3, "hidden_dim": 1536, "embedding_dim": 768},
    },
}


def dimensions(
    model: str,
    size: str,
    *,
    num_layers: int | None = None,
    num_heads: int | None = None,
    hidden_dim: int | None = None,
    embedding_dim: int | None = None,
) -> dict[str, int]:
    """Resolve a size, and the dimensions that override it, to the dimensions of a model.

    Args:
        model: "transformer" or "lstm".
        size: "tiny", "small" or "base".
        num_layers: see `transformer` and `lstm`.
        num_heads: see `transformer`.
        hidden_dim: see `transformer` and `lstm`.
        embedding_dim: see `lstm`.

    Returns:
        `dict[str, int]`: "num_layers", "hidden_dim", and "num_heads" of a Transformer or "embedding_dim" of
        an LSTM.

    Raises:
        ValueError: `model` or `size` is unknown, or a dimension is invalid.

    Example:
        >>> dimensions("lstm", "tiny", hidden_dim=100)
        {'num_layers': 1, 'hidden_dim': 100, 'embedding_dim': 50}
    """
    if model not in SIZES:
        raise ValueError(f"model must be one of {', '.join(SIZES)}, got {model!r}.")
    if size not in SIZES[model]:
        raise ValueError(f"size must be one of {', '.join(SIZES[model])}, got {size!r}.")
    if model == "lstm" and num_heads is not None:
        raise ValueError("num_heads is for a Transformer: an LSTM has no attention heads. Remove num_heads.")
    if model == "lstm" and embedding_dim is None and hidden_dim is not None:
        embedding_dim = hidden_dim // 2
    given = {
        "num_layers": num_layers, "num_heads": num_heads, "hidden_dim": hidden_dim, "embedding_dim": embedding_dim
    }  # fmt: skip
    chosen = {**SIZES[model][size], **{name: value for name, value in given.items() if value is not None}}
    check_at_least_1(**chosen)
    if chosen["hidden_dim"] % chosen.get("num_heads", 1):
        raise ValueError(
            f"hidden_dim must be a multiple of num_heads, got {chosen['hidden_dim']} and {chosen['num_heads']}."
        )
    return chosen


def check_at_least_1(**dimensions: int) -> None:
    """Refuse a dimension below 1, naming it."""
    for name, value in dimensions.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
