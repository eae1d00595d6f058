"""Time training side by side: our models, plain PyTorch written well, and keras-hub.

    pip install -e . torch keras-hub
    python benchmarks/train_speed.py                                     # all that are installed
    python benchmarks/train_speed.py --sizes S --systems transformer torch-transformer

A step is forward, backward, clipping by the global norm and AdamW, on random ids of a vocabulary of 8,192, without
dropout. S is 4 layers, 256 wide, context 128, batch 32; M is 6 layers, 384 wide, context 256, batch 16. The
Transformers have the shape of GPT-2 (learned positions, biases, GELU by tanh, the token embedding as head); the LSTMs
2 layers, 512 wide at S and 3, 768 wide at M, on an embedding half as wide that is also the head. All train in bfloat16
where the processor multiplies in it: ours as `aigc_tf.train` does, PyTorch by autocast, the Transformer compiled
(`torch.compile`), keras-hub by its policy.

Each system has a process of its own for each size. It waits for orders and does nothing meanwhile; in each round all
take their turns, so that slow changes of the machine hit all alike. The first step holds what is compiled. Other
figures are medians over all steps.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

VOCAB_SIZE = 8_192
SIZES = {
    "S": {
        "batch": 32,
        "context": 128,
        "num_layers": 4,
        "hidden_dim": 256,
        "lstm": {"num_layers": 2, "hidden_dim": 512},
    },
    "M": {
        "batch": 16,
        "context": 256,
        "num_layers": 6,
        "hidden_dim": 384,
        "lstm": {"num_layers": 3, "hidden_dim": 768},
    },
}
HEAD_DIM = 64
KEPT_OPEN = contextlib.ExitStack()  # as long as the process lives
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.1, 1.0  # low, as PyTorch trains without a warm-up here


def main() -> None:
    """Print the tables, or as a child process make a system and let it train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each system")
    parser.add_argument("--passes", type=int, default=5, metavar="N", help="rounds")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="steps of each system in a round")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measured time here")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        system, size = options.child
        serve(SYSTEMS[system][0], SIZES[size], options.threads, options.precision)
        return
    systems = [system for system in options.systems if is_installed(system)]
    results = [result for size in options.sizes for result in measure(systems, size, options)]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    print_tables(results)


def is_installed(system: str) -> bool:
    """Tell whether the package that a system needs is there, and print its version or that it is skipped."""
    package = SYSTEMS[system][1]
    try:
        print(f"{system}: {package} {importlib.metadata.version(package)}")
    except importlib.metadata.PackageNotFoundError:
        print(f"{system}: skipped, {package} is not installed")
        return False
    return True


# --- the parent: asks, measures, prints -------------------------------------------------------------------------


def measure(systems: list[str], size: str, options) -> list[dict]:
    """Start the systems with one size, and let them train in turns; return the seconds of every step."""
    results, processes, logs = [], {}, {}
    threads = str(options.threads)
    names = "OMP_NUM_THREADS TF_NUM_INTRAOP_THREADS TF_NUM_INTEROP_THREADS".split()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        environment = {**os.environ, "KERAS_BACKEND": "tensorflow", **dict.fromkeys(names, threads)}
        for system in systems:
            command = [sys.executable, __file__, "--threads", threads, "--precision", options.precision]
            logs[system] = log = stack.enter_context(open(Path(folder) / f"{system}.log", "w+", encoding="utf-8"))
            process = subprocess.Popen(
                [*command, "--child", system, size],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, text=True,
            )  # fmt: skip
            processes[system] = stack.enter_context(process)
            try:
                first = ask(process, 1)
                ask(process, 2)
            except BrokenPipeError:
                print_failure(system, size, log)
                continue
            results.append({"system": system, "size": size, "threads": options.threads, "first": first[0]})
            results[-1] |= {"seconds": [], "tokens": SIZES[size]["batch"] * SIZES[size]["context"]}
        for _ in range(options.passes):
            for result in list(results):
                try:
                    result["seconds"] += ask(processes[result["system"]], options.steps)
                except BrokenPipeError:
                    print_failure(result["system"], size, logs[result["system"]])
                    results.remove(result)
    return results


def print_failure(system: str, size: str, log) -> None:
    log.seek(0)
    print(f"{system}: failed at {size}\n{log.read()[-1500:]}", flush=True)


def ask(process: subprocess.Popen, steps: int) -> list[float]:
    """Let a child train, and return the seconds of each step."""
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise BrokenPipeError
    return json.loads(answer)


def print_tables(results: list[dict]) -> None:
    """Print speeds, and of each architecture ours as a multiple of the peers'."""
    sizes = list(dict.fromkeys(result["size"] for result in results))
    speeds = {(r["system"], r["size"]): r["tokens"] / statistics.median(r["seconds"]) for r in results}
    slowest = {(r["system"], r["size"]): r["tokens"] / max(r["seconds"]) for r in results}
    first = {(r["system"], r["size"]): r["first"] for r in results}
    ratios = {}
    for (system, size), speed in speeds.items():
        ours = system.split("-")[-1]
        if system != ours and (ours, size) in speeds:
            ratios[f"{ours} / {system}", size] = speeds[ours, size] / speed
    for title, figures, digits in (
        ("tokens a second", speeds, 0),
        ("tokens a second in the slowest step", slowest, 0),
        ("ratio of tokens a second", ratios, 2),
        ("seconds of the first step", first, 1),
    ):
        if figures:
            print(f"\n{title:44}" + "".join(f"{size:>10}" for size in sizes))
        for name in dict.fromkeys(name for name, _ in figures):
            row = [f"{figures[name, s]:10,.{digits}f}" if (name, s) in figures else f"{'-':>10}" for s in sizes]
            print(f"{name:44}" + "".join(row))


# --- the children: a system is made by a function that returns one, which takes a step --------------------------


def serve(make, size: dict, threads: int, precision: str) -> None:
    """Make a system; then read from stdin how many steps to take, and answer with the seconds of each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    step = make(size, threads, precision)
    loss = None
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - began)
        if not 0 < loss < 20:
            raise RuntimeError(f"The loss is {loss}.")
        print(json.dumps(seconds), file=answers, flush=True)


def batches(size: dict):
    """Give inputs and targets, ids `int32 (batch, context)` of which the rare ones are many, for ever."""
    generator = np.random.default_rng(0)
    while True:
        ids = (VOCAB_SIZE * generator.random((size["batch"], size["context"] + 1)) ** 4).astype(np.int32)
        yield ids[:, :-1], ids[:, 1:]


def keras_step(model, size: dict):
    """Return a function that takes a step as `fit` does."""
    import tensorflow as tf

    shape = tf.TensorSpec((size["batch"], size["context"]), tf.int32)
    data = iter(tf.data.Dataset.from_generator(lambda: batches(size), output_signature=(shape, shape)).prefetch(2))
    model.make_train_function()
    return lambda: float(model.train_function(data)["loss"])


def ours(model, size: dict):
    """Return a function that takes a step as `aigc_tf.train` does."""
    from aigc_tf import fast_training, training

    training.compile_model(model, 1000, LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM)
    KEPT_OPEN.enter_context(fast_training.fast_training(model, num_tokens=1e12))
    return keras_step(model, size)


def transformer(size, threads, precision):
    from aigc_tf import models

    shape = {"num_layers": size["num_layers"], "hidden_dim": size["hidden_dim"], "dropout": 0.0}
    shape["num_heads"] = size["hidden_dim"] // HEAD_DIM
    precision = "mixed_bfloat16" if precision == "bfloat16" else "float32"
    model = models.build("transformer", VOCAB_SIZE, size["context"], **shape, precision=precision)
    return ours(model, size)


def lstm(size, threads, precision):
    from aigc_tf import models

    precision = "mixed_bfloat16" if precision == "bfloat16" else "float32"
    model = models.build("lstm", VOCAB_SIZE, size["context"], **size["lstm"], dropout=0.0, precision=precision)
    return ours(model, size)


def keras_hub_transformer(size, threads, precision):
    import keras
    import keras_hub

    keras.config.set_dtype_policy("mixed_bfloat16" if precision == "bfloat16" else "float32")
    shape = {"num_layers": size["num_layers"], "hidden_dim": size["hidden_dim"], "dropout": 0.0}
    shape |= {"num_heads": size["hidden_dim"] // HEAD_DIM, "intermediate_dim": 4 * size["hidden_dim"]}
    backbone = keras_hub.models.GPT2Backbone(VOCAB_SIZE, **shape, max_sequence_length=size["context"])
    ids = keras.Input((size["context"],), dtype="int32")
    hidden = backbone({"token_ids": ids, "padding_mask": keras.ops.ones_like(ids)})
    model = keras.Model(ids, backbone.token_embedding(hidden, reverse=True))
    optimizer = keras.optimizers.AdamW(LEARNING_RATE, WEIGHT_DECAY, beta_2=0.95, global_clipnorm=CLIP_NORM)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return keras_step(model, size)


def torch_step(model, size: dict, threads: int, precision: str, is_compiled: bool):
    from torch_models import trainer

    settings = {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM}
    step = trainer(model, threads, precision=precision, is_compiled=is_compiled, **settings)
    data = batches(size)
    return lambda: step(*next(data))


def torch_transformer(size, threads, precision):
    from torch_models import Transformer

    model = Transformer(VOCAB_SIZE, size["context"], size["num_layers"], size["hidden_dim"])
    return torch_step(model, size, threads, precision, is_compiled=True)


def torch_lstm(size, threads, precision):
    from torch_models import Lstm

    model = Lstm(VOCAB_SIZE, size["lstm"]["num_layers"], size["lstm"]["hidden_dim"])
    return torch_step(model, size, threads, precision, is_compiled=False)


# What makes each system, and the package it needs.
SYSTEMS = {
    "transformer": (transformer, "aigc-tf"),
    "torch-transformer": (torch_transformer, "torch"),
    "keras-hub-transformer": (keras_hub_transformer, "keras-hub"),
    "lstm": (lstm, "aigc-tf"),
    "torch-lstm": (torch_lstm, "torch"),
}


if __name__ == "__main__":
    main()
