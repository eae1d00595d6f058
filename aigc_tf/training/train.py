"""Training: train(), from a model and data to the best weights on held-out documents."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..corpus.dataset import Batches
from ..corpus.documents import check_documents, documents_sha256
from ..corpus.tokenizer import Tokenizer
from ..models.contract import check_model
from ..runtime.backend import keras, uses_accelerator
from ..runtime.distribution import check_distribution, is_first_host, num_hosts, num_replicas, rows_of_host
from ..runtime.files import locked
from .fast.fast_training import fast_training
from .logs import Display, NoDisplay
from .optimizer import WarmupStableDecay, adamw, check_optimization
from .sampled_softmax import SHARE_OF_STEPS, draw_candidates, has_tied_head, sampled_softmax_model
from .session import Session, signals_stop

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
    """Train a language model, and leave it with the weights that predicted the held-out documents best.

    AdamW with a learning rate that rises to `learning_rate` over the first twentieth of the steps, stays, and falls
    to zero over the last three tenths, both in a straight line; weight decay on matrices and embeddings, not on
    biases and norms; gradients clipped by their global norm. A model built under a mixed precision policy trains in
    mixed precision. Ctrl-C ends the training early, after a last validation, and keeps what was learned; on several
    hosts it ends all processes, with a checkpoint.

    The figures on held-out documents, by which the best weights are chosen, are of at most some 200,000 tokens of them,
    in whole documents that a hash chooses, always the same ones. A GPU or TPU takes up to 16 steps at a time, and
    validates, and writes checkpoints, after the block of steps in which it is due.

    With a `run_dir` nothing is lost: the same call again goes on after the newest checkpoint there, however
    the one before it ended, and on a CPU with as many threads it ends with the weights and the history, bit for
    bit, that it would have ended with at once (its "tokens_per_second" apart).

    Args:
        model: ids `int32 (B, T)` to logits `float32 (B, T, V)`, causal.
        train_data: endless batches of `(inputs, targets)`, `int32 (B, T)` (see `make_dataset`). Data that was not
            made so must come in the same order each time, is read again up to the step to go on at, and cannot
            be told from other data.
        tokenizer: the tokenizer of both.
        valid_documents: the held-out documents.
        steps: how many batches to learn from.
        learning_rate: the highest learning rate.
        weight_decay: the share of each weight that goes per step, times the learning rate.
        clip_norm: the largest global norm of the gradients, or None.
        validations: how often at most to evaluate on the held-out documents: every ceil(steps / validations) steps,
            and at the end.
        num_microbatches: in how many parts to compute a batch, one after the other: the same training in less
            memory, as their gradients are added up.
        num_candidates: over how many tokens the softmax runs in the first nine tenths of the steps: those that a batch
            predicts, and others drawn by their frequency. With a large vocabulary a step takes less time on a CPU.
            The "loss" of these steps reads a little low. 0 takes all tokens in all steps; None, on a CPU, as many
            candidates as a batch has tokens or an eighth of the vocabulary, whichever is more, if that is at most half
            of it. For one device, and data of `make_dataset`.
        run_dir: a folder for `log.csv`, TensorBoard's `tensorboard/` and `checkpoints/`, or None.
        checkpoint_minutes: how long to train between two checkpoints, or None. Where writing one takes long, it
            is longer: 50 times that.
        checkpoint_steps: the number of steps between two checkpoints, or None.
        keep_checkpoints: how many of the newest to keep.
        progress: show the progress on standard output.

    Returns:
        `dict[str, list[float]]`, one value a validation: "step", "loss" (training nats per token since
        the last one), "bits_per_char" (held out), "learning_rate", "tokens_per_second" (validation
        excluded).

    Raises:
        ValueError: a setting is out of range, model and tokenizer do not belong together, the devices cannot share
            such a batch (see `use_devices`), the data ends before the steps do, the loss is no longer a number, or the
            checkpoints in `run_dir` are of another training.
        BlockingIOError: another training is going on in `run_dir`.
        OSError: `run_dir` cannot be written to. The checkpoints that are there stay.
    """
    check_model(model, tokenizer)
    numbers = {"steps": steps, "validations": validations, "num_microbatches": num_microbatches}
    for name, value in {**numbers, "keep_checkpoints": keep_checkpoints}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    for name, value in (("checkpoint_minutes", checkpoint_minutes), ("checkpoint_steps", checkpoint_steps)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, or None, got {value}.")
    check_optimization(learning_rate, weight_decay, clip_norm)
    check_documents(valid_documents)
    if not any(valid_documents):
        raise ValueError(
            "Training needs at least one held-out document that is not empty to choose the best weights by, got none."
        )
    batch_size, context = _shape_of_a_batch(train_data)
    _check_batch(batch_size, num_microbatches)
    tokens_per_batch = batch_size * context // num_microbatches
    num_candidates = _num_candidates(num_candidates, model, train_data, tokens_per_batch, tokenizer.vocab_size)
    settings = {"steps": steps, "learning_rate": learning_rate, "weight_decay": weight_decay, "clip_norm": clip_norm}
    settings["num_microbatches"] = num_microbatches
    if 0 <= (num_batches := int(train_data.cardinality())) < steps:  # below 0 it is endless, or not known
        raise _ended(num_batches, steps)
    steps_per_validation = math.ceil(steps / validations)
    schedule = compile_model(model, **settings)
    display = Display() if progress and is_first_host() else NoDisplay()
    if not hasattr(train_data, "from_step"):
        display.line(
            "train_data is not as make_dataset returned it (.map() and the like make another): the softmax runs over "
            "all tokens, and a training that is resumed reads the data from the start and cannot notice a change"
        )
    course = Session(
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
            course.keep_in(Path(run_dir), identity, checkpoint_minutes, checkpoint_steps, keep_checkpoints)
        counts = train_data.counts() if num_candidates else None
        for phase in phases(model, steps, num_candidates, counts, getattr(train_data, "seed", None) or 0):
            if course.step < phase.end and not course.received:
                _run_phase(phase, course, train_data, batch_size, num_microbatches, checkpoint_steps)
    if course.best_weights:
        model.set_weights(course.best_weights)
    return course.history


class Phase(NamedTuple):
    """A part of a training.

    Attributes:
        model: what is trained, compiled; it has the weights of the language model.
        prepare: from data from a batch on, and the number of that batch, to what the model takes.
        end: the last step.
        methods: in words, what is done to be fast.
    """

    model: keras.Model
    prepare: Callable[["tf.data.Dataset | Batches", int], "tf.data.Dataset | Batches | Iterator"]
    end: int
    methods: list[str]


def phases(
    model: keras.Model, steps: int, num_candidates: int, counts: np.ndarray | None, seed: int = 0
) -> list[Phase]:
    """Divide the training of a compiled model: the steps among candidates, if any, then those among all tokens.

    Args:
        model: the language model, compiled.
        steps: the number of steps in all.
        num_candidates: C, or 0.
        counts: how often each token occurs, `int (V,)`, if there are candidates.
        seed: the seed by which candidates are drawn.

    Returns:
        The phases, in their order.
    """
    among_all = Phase(model, lambda data, first: data, steps, [])
    if not num_candidates:
        return [among_all]
    among_candidates = sampled_softmax_model(model, num_candidates)
    among_candidates.compile(model.optimizer, _loss(), jit_compile=_jit_compile())
    method = f"a softmax over {num_candidates:,} of {len(counts):,} tokens in {SHARE_OF_STEPS:.0%} of the steps"
    draw = draw_candidates(counts, num_candidates, seed)
    return [Phase(among_candidates, draw, int(SHARE_OF_STEPS * steps), [method]), among_all]


def _run_phase(
    phase: Phase, course: Session, train_data, batch_size: int, num_microbatches: int, checkpoint_steps
) -> None:
    num_steps = phase.end - course.step
    course.phase_end = phase.end
    at_once = steps_at_once(course.steps_per_validation, checkpoint_steps)
    with signals_stop(course), fast_training(phase.model, num_steps * course.tokens_per_step) as (trained, methods):
        course.tell([*methods, *phase.methods])
        for steps, block in _blocks(num_steps, at_once):
            if course.received:
                break
            first = course.step
            data = train_data
            if first:
                data = data.from_step(first) if hasattr(data, "from_step") else data.skip(first)
            if num_microbatches > 1:
                data = data.rebatch(batch_size // num_microbatches, drop_remainder=True)
            trained.steps_per_execution = num_microbatches * block
            trained.train_function = None  # one that was made for blocks of another size
            trained.fit(
                feed(phase.prepare(data, first * num_microbatches)),
                steps_per_epoch=steps * num_microbatches,
                callbacks=[course],
                shuffle=False,  # the data has its order; Keras would warn that it does not shuffle it
                verbose=0,
            )
            if course.step < first + steps and not course.received:
                raise _ended(course.step, course.steps)
            course.keep_metrics()


def feed(data):
    """Return data as `fit` takes it: a `tf.data.Dataset`, or a generator, of its own rows on each of several hosts."""
    if hasattr(data, "element_spec"):
        if num_hosts() == 1:
            return data
        data = data.as_numpy_iterator()
    return (keras.tree.map_structure(rows_of_host, batch) for batch in data)


def _shape_of_a_batch(train_data) -> tuple[int, int]:
    if isinstance(train_data, Batches):
        return train_data.shape
    shape = train_data.element_spec[0].shape
    if shape.rank != 2 or None in shape:
        raise ValueError(
            f"train_data must have batches of one shape (B, T), got {shape}. Make them with make_dataset, or with "
            ".batch(B, drop_remainder=True)."
        )
    return tuple(shape)


def _ended(num_batches: int, steps: int) -> ValueError:
    return ValueError(f"train_data ended after {num_batches} of {steps} batches; make_dataset(..., seed=0) is endless.")


def usual_candidates(model: keras.Model, tokens_per_batch: int, vocab_size: int) -> int:
    """Choose `num_candidates` for a model on this device (see `train`)."""
    serves = num_replicas() == 1 and not uses_accelerator() and has_tied_head(model)
    number = max(tokens_per_batch, vocab_size // 8)
    return number if serves and 2 * number <= vocab_size else 0


def _num_candidates(number: int | None, model, data, tokens_per_batch: int, vocab_size: int) -> int:
    if number is None:
        return usual_candidates(model, tokens_per_batch, vocab_size) if hasattr(data, "counts") else 0
    check_candidates(number, tokens_per_batch, vocab_size)
    if number and (num_replicas() > 1 or not hasattr(data, "counts")):
        raise ValueError("num_candidates is for one device, and for data of make_dataset.")
    return number


def check_candidates(number: int, tokens_per_batch: int, vocab_size: int) -> None:
    """Refuse so many candidates as cannot be."""
    least = min(tokens_per_batch, vocab_size)
    if number and not least <= number <= vocab_size:
        raise ValueError(
            f"num_candidates must be 0, or from {least}, the tokens of a batch, to {vocab_size}, those of the "
            f"vocabulary, got {number}."
        )


def _check_batch(batch_size: int, num_microbatches: int) -> None:
    if batch_size % num_microbatches:
        raise ValueError(f"A batch of {batch_size} windows cannot be divided into {num_microbatches} microbatches.")
    check_distribution(batch_size // num_microbatches)
    if num_microbatches > 1 and keras.backend.backend() == "tensorflow" and num_replicas() > 1:
        raise ValueError(
            "Keras on TensorFlow cannot add up gradients of microbatches on several devices. Train with "
            "num_microbatches=1, or with KERAS_BACKEND=jax."
        )


def steps_at_once(*intervals: int | None) -> int:
    """Choose how many steps an accelerator takes without a look from Python: 16, or what may not be passed over."""
    if not uses_accelerator() or (keras.backend.backend() == "tensorflow" and num_replicas() > 1):  # Keras cannot
        return 1
    return min(16, *(n for n in intervals if n is not None))


def _blocks(num_steps: int, at_once: int) -> list[tuple[int, int]]:
    """Divide steps into those in whole blocks and the rest, which is a block of its own: (steps, steps in a block)."""
    rest = num_steps % at_once
    return [(steps, size) for steps, size in ((num_steps - rest, at_once), (rest, rest)) if steps]


def _identity(model, train_data, tokenizer, valid_documents, settings: dict) -> dict:
    """Tell a training from others: what must be the same for it to go on."""
    describe_data = getattr(train_data, "identity", dict)
    layers = {}
    for i, layer in enumerate(model.layers):
        config = layer.get_config()
        # Keras numbers the layers that nobody named, over all models of a process.
        layers[f"layer {i} ({type(layer).__name__})"] = {key: config[key] for key in config if key != "name"}
    return {
        "backend": keras.backend.backend(),
        "tokenizer": tokenizer.fingerprint,
        "training data": {"shape of a batch": list(_shape_of_a_batch(train_data)), **describe_data()},
        "held-out documents": documents_sha256(valid_documents),
        **settings,
        "model": layers,
    }


def compile_model(
    model: keras.Model,
    steps: int,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
    num_microbatches: int = 1,
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Give a model the loss and the optimizer that `train` uses, and return the schedule of its learning rate."""
    schedule = WarmupStableDecay(learning_rate, steps, num_microbatches)
    model.compile(adamw(schedule, weight_decay, clip_norm, num_microbatches), _loss(), jit_compile=_jit_compile())
    # Not left to the first step: the order of its variables, in which checkpoints have them, would be another there.
    model.optimizer.build(model.trainable_variables)
    return schedule


def _jit_compile() -> bool | str:
    """Leave compiling to Keras, but on TensorFlow's CPU: Keras would see a GPU that is hidden from TensorFlow."""
    return "auto" if keras.backend.backend() != "tensorflow" or uses_accelerator() else False


def _loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
