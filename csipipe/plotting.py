"""How methods and distributions look in all pictures: distinguishable in grey too.

Drawn without pyplot, so that no display is needed.
"""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from csipipe.files import whole

_NAMES = {
    "csilocal": "CSILocal",
    "splitfed": "SplitFed",
    "fedavg": "FedAvg",
    "fedavgper": "FedAvgPer",
    "fedprox": "FedProx",
    "fedproxper": "FedProxPer",
    "fedgrad": "FedGrad",
    "fedgradper": "FedGradPer",
    "centralised": "centralised",
    "indoor": "Indoor",
    "outdoor": "Outdoor",
    "noniid": "Non-IID",
}

_DASHED, _DOTTED, _MIXED = (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5))
_STYLES: dict[str, dict[str, Any]] = {
    "csilocal": {"color": "black", "linestyle": "-", "marker": "o", "linewidth": 2.2},
    "splitfed": {"color": "#8e44ad", "linestyle": _DASHED, "marker": "v"},
    "fedavg": {"color": "#0059b3", "linestyle": "-", "marker": "s"},
    "fedavgper": {"color": "#0059b3", "linestyle": _DASHED, "marker": "s", "mfc": "white"},
    "fedprox": {"color": "#c0392b", "linestyle": _MIXED, "marker": "^"},
    "fedproxper": {"color": "#c0392b", "linestyle": _DOTTED, "marker": "^", "mfc": "white"},
    "fedgrad": {"color": "#4d9900", "linestyle": "-", "marker": "D"},
    "fedgradper": {"color": "#4d9900", "linestyle": _DASHED, "marker": "D", "mfc": "white"},
    "centralised": {"color": "0.35", "linestyle": _MIXED, "linewidth": 1.6},
    "indoor": {"color": "#0059b3", "linestyle": "-", "marker": "o"},
    "outdoor": {"color": "#c0392b", "linestyle": _DASHED, "marker": "s"},
    "noniid": {"color": "black", "linestyle": _MIXED, "marker": "^"},
}
_LETTERS = 10
"""Of a title, per inch."""
LOSS = "test loss ‖Ĥ − H‖² / ‖H‖²"


def name_of(key: str) -> str:
    """A method or distribution as pictures and tables call it; one of no table by its own name."""
    return _NAMES.get(key, key)


def style(key: str) -> dict[str, Any]:
    """Line, marker and label of a method or distribution; grey for one of no table."""
    look = _STYLES.get(key, {"color": "0.5", "linestyle": "-"})
    return {"linewidth": 1.3, "markersize": 4.5, "label": name_of(key)} | look


def scale(largest: float, unit: str) -> tuple[float, str]:
    """A divisor that gives an axis small numbers, and its unit, such as 10⁹ parameters."""
    power = 3 * math.floor(math.log10(max(largest, 1.0)) / 3)
    superscript = str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return 10.0**power, f"10{superscript} {unit}" if power else unit


def entitle(figure: Figure, title: str) -> None:
    """Set a title over all panels, in as many lines as fit; a long path is broken, too."""
    width = int(figure.get_figwidth() * _LETTERS)
    figure.suptitle(textwrap.fill(title, width), fontsize="medium")


def save(figure: Figure, file: Path) -> None:
    """Write a PNG, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial:
        figure.savefig(partial, dpi=150, format="png")
