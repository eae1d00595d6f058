"""Model files: read without Keras as with it; files that are damaged or reach beyond themselves are refused."""

import contextlib
import json
import zipfile

import numpy as np
import pytest
from conftest import change_weights, message_of, spread

import aigc_tf
from aigc_tf.models.graph import read_weights
from aigc_tf.models.keras_file import check_keras_file, read_keras_file
from aigc_tf.models.weights import LstmWeights, TransformerWeights
from aigc_tf.runtime.backend import keras

MODELS = {
    "transformer": lambda: aigc_tf.transformer(301, 12, num_layers=2, num_heads=2, hidden_dim=8),
    "lstm": lambda: aigc_tf.lstm(301, 12, num_layers=2, hidden_dim=8),
    "untied lstm": lambda: aigc_tf.lstm(301, 12, num_layers=1, hidden_dim=8, tie_embeddings=False),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_read_as_the_model_is(name, tmp_path):
    model = spread(MODELS[name]())
    model.save(tmp_path / "model.keras")
    check_keras_file(tmp_path / "model.keras")
    config = json.loads(json.dumps(model.get_config()))
    expected = read_weights(config, lambda name: model.get_layer(name).get_weights())
    weights = read_keras_file(tmp_path / "model.keras")
    assert type(weights) is type(expected)
    assert type(weights) in (TransformerWeights, LstmWeights)
    for ours, theirs in zip(*(keras.tree.flatten(vars(each)) for each in (weights, expected)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "how", ["external data", "virtual data", "soft link", "external link", "a bomb", "no storage", "empty"]
)
def test_a_file_that_reaches_beyond_itself_is_refused(how, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"TOP SECRET" * 1000)
    path = tmp_path / "model.keras"
    MODELS["lstm"]().save(path)

    def change(file, h5py):
        group = next(group for group in file["layers"].values() if group["vars"].attrs["name"] == "lstm_0")
        bias = group["cell"]["vars"]["2"]
        (size,), dtype, place = bias.shape, bias.dtype, group["cell"]["vars"]
        del place["2"]
        if how == "external data":
            place.create_dataset("2", (size,), dtype, external=[(str(secret), 0, 4 * size)])
        elif how == "virtual data":
            layout = h5py.VirtualLayout((size,), dtype)
            layout[:] = h5py.VirtualSource(str(secret), "any", (size,))
            place.create_virtual_dataset("2", layout)
        elif how == "soft link":
            place["2"] = h5py.SoftLink("/layers")
        elif how == "external link":
            place["2"] = h5py.ExternalLink(str(secret), "/any")
        elif how == "a bomb":
            place.create_dataset("2", data=np.zeros(10**6, dtype), compression="gzip")
        elif how == "empty":
            place.create_dataset("2", data=h5py.Empty(dtype))
        else:
            place.create_dataset("2", (10**12,), dtype, chunks=(10**6,))

    change_weights(path, change)
    message = message_of(ValueError, check_keras_file, path)
    assert "is refused" in message
    assert "link to another place" in message if "link" in how else "not stored in it uncompressed and whole" in message


def test_a_compressed_file_is_refused(tmp_path):
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", b"\0" * 10**7)
    assert "is compressed" in message_of(ValueError, check_keras_file, path)


@pytest.mark.parametrize(
    "content", [b"", b"PK", "[" * 100_000, "[]", "1", "{}"], ids=["", "PK", "deep", "[]", "1", "{}"]
)
def test_a_file_that_is_not_a_model_is_refused(content, tmp_path):
    path = tmp_path / "model.keras"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("config.json", content)
            archive.writestr("model.weights.h5", b"")
    assert "model.keras is refused: " in message_of(ValueError, check_keras_file, path)


@pytest.mark.parametrize("place", ["archive", "HDF5", "end"])
def test_a_damaged_file_is_refused_or_read(tmp_path, place):
    MODELS["lstm"]().save(tmp_path / "whole.keras")
    whole, random = (tmp_path / "whole.keras").read_bytes(), np.random.default_rng(0)
    of_hdf5 = whole.index(b"\x89HDF")
    first, last = {"archive": (0, 200), "HDF5": (of_hdf5, of_hdf5 + 4000), "end": (len(whole) - 300, len(whole))}[place]
    for _ in range(300):
        data = np.frombuffer(whole, np.uint8).copy()
        data[random.integers(first, last, 2)] = random.integers(0, 256, 2)
        (tmp_path / "model.keras").write_bytes(data)
        for read in (check_keras_file, read_keras_file):
            with contextlib.suppress(ValueError):
                read(tmp_path / "model.keras")
