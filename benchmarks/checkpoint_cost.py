"""The cost of checkpoints: how long one takes to write and to read, and its share of the default five minutes.

    python benchmarks/checkpoint_cost.py

A checkpoint holds the weights, the two moments of AdamW and the best weights so far, all in float32, with a checksum;
it counts as written when it is on the disk. If checkpoints would take more than 2 % of the time, they are written less
often.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from aigc_tf.models.networks import build
from aigc_tf.training.checkpoints import list_checkpoints, read_newest, write_checkpoint
from aigc_tf.training.optimizer import compile_model

MODELS = [("transformer", size) for size in ("tiny", "small", "base")] + [("lstm", "small")]
VOCAB_SIZE, CONTEXT = 8192, 256
DEFAULT_SECONDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=3)
    passes = parser.parse_args().passes
    print(f"{'model':20}{'parameters':>14}{'megabytes':>12}{'written in':>12}{'read in':>10}{'share':>9}")
    for name, size in MODELS:
        model = build(name, VOCAB_SIZE, CONTEXT, size)
        compile_model(model, 1000)
        variables = {"variables": model.variables, "optimizer": model.optimizer.variables}
        written, read = [], []
        with tempfile.TemporaryDirectory() as folder:
            for step in range(passes):
                began = time.perf_counter()
                arrays = {kind: [np.asarray(v) for v in values] for kind, values in variables.items()}
                write_checkpoint(folder, step, {**arrays, "best": model.get_weights()}, {}, keep=2)
                written.append(time.perf_counter() - began)
                began = time.perf_counter()
                read_newest(folder, print)
                read.append(time.perf_counter() - began)
            megabytes = Path(list_checkpoints(folder)[-1]).stat().st_size / 1e6
        seconds = statistics.median(written)
        row = f"{f'{name} {size}':20}{model.count_params():14,}{megabytes:12,.0f}{seconds:10.2f} s"
        print(f"{row}{statistics.median(read):8.2f} s{seconds / DEFAULT_SECONDS:9.2%}", flush=True)


if __name__ == "__main__":
    main()
