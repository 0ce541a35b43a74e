"""Memory that a UE takes for as long as a run lasts: arithmetic, from the settings alone."""

from __future__ import annotations

from csipipe.methods.common import some_are_absent
from csipipe.methods.cost import exchanged_parts
from csipipe.models import count_frozen, count_parts, count_statistics, widths
from csipipe.settings.config import Settings

_MIB = 2**20
_BYTES = {"fp32": 4, "bf16": 2}


def of_a_ue(settings: Settings) -> dict[str, int]:
    """Bytes of a UE's `weights` and `moments`, and of what the `bts` keeps for it; where they are
    kept, of the weights' `mean`, and of what updates lost at their codec (`feedback`).

    Weights include those that never learn, BatchNorm's statistics, the ranges of codeword entries
    (`comm.scale range`) and, in the federated methods, what all UEs agreed on.
    Gradients and activations aren't included: only UEs of the iteration have some.
    """
    spec, sizes = settings.spec, count_parts(settings.model)
    statistics = count_statistics(settings.model)
    parts = [part for part in sizes if part != "tail" or not spec.pipelined]
    shared = exchanged_parts(settings)
    agreed = sum(sizes[part] + statistics[part] for part in shared)
    elsewhere = [*settings.train.frozen, *(shared if spec.bts_steps else [])]
    stepped = sum(sizes[part] for part in parts if part not in elsewhere)
    ranges = 2 * widths(settings.model)[0] if settings.feedback_bits else 0  # centre and spread
    frozen = count_frozen(settings.model)
    own = sum(sizes[part] + frozen[part] + statistics[part] for part in parts) + ranges
    update = sum(sizes[part] for part in shared)
    return {
        "weights": 4 * (own + agreed),
        "moments": 2 * _BYTES[settings.train.moments] * stepped,
        "mean": 4 * own if settings.train.average else 0,
        "feedback": 4 * update if settings.comm.error_feedback else 0,
        "bts": 4 * agreed if some_are_absent(settings) else 0,
    }


def note(settings: Settings) -> str:
    """What a run says of it."""
    held, ues = of_a_ue(settings), settings.topology.ues
    parts = [
        f"{held['weights'] / _MIB:.2f} MiB of weights",
        f"{held['moments'] / _MIB:.2f} of Adam's moments ({settings.train.moments})",
    ]
    more = {
        "mean": "of the weights' mean",
        "feedback": "of what updates lost",
        "bts": "at the BTS of what it knows",
    }
    parts += [f"{held[key] / _MIB:.2f} {what}" for key, what in more.items() if held[key]]
    total = ues * sum(held.values()) / _MIB
    return (
        f"memory of a UE: {', '.join(parts)}; {total:,.0f} MiB for {ues:,}, and about as much "
        "again once a checkpoint is saved"
    )
