"""Bits per character over width, at a fixed number of steps: LSTMs, Transformers and Kneser-Ney n-grams.

    pip install -e '.[notebooks]'
    python benchmarks/scaling.py            # about 40 minutes of one core; resumes where it was interrupted
    python benchmarks/scaling.py --chart    # only the table and the chart, from the results in data/scaling.json

Every network starts from random values, not from a counted embedding, computes its softmax over all tokens
(`num_candidates=0`), and sees the same windows in the same number of steps, 700, with a learning rate that falls by a
cosine to a tenth. Only the width differs, and with it the highest rate, by a fixed rule. So this is not what
`aigc-tf train` reaches, and it is no scaling law: 700 steps are short for the wide ones, whose rate was not searched
for. No line is drawn through the points. Time is CPU time of the whole process, so other work on the machine hardly
counts. Results go to data/scaling.json, one entry a run, and the chart to scaling.svg in this folder.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

import aigc_tf
from aigc_tf.runtime.backend import keras
from aigc_tf.runtime.files import write_json
from aigc_tf.training import optimizer

HERE = Path(__file__).parent
# When data/scaling.json was measured; change it with the results.
MEASURED = "measured on 24 November 2026, before later changes of the training"
# The results ship with the package: notebook 02 draws them too.
RESULTS, CHART = HERE.parent / "data" / "scaling.json", HERE / "scaling.svg"
CONTEXT, BATCH_SIZE, STEPS, VALIDATIONS, SEEDS = 36, 16, 700, 7, (0, 1, 2)
WIDTHS = {"transformer": (16, 32, 64, 128, 256), "lstm": (32, 64, 128, 256)}
# The learning rates of the demo, at the widths of the demo.
RATES = {"transformer": (4e-3, 128), "lstm": (8e-3, 256)}
ORDERS = (1, 2, 3, 4, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chart", action="store_true", help="run nothing, draw the results that are there")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    if not options.chart:
        documents = aigc_tf.load_corpus("tang_quatrains")
        train_documents, valid_documents = aigc_tf.split(documents)
        tokenizer = aigc_tf.Tokenizer.train(train_documents)
        for order in ORDERS:
            if f"{order}-gram" not in results:
                results[f"{order}-gram"] = run_ngram(order, train_documents, valid_documents, tokenizer)
                write_json(RESULTS, results)
        for seed in SEEDS:
            for model in WIDTHS:
                for width in WIDTHS[model]:
                    name = f"{model} {width} seed {seed}"
                    if name not in results:
                        results[name] = run_network(model, width, seed, train_documents, valid_documents, tokenizer)
                        write_json(RESULTS, results)
                        print(name, {k: v for k, v in results[name].items() if k != "curve"}, flush=True)
    print("\n".join(table(results)))
    draw(results)


def run_ngram(order, train_documents, valid_documents, tokenizer) -> dict:
    began = time.process_time()
    ngram = aigc_tf.kneser_ney(train_documents, tokenizer, order)
    cpu_seconds = time.process_time() - began
    figures = aigc_tf.evaluate(ngram, tokenizer, valid_documents)
    return {"model": "n-gram", "order": order, "bits_per_char": figures["bits_per_char"], "cpu_seconds": cpu_seconds}


def run_network(name, width, seed, train_documents, valid_documents, tokenizer) -> dict:
    build = {"transformer": aigc_tf.transformer, "lstm": aigc_tf.lstm}[name]
    rate, at_width = RATES[name]
    model = build(tokenizer.vocab_size, CONTEXT, hidden_dim=width, seed=seed)
    data = aigc_tf.make_dataset(train_documents, tokenizer, CONTEXT, BATCH_SIZE, seed)
    # Narrower models take a higher rate. The one wider than the demo's needs a much lower one: in one trial it reached
    # 8.14 bits per character with 2.8e-3, and 7.80 with 1.4e-3.
    learning_rate = rate * (at_width / width) ** (0.5 if width <= at_width else 1.5)
    began = time.process_time()
    history = train_by_cosine(model, data, tokenizer, valid_documents, learning_rate)
    # This includes validation, which is part of choosing the best weights.
    cpu_seconds = time.process_time() - began
    figures = aigc_tf.evaluate(model, tokenizer, valid_documents)
    result = {
        "model": name,
        "width": width,
        "seed": seed,
        "parameters": model.count_params(),
        "bits_per_char": figures["bits_per_char"],
        "cpu_seconds": cpu_seconds,
        "curve": {"step": history["step"], "bits_per_char": history["bits_per_char"]},
    }
    keras.backend.clear_session()
    return result


def train_by_cosine(model, data, tokenizer, valid_documents, learning_rate) -> dict:
    """Train as the stored results were obtained: `aigc_tf.train` except for the learning rate."""
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, STEPS - STEPS // 20, alpha=0.1, warmup_target=learning_rate, warmup_steps=STEPS // 20
    )
    with mock.patch.object(optimizer, "WarmupStableDecay", return_value=schedule):
        return aigc_tf.train(
            model, data, tokenizer, valid_documents, steps=STEPS, learning_rate=learning_rate,
            validations=VALIDATIONS, num_candidates=0, progress=False,
        )  # fmt: skip


def by_size(results: dict, model: str) -> dict[int, list[dict]]:
    """Group the runs of one architecture by their number of parameters."""
    runs = defaultdict(list)
    for result in results.values():
        if result["model"] == model:
            runs[result["parameters"]].append(result)
    return dict(sorted(runs.items()))


def table(results: dict) -> list[str]:
    best = min(r["bits_per_char"] for r in results.values() if r["model"] == "n-gram")
    lines = ["model         parameters   bits/char   spread over seeds   CPU seconds   against the best n-gram"]
    for name, result in results.items():
        if result["model"] == "n-gram":
            lines.append(f"{name:14}{'':>10}{result['bits_per_char']:12.3f}{'':20}{result['cpu_seconds']:14.1f}")
    for model in WIDTHS:
        for parameters, runs in by_size(results, model).items():
            bits = [run["bits_per_char"] for run in runs]
            seconds = statistics.median(run["cpu_seconds"] for run in runs)
            lines.append(
                f"{model:14}{parameters:10,}{statistics.mean(bits):12.3f}{max(bits) - min(bits):20.3f}"
                f"{seconds:14.1f}{statistics.mean(bits) - best:+26.3f}"
            )
    return lines


def draw(results: dict) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for model, colour in zip(WIDTHS, ("#0072B2", "#D55E00"), strict=True):
        sizes = by_size(results, model)
        for parameters, runs in sizes.items():
            axes.plot([parameters] * len(runs), [r["bits_per_char"] for r in runs], "o", color=colour, alpha=0.6)
        axes.plot([], [], "o", color=colour, label=model)
    for name, result in results.items():
        if result["model"] == "n-gram" and result["order"] in (2, 5):
            axes.axhline(result["bits_per_char"], color="grey", linestyle=":")
            axes.annotate(f"{name}, Kneser-Ney", (1, result["bits_per_char"]), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", color="grey")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="parameters N", ylabel="bits per character, held-out poems")
    axes.yaxis.set_major_formatter("{x:.1f}")
    axes.yaxis.set_minor_formatter("{x:.1f}")
    axes.set_title(
        f"Width at a fixed number of steps; no scaling law\nTang quatrains, {STEPS} steps of {BATCH_SIZE} x {CONTEXT} "
        f"tokens from random values, three seeds\n{MEASURED}",
        fontsize="small",
    )
    axes.legend()
    figure.savefig(CHART, metadata={"Date": None})


if __name__ == "__main__":
    main()
