"""The autoencoder's three parts: encoder, decoder tail (a list of layers), decoder head."""

from csipipe.models.autoencoder import (
    build_encoder,
    build_head,
    build_tail,
    count_parameters,
    count_parts,
    count_statistics,
    tail_shapes,
)
from csipipe.models.crblock import CRBlock

__all__ = [
    "CRBlock",
    "build_encoder",
    "build_head",
    "build_tail",
    "count_parameters",
    "count_parts",
    "count_statistics",
    "tail_shapes",
]
