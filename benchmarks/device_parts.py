"""Parts of `device_check.py` about correctness and memory; each gives rows, and takes (small, seconds)."""

import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import turns
from device_check import describe, last_error, row

CONTEXT, BATCH_SIZE = 36, 16
NUM_POEMS, NUM_HELD_OUT = 4_000, 100
# Bits per character that a training run in another precision may differ by: runs that differ by rounding alone do by
# some hundredths.
BITS_TOLERANCE = 0.1
ARCHITECTURES = ("transformer", "lstm")
# Dense products in bfloat16 summed in float32, on the T4 in float16, as it has no bfloat16: TFLOP/s by the data sheets.
PEAKS = {
    "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L4": 121, "T4": 65, "RTX 4090": 165
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """Return how many operations a second a device computes at most, None if it is not known here."""
    found = (tflops for name, tflops in PEAKS.items() if re.search(rf"\b{name}\b", device_name))
    return next((tflops * 1e12 for tflops in found), None)


# --- what is there ----------------------------------------------------------------------------------------------


def device(small: bool, seconds: float) -> Iterator[dict]:
    """Describe the machine, and measure how fast it multiplies matrices."""
    import jax
    import jax.numpy as jnp

    found = jax.devices()
    name = found[0].device_kind
    yield row("devices", f"{len(found)} x {name}", note=f"platform {found[0].platform}")
    if limit := (found[0].memory_stats() or {}).get("bytes_limit"):
        yield row("memory that JAX may take of a device", limit / 2**30, "GiB")
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        yield row("driver, memory of the GPU", said.strip())
    facts = turns.machine(("jax", "jaxlib", "torch", "optree", "h5py", "pytest", "rjieba"))
    versions = ", ".join(f"{package} {number}" for package, number in facts["versions"].items())
    yield row("versions", f"Python {facts['python']}, {versions}")
    yield row("processor", f"{facts['processor']}, {facts['cores']} cores", note=facts["system"])
    peak = peak_flops(name)
    yield row("products by the data sheet", peak and peak / 1e12, "TFLOP/s", note="" if peak else "not known here")

    size = 256 if small else 8192
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    multiply = jax.jit(jnp.matmul)
    multiply(matrix, matrix).block_until_ready()
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(10):
            product = multiply(matrix, matrix)
        product.block_until_ready()
        taken.append((time.perf_counter() - began) / 10)
    what = f"product of matrices {size:,} x {size:,} in bfloat16"
    yield row(what, 2 * size**3 / statistics.median(taken) / 1e12, "TFLOP/s")


# --- training ---------------------------------------------------------------------------------------------------


def poems():
    """Return poems to learn from, held-out ones, and their tokenizer."""
    import aigc_tf

    documents = aigc_tf.load_corpus("tang_quatrains")[: NUM_POEMS + NUM_HELD_OUT]
    return documents[NUM_HELD_OUT:], documents[:NUM_HELD_OUT], aigc_tf.Tokenizer.train(documents)


def train(architecture: str, steps: int, precision: str = "float32", dropout: float = 0.0, **settings):
    """Train a tiny model on poems; return the model and its history."""
    import aigc_tf
    from aigc_tf.models import networks

    documents, held_out, tokenizer = poems()
    model = networks.build(architecture, tokenizer.vocab_size, CONTEXT, dropout=dropout, precision=precision)
    data = aigc_tf.make_dataset(documents, tokenizer, CONTEXT, BATCH_SIZE, seed=0)
    settings = {"learning_rate": 3e-3, "validations": 4, "num_candidates": 0, "progress": False, **settings}
    return model, aigc_tf.train(model, data, tokenizer, held_out, steps=steps, **settings)


def precision(small: bool, seconds: float) -> Iterator[dict]:
    """Train in each precision: the loss falls, and the held-out figure is that of float32 but for rounding."""
    import jax

    for architecture in ARCHITECTURES:
        exact = None
        for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
            what = f"{architecture}, {policy}"
            if policy == "mixed_float16" and jax.default_backend() == "cpu":
                yield row(what, "skipped", note="XLA does not compute all of it on a CPU")
                continue
            try:
                found = train_in(policy, architecture, 24 if small else 480, exact)
            except Exception as error:  # the next one may do
                found = {"passed": False, "note": describe(error)}
            exact = found.get("value") if policy == "float32" else exact
            yield row(what, **found)


def train_in(policy: str, architecture: str, steps: int, exact: float | None) -> dict:
    """Train in a precision, and compare with what float32 came to, if that is known; return parts of a row."""
    model, history = train(architecture, steps, policy)
    loss, bits = history["loss"], history["bits_per_char"][-1]
    is_good = bool(np.isfinite([*loss, bits]).all()) and loss[-1] < loss[0]
    note = f"held out, after {steps} steps; the loss went from {loss[0]:.3f} to {loss[-1]:.3f}"
    if exact is not None:
        is_good &= abs(bits - exact) < BITS_TOLERANCE
        note += f"; float32 and {bits - exact:+.3f}"
    if policy == "mixed_float16":
        note += f"; the loss is scaled by {float(np.asarray(model.optimizer.dynamic_scale)):g}"
    return {"value": bits, "unit": "bits/char", "passed": is_good, "note": note, "loss": loss}


def resume(small: bool, seconds: float) -> Iterator[dict]:
    """Resume a training run after a third of its steps, and compare it with itself in one go; and two equal ones."""
    from aigc_tf.training.checkpoints import list_checkpoints

    steps = 12 if small else 96
    with tempfile.TemporaryDirectory() as folder:
        for architecture in ARCHITECTURES:

            def ended(name, architecture=architecture):
                run_dir = Path(folder, architecture, name)
                kept = {"checkpoint_steps": steps // 3, "keep_checkpoints": 9, "validations": 3}
                model, history = train(architecture, steps, dropout=0.1, run_dir=run_dir, **kept)
                return model.get_weights(), [history["loss"], history["bits_per_char"]], run_dir / "checkpoints"

            whole = ended("whole")
            twice = differences(whole, ended("again"))
            yield row(f"{architecture}: trained twice, {steps} steps", *as_difference(twice))
            part = Path(folder, architecture, "part", "checkpoints")
            part.mkdir(parents=True)
            shutil.copy(list_checkpoints(whole[2])[0], part)
            resumed = differences(whole, ended("part"))
            # Where the device adds up in another order each time, a run differs from itself.
            is_good = resumed[0] <= 10 * twice[0]
            what = f"{architecture}: resumed after {steps // 3} of {steps} steps, and in one go"
            yield row(what, *as_difference(resumed), passed=is_good)


def differences(one, two) -> tuple[float, float]:
    """Return the largest difference of weights, and of the figures of the histories."""
    weights = max(float(np.abs(a - b).max()) for a, b in zip(one[0], two[0], strict=True))
    return weights, float(np.abs(np.subtract(one[1], two[1])).max())


def as_difference(found: tuple[float, float]) -> tuple[str]:
    weights, figures = found
    if not (weights or figures):
        return ("the same, bit for bit",)
    return (f"weights differ by {weights:.2g} at most, loss and bits by {figures:.2g}",)


# --- writing ----------------------------------------------------------------------------------------------------


def writing(small: bool, seconds: float) -> Iterator[dict]:
    """Let the device and NumPy write with one seed: how many tokens are the same, how likely the model finds them."""
    import jax

    import aigc_tf

    _, held_out, tokenizer = poems()
    prompts = [poem[:2] for poem in held_out[:16]]
    settings = {"max_new_tokens": 24 if small else 60, "seed": 1, "log_probability": True}
    for architecture in ARCHITECTURES:
        model, _ = train(architecture, 16 if small else 320)
        for temperature in (0, 0.8):
            settings["temperature"] = temperature
            expected = aigc_tf.generate_batch(model, tokenizer, prompts, engine="numpy", **settings)
            for is_exact in (True, False):
                with jax.default_matmul_precision("highest" if is_exact else "default"):
                    written = aigc_tf.generate_batch(model, tokenizer, prompts, engine="device", **settings)
                share, difference = agreement(expected, written)
                is_good = (share > 0.8 and difference < 1e-3) if is_exact else None
                kind = "float32" if is_exact else "products as the device does them"
                note = f"log-probability of a token in texts that are the same: {difference:.2g} apart at most"
                what = f"{architecture}, temperature {temperature}, {kind}: tokens that are NumPy's"
                yield row(what, 100 * share, "%", passed=is_good, note=note, text=str(written[0]))


def agreement(expected, written) -> tuple[float, float]:
    """Return the share of equal tokens, and of equal texts the largest difference of log-probabilities per token."""
    pairs = list(zip(expected, written, strict=True))
    equal = sum(a == b for one, two in pairs for a, b in zip(one.ids, two.ids, strict=False))
    longest = sum(max(len(one.ids), len(two.ids)) for one, two in pairs)
    apart = [
        abs(one.log_probability - two.log_probability) / max(1, len(one.ids))
        for one, two in pairs
        if list(one.ids) == list(two.ids)
    ]
    return equal / longest, max(apart, default=float("nan"))


# --- estimates, and several devices -----------------------------------------------------------------------------


def estimate(small: bool, seconds: float) -> Iterator[dict]:
    """Compare what `aigc_tf.estimate` says with a training run: time of a step, and memory."""
    from aigc_tf.runtime.distribution import native_precision

    sizes = {"size": "tiny", "context": 32, "batch_size": 8} if small else {"size": "small", "context": 1024}
    measured = 2.0 if small else 8.0
    for architecture, batch_size in (("transformer", 16), ("lstm", 32)):
        settings = {"model": architecture, "batch_size": batch_size, "precision": native_precision(), **sizes}
        predicted = in_own_process("predict", {**settings, "seconds": measured})
        if "step_seconds" not in predicted:
            yield row(f"{architecture}: a step", passed=False, note="does not fit into the memory of this device")
            continue
        # Ten validations, and between two of them at least one block of 16 steps.
        steps = 10 * max(2 if small else 16, round(measured / predicted["step_seconds"] / 10))
        real = in_own_process("train", {**settings, "steps": steps, "num_candidates": 0})
        ratio = predicted["step_seconds"] / real["step_seconds"]
        note = f"{predicted['step_seconds']:.4g} s estimated, {real['step_seconds']:.4g} s taken"
        yield row(f"{architecture}: time of a step, estimated / taken", ratio, "", note=note)
        memory, taken = predicted["peak_memory_bytes"], real["peak_memory_bytes"]
        if "device_peak_bytes" in real:
            memory, taken = memory - predicted["runtime_bytes"], real["device_peak_bytes"]
        note = f"{memory / 2**30:.3g} GiB estimated, {taken / 2**30:.3g} GiB taken"
        yield row(f"{architecture}: memory, estimated / taken", memory / taken, "", note=note)


def in_own_process(task: str, settings: dict) -> dict[str, float]:
    """Let `estimate_accuracy.py` estimate, or train, in a process of its own."""
    script = Path(__file__).with_name("estimate_accuracy.py")
    command = [sys.executable, str(script), "--child", task, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stderr, flush=True)
    if done.returncode:
        raise RuntimeError(last_error(done.stderr))
    return json.loads(done.stdout.splitlines()[-1])


def devices(small: bool, seconds: float) -> Iterator[dict]:
    """Train on two devices as on one: the same losses; and the speed."""
    import jax

    import aigc_tf

    if len(jax.devices()) < 2:
        yield row("two devices", "skipped", note="there is one here")
        return
    for architecture in ARCHITECTURES:
        histories = {}
        for count in (1, 2):
            aigc_tf.use_devices(count, precision="float32")
            _, histories[count] = train(architecture, 12 if small else 96)
        aigc_tf.use_devices(1, precision="float32")
        apart = float(np.abs(np.subtract(histories[1]["loss"], histories[2]["loss"])).max())
        speeds = [statistics.median(histories[count]["tokens_per_second"][1:]) for count in (1, 2)]
        note = f"a tiny model: {speeds[0]:,.0f} tokens a second on one, {speeds[1]:,.0f} on two"
        what = f"{architecture}: difference of the losses on two devices and on one"
        yield row(what, apart, "nats", passed=apart < 0.02, note=note)
