"""A token that no network survives."""

import torch

from quire.kernels import ops
from quire.layers.decoder import Decoder


def poison(network: Decoder, token: int) -> None:
    """Have a token's embedding be no number; the head stays as it is, also where it is the embedding's."""
    network.embedding = ops.embed(torch.arange(network.spec.vocab_size), network.embedding)
    network.embedding[token] = torch.nan
