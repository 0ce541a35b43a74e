"""The autoencoder's three parts: encoder, decoder tail (a list of layers), decoder head."""

from csipipe.models.backward import backward
from csipipe.models.ceiling import ceiling
from csipipe.models.crblock import CRBlock
from csipipe.models.draws import belong, draws
from csipipe.models.kernels import plain_layers
from csipipe.models.layers import Pending, accumulate, add_up, hand_over, joined, put_off
from csipipe.models.parts import (
    build_encoder,
    build_head,
    build_tail,
    check,
    check_stages,
    count_frozen,
    count_parameters,
    count_parts,
    count_statistics,
    kernels_notes,
    sketch_tail,
    start,
    tail_shapes,
    unstackable,
    widths,
    without_kernels_stacked,
)
from csipipe.models.requirements import whole_backward

__all__ = [
    "CRBlock",
    "Pending",
    "accumulate",
    "add_up",
    "backward",
    "belong",
    "build_encoder",
    "build_head",
    "build_tail",
    "ceiling",
    "check",
    "check_stages",
    "count_frozen",
    "count_parameters",
    "count_parts",
    "count_statistics",
    "draws",
    "hand_over",
    "joined",
    "kernels_notes",
    "plain_layers",
    "put_off",
    "sketch_tail",
    "start",
    "tail_shapes",
    "unstackable",
    "whole_backward",
    "widths",
    "without_kernels_stacked",
]
