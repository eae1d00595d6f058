"""Parts of `device_check.py` that measure speed, beside PyTorch: training, and writing on the device.

The models have no dropout and a vocabulary of 8,192; ours are trained in the precision that the device computes best
in, as `aigc_tf.train` does it, and PyTorch's by autocast in the same. Each system is a process of its own and they take
turns (`turns.py`); both are in the device's memory at a time. A batch that does not fit is halved, which the rows say.
Of tiny models no ratios are given: they would say nothing about speed.
"""

import functools
import gc
import json
import statistics
import time
from collections.abc import Iterator

import numpy as np
import turns
from device_check import describe, row

VOCAB_SIZE = 8_192
# architecture, size, context, batch
TRAININGS = [("transformer", "small", 1024, 32), ("transformer", "base", 1024, 16), ("lstm", "small", 1024, 64)]
SMALL_TRAININGS = [("transformer", "tiny", 64, 4), ("lstm", "tiny", 64, 4)]
OPTIMIZER = {"learning_rate": 1e-4, "weight_decay": 0.1, "clip_norm": 1.0}
STEPS_IN_BLOCK = 16  # as many as `aigc_tf.train` takes on a device before it reads the loss
ROUNDS = 3

PROMPT_TOKENS, NEW_TOKENS, CONTEXT, TOP_K = 16, 200, 256, 50
BATCHES, SMALL_BATCHES = (1, 64, 512), (1, 4)
STDDEV = 0.08  # of the weights: texts vary


# --- parts ------------------------------------------------------------------------------------------------------


def training(small: bool, seconds: float) -> Iterator[dict]:
    """Train each model in turns with PyTorch's."""
    from device_parts import peak_flops

    import aigc_tf

    for architecture, size, context, batch_size in SMALL_TRAININGS if small else TRAININGS:
        settings = {"architecture": architecture, "size": size, "context": context, "batch_size": batch_size}
        settings["steps_in_block"] = 2 if small else STEPS_IN_BLOCK
        results, failures = compare("training", ["ours", "torch"], settings, [0], [1 if small else 2])
        what = f"{architecture} {size}, context {context:,}"
        yield from failed(what, failures)
        shape = {"vocab_size": VOCAB_SIZE, "context": context, "batch_size": batch_size, "steps": 1, "seconds": 0}
        flops = aigc_tf.estimate(architecture, size, **shape)["train_flops_per_token"]
        for system, result in results.items():
            hello = result["hello"]
            steps = [step for (order,) in result["rounds"] for step in order["answer"]["value"]]
            speed = hello["batch_size"] * context / statistics.median(steps)
            peak = peak_flops(hello["device"])
            notes = [f"batch {hello['batch_size']}", hello["precision"]]
            notes += [f"{flops * speed / peak:.1%} of the {peak / 1e12:.0f} TFLOP/s of the data sheet"] if peak else []
            yield row(f"{what}: {system}", speed, "tokens/s", note=", ".join(notes), seconds_a_step=steps)
        if len(results) == 2 and not small:
            rates = {
                system: [
                    statistics.median(order["answer"]["value"]) / result["hello"]["batch_size"]
                    for (order,) in result["rounds"]
                ]
                for system, result in results.items()
            }
            yield ratio_row(what, rates)


def generation(small: bool, seconds: float) -> Iterator[dict]:
    """Write with GPT-2's base model of random weights, in turns with PyTorch."""
    batches = SMALL_BATCHES if small else BATCHES
    for dtype in ("bfloat16", "float32"):
        settings = {"dtype": dtype, "size": "tiny" if small else "base", "new_tokens": 20 if small else NEW_TOKENS}
        results, failures = compare("generation", ["ours", "torch"], settings, list(batches), list(batches))
        yield from failed(f"{settings['size']}, {dtype}", failures)
        for i, batch in enumerate(batches):
            what, rates = f"transformer {settings['size']}, {dtype}, {batch} rows", {}
            for system, result in results.items():
                answers = [orders[i]["answer"] for orders in result["rounds"]]
                if problems := [answer["error"] for answer in answers if "error" in answer]:
                    yield row(f"{what}: {system}", passed=False, note=problems[0])
                    continue
                rates[system] = [answer["value"] for answer in answers]
                speed = batch * settings["new_tokens"] / statistics.median(rates[system])
                first = result["warm_up"][i]["answer"]["value"]
                note = f"{settings['new_tokens']} tokens after {PROMPT_TOKENS}; the first call takes {first:.1f} s"
                yield row(f"{what}: {system}", speed, "tokens/s", note=note, seconds=rates[system])
            if len(rates) == 2 and not small:
                yield ratio_row(what, rates)


def compare(task: str, systems: list[str], settings: dict, warm_up: list[int], orders: list[int]):
    """Let systems work in turns; return the results, see `turns.measure`, and errors."""
    there = [system for system in systems if system == "ours" or turns.version(system)]
    children = {system: (["--serve", task, system, json.dumps(settings)], {}, "glibc") for system in there}
    measured = turns.measure(children, warm_up, orders, ROUNDS)
    failures = {system: "not installed" for system in systems if system not in there}
    for system in there:
        result = measured.get(system)
        if result is None:
            failures[system] = "its process ended, see log.txt"
        elif "error" in result["hello"]:
            failures[system] = measured.pop(system)["hello"]["error"]
        elif task == "training" and (errors := [o["error"] for o in answers_of(result) if "error" in o]):
            failures[system], _ = errors[0], measured.pop(system)
    return measured, failures


def answers_of(result: dict) -> list[dict]:
    return [order["answer"] for orders in [result["warm_up"], *result["rounds"]] for order in orders]


def failed(what: str, failures: dict[str, str]) -> Iterator[dict]:
    for system, problem in failures.items():
        yield row(f"{what}: {system}", passed=None if problem == "not installed" else False, note=problem)


def ratio_row(what: str, rates: dict[str, list[float]]) -> dict:
    median, least, most = turns.ratio(rates["ours"], rates["torch"])
    return row(f"{what}: ours / torch", median, "times the speed", note=f"{least:.2f} to {most:.2f} in {ROUNDS} rounds")


# --- systems ----------------------------------------------------------------------------------------------------


def serve(task: str, system: str, settings: str) -> None:
    """Be a system: make it, then do as ordered; errors are answers too."""
    make = {
        ("training", "ours"): train_ours, ("training", "torch"): train_torch,
        ("generation", "ours"): write_ours, ("generation", "torch"): write_torch,
    }[task, system]  # fmt: skip

    def answered(do, order):
        try:
            return {"value": do(order)}
        except Exception as error:
            return {"error": describe(error)}

    def made():
        try:
            hello, do = make(**json.loads(settings))
        except Exception as error:
            return {"error": describe(error)}, lambda order: {"error": "it was not made"}
        return hello, functools.partial(answered, do)

    turns.serve(made)


def halved_until_it_fits(make, batch_size: int, batch_size_least: int = 1):
    """Make a system that trains, and let it take its first steps, with the largest batch that fits."""
    while True:
        try:
            train = make(batch_size)
            train(0)
            return batch_size, train
        except Exception as error:  # of JAX or PyTorch, which is not loaded for the other
            is_memory = any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory"))
            if not is_memory or batch_size // 2 < batch_size_least:
                raise
        gc.collect()
        batch_size //= 2


def train_ours(architecture, size, context, batch_size, steps_in_block):
    """Make what trains for some seconds and gives the seconds of a step in each block of steps."""
    import jax

    import aigc_tf
    from aigc_tf.models import networks
    from aigc_tf.runtime.backend import keras
    from aigc_tf.runtime.distribution import native_precision
    from aigc_tf.training.loop import feed
    from aigc_tf.training.optimizer import compile_model

    class Clock(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if not 0 < float(logs["loss"]) < 20:  # waits for the device
                raise RuntimeError(f"The loss is {logs['loss']}.")
            self.ends.append(time.perf_counter())
            if len(self.ends) > 1 and self.ends[-1] - self.ends[0] > self.seconds:
                self.model.stop_training = True  # asked for earlier, Keras would copy the state

    tokenizer = aigc_tf.Tokenizer([chr(0x4E00 + i) for i in range(VOCAB_SIZE - 259)])
    characters = np.array(tokenizer.pieces)
    documents = ["".join(np.random.default_rng(i).choice(characters, 2 * context)) for i in range(256)]

    def make(batch_size):
        model = networks.build(architecture, VOCAB_SIZE, context, size, dropout=0.0, precision="auto")
        compile_model(model, 1_000_000, **OPTIMIZER)
        model.steps_per_execution = steps_in_block
        data = aigc_tf.make_dataset(documents, tokenizer, context, batch_size, seed=0)

        def train(seconds):
            clock = Clock()
            clock.ends, clock.seconds = [], seconds
            model.fit(feed(data), steps_per_epoch=10**6 * steps_in_block, callbacks=[clock], shuffle=False, verbose=0)
            return [float(taken) / steps_in_block for taken in np.diff(clock.ends)]

        return train

    batch_size, train = halved_until_it_fits(make, batch_size)
    device = jax.devices()[0].device_kind
    return {"batch_size": batch_size, "precision": native_precision(), "device": device}, train


def train_torch(architecture, size, context, batch_size, steps_in_block):
    """Make the same in PyTorch."""
    import device_torch
    import torch
    import torch_models
    from train_speed import batches

    from aigc_tf.models.sizes import dimensions

    shape = dimensions(architecture, size)
    precision = best_precision(torch)

    def make(batch_size):
        if architecture == "transformer":
            model = torch_models.Transformer(VOCAB_SIZE, context, shape["num_layers"], shape["hidden_dim"])
        else:
            model = torch_models.Lstm(VOCAB_SIZE, shape["num_layers"], shape["hidden_dim"])
        source = batches({"batch": batch_size, "context": context})
        data = [next(source) for _ in range(8)]
        return device_torch.trainer(model, data, precision, steps_in_block, **OPTIMIZER)

    batch_size, train = halved_until_it_fits(make, batch_size)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"batch_size": batch_size, "precision": precision, "device": device}, train


def best_precision(torch) -> str:
    """Name what the device computes best in, as `aigc_tf.use_devices` chooses it."""
    if not torch.cuda.is_available():
        return "float32"
    major = torch.cuda.get_device_capability()[0]
    return "mixed_bfloat16" if major >= 8 else "mixed_float16" if major >= 7 else "float32"


def random_prompts(batch: int) -> np.ndarray:
    return np.random.default_rng(1).integers(259, VOCAB_SIZE, (batch, PROMPT_TOKENS))


def write_ours(dtype, size, new_tokens):
    """Make what writes a batch and gives the seconds, by `generate_batch`, whose loop keeps weights in `dtype`."""
    import aigc_tf
    from aigc_tf.generation.engines import device_loop

    tokenizer = aigc_tf.Tokenizer([chr(0x4E00 + i) for i in range(VOCAB_SIZE - 259)])
    model = aigc_tf.transformer(VOCAB_SIZE, CONTEXT, size, dropout=0.0)
    generator = np.random.default_rng(0)
    model.set_weights([generator.normal(0, STDDEV, w.shape) if w.ndim > 1 else w for w in model.get_weights()])
    write_on_device = functools.partial(device_loop.write_on_device, dtype=dtype)
    device_loop.write_on_device = write_on_device  # `generate_batch` leaves the dtype at float32
    banned = dict.fromkeys(range(259), -float("inf"))  # no text ends early, each token is a character
    settings = {"temperature": 1.0, "top_k": TOP_K, "top_p": None, "logit_bias": banned, "engine": "device"}

    def write(batch):
        prompts = [tokenizer.decode(ids[1:]) for ids in random_prompts(batch)]  # begin of document comes first
        began = time.perf_counter()
        texts = aigc_tf.generate_batch(model, tokenizer, prompts, max_new_tokens=new_tokens, **settings)
        taken = time.perf_counter() - began
        written = sum(len(text.new) for text in texts)
        if written != batch * new_tokens:
            raise RuntimeError(f"{batch * new_tokens} tokens were asked for, {written} came.")
        return taken

    return {}, write


def write_torch(dtype, size, new_tokens):
    """Make the same in PyTorch."""
    import device_torch
    import torch
    import torch_models

    from aigc_tf.models.sizes import dimensions

    shape = dimensions("transformer", size)
    torch.set_float32_matmul_precision("high")
    model = torch_models.Transformer(VOCAB_SIZE, CONTEXT, shape["num_layers"], shape["hidden_dim"]).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=STDDEV)
    model = model.to(device_torch.device(), getattr(torch, dtype))
    writers = {}

    def write(batch):
        if batch not in writers:
            writers[batch] = device_torch.writer(model, random_prompts(batch), CONTEXT, new_tokens, TOP_K)
        began = time.perf_counter()
        written = writers[batch]()
        taken = time.perf_counter() - began
        if written.shape != (batch, new_tokens):
            raise RuntimeError(f"{batch} texts of {new_tokens} tokens were asked for, {written.shape} came.")
        return taken

    return {}, write
