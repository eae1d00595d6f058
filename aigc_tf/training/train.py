"""Training: train(), from a model and data to the weights that score best on held-out documents."""

import contextlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..corpus.dataset import Batches
from ..corpus.documents import check_documents, documents_sha256
from ..corpus.tokenizer import Tokenizer
from ..models.contract import check_model
from ..runtime.backend import keras
from ..runtime.distribution import check_distribution, is_first_host, num_replicas
from ..runtime.files import to_json
from ..runtime.locks import locked
from .logs import Display, NoDisplay
from .loop import data_ended_error, phases, run_phase
from .optimizer import check_optimizer_settings, compile_model
from .sampled_softmax import check_num_candidates, default_num_candidates
from .session import Session

if TYPE_CHECKING:
    from ..runtime.backend import tf


def train(
    model: keras.Model,
    train_data: "tf.data.Dataset | Batches",
    tokenizer: Tokenizer,
    valid_documents: list[str],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
    validations: int = 10,
    num_microbatches: int = 1,
    num_candidates: int | None = None,
    run_dir=None,
    checkpoint_minutes: float | None = 5.0,
    checkpoint_steps: int | None = None,
    keep_checkpoints: int = 2,
    progress: bool = True,
) -> dict[str, list[float]]:
    """Train a language model, and leave it with the weights that scored best on the held-out documents.

    The loss is the cross-entropy of the next token, and the optimizer AdamW. The learning rate rises linearly to
    `learning_rate` during the first 5% of the steps, stays there, and falls linearly to zero during the last 30%.
    Weight decay applies to matrices and embeddings, not to biases and norms. A model built under a mixed precision
    policy trains in mixed precision.

    A validation scores about 200,000 tokens at most: whole held-out documents, the same ones each time. A GPU or TPU
    runs up to 16 steps at a time; a validation or checkpoint that is due waits until they are done.

    Ctrl-C ends training after the current step and a last validation. On several hosts it ends all processes.

    With a `run_dir`, training that was interrupted in any way resumes: the same call continues from the newest
    checkpoint there. On a CPU with the same number of threads, weights and history end up bit for bit as they would
    have without the interruption, except for "tokens_per_second".

    Args:
        model: a causal model from ids `int32 (B, T)` to logits `float32 (B, T, V)`.
        train_data: endless batches of `(inputs, targets)`, `int32 (B, T)`, as `make_dataset` returns with a seed.
            Other data must come in the same order each time; resuming reads it again from the start, and does not
            notice changes.
        tokenizer: the tokenizer of `train_data`.
        valid_documents: the held-out documents.
        steps: the number of batches to train on.
        learning_rate: the peak learning rate.
        weight_decay: the weight decay of AdamW, which is multiplied by the learning rate.
        clip_norm: the largest global norm of the gradients, or None for no clipping.
        validations: the largest number of validations: one every ceil(steps / validations) steps, and one at the end.
        num_microbatches: the number of parts of a batch that are computed one after the other (gradient
            accumulation). The result is the same, and less memory is used.
        num_candidates: how many tokens the softmax covers in the first 90% of the steps (sampled softmax): the targets
            of the batch, and others drawn by their frequency. With a large vocabulary this makes steps faster on a CPU;
            the "loss" of these steps is a little too low. 0 for the full softmax in all steps. None chooses: on a CPU,
            the number of tokens in a batch or an eighth of the vocabulary, whichever is larger, if that is at most half
            of the vocabulary; otherwise 0. Needs one device, and data of `make_dataset`.
        run_dir: a folder for `log.csv`, TensorBoard's `tensorboard/` and `checkpoints/`, or None.
        checkpoint_minutes: the time between two checkpoints, or None. It is at least 50 times the time that writing
            one takes.
        checkpoint_steps: the number of steps between two checkpoints, or None.
        keep_checkpoints: how many of the newest checkpoints to keep.
        progress: whether to show the progress on standard output.

    Returns:
        The history, with one value for each validation: "step", "loss" (on the training data, in nats per token, the
        mean since the previous validation), "bits_per_char" (on the held-out documents), "learning_rate" and
        "tokens_per_second" (validation excluded).

    Raises:
        ValueError: a setting is out of range; model and tokenizer do not match; the devices cannot share such a batch
            (see `use_devices`); the data ends too early; the loss becomes NaN or infinite; or the checkpoints in
            `run_dir` belong to another training run.
        BlockingIOError: another process is training in `run_dir`.
        OSError: `run_dir` cannot be written to. Earlier checkpoints are kept.

    Example:
        >>> import aigc_tf
        >>> poems = ["春眠不觉晓，", "处处闻啼鸟。"]
        >>> tokenizer = aigc_tf.Tokenizer.train(poems)
        >>> model = aigc_tf.lstm(tokenizer.vocab_size, context=7, num_layers=1, hidden_dim=16)
        >>> data = aigc_tf.make_dataset(poems, tokenizer, context=7, batch_size=2, seed=0)
        >>> history = train(model, data, tokenizer, poems, steps=4, validations=2, progress=False)
        >>> history["step"]
        [2.0, 4.0]
    """
    check_model(model, tokenizer)
    numbers = {"steps": steps, "validations": validations, "num_microbatches": num_microbatches}
    for name, value in {**numbers, "keep_checkpoints": keep_checkpoints}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    for name, value in (("checkpoint_minutes", checkpoint_minutes), ("checkpoint_steps", checkpoint_steps)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, or None, got {value}.")
    check_optimizer_settings(learning_rate, weight_decay, clip_norm)
    check_documents(valid_documents)
    if not any(valid_documents):
        raise ValueError(
            "Training needs at least one held-out document that is not empty to choose the best weights by, got none."
        )
    batch_size, context = _batch_shape(train_data)
    _check_batch_size(model, batch_size, num_microbatches)
    tokens_per_batch = batch_size * context // num_microbatches
    num_candidates = _resolve_num_candidates(num_candidates, model, train_data, tokens_per_batch, tokenizer.vocab_size)
    settings = {"steps": steps, "learning_rate": learning_rate, "weight_decay": weight_decay, "clip_norm": clip_norm}
    settings["num_microbatches"] = num_microbatches
    if 0 <= (num_batches := int(train_data.cardinality())) < steps:  # negative: endless, or unknown
        raise data_ended_error(num_batches, steps)
    steps_per_validation = math.ceil(steps / validations)
    schedule = compile_model(model, **settings)
    display = Display() if progress and is_first_host() else NoDisplay()
    if not hasattr(train_data, "from_step"):
        display.line(
            "train_data does not come straight from make_dataset (.map() and the like return new data): no sampled "
            "softmax, and resuming reads the data again from the start and does not notice changes"
        )
    session = Session(
        model,
        tokenizer,
        valid_documents,
        schedule,
        display,
        steps=steps,
        steps_per_validation=steps_per_validation,
        tokens_per_step=batch_size * context,
        num_microbatches=num_microbatches,
    )
    with locked(run_dir) if run_dir is not None and is_first_host() else contextlib.nullcontext():
        if run_dir is not None:
            others = {"validations": validations, "num_candidates": num_candidates}
            identity = _identity(model, train_data, tokenizer, valid_documents, {**settings, **others})
            session.open_run_dir(Path(run_dir), identity, checkpoint_minutes, checkpoint_steps, keep_checkpoints)
        counts = train_data.counts() if num_candidates else None
        try:
            for phase in phases(model, steps, num_candidates, counts, getattr(train_data, "seed", None) or 0):
                if session.step < phase.end and not session.stop_signal:
                    run_phase(phase, session, train_data, batch_size, num_microbatches, checkpoint_steps)
        finally:
            session.close()
    if session.best_weights:
        model.set_weights(session.best_weights)
    return session.history


def _batch_shape(train_data) -> tuple[int, int]:
    if isinstance(train_data, Batches):
        return train_data.shape
    spec = getattr(train_data, "element_spec", None)
    if not isinstance(spec, tuple) or len(spec) != 2:
        got = f"{type(train_data).__name__} of {spec}" if spec is not None else type(train_data).__name__
        raise ValueError(
            f"train_data must be what make_dataset returns, or a tf.data.Dataset of pairs (inputs, targets), got {got}."
        )
    shape = spec[0].shape
    if shape.rank != 2 or None in shape:
        raise ValueError(
            f"train_data must have batches of one shape (B, T), got {shape}. Make them with make_dataset, or with "
            ".batch(B, drop_remainder=True)."
        )
    return tuple(shape)


def _check_batch_size(model, batch_size: int, num_microbatches: int) -> None:
    if batch_size % num_microbatches:
        raise ValueError(f"A batch of {batch_size} windows cannot be divided into {num_microbatches} microbatches.")
    check_distribution(model, batch_size // num_microbatches)
    if num_microbatches > 1 and keras.backend.backend() == "tensorflow" and num_replicas() > 1:
        raise ValueError(
            "Keras on TensorFlow cannot accumulate gradients on several devices. Train with num_microbatches=1, or "
            "with KERAS_BACKEND=jax."
        )


def _resolve_num_candidates(
    num_candidates: int | None, model, train_data, tokens_per_batch: int, vocab_size: int
) -> int:
    is_supported = hasattr(train_data, "counts")
    if num_candidates is None:
        return default_num_candidates(model, tokens_per_batch, vocab_size) if is_supported else 0
    check_num_candidates(num_candidates, tokens_per_batch, vocab_size)
    if num_candidates and (num_replicas() > 1 or not is_supported):
        raise ValueError(
            "num_candidates > 0 needs one device, and train_data straight from make_dataset. Set num_candidates=0."
        )
    return num_candidates


def _identity(model, train_data, tokenizer, valid_documents, settings: dict) -> dict:
    """Describe a training run in JSON types: what must be the same for another one to resume it."""
    describe_data = getattr(train_data, "identity", dict)
    layers = {}
    for i, layer in enumerate(model.layers):
        config = layer.get_config()
        # Without the name: Keras numbers unnamed layers over all models of a process.
        layers[f"layer {i} ({type(layer).__name__})"] = {key: config[key] for key in config if key != "name"}
    identity = {
        "backend": keras.backend.backend(),
        "tokenizer": tokenizer.fingerprint,
        "training data": {"shape of a batch": list(_batch_shape(train_data)), **describe_data()},
        "held-out documents": documents_sha256(valid_documents),
        **settings,
        "model": layers,
    }
    return json.loads(to_json(identity))
