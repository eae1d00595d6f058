"""Learning per second: bits per character on held-out documents after the same CPU time of one core.

    pip install -e '.[fast]' torch
    npm pack chinese-poetry@2.0.1          # for the corpus "tang": 54,283 poems, 3.5 million traditional characters
    python benchmarks/learning.py --corpora tang --seconds 600 --seeds 0 1 2
    python benchmarks/learning.py --corpora tang --seconds 600 --seeds 0 --systems lstm torch-lstm --dropout 0.1
    python benchmarks/learning.py --corpora quatrains laws --systems lstm lstm-plain --seconds 100

Two methods make a difference apart from the architecture, and any package can use them: an embedding counted in the
text (`aigc_tf.initialise`) and a sampled softmax in nine tenths of the time (`num_candidates` of `aigc_tf.train`). So
each architecture is trained by each package with and without them:

    lstm, transformer                       ours, with both, as by default
    lstm-counted, transformer-counted       with the embedding only
    lstm-candidates, transformer-candidates with the sampled softmax only
    lstm-plain, transformer-plain           with neither
    torch-lstm, torch-gpt                   plain PyTorch, compiled, with neither
    torch-lstm-methods, torch-gpt-methods   the same with both: the same embedding, candidates drawn the same way
    5-gram                                  Kneser-Ney, for comparison

All train in bfloat16 with AdamW and a learning rate that warms up, stays constant and falls to zero. Each run has a
process and a core of its own, and the allocator that `turns.py` calls "kept"; as many run in parallel as there are
cores. The clock is the CPU time of the process from the first step, plus that of counting the embedding. Compilation,
which happens in a few steps with a rate of zero beforehand, and evaluation are not counted. All stop by this clock;
it also sets the learning rate and decides when the softmax runs over all tokens. The table shows how far the last step
overran. PyTorch reads the same windows from a file, without loading TensorFlow.

A tenth of the documents is held out. Choose settings, such as dropout, on its first half, "valid", and report on the
other, "test". Results go to a file, one line a run; a run that is already there is not repeated.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import turns

CONTEXT, BATCH_SIZE = {"lstm": 64, "transformer": 128, "gpt": 128}, 16  # windows of 64 tokens, or half as many of 128
# The same shapes for all. The GPT's was the best of nine in PyTorch on all of Tang at 600 seconds, see README.md.
LSTM = {"num_layers": 1, "hidden_dim": 512}
OURS = {"lstm": LSTM, "transformer": {"num_layers": 2, "hidden_dim": 128, "num_heads": 2}}
TORCH = {"lstm": LSTM, "gpt": {"num_layers": 2, "dim": 128, "context": CONTEXT["gpt"]}}
RATES = {"transformer": 3e-3, "lstm": 3e-3, "gpt": 3e-3}
VARIANTS = {"": (True, True), "counted": (True, False), "candidates": (False, True), "plain": (False, False)}
SYSTEMS = (
    *("lstm", "lstm-counted", "lstm-candidates", "lstm-plain"),
    *("transformer", "transformer-counted", "transformer-candidates", "transformer-plain"),
    *("torch-lstm", "torch-lstm-methods", "torch-gpt", "torch-gpt-methods"),
    "5-gram",
)
VOCAB_SIZE = {"tang": 12_000}
HELD_OUT, NUM_EVALUATED = 0.1, 1_500  # the share of all documents, and how many of each half at most
WEIGHT_DECAY, CLIP_NORM = 0.1, 1.0
RISE, FALL, AMONG_CANDIDATES = 0.05, 0.3, 0.9  # shares of the time
WARMUP_STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", nargs="+", default=["quatrains", "tang", "laws"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=600, help="CPU seconds of a run")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--learning-rate", type=float, help="instead of each system's own")
    parser.add_argument("--dropout", type=float, default=0.0, help="of all networks (default: none)")
    parser.add_argument("--prepared", type=Path, default=Path("learning-data"), help="a folder for PyTorch's windows")
    parser.add_argument("--archive", type=Path, default=Path("chinese-poetry-2.0.1.tgz"), help="for the corpus tang")
    parser.add_argument("--cores", nargs="+", default=[str(i) for i in range(os.cpu_count())])
    parser.add_argument("--results", type=Path, default=Path("learning.jsonl"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run(*options.child, options)))
        return
    done = {}
    if options.results.exists():
        for line in options.results.read_text("utf-8").splitlines():
            result = json.loads(line)
            done[key(result)] = result
    facts = turns.machine(["aigc-tf", "torch"])
    turns.show_machine(facts)
    settings = {name: getattr(options, name) for name in ("seconds", "batch_size", "learning_rate", "dropout")}
    jobs = [
        {"corpus": corpus, "system": system, "seed": seed, **settings}
        for seed in options.seeds
        for corpus in options.corpora
        for system in options.systems
    ]
    jobs = [job for job in jobs if key(job) not in done and (job["system"] != "5-gram" or job["seed"] == 0)]
    cores = list(options.cores)

    def work(job):
        core = cores.pop()
        try:
            if job["system"].startswith("torch"):
                ask({**job, "system": f"prepare-{job['system'].split('-')[1]}"}, core, options)
            result = {**job, **ask(job, core, options), "machine": facts}
        finally:
            cores.append(core)
        done[key(job)] = result
        with open(options.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)

    with ThreadPoolExecutor(len(cores)) as pool:
        list(pool.map(work, jobs))
    print_table(list(done.values()))


def key(result: dict) -> str:
    names = ("corpus", "system", "seed", "seconds", "batch_size", "learning_rate", "dropout")
    return json.dumps([result[name] for name in names])


def ask(job: dict, core: str, options) -> dict:
    """Run a system in a process of its own, on one core."""
    command = [sys.executable, __file__, "--child", job["corpus"], job["system"], str(job["seed"])]
    command += ["--seconds", str(options.seconds), "--batch-size", str(options.batch_size)]
    command += ["--archive", str(options.archive), "--prepared", str(options.prepared)]
    command += ["--dropout", str(options.dropout)]
    if options.learning_rate:
        command += ["--learning-rate", str(options.learning_rate)]
    environment = {**os.environ, **dict.fromkeys(turns.THREADS, "1"), **turns.memory_settings("kept")}
    environment["KERAS_BACKEND"] = "tensorflow"
    done = subprocess.run(["taskset", "-c", core, *command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def print_table(results: list[dict]) -> None:
    columns = f"{'dropout':>9}{'seconds':>8}{'over':>6}{'runs':>6}{'valid':>9}{'test':>9}{'spread':>8}{'M tokens':>10}"
    print(f"\n{'corpus':12}{'system':24}{columns}")
    groups = {}
    for result in results:
        group = tuple(result[name] for name in ("corpus", "system", "dropout", "seconds"))
        groups.setdefault(group, []).append(result)
    for (corpus, system, dropout, seconds), runs in sorted(groups.items()):
        valid, test = (statistics.mean(run[kind] for run in runs) for kind in ("valid", "test"))
        spread = max(run["test"] for run in runs) - min(run["test"] for run in runs)
        tokens = statistics.mean(run.get("tokens", 0) for run in runs) / 1e6
        over = max(run["cpu"] for run in runs) - seconds if tokens else float("nan")
        row = f"{corpus:12}{system:24}{dropout:9.1f}{seconds:8.0f}{over:6.1f}{len(runs):6}"
        print(f"{row}{valid:9.3f}{test:9.3f}{spread:8.3f}{tokens:10.2f}")


# --- a run ------------------------------------------------------------------------------------------------------


def run(corpus: str, system: str, seed: str, options) -> dict:
    kind, _, name = system.partition("-")
    path = options.prepared / f"{corpus}-{name.removesuffix('-methods')}-{seed}.npz"
    if kind == "prepare" and path.exists():
        return {}
    if kind == "torch":
        return run_torch(name, path, int(seed), options)
    import aigc_tf

    documents = documents_of(corpus, options.archive)
    train_documents, held_out = aigc_tf.split(documents, HELD_OUT)
    _, valid_documents = aigc_tf.split(documents, HELD_OUT / 2)
    test_documents = sorted(set(held_out) - set(valid_documents), key=held_out.index)
    held_out = {"valid": valid_documents[:NUM_EVALUATED], "test": test_documents[:NUM_EVALUATED]}
    tokenizer = aigc_tf.Tokenizer.train(train_documents, vocab_size=VOCAB_SIZE.get(corpus))
    if kind == "prepare":
        return prepare(name, path, tokenizer, train_documents, held_out, int(seed))
    if kind == "5":
        began = time.process_time()
        model = aigc_tf.kneser_ney(train_documents, tokenizer, 5)
        result = {"cpu": time.process_time() - began}
    else:
        model, result = run_ours(kind, *VARIANTS[name], tokenizer, train_documents, int(seed), options)
    return result | {half: aigc_tf.evaluate(model, tokenizer, d)["bits_per_char"] for half, d in held_out.items()}


def documents_of(corpus: str, archive: Path) -> list[str]:
    import aigc_tf

    if corpus != "tang":
        return aigc_tf.load_corpus("tang_quatrains" if corpus == "quatrains" else corpus)
    sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
    import build_tang_quatrains as build

    poems = {}
    for work in build.read_works(archive):
        raw = "".join(work["paragraphs"])
        lines = [line for line in map(build.strip_notes, work["paragraphs"]) if line]
        damaged = (build.MISSING, build.FOREIGN)
        if lines and not any(rule.search("".join(lines)) for rule in damaged) and not build.CORRECTION.search(raw):
            poems["\n".join(lines)] = None
    return list(poems)


class Clock:
    """The share of a budget of CPU time that is used up, and the learning rate then, as a share of the highest."""

    def __init__(self, seconds: float):
        self.seconds, self.began = seconds, time.process_time()

    def cpu(self) -> float:
        return time.process_time() - self.began

    def share(self) -> float:
        return self.cpu() / self.seconds

    def rate(self) -> float:
        return max(0.0, min(1.0, self.share() / RISE, (1 - self.share()) / FALL))


def run_ours(name, is_counted, among_candidates, tokenizer, documents, seed, options):
    """Train as `aigc_tf.train` does, except for the clock."""
    import aigc_tf
    from aigc_tf.models import networks
    from aigc_tf.runtime.backend import keras
    from aigc_tf.training import loop
    from aigc_tf.training.fast.fast_training import fast_training
    from aigc_tf.training.optimizer import adamw
    from aigc_tf.training.sampled_softmax import default_num_candidates

    context, tokens_per_batch = CONTEXT[name], options.batch_size * 64
    settings = {**OURS[name], "dropout": options.dropout, "precision": "mixed_bfloat16", "seed": seed}
    model = networks.build(name, tokenizer.vocab_size, context, **settings)
    data = aigc_tf.make_dataset(documents, tokenizer, context, tokens_per_batch // context, seed)
    began = time.process_time()
    if is_counted:
        aigc_tf.initialise(model, tokenizer, documents, seed)
    counting = time.process_time() - began
    rate = options.learning_rate or RATES[name]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(adamw(rate, WEIGHT_DECAY, CLIP_NORM), loss)
    model.optimizer.build(model.trainable_variables)
    number = default_num_candidates(model, tokens_per_batch, tokenizer.vocab_size) if among_candidates else 0
    phases = loop.phases(model, 1000, number, data.counts())

    class StopByClock(keras.callbacks.Callback):
        steps = 0

        def on_train_batch_begin(self, batch, logs=None):
            self.model.optimizer.learning_rate = rate * clock.rate()

        def on_train_batch_end(self, batch, logs=None):
            StopByClock.steps += 1
            if clock.share() >= self.end:
                self.model.stop_training = True

    def fit(trained, phase, first, steps, callbacks):
        batches = phase.prepare(data.from_step(first), first)
        trained.fit(batches, steps_per_epoch=steps, callbacks=callbacks, shuffle=False, verbose=0)

    with contextlib.ExitStack() as stack:
        trained = [stack.enter_context(fast_training(phase.model, 1))[0] for phase in phases]
        for fast, phase in zip(trained, phases, strict=True):
            fast.optimizer.learning_rate = 0.0
            fit(fast, phase, 0, WARMUP_STEPS, [])
        clock = Clock(options.seconds - counting)
        for fast, phase in zip(trained, phases, strict=True):
            callback = StopByClock()
            callback.end = phase.end / 1000
            fit(fast, phase, StopByClock.steps, 10**9, [callback])
        cpu = clock.cpu() + counting
    return model, {"cpu": cpu, "tokens": StopByClock.steps * tokens_per_batch}


def prepare(name, path, tokenizer, documents, held_out, seed) -> dict:
    """Write what PyTorch needs: windows, documents to evaluate on, frequencies, and a counted embedding."""
    import numpy as np

    import aigc_tf
    from aigc_tf.evaluation import bits
    from aigc_tf.models import networks

    shape = TORCH[name]
    context = CONTEXT[name]
    data = aigc_tf.make_dataset(documents, tokenizer, context, 1)
    rows = [np.append(inputs[0], targets[0, -1]) for inputs, targets in data.as_numpy_iterator()]
    if name == "gpt":
        model = networks.build(
            "transformer", tokenizer.vocab_size, context, num_layers=1, hidden_dim=shape["dim"], seed=seed
        )
    else:
        model = networks.build("lstm", tokenizer.vocab_size, context, **shape, seed=seed)
    began = time.process_time()
    aigc_tf.initialise(model, tokenizer, documents, seed)
    arrays = {"windows": np.array(rows), "counts": data.counts(), "counting": np.array(time.process_time() - began)}
    arrays["embedding"] = model.get_layer("token_embedding").get_weights()[0]
    for half, texts in held_out.items():
        parts = zip(*bits.window_batches(tokenizer, texts, context, 64), strict=True)
        arrays |= {f"{half}_{kind}": np.array(part) for kind, part in zip(("in", "out", "counted"), parts, strict=True)}
        arrays[f"{half}_chars"] = np.array(sum(map(len, texts)))
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}.npz")  # another run may be preparing the same
    np.savez(written, **arrays)
    written.replace(path)
    return {}


def run_torch(name, path, seed, options) -> dict:
    """Train a plain PyTorch model on what `prepare` wrote, with or without the two methods."""
    import numpy as np
    import torch
    from torch_models import Lstm, Transformer, mixed, nats, trainer

    has_methods, name = name.endswith("-methods"), name.removesuffix("-methods")
    arrays = dict(np.load(path))
    windows, counts = arrays["windows"], arrays["counts"]
    torch.manual_seed(seed)
    model = (Transformer if name == "gpt" else Lstm)(len(counts), **TORCH[name], dropout=options.dropout)
    budget = options.seconds
    if has_methods:
        model.tokens.weight.data.copy_(torch.from_numpy(arrays["embedding"]))
        budget -= float(arrays["counting"])
    rate, number = options.learning_rate or RATES[name], options.batch_size * 64
    settings = {"precision": "bfloat16", "learning_rate": rate, "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM}
    step = trainer(model, 1, **settings)
    among = max(number, len(counts) // 8) if has_methods else 0  # as ours chooses it
    among = among if 2 * among <= len(counts) else 0
    draw = candidates(counts, among, seed) if among else None

    def batches():
        generator, size = np.random.default_rng(seed), number // (windows.shape[1] - 1)
        while True:
            order = generator.permutation(len(windows))
            for start in range(0, len(order) - size + 1, size):
                rows = windows[order[start : start + size]]
                yield rows[:, :-1], rows[:, 1:]

    def train(batch, share, is_among):
        inputs, targets = batch
        if is_among:
            chosen, log_expected, places = draw(targets)
            step(inputs, places, share, chosen, log_expected)
        else:
            step(inputs, targets, share)

    batch = batches()
    for is_among in [True, False] if among else [False]:
        for _ in range(WARMUP_STEPS):
            train(next(batch), 0.0, is_among)
    clock, steps, batch = Clock(budget), 0, batches()
    while clock.share() < 1:
        train(next(batch), clock.rate(), bool(among) and clock.share() < AMONG_CANDIDATES)
        steps += 1
    result = {"cpu": clock.cpu() + options.seconds - budget, "tokens": steps * number}
    model.eval()
    with mixed("bfloat16"):
        for half in ("valid", "test"):
            parts = zip(*(arrays[f"{half}_{kind}"] for kind in ("in", "out", "counted")), strict=True)
            total = sum(float(nats(model, inputs, targets)[counted].sum()) for inputs, targets, counted in parts)
            result[half] = total / math.log(2) / int(arrays[f"{half}_chars"])
    return result


def candidates(counts, number: int, seed: int):
    """Return what draws, for targets, candidates, the logarithms of their probabilities to be one, and the places of
    the targets among them: the targets, and others by their frequency, without replacement (Jean et al., 2015)."""
    import numpy as np

    generator = np.random.default_rng(seed)
    log_frequency = np.log((counts + 0.5) / (counts + 0.5).sum())
    log_missed = np.log1p(-np.exp(log_frequency))
    low, high = 1.0, 1e12  # numbers of draws that give this many distinct tokens
    for _ in range(100):
        draws = math.sqrt(low * high)
        low, high = (low, draws) if -np.expm1(draws * log_missed).sum() > number else (draws, high)
    log_expected = np.log(-np.expm1(high * log_missed)).astype(np.float32)

    def draw(targets):
        keys = log_frequency + generator.gumbel(size=len(counts))
        keys[targets.ravel()] = np.inf
        chosen = np.sort(np.argpartition(-keys, number - 1)[:number])
        places = np.empty(len(counts), np.int64)
        places[chosen] = np.arange(number)
        return chosen, log_expected[chosen], places[targets]

    return draw


if __name__ == "__main__":
    main()
