"""Loop: the phases of a training run, and the calls of `fit` in each of them."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..corpus.dataset import Batches
from ..runtime.backend import keras, uses_accelerator
from ..runtime.distribution import num_hosts, num_replicas, rows_of_host
from .fast.fast_training import fast_training
from .optimizer import compile_with_optimizer
from .sampled_softmax import SAMPLED_FRACTION, candidate_sampler, sampled_softmax_model
from .session import Session, stop_on_signals

if TYPE_CHECKING:
    from ..runtime.backend import tf

_UNKNOWN = -2  # tf.data.UNKNOWN_CARDINALITY


class Phase(NamedTuple):
    """A part of a training run.

    Attributes:
        model: the compiled model to train; it shares the weights of the language model.
        prepare: a function from data and the number of its first batch to the data that `model` takes.
        end: the last step.
        optimisations: those used, in words.
    """

    model: keras.Model
    prepare: Callable[["tf.data.Dataset | Batches", int], "tf.data.Dataset | Batches | Iterator"]
    end: int
    optimisations: list[str]


def phases(
    model: keras.Model, steps: int, num_candidates: int, counts: np.ndarray | None, seed: int = 0
) -> list[Phase]:
    """Divide a training run into the steps with a sampled softmax, if any, and those with the full softmax.

    Args:
        model: the language model, compiled.
        steps: the number of steps.
        num_candidates: C of the sampled softmax, or 0 for none.
        counts: how often each token occurs, `int (V,)`; not used without candidates.
        seed: the seed of the candidates.

    Returns:
        The phases, in order.
    """
    full = Phase(model, lambda data, first: data, steps, [])
    if not num_candidates:
        return [full]
    sampled_model = sampled_softmax_model(model, num_candidates)
    compile_with_optimizer(sampled_model, model.optimizer)
    words = f"a softmax over {num_candidates:,} of {len(counts):,} tokens in {SAMPLED_FRACTION:.0%} of the steps"
    sampler = candidate_sampler(counts, num_candidates, seed)
    return [Phase(sampled_model, sampler, int(SAMPLED_FRACTION * steps), [words]), full]


def run_phase(
    phase: Phase, session: Session, train_data, batch_size: int, num_microbatches: int, checkpoint_steps: int | None
) -> None:
    """Train from the step where the session is to the end of a phase, or until a signal stops it."""
    num_steps = phase.end - session.step
    session.phase_end = phase.end
    # Keras does not report data that ends within a block.
    may_end = int(train_data.cardinality()) == _UNKNOWN
    block_size = 1 if may_end else choose_steps_per_execution(session.steps_per_validation, checkpoint_steps)
    with (
        stop_on_signals(session),
        fast_training(phase.model, num_steps * session.tokens_per_step) as (trained, optimisations),
    ):
        session.show_optimisations([*optimisations, *phase.optimisations])
        for steps, steps_per_execution in split_into_blocks(num_steps, block_size):
            if session.stop_signal:
                break
            first = session.step
            data = train_data
            if first:
                data = data.from_step(first) if hasattr(data, "from_step") else data.skip(first)
            if num_microbatches > 1:
                data = data.rebatch(batch_size // num_microbatches, drop_remainder=True)
            trained.steps_per_execution = num_microbatches * steps_per_execution
            trained.train_function = None  # it may have been made for blocks of another size
            trained.fit(
                feed(phase.prepare(data, first * num_microbatches)),
                steps_per_epoch=steps * num_microbatches,
                callbacks=[session],
                shuffle=False,  # the data is shuffled already; Keras would warn that it cannot shuffle it
                verbose=0,
            )
            if session.step < first + steps and not session.stop_signal:
                raise data_ended_error(session.step, session.steps)
            session.carry_metrics_over()


def feed(data):
    """Return data as `fit` takes it: a `tf.data.Dataset`, or a generator, on several hosts of its own rows."""
    if hasattr(data, "element_spec"):
        if num_hosts() == 1:
            return data
        data = data.as_numpy_iterator()
    return (keras.tree.map_structure(rows_of_host, batch) for batch in data)


def choose_steps_per_execution(*intervals: int | None) -> int:
    """Choose how many steps run in one call to the device: 16 on an accelerator, or the smallest interval; else 1."""
    # Keras does not support several on TensorFlow with several devices.
    if not uses_accelerator() or (keras.backend.backend() == "tensorflow" and num_replicas() > 1):
        return 1
    return min(16, *(n for n in intervals if n is not None))


def split_into_blocks(num_steps: int, size: int) -> list[tuple[int, int]]:
    """Split steps into those in blocks of `size`, and the rest in one block: pairs (steps, steps per block)."""
    rest = num_steps % size
    return [(steps, block) for steps, block in ((num_steps - rest, size), (rest, rest)) if steps]


def data_ended_error(num_batches: int, steps: int) -> ValueError:
    """Make the error for data with fewer batches than steps."""
    return ValueError(f"train_data ended after {num_batches} of {steps} batches; make_dataset(..., seed=0) is endless.")
