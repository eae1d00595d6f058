"""Time encoding side by side: our tokenizer by characters and by words, and Keras' TextVectorization.

    python benchmarks/tokenizer_speed.py

The text is the quatrains that ship with the package, as separate documents and as one long text. Each figure is the
median of five passes, in million characters a second of one process. The package cuts words with jieba, or with rjieba
if it is installed (extra `fast`); both are timed here.
"""

import argparse
import functools
import statistics
import time

from aigc_tf import Tokenizer, load_documents
from aigc_tf.corpus import segmentation
from aigc_tf.runtime.backend import keras
from aigc_tf.runtime.files import shipped_file


def speed(function, num_chars: int, passes: int = 5) -> float:
    """Return million characters a second, the median of several passes after a warm-up."""
    function()
    seconds = []
    for _ in range(passes):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return num_chars / statistics.median(seconds) / 1e6


def encode_all(tokenizer: Tokenizer, documents: list[str]) -> None:
    for _ in tokenizer.encode_documents(documents):
        pass


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    poems = load_documents(shipped_file("tang_quatrains.txt"))
    long_text = ["\n\n".join(poems)]
    num_chars = sum(map(len, poems))
    by_char, by_word = Tokenizer.train(poems), Tokenizer.train(poems, "word")
    rust = segmentation._rust_cut()
    jieba = functools.partial(segmentation._jieba_tokenizer(()).lcut, HMM=False)
    vectorization = keras.layers.TextVectorization(split="character", standardize=None, vocabulary=by_char.pieces)

    rows = {
        "ours, characters, a document each": speed(lambda: encode_all(by_char, poems), num_chars),
        "ours, characters, one long text": speed(lambda: encode_all(by_char, long_text), num_chars),
        "Keras TextVectorization, characters": speed(lambda: vectorization(poems), num_chars),
        "jieba, words": speed(lambda: [jieba(poem) for poem in poems], num_chars, passes=3),
    }
    if rust:
        rows["rjieba, words"] = speed(lambda: [rust(poem) for poem in poems], num_chars)
    rows["ours, words, a document each"] = speed(lambda: encode_all(by_word, poems), num_chars)
    for name, value in rows.items():
        print(f"{name:40}{value:10.2f} million characters/s")


if __name__ == "__main__":
    main()
