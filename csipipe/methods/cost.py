"""What each method exchanges, from the settings alone: arithmetic, nothing is trained.

The paper's count: scalars that cross between UEs and BTS in training, over all UEs; iteration
means one exchange. BatchNorm's running statistics are outside of it.
"""

from __future__ import annotations

from csipipe.models import count_parts
from csipipe.settings.config import Method, Settings


def shared_parts(method: Method) -> tuple[str, ...]:
    """Parts of the model that a federated method averages; the others stay at their UE."""
    if method in ("csilocal", "centralised"):
        return ()
    return ("tail", "head") if method.endswith("per") else ("encoder", "tail", "head")


def exchanged_per_iteration(settings: Settings) -> dict[str, int]:
    """Scalars `up` (UE → BTS) and `down` in one iteration, over all UEs.

    CSILocal: smashed data and the gradient at the head's input go up, the tail's output and the
    gradient at the encoder's output down. Federated methods: the shared parts, or their gradient,
    up, and the mean of all UEs down. Centralised: nothing.
    """
    model = settings.model
    if settings.method == "csilocal":
        each = settings.train.batch_size * (model.c1 + model.c2)
    else:
        sizes = count_parts(model)
        each = sum(sizes[part] for part in shared_parts(settings.method))
    total = settings.topology.ues * each
    return {"up": total, "down": total}
