"""Compare what `aigc_tf.estimate` predicts with what a training run takes: step time and peak memory.

    python benchmarks/estimate_accuracy.py                 # six settings, about 10 minutes of two idle cores
    python benchmarks/estimate_accuracy.py --only lstm     # those whose name contains "lstm"

Each estimate and each training runs in a process of its own, so that neither sees the memory of the other. The training
is `aigc_tf.train` with ten validations. Its step time is the wall time of the steps after the first validation, without
validation; if the first nine tenths of the steps use a sampled softmax, it is nine tenths of their time and a tenth of
that of a run without it. Its memory is the peak of the process (VmHWM, so this runs on Linux only). Other work on
the machine spoils the times, but hardly the memory.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

SETTINGS = {
    "transformer tiny": {"model": "transformer", "size": "tiny", "context": 36, "batch_size": 16},
    "transformer 4 x 256": {
        "model": "transformer", "num_layers": 4, "num_heads": 4, "hidden_dim": 256, "context": 128, "batch_size": 32
    },
    "transformer small": {"model": "transformer", "size": "small", "context": 256, "batch_size": 8},
    "lstm tiny": {"model": "lstm", "size": "tiny", "context": 128, "batch_size": 16},
    "lstm 1 x 512": {"model": "lstm", "num_layers": 1, "hidden_dim": 512, "context": 64, "batch_size": 16},
    "lstm small": {"model": "lstm", "size": "small", "context": 128, "batch_size": 8},
}  # fmt: skip
VOCAB_SIZE = 6_000
VALIDATIONS = 10
TIME_TARGET, MEMORY_TARGET = 0.15, 0.20


def main() -> None:
    """Print the table, or as a child process the figures of one estimate or one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to measure, and about how long to train")
    parser.add_argument("--only", default="", metavar="TEXT", help="the settings whose name contains this")
    parser.add_argument("--precision", default="float32", help="float32, mixed_bfloat16 or mixed_float16")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        task, settings = options.child
        print(json.dumps({"predict": predict, "train": train}[task](**json.loads(settings))))
        return
    names = [name for name in SETTINGS if options.only in name]
    if not names:
        parser.error(f"--only must be part of one of {', '.join(SETTINGS)}, got {options.only!r}.")
    print(f"{'':22}{'seconds a step':^30}  {'peak memory in MB':^30}")
    print(f"{'':22}" + "  ".join([f"{'predicted':>10}{'real':>10}{'ratio':>10}"] * 2), flush=True)
    in_time = in_memory = 0
    for name in names:
        settings = {**SETTINGS[name], "precision": options.precision}
        predicted = in_own_process("predict", {**settings, "seconds": options.seconds})
        if "step_seconds" not in predicted:
            print(f"{name:22}does not fit into the memory of this machine")
            continue
        settings["steps"] = VALIDATIONS * max(2, round(options.seconds / VALIDATIONS / predicted["step_seconds"]))
        real = in_own_process("train", {**settings, "num_candidates": 0})
        if number := int(predicted["num_candidates"]):
            among = in_own_process("train", {**settings, "num_candidates": number})
            among["step_seconds"] = 0.9 * among["step_seconds"] + 0.1 * real["step_seconds"]
            real = among
        time_ratio, memory_ratio = (predicted[k] / real[k] for k in ("step_seconds", "peak_memory_bytes"))
        in_time += abs(time_ratio - 1) <= TIME_TARGET
        in_memory += abs(memory_ratio - 1) <= MEMORY_TARGET
        print(
            f"{name:22}{predicted['step_seconds']:10.4f}{real['step_seconds']:10.4f}{time_ratio:10.2f}  "
            f"{predicted['peak_memory_bytes'] / 1e6:10.0f}{real['peak_memory_bytes'] / 1e6:10.0f}{memory_ratio:10.2f}",
            flush=True,
        )
    print(f"time within {TIME_TARGET:.0%}: {in_time} of {len(names)}; ", end="")
    print(f"memory within {MEMORY_TARGET:.0%}: {in_memory} of {len(names)}")


def in_own_process(task: str, settings: dict) -> dict[str, float]:
    """Run `predict` or `train` in a fresh process, and return its figures."""
    command = [sys.executable, __file__, "--child", task, json.dumps(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def predict(**settings) -> dict[str, float]:
    """Estimate one setting."""
    import aigc_tf

    return aigc_tf.estimate(**settings, vocab_size=VOCAB_SIZE, steps=1)


def train(
    model: str, context: int, batch_size: int, steps: int, precision: str, num_candidates: int, **dimensions
) -> dict[str, float]:
    """Train with one setting on documents of random characters, and return its step time and peak memory."""
    import numpy as np

    import aigc_tf
    from aigc_tf.runtime.backend import keras

    # The ids before the pieces are three special ones and 256 bytes; 4E00 is the first Chinese character.
    tokenizer = aigc_tf.Tokenizer([chr(0x4E00 + i) for i in range(VOCAB_SIZE - 259)])
    generator = np.random.default_rng(0)
    documents = ["".join(generator.choice(tokenizer.pieces, 2 * context)) for _ in range(400)]
    keras.config.set_dtype_policy(precision)
    language_model = getattr(aigc_tf, model)(VOCAB_SIZE, context, **dimensions)
    data = aigc_tf.make_dataset(documents[20:], tokenizer, context, batch_size, seed=0)
    settings = {"steps": steps, "validations": VALIDATIONS, "num_candidates": num_candidates, "progress": False}
    history = aigc_tf.train(language_model, data, tokenizer, documents[:20], **settings)
    # The first stretch between validations holds the compilation, and the last tenth of the steps may have its own.
    steady = history["tokens_per_second"][1:-1]
    return {
        "step_seconds": batch_size * context * sum(1 / speed for speed in steady) / len(steady),
        "peak_memory_bytes": peak_bytes(),
        **device_peak_bytes(),
    }


def peak_bytes() -> float:
    """Read the peak memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def device_peak_bytes() -> dict[str, float]:
    """Read the most memory of a GPU or TPU that arrays ever held, where JAX tells it."""
    if "jax" not in sys.modules:
        return {}
    statistics = sys.modules["jax"].local_devices()[0].memory_stats() or {}
    return {"device_peak_bytes": statistics["peak_bytes_in_use"]} if "peak_bytes_in_use" in statistics else {}


if __name__ == "__main__":
    main()
