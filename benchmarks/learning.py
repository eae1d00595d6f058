"""Learning per second: bits per character on held-out documents after the same CPU time of one core.

    pip install -e '.[fast]' torch
    npm pack chinese-poetry@2.0.1          # for the corpus "tang": 54,283 poems, 3.5 million traditional characters
    python benchmarks/learning.py --seconds 600 --seeds 0
    python benchmarks/learning.py --corpora quatrains laws --systems lstm lstm-random --seconds 100 --seeds 0 1 2

Each run has a process and a core of its own; as many run at a time as there are cores. What counts is the CPU time of
the steps and of an initialisation (`aigc_tf.initialise`), not that of compiling and validating. "random" are our models
without the initialisation, "all" those whose softmax runs over all tokens in all steps (`num_candidates=0` of
`aigc_tf.train`); torch is GPT-2's architecture in plain PyTorch, compiled, in bfloat16, with AdamW and a learning rate
that takes the same course. The number of steps is what the budget allows, from the time that the first ones take.
Results go to a file, one line a run, and a run that is there already is not done again.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CONTEXT, BATCH_SIZE = 64, 16
# The best of nine tried on all of Tang at 600 seconds, see README.md.
TORCH = {"num_layers": 2, "dim": 128, "context": 128}
TRANSFORMER = {"num_layers": 4, "hidden_dim": 256}
LSTM = {"num_layers": 1, "hidden_dim": 512}
RATES = {"transformer": 1e-3, "lstm": 3e-3, "torch": 3e-3}
SYSTEMS = (
    *("lstm", "lstm-random", "lstm-all"),
    *("transformer", "transformer-random", "transformer-all"),
    *("torch", "5-gram"),
)
VOCAB_SIZE = {"tang": 12_000}
NUM_VALID = 1_500  # of the held-out documents, at most
WARMUP_STEPS, TIMED_STEPS = 10, 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", nargs="+", default=["quatrains", "tang", "laws"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=600, help="CPU seconds of a run")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--learning-rate", type=float, help="instead of each system's own")
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
    settings = {"seconds": options.seconds, "batch_size": options.batch_size, "learning_rate": options.learning_rate}
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
            result = {**job, **ask(job, core, options)}
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
    return json.dumps([result[k] for k in ("corpus", "system", "seed", "seconds", "batch_size", "learning_rate")])


def ask(job: dict, core: str, options) -> dict:
    """Do a run in a process of its own, on one core."""
    names = "OMP_NUM_THREADS TF_NUM_INTRAOP_THREADS TF_NUM_INTEROP_THREADS NUMBA_NUM_THREADS".split()
    command = [sys.executable, __file__, "--child", job["corpus"], job["system"], str(job["seed"])]
    command += ["--seconds", str(options.seconds), "--batch-size", str(options.batch_size)]
    command += ["--archive", str(options.archive)]
    if options.learning_rate:
        command += ["--learning-rate", str(options.learning_rate)]
    environment = {**os.environ, **dict.fromkeys(names, "1"), "KERAS_BACKEND": "tensorflow"}
    done = subprocess.run(["taskset", "-c", core, *command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def print_table(results: list[dict]) -> None:
    print(f"\n{'corpus':12}{'system':22}{'seconds':>8}{'runs':>6}{'bits/char':>11}{'spread':>8}{'M tokens':>10}")
    groups = {}
    for result in results:
        groups.setdefault((result["corpus"], result["system"], result["seconds"]), []).append(result)
    for (corpus, system, seconds), runs in sorted(groups.items()):
        bits = [run["bits_per_char"] for run in runs]
        tokens = statistics.mean(run.get("tokens", 0) for run in runs) / 1e6
        spread = max(bits) - min(bits)
        row = f"{corpus:12}{system:22}{seconds:8.0f}{len(runs):6}{statistics.mean(bits):11.3f}"
        print(f"{row}{spread:8.3f}{tokens:10.2f}")


# --- a run ------------------------------------------------------------------------------------------------------


def run(corpus: str, system: str, seed: str, options) -> dict:
    import aigc_tf

    documents = documents_of(corpus, options.archive)
    train_documents, valid_documents = aigc_tf.split(documents)
    valid_documents = valid_documents[:NUM_VALID]
    tokenizer = aigc_tf.Tokenizer.train(train_documents, vocab_size=VOCAB_SIZE.get(corpus))
    if system == "5-gram":
        began = time.process_time()
        ngram = aigc_tf.kneser_ney(train_documents, tokenizer, 5)
        counted = time.process_time() - began
        return {"bits_per_char": aigc_tf.evaluate(ngram, tokenizer, valid_documents)["bits_per_char"], "cpu": counted}
    context = TORCH["context"] if system == "torch" else CONTEXT
    batch_size = options.batch_size * CONTEXT // context
    data = aigc_tf.make_dataset(train_documents, tokenizer, context, batch_size, int(seed))
    rate = options.learning_rate or RATES[system.split("-")[0]]
    function = run_torch if system == "torch" else run_ours
    bits, steps, cpu = function(system, data, tokenizer, train_documents, valid_documents, rate, int(seed), options)
    return {"bits_per_char": bits, "tokens": steps * options.batch_size * CONTEXT, "cpu": cpu}


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


def run_ours(system, data, tokenizer, train_documents, valid_documents, rate, seed, options):
    import aigc_tf
    from aigc_tf import models, training
    from aigc_tf.fast_training import fast_training

    name, _, variant = system.partition("-")
    shape = {"transformer": {**TRANSFORMER, "num_heads": TRANSFORMER["hidden_dim"] // 64}, "lstm": LSTM}[name]
    settings = {**shape, "dropout": 0.0, "precision": "mixed_bfloat16", "seed": seed}

    def fresh():
        return models.build(name, tokenizer.vocab_size, CONTEXT, **settings)

    model = fresh()
    training.compile_model(model, 1000, rate)
    usual = training.usual_candidates(model, options.batch_size * CONTEXT, tokenizer.vocab_size)
    num_candidates = 0 if variant == "all" else usual
    per_step, steps_before = 0.0, 0
    for phase in training.phases(model, 1000, num_candidates, data.counts()):
        with fast_training(phase.model, 1) as (trained, _):
            trained.make_train_function()
            batches = iter(phase.prepare(data, 0))
            for step in range(WARMUP_STEPS + TIMED_STEPS):
                if step == WARMUP_STEPS:
                    began = time.process_time()
                float(trained.train_function(batches)["loss"])
            share = (phase.end - steps_before) / 1000
            per_step += share * (time.process_time() - began) / TIMED_STEPS
            steps_before = phase.end
    model, budget, began = fresh(), options.seconds, time.process_time()
    if variant != "random":
        aigc_tf.initialise(model, tokenizer, train_documents, seed)
        budget -= time.process_time() - began
    steps = round(budget / per_step)
    began = time.process_time()
    valid = valid_documents[:50]  # the weights that count are the last
    settings = {"steps": steps, "learning_rate": rate, "num_candidates": num_candidates}
    training.train(model, data, tokenizer, valid, **settings, validations=1, progress=False)
    cpu = time.process_time() - began + options.seconds - budget
    return aigc_tf.evaluate(model, tokenizer, valid_documents)["bits_per_char"], steps, cpu


def run_torch(system, data, tokenizer, train_documents, valid_documents, rate, seed, options):
    import torch
    from torch_models import Transformer, nats, trainer

    from aigc_tf import evaluation

    torch.manual_seed(seed)
    model = Transformer(tokenizer.vocab_size, **TORCH)
    step = trainer(
        model, 1, precision="bfloat16", learning_rate=rate, weight_decay=0.1, clip_norm=1.0, is_compiled=True
    )
    batches = data.as_numpy_iterator()
    for _ in range(WARMUP_STEPS):
        step(*next(batches), 0.0)
    began, steps = time.process_time(), 0
    while (progress := (time.process_time() - began) / options.seconds) < 1:
        step(*next(batches), min(1, progress / 0.05, (1 - progress) / 0.3))
        steps += 1
    cpu = time.process_time() - began
    total = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        for inputs, targets, counted in evaluation.batches(tokenizer, valid_documents, TORCH["context"], 64):
            total += float(nats(model, inputs, targets)[counted].sum())
    return total / math.log(2) / sum(map(len, valid_documents)), steps, cpu


if __name__ == "__main__":
    main()
