"""Time training side by side: our models, plain PyTorch written with care, and keras-hub.

    pip install -e '.[fast]' torch keras-hub jax
    python benchmarks/train_speed.py                                     # all that are installed
    python benchmarks/train_speed.py --sizes S --systems transformer torch-transformer --precision float32 --threads 1
    python benchmarks/train_speed.py --dropout 0.1                       # as `aigc-tf train` does unless told otherwise
    python benchmarks/train_speed.py --allocators glibc kept             # the effect of the allocator

To measure as on a processor without AVX-512, on one that has it, with a cache of PyTorch's compiler of its own:

    export XLA_FLAGS=--xla_cpu_max_isa=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
    export ATEN_CPU_CAPABILITY=avx2 TORCHINDUCTOR_CACHE_DIR=/tmp/inductor-avx2
    export NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx2,+fma,+bmi,+bmi2
    python benchmarks/train_speed.py --precision float32 --sizes S

A step is forward, backward, clipping by the global norm and AdamW, on random ids of a vocabulary of 8,192. S is 4
layers, 256 wide, context 128, batch 32; M is 6 layers, 384 wide, context 256, batch 16. The Transformers have the shape
of GPT-2 (learned positions, biases, GELU by tanh, tied head). The LSTMs have 2 layers, 512 wide, at S and 3 layers, 768
wide, at M, on an embedding half as wide that is also the head. `--dropout` applies to the embeddings, attention and
branches of a Transformer, and before and after the layers of an LSTM; by default there is none.

All train in `--precision`, by default bfloat16: ours as `aigc_tf.train` does, with a softmax over all tokens; PyTorch
with autocast, `torch.compile` for forward, loss and backward (except the loop of `nn.LSTM`, which it calls as it is),
`foreach` clipping and fused AdamW; keras-hub on TensorFlow by its dtype policy, and on JAX always in float32, as XLA
multiplies bfloat16 more slowly on a CPU. The allocator is the same for all (see `turns.py`). The first step includes
compilation. Speeds are those of the median step.
"""

import argparse
import contextlib
import json
import statistics
import time

import numpy as np
import turns

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
KEPT_OPEN = contextlib.ExitStack()  # until the process ends
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.1, 1.0  # low, as PyTorch trains without a warmup here


def main() -> None:
    """Print the tables, or, as a child process, make a system and let it train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    turns.add_options(parser)
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="steps of each system in a round")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--dropout", type=float, default=0.0, help="(default: none)")
    options = parser.parse_args()
    if options.child:
        system, size = options.child
        turns.serve(lambda: make(system, SIZES[size], options))
        return
    systems = turns.installed(SYSTEMS, options.systems)
    facts = turns.machine({package for system in systems for package in SYSTEMS[system][1]})
    settings = {name: getattr(options, name) for name in ("threads", "passes", "steps", "precision", "dropout")}
    turns.show_machine(facts)
    print(", ".join(f"{name} {value}" for name, value in settings.items()), flush=True)
    results = [result for size in options.sizes for result in measure(systems, size, options)]
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "settings": settings, "results": results}, indent=1))
    print_tables(results)


def measure(systems: list[str], size: str, options) -> list[dict]:
    """Let the systems train with one size, in turns, with each allocator."""
    arguments = ["--threads", str(options.threads), "--precision", options.precision, "--dropout", str(options.dropout)]
    children, keys = {}, {}
    for system in systems:
        for allocator in options.allocators:
            environment = {**dict.fromkeys(turns.THREADS, str(options.threads)), "KERAS_BACKEND": "tensorflow"}
            environment |= SYSTEMS[system][2]
            name = f"{system}, {size}, {allocator}"
            children[name] = ([*arguments, "--child", system, size], environment, allocator)
            keys[name] = {"system": system, "size": size, "allocator": allocator}
    tokens = SIZES[size]["batch"] * SIZES[size]["context"]
    results = turns.measure(children, [1, 2], [options.steps], options.passes)
    return [{**keys[name], "tokens": tokens, **result} for name, result in results.items()]


def print_tables(results: list[dict]) -> None:
    """Print speeds, what each step costs, and of each architecture ours as a multiple of the peers' speed."""
    speeds, slowest, cpu, faults, first, rounds = ({} for _ in range(6))
    several = len({result["allocator"] for result in results}) > 1
    for result in results:
        system, allocator = result["system"], result["allocator"]
        key = f"{system}, {allocator}" if several else system, result["size"]
        steps = [answer for (order,) in result["rounds"] for answer in order["answer"]]
        speeds[key] = result["tokens"] / statistics.median(steps)
        slowest[key] = result["tokens"] / max(steps)
        cpu[key] = statistics.median(order["cpu"] / len(order["answer"]) for (order,) in result["rounds"])
        faults[key] = statistics.median(order["faults"] / len(order["answer"]) for (order,) in result["rounds"])
        first[key] = result["warm_up"][0]["answer"][0]
        rounds[system, allocator, result["size"]] = [statistics.median(o["answer"]) for (o,) in result["rounds"]]
    ratios = {}
    for (system, allocator, size), theirs in rounds.items():
        architecture = system.split("-")[-1]
        if system != architecture and (architecture, allocator, size) in rounds:
            name = f"{architecture} / {system}{f', {allocator}' if several else ''}"
            ratios[name, size] = turns.ratio(rounds[architecture, allocator, size], theirs)
    turns.print_table("tokens a second", speeds, "{:,.0f}".format)
    turns.print_table("tokens a second in the slowest step", slowest, "{:,.0f}".format)
    turns.print_table("ratio of tokens a second (least-most)", ratios, turns.as_ratio)
    turns.print_table("CPU seconds a step", cpu, "{:.3f}".format)
    turns.print_table("page faults a step", faults, "{:,.0f}".format)
    turns.print_table("seconds of the first step", first, "{:.1f}".format)


# --- the children: a system is made by a function that returns one, which takes a step --------------------------


def make(system: str, size: dict, options):
    """Make a system; return nothing to say, and what takes a number of steps and tells the seconds of each."""
    step = SYSTEMS[system][0](size, options)

    def train(number):
        seconds = []
        for _ in range(number):
            began = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - began)
        if not 0 < loss < 20:
            raise RuntimeError(f"The loss is {loss}.")
        return seconds

    return None, train


def batches(size: dict):
    """Give inputs and targets, ids `int32 (batch, context)` many of them rare, without end."""
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
    from aigc_tf.training.fast.fast_training import fast_training
    from aigc_tf.training.optimizer import compile_model

    compile_model(model, 1000, LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM)
    trained, _ = KEPT_OPEN.enter_context(fast_training(model, num_tokens=1e12))
    return keras_step(trained, size)


def policy(options) -> str:
    return "mixed_bfloat16" if options.precision == "bfloat16" else "float32"


def transformer(size, options):
    from aigc_tf.models import networks

    shape = {"num_layers": size["num_layers"], "hidden_dim": size["hidden_dim"], "dropout": options.dropout}
    shape["num_heads"] = size["hidden_dim"] // HEAD_DIM
    model = networks.build("transformer", VOCAB_SIZE, size["context"], **shape, precision=policy(options))
    return ours(model, size)


def lstm(size, options):
    from aigc_tf.models import networks

    settings = {**size["lstm"], "dropout": options.dropout, "precision": policy(options)}
    return ours(networks.build("lstm", VOCAB_SIZE, size["context"], **settings), size)


def keras_hub_transformer(size, options):
    import keras
    import keras_hub

    on_jax = keras.backend.backend() == "jax"
    keras.config.set_dtype_policy("float32" if on_jax else policy(options))
    shape = {"num_layers": size["num_layers"], "hidden_dim": size["hidden_dim"], "dropout": options.dropout}
    shape |= {"num_heads": size["hidden_dim"] // HEAD_DIM, "intermediate_dim": 4 * size["hidden_dim"]}
    backbone = keras_hub.models.GPT2Backbone(VOCAB_SIZE, **shape, max_sequence_length=size["context"])
    ids = keras.Input((size["context"],), dtype="int32")
    hidden = backbone({"token_ids": ids, "padding_mask": keras.ops.ones_like(ids)})
    model = keras.Model(ids, backbone.token_embedding(hidden, reverse=True))
    optimizer = keras.optimizers.AdamW(LEARNING_RATE, WEIGHT_DECAY, beta_2=0.95, global_clipnorm=CLIP_NORM)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    if not on_jax:
        return keras_step(model, size)
    data = batches(size)
    return lambda: float(model.train_on_batch(*next(data)))


def torch_step(model, size: dict, options):
    from torch_models import trainer

    settings = {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM}
    step = trainer(model, options.threads, precision=options.precision, **settings)
    data = batches(size)
    return lambda: step(*next(data))


def torch_transformer(size, options):
    from torch_models import Transformer

    shape = (size["context"], size["num_layers"], size["hidden_dim"], options.dropout)
    return torch_step(Transformer(VOCAB_SIZE, *shape), size, options)


def torch_lstm(size, options):
    from torch_models import Lstm

    return torch_step(Lstm(VOCAB_SIZE, **size["lstm"], dropout=options.dropout), size, options)


# What makes each system, the packages it needs, and its environment.
SYSTEMS = {
    "transformer": (transformer, ["aigc-tf"], {}),
    "torch-transformer": (torch_transformer, ["torch"], {}),
    "keras-hub-tensorflow-transformer": (keras_hub_transformer, ["keras-hub"], {}),
    "keras-hub-jax-transformer": (keras_hub_transformer, ["keras-hub", "jax"], {"KERAS_BACKEND": "jax"}),
    "lstm": (lstm, ["aigc-tf"], {}),
    "torch-lstm": (torch_lstm, ["torch"], {}),
}


if __name__ == "__main__":
    main()
