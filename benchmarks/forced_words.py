"""The cost of forced words: the form of the poem, whether the words are there, and the time.

    aigc-tf demo                              # trains the two models
    python benchmarks/forced_words.py

The words are the first two characters of clauses of held-out poems, the same for each model. A poem starts from an
empty prompt, with the default settings and a seed of its own. Well-formed is what the demo calls well-formed: two lines
of four clauses, all of 5 or all of 7 characters. Times are multiples of those of poems without forced words.
"""

import argparse
import random
import re
import time

import aigc_tf
from aigc_tf.cli.demo import is_quatrain

LENGTH = 64
DEMO = ["runs/demo/transformer", "runs/demo/lstm"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", default=DEMO, help="run folders of the demo (default: its own)"
    )
    parser.add_argument("--poems", type=int, default=200, help="how many of each kind")
    options = parser.parse_args()
    _, held_out = aigc_tf.split(aigc_tf.load_corpus("tang_quatrains"))
    clauses = [clause for poem in held_out for clause in re.split("[，。\n]", poem) if len(clause) in (5, 7)]
    random_words = random.Random(0)
    words = [random_words.sample([clause[:2] for clause in clauses], 2) for _ in range(options.poems)]
    print(f"{'run':24}{'words':>6}{'right form':>12}{'all there':>11}{'ms':>8}{'times':>7}")
    for run in options.runs:
        model, tokenizer = aigc_tf.load(run)

        def write(seed, forced, model=model, tokenizer=tokenizer):
            return aigc_tf.generate(model, tokenizer, max_new_tokens=LENGTH, seed=seed, forced=forced)

        for forced in ([], words[0]):  # compiled and prepared once
            write(0, forced)
        alone = None
        for number in range(3):
            began = time.perf_counter()
            poems = [write(seed, chosen[:number]) for seed, chosen in enumerate(words)]
            seconds = (time.perf_counter() - began) / len(poems)
            alone = alone or seconds
            form = sum(map(is_quatrain, poems)) / len(poems)
            there = [all(word in poem for word in chosen[:number]) for chosen, poem in zip(words, poems, strict=True)]
            figures = f"{form:12.1%}{sum(there) / len(poems):11.1%}{seconds * 1e3:8.1f}{seconds / alone:7.1f}"
            print(f"{run:24}{number:6}{figures}", flush=True)


if __name__ == "__main__":
    main()
