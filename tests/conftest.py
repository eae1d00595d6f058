"""What the tests share: a small real corpus, its tokenizer, and one tiny model of each kind."""

import gc
import logging
import os
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# With AIGC_TF_TEST_DEVICE=1 the tests use the GPU or TPU that is there. Otherwise one kind of machine, whatever is in
# it: set before anything loads TensorFlow or JAX, and for the processes of tests too.
ON_DEVICE = os.environ.get("AIGC_TF_TEST_DEVICE") == "1"
if not ON_DEVICE:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["JAX_PLATFORMS"] = "cpu"

# What is faster than Keras alone is made of TensorFlow.
collect_ignore = ["training/fast"] if os.environ.get("KERAS_BACKEND") == "jax" else []

# The same examples each time, and no verdict by the clock: a busy machine is no fault of the code.
settings.register_profile("here", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")

cpu_only = pytest.mark.skipif(ON_DEVICE, reason="what it expects holds on one CPU")

CLAUSES = "白日依山尽 黄河入海流 欲穷千里目 更上一层楼 床前明月光 疑是地上霜 举头望明月 低头思故乡".split()


def pytest_collection_finish():
    """Spare the garbage collector what the libraries made, which stays: a third of the time of a short training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def documents():
    """Sixty different couplets of well-known clauses, of one to three lines."""
    lines = [f"{a}，{b}。" for a in CLAUSES for b in CLAUSES if a != b]
    return ["\n".join(lines[i : i + 1 + i % 3]) for i in range(len(lines))]


@pytest.fixture(scope="session")
def tokenizer(documents):
    from aigc_tf import Tokenizer

    return Tokenizer.train(documents)


@pytest.fixture(scope="session", params=["lstm", "transformer"])
def build(request):
    """A function (vocab_size, context, **settings) -> tiny model, of each architecture in turn."""
    return builder(request.param)


@pytest.fixture(scope="session")
def build_one():
    """The same of one architecture, for what does not depend on it."""
    return builder("lstm")


def builder(architecture):
    import aigc_tf

    def build_tiny(vocab_size, context, **settings):
        if architecture == "transformer":
            settings = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, **settings}
            return aigc_tf.transformer(vocab_size, context, **settings)
        return aigc_tf.lstm(vocab_size, context, **{"num_layers": 2, "hidden_dim": 16, **settings})

    build_tiny.architecture = architecture
    return build_tiny


def spread(model):
    """Untrained logits are all alike: spread them, biases and norms too, so that each weight and position tells."""
    generator = np.random.default_rng(0)
    for weight in model.trainable_weights:
        noise = generator.normal(size=weight.shape, scale=0.1)
        weight.assign(weight * 4 + noise)
    return model


def table_model(tokenizer, successors, context=48):
    """A model that surely follows each token of `successors` by the one it maps to, and others by EOS.

    Where a token maps to several, each is as likely.
    """
    from aigc_tf.runtime.backend import keras

    table = np.full((tokenizer.vocab_size,) * 2, -50.0, np.float32)
    table[:, tokenizer.EOS] = 0.0
    for token, successor in successors.items():
        table[token, tokenizer.EOS] = -50.0
        table[token, successor] = 0.0
    ids = keras.Input((context,), dtype="int32")
    embedding = keras.layers.Embedding(tokenizer.vocab_size, tokenizer.vocab_size)
    model = keras.Model(ids, embedding(ids))
    embedding.embeddings.assign(table)
    return model


_ENDS = [b"", b"\x80", b"\x80\x80", b"\xa0\x80", b"\x80\x80\x80", b"\x90\x80\x80"]


def is_character(data: bytes) -> bool:
    """Whether Python's own strict decoder makes one character of bytes."""
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def may_follow(data: bytes, byte: int) -> bool:
    """Whether a byte after the beginning of a character makes another, or all of it."""
    return any(is_character(data + bytes([byte]) + end) for end in _ENDS)


def breaking_tokens(tokenizer, ids):
    """The tokens after which a text would not be well-formed UTF-8, by Python's own decoder."""
    data = b""
    for i in ids[-3:]:
        for byte in tokenizer.token_bytes(i):
            data = data + bytes([byte]) if may_follow(data, byte) else bytes([byte]) if may_follow(b"", byte) else b""
            data = b"" if is_character(data) else data
    broken = [i for i in range(3, 259) if not may_follow(data, i - 3)]
    return [*broken, tokenizer.EOS, *range(259, tokenizer.vocab_size)] if data else broken


@pytest.fixture
def tensorflow_log(caplog):
    """Collect what TensorFlow logs, of all functions that are traced often among it, whatever model they belong to."""
    logger = logging.getLogger("tensorflow")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def message_of(error, function, *args, **kwargs):
    """Return the message of the error that a call raises, which must be one line."""
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def change_weights(path, change):
    """Change the HDF5 file within a `.keras` file."""
    import h5py

    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    inner = path.with_suffix(".h5")
    inner.write_bytes(parts["model.weights.h5"])
    with h5py.File(inner, "r+") as file:
        change(file, h5py)
    parts["model.weights.h5"] = inner.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


def only(tokenizer, text):
    """A bias that leaves nothing but the characters of a text and the end."""
    kept = {tokenizer.EOS, *tokenizer.encode(text)}
    return dict.fromkeys(set(range(tokenizer.vocab_size)) - kept, -float("inf"))
