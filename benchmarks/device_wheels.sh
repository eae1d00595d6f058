#!/bin/sh
# Fill benchmarks/device_wheels/, some 34 MB, with what device_check.py needs beside JAX, numba and PyTorch, for Python
# 3.12 on Linux on x86-64. Run it where there is a network; the folder then travels with the checkout.
set -eu
folder="$(dirname "$0")/device_wheels"
python="${PYTHON:-python3}"
rm -rf "$folder"
mkdir "$folder"
"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder" \
    --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none --platform manylinux2014_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_28_x86_64 \
    'keras>=3.13,<3.16' namex optree h5py absl-py rich markdown-it-py mdurl pygments packaging typing_extensions \
    rjieba hypothesis sortedcontainers pytest pluggy iniconfig
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" jieba # which has no wheel of its own
