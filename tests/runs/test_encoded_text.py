import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import aigc_tf
from aigc_tf.runs.encoded_text import encode_or_open


def test_a_store_of_other_text_is_not_taken(documents, tmp_path):
    first, ids = encode_or_open(documents, "char", None, (), tmp_path)
    again, same = encode_or_open(documents, "char", None, (), tmp_path)
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(ids, same)
    ids = np.array(ids)  # not of the file
    _, other = encode_or_open(documents[:-1], "char", None, (), tmp_path)
    assert len(other) < len(ids)
    for tokens in tmp_path.glob("*/tokens/tokens.bin"):
        tokens.write_bytes(b"")  # as after a power cut
    np.testing.assert_array_equal(encode_or_open(documents, "char", None, (), tmp_path)[1], ids)


@pytest.mark.parametrize("before", ["nothing", "a damaged store"])
def test_of_two_runs_one_encodes_and_the_other_waits(documents, tmp_path, monkeypatch, before):
    if before != "nothing":
        encode_or_open(documents, "char", None, (), tmp_path)
        next(tmp_path.glob("*/tokens/tokens.bin")).write_bytes(b"")
    train, begun, num_trained = aigc_tf.Tokenizer.train, threading.Event(), []

    def slowly(*args, **kwargs):
        num_trained.append(1)
        begun.set()
        time.sleep(0.3)
        return train(*args, **kwargs)

    monkeypatch.setattr(aigc_tf.Tokenizer, "train", slowly)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(encode_or_open, documents, "char", None, (), tmp_path)
        begun.wait()
        second = pool.submit(encode_or_open, documents, "char", None, (), tmp_path)
        (tokenizer, ids), (same, same_ids) = first.result(), second.result()
    assert len(num_trained) == 1
    assert same.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(same_ids, ids)
    assert len(list(tmp_path.iterdir())) == 1


def test_without_locks_the_store_of_the_faster_run_is_kept(documents, tmp_path, monkeypatch):
    monkeypatch.setattr("aigc_tf.runs.encoded_text.hold_lock", lambda lock, wait: contextlib.nullcontext())
    train, of_others = aigc_tf.Tokenizer.train, []

    def train_while_another_does(*args, **kwargs):
        monkeypatch.setattr(aigc_tf.Tokenizer, "train", train)
        of_others.append(encode_or_open(documents, "char", None, (), tmp_path))
        return train(*args, **kwargs)

    monkeypatch.setattr(aigc_tf.Tokenizer, "train", train_while_another_does)
    _, ids = encode_or_open(documents, "char", None, (), tmp_path)
    assert ids.filename == of_others[0][1].filename
    assert len(list(tmp_path.iterdir())) == 1
