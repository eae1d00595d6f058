"""Model files: the weights in a `.keras` file, read without Keras, and a check before anything else reads the file."""

import contextlib
import io
import zipfile
from collections.abc import Iterator

from ..runtime.files import parse_json
from .graph import read_weights
from .weights import LstmWeights, TransformerWeights


def read_keras_file(path) -> TransformerWeights | LstmWeights | None:
    """Read the weights of a model that `models/networks.py` built from its file, without importing Keras.

    Args:
        path: a `.keras` file.

    Returns:
        The weights, float32, or None if the graph differs or the file has another layout.

    Raises:
        ValueError: the file is not a model file, or is damaged.
    """
    with _open_keras_file(path) as (config, file):

        def layer_weights(name):
            (group,) = (group for group in file["layers"].values() if group["vars"].attrs["name"] == name)
            return _arrays(group)

        return read_weights(config, layer_weights)


def check_keras_file(path) -> None:
    """Refuse a model file that would make its reader open other files, or take more memory than its own size.

    Args:
        path: a `.keras` file, of any model.

    Raises:
        ValueError: the file is damaged, compressed, or holds links or data stored elsewhere.
    """
    import h5py

    # A visit ends at the first name that is returned.
    def not_hard(name, link):
        return None if isinstance(link, h5py.HardLink) else name

    def not_stored_here(name, item):
        is_stored_here = not isinstance(item, h5py.Dataset) or not (
            item.shape is None  # what HDF5 calls an empty dataset
            or item.external
            or item.is_virtual
            or item.id.get_storage_size() < item.size * item.dtype.itemsize
        )
        return None if is_stored_here else name

    with _open_keras_file(path) as (_, file):
        if (name := file.visititems_links(not_hard)) is not None:  # this follows no links
            raise ValueError(f"{name!r} in it is a link to another place")
        if (name := file.visititems(not_stored_here)) is not None:
            raise ValueError(f"its data {name!r} is not stored in it uncompressed and whole")


@contextlib.contextmanager
def _open_keras_file(path) -> Iterator:
    """Open a `.keras` file: its configuration, and its weights as an HDF5 file of which nothing is read yet.

    Any error about its content becomes a `ValueError`: for damaged files the readers of ZIP and HDF5 raise many kinds.
    """
    import h5py  # Keras brings it

    with open(path, "rb") as opened:
        try:
            with zipfile.ZipFile(opened) as archive:
                if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                    raise ValueError("it is compressed, which Keras never does")
                config = parse_json(archive.read("config.json")).get("config", {})
                with h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as file:
                    yield config, file
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(f"{path} is refused: {str(error) or type(error).__name__}.") from None


_SUBLAYERS = ("cell", "query_dense", "key_dense", "value_dense", "output_dense")


def _arrays(group) -> list:
    """Return the arrays of a layer's group in the file, in the order of `get_weights`."""
    arrays = [group["vars"][key] for key in sorted(group["vars"])]
    for name in _SUBLAYERS:
        if name in group:
            arrays += _arrays(group[name])
    return arrays
