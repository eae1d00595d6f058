"""Weights: the arrays of a model that `models/networks.py` builds, for engines that compute without Keras.

They have `input_shape`, `output_shape` and `name` like the model itself.
"""

import dataclasses
from typing import NamedTuple

import numpy as np


class Block(NamedTuple):
    """The weights of a Transformer block; matrices are (inputs, outputs), norms (2, D): scale and offset."""

    attention_norm: np.ndarray
    attention: np.ndarray  # (D, 3 D): query, key and value
    attention_bias: np.ndarray
    output: np.ndarray
    output_bias: np.ndarray
    mlp_norm: np.ndarray
    expand: np.ndarray
    expand_bias: np.ndarray
    project: np.ndarray
    project_bias: np.ndarray


@dataclasses.dataclass(eq=False)
class TransformerWeights:
    """The weights of a Transformer."""

    token_embedding: np.ndarray
    position_embedding: np.ndarray
    blocks: list[Block]
    final_norm: np.ndarray
    num_heads: int
    name = "transformer"

    @property
    def input_shape(self) -> tuple[None, int]:
        """The shape of the ids, (B, T)."""
        return None, len(self.position_embedding)

    @property
    def output_shape(self) -> tuple[None, None, int]:
        """The shape of the logits, (B, T, V)."""
        return None, None, len(self.token_embedding)

    @property
    def num_parameters(self) -> int:
        """The number of weights in the matrices that each token is multiplied with."""
        return self.token_embedding.size + sum(array.size for block in self.blocks for array in block)


@dataclasses.dataclass(eq=False)
class LstmWeights:
    """The weights of an LSTM; a layer is a matrix from input and state to the gates, in the order of Keras: i f c o."""

    token_embedding: np.ndarray
    layers: list[tuple[np.ndarray, np.ndarray]]  # (inputs + D, 4 D) and its bias
    head: list[tuple[np.ndarray, np.ndarray]]  # dense layers up to the logits
    context: int | None = None  # of the model; the recurrent state has no limit
    name = "lstm"

    @property
    def input_shape(self) -> tuple[None, int | None]:
        """The shape of the ids, (B, T)."""
        return None, self.context

    @property
    def output_shape(self) -> tuple[None, None, int]:
        """The shape of the logits, (B, T, V)."""
        return None, None, len(self.head[-1][1])

    @property
    def num_parameters(self) -> int:
        """The number of weights in the matrices that each token is multiplied with."""
        return sum(matrix.size for matrix, _ in (*self.layers, *self.head))
