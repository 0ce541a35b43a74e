"""What section IV-D says about Fig. 6, judged; each rule was fixed before any run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from csipipe.reports.curves import Curve
from csipipe.reports.pages import Claim, every
from csipipe.reports.preset import METHODS, OURS, PANELS

Panels = Mapping[tuple[str, str], Curve]
"""Curves by panel and method."""
SIMILAR = 1.10
"""A test loss up to this factor times another's is similar to it."""
_RIVALS = METHODS[1:]


def claims(curves: Panels) -> list[Claim]:
    """Every claim; those about panels that this report doesn't have are not judged."""
    ours = {panel: curves.get((panel, OURS)) for panel in PANELS}
    asked = sorted({panel for panel, _ in curves})
    return [
        _cheapest(curves, asked),
        _similar(curves, asked),
        _order(
            "Outdoor 1/8 (e) has a slightly higher loss than indoor 1/8 (a)",
            ours,
            [("e", "a")],
            lambda c: c.end,
        ),
        _order(
            "Outdoor 1/8 (e) varies more over UEs than indoor 1/8 (a)",
            ours,
            [("e", "a")],
            lambda c: c.spread,
        ),
        _consistently_highest(ours),
        _order(
            "Non-IID fluctuates more over UEs than indoor and outdoor (c > a, e; d > b, f)",
            ours,
            [("c", "a"), ("c", "e"), ("d", "b"), ("d", "f")],
            lambda c: c.spread,
        ),
        _order(
            "A larger codeword makes up for the degradation (a > b, c > d, e > f)",
            ours,
            [("a", "b"), ("c", "d"), ("e", "f")],
            lambda c: c.end,
        ),
        _order(
            "A larger codeword makes up for the fluctuation over UEs (a > b, c > d, e > f)",
            ours,
            [("a", "b"), ("c", "d"), ("e", "f")],
            lambda c: c.spread,
        ),
        _beaten_in_f(curves),
    ]


def _cheapest(curves: Panels, panels: list[str]) -> Claim:
    """At CSILocal's total exchange, no benchmark was lower."""
    judged: list[bool | None] = []
    beaten = []
    for panel in panels:
        mine, rivals = _with_rivals(curves, panel, _RIVALS)
        if mine is None:
            judged.append(None)
            continue
        lower = [m for m, c in rivals.items() if c.loss_at(mine.scalars[-1]) < mine.lowest]
        beaten += [f"{m} in ({panel})" for m in lower]
        judged.append(None if len(rivals) < len(_RIVALS) and not lower else not lower)
    count = f"in {judged.count(True)} of {len(judged)} panels"
    return Claim(
        "CSILocal always achieves the lowest test loss at the same exchange (judged at CSILocal's "
        "total exchange)",
        "in all panels",
        count + (f"; lower: {', '.join(beaten)}" if beaten else ""),
        every(judged),
    )


def _similar(curves: Panels, panels: list[str]) -> Claim:
    """At the end, CSILocal's loss is close to the best benchmark's, or below."""
    judged: list[bool | None] = []
    shown = []
    for panel in panels:
        mine, rivals = _with_rivals(curves, panel, _RIVALS)
        if mine is None or len(rivals) < len(_RIVALS):
            judged.append(None)
            continue
        ratio = mine.end / min(c.end for c in rivals.values())
        shown.append(f"({panel}) ×{ratio:.2f}")
        judged.append(ratio <= SIMILAR)
    return Claim(
        f"CSILocal's final loss is similar to the benchmarks' (judged: at most {SIMILAR:.2f} times "
        "the best one's, after the same iterations)",
        "in words",
        ", ".join(shown) or "missing",
        every(judged),
    )


def _order(
    text: str,
    ours: Mapping[str, Curve | None],
    pairs: list[tuple[str, str]],
    figure: Callable[[Curve], float],
) -> Claim:
    """CSILocal's figure is higher in the first panel of every pair."""
    judged: list[bool | None] = []
    shown = []
    for high, low in pairs:
        above, below = ours[high], ours[low]
        if above is None or below is None:
            judged.append(None)
            continue
        shown.append(f"({high}) {figure(above):.2e}, ({low}) {figure(below):.2e}")
        judged.append(figure(above) > figure(below))
    return Claim(text, "in words", "; ".join(shown) or "panels missing", every(judged))


def _consistently_highest(ours: Mapping[str, Curve | None]) -> Claim:
    """Non-IID is above both others at each evaluation of the second half."""
    mine, others = ours["c"], [ours["a"], ours["e"]]
    text = (
        "Non-IID 1/8 (c) has a consistently higher loss than (a) and (e) (judged: at every "
        "evaluation of the second half)"
    )
    if mine is None or None in others:
        return Claim(text, "in words", "panels missing", None)
    half = len(mine.loss) // 2
    above = [
        all(other is not None and value > other.loss[i] for other in others)
        for i, value in enumerate(mine.loss)
    ][half:]
    return Claim(text, "in words", f"at {sum(above)} of {len(above)} evaluations", all(above))


def _beaten_in_f(curves: Panels) -> Claim:
    """The paper grants FedAvg and FedProx the lower final loss in panel f."""
    mine, rivals = _with_rivals(curves, "f", ("fedavg", "fedprox"))
    text = "FedAvg and FedProx end with a lower loss than CSILocal in (f), for a larger exchange"
    if mine is None or len(rivals) < 2:
        return Claim(text, "in words", "runs missing", None)
    shown = ", ".join(f"{m} {c.end:.2e}" for m, c in rivals.items())
    holds = all(c.end < mine.end and c.scalars[-1] > mine.scalars[-1] for c in rivals.values())
    return Claim(text, "in words", f"CSILocal {mine.end:.2e}, {shown}", holds)


def _with_rivals(
    curves: Panels, panel: str, methods: tuple[str, ...]
) -> tuple[Curve | None, dict[str, Curve]]:
    rivals = {m: curves[panel, m] for m in methods if (panel, m) in curves}
    return curves.get((panel, OURS)), rivals
