"""Table I as CSV, PNG and a Markdown verdict beside the paper's figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from csipipe import plotting
from csipipe.bench.table import spread
from csipipe.files import write_file, write_table
from csipipe.reports import pages

PAPER = {
    ("indoor", 256, 400): (0.0560, 0.0583),
    ("indoor", 256, 800): (0.0952, 0.1160),
    ("indoor", 512, 400): (0.0574, 0.0597),
    ("indoor", 512, 800): (0.0974, 0.1184),
    ("outdoor", 256, 400): (0.0561, 0.0582),
    ("outdoor", 256, 800): (0.0951, 0.1160),
    ("outdoor", 512, 400): (0.0562, 0.0596),
    ("outdoor", 512, 800): (0.0972, 0.1184),
}
"""Table I of the paper: seconds per iteration with and without pipeline, by (environment, c, B)."""
_COLUMNS = ("q1", "median", "q3")


@dataclass(frozen=True)
class Row:
    """One finished cell: seconds per iteration of every round, with and without pipeline."""

    environment: str
    c: int
    batch_size: int
    ues: int
    with_pipeline: list[float]
    without: list[float]

    @classmethod
    def of(cls, content: dict[str, Any]) -> Row:
        """A cell's file, as `table1.measure` writes it.

        Raises:
            ValueError, KeyError, TypeError: something else.
        """
        found = content["candidates"]
        times = [[float(v) for v in found[content[key]]["seconds"]] for key in ("with", "without")]
        if not times[0] or len(times[0]) != len(times[1]):
            raise ValueError("rounds are missing")
        ues = found[content["with"]]["settings"]["topology"]["ues"]
        return cls(**content["cell"], ues=ues, with_pipeline=times[0], without=times[1])

    @property
    def saved(self) -> list[float]:
        """Share of the time saved, 1 - t_with/t_without, round by round."""
        return [1 - a / b for a, b in zip(self.with_pipeline, self.without, strict=True)]

    @property
    def gain(self) -> list[float]:
        """The paper's percentage, t_without/t_with - 1, round by round."""
        return [b / a - 1 for a, b in zip(self.with_pipeline, self.without, strict=True)]

    @property
    def paper(self) -> tuple[float, float] | None:
        """The paper's seconds with and without pipeline, if this is a cell of its table."""
        return PAPER.get((self.environment, self.c, self.batch_size))

    @property
    def paper_saved(self) -> float | None:
        """Share of the time that the paper's pipeline saves."""
        return None if self.paper is None else 1 - self.paper[0] / self.paper[1]


def bound(stages: int, micro_batches: int) -> float:
    """Largest share of time that S equal stages and M micro-batches can save: 1-(M+S-1)/(S·M)."""
    return 1 - (micro_batches + stages - 1) / (stages * micro_batches)


def write(folder: Path, rows: Sequence[Row], stages: int, micro_batches: int) -> str:
    """Write table1.csv, table1.png and table1.md into `folder`; returns the last one's text."""
    if not rows:
        return "no cell is finished yet"
    best = bound(stages, micro_batches)
    text = verdict(rows, best, stages, micro_batches)
    write_csv(folder / "table1.csv", rows, best)
    write_file(folder / "table1.md", text)
    plotting.save(picture(rows, best), folder / "table1.png")
    return text


def write_csv(file: Path, rows: Sequence[Row], best: float) -> None:
    """One line per cell; times in seconds per iteration, shares as fractions of 1."""
    series = ("with", "without", "time_saved", "without_over_with_minus_1")
    header = ["environment", "c", "batch_size", "rounds"]
    header += [f"{name}_{column}" for name in series for column in _COLUMNS]
    header += ["bound_saved", "paper_with", "paper_without", "paper_time_saved"]
    lines = []
    for row in rows:
        values: list[Any] = [row.environment, row.c, row.batch_size, len(row.saved)]
        for numbers in (row.with_pipeline, row.without, row.saved, row.gain):
            s = spread(numbers)
            values += [f"{s[column]:.6g}" for column in _COLUMNS]
        published = row.paper or ("", "")
        saved = "" if row.paper_saved is None else f"{row.paper_saved:.4f}"
        lines.append([*values, f"{best:.4f}", *published, saved])
    write_table(file, header, lines)


def verdict(rows: Sequence[Row], best: float, stages: int, micro_batches: int) -> str:
    """Markdown: the table, ours beside the paper's, and what it says."""
    heads = ["cell", "with (s)", "without (s)", "saved", "gain"]
    heads += ["paper: with / without (s)", "paper: saved", "paper: gain"]
    return pages.page(
        "Table I: time per iteration with and without the pipeline",
        f"{rows[0].ues} UEs. With: {stages} BTS stages, {micro_batches} micro-batches; without: "
        "one BTS stage, the same micro-batches. Medians over rounds in which both took turns, with "
        "quartiles in brackets. *Saved* is the median over rounds of 1 − t_with/t_without, *gain* "
        "that of t_without/t_with − 1, the percentage in the paper's text. Both are taken round "
        "by round, since a slow moment slows the two turns of a round alike; they needn't be what "
        "the median times beside them would give.",
        pages.table(heads, map(_cells, rows)),
        f"Bound for {stages} equal stages and {micro_batches} micro-batches: {best:.1%} saved, "
        "if an iteration consisted of the tail alone and every stage had its own core.",
        _judgement(rows, best),
    )


def _cells(row: Row) -> list[str]:
    seconds = [
        f"{s['median']:.3f} [{s['q1']:.3f}, {s['q3']:.3f}]"
        for s in map(spread, (row.with_pipeline, row.without))
    ]
    shares = [_share(spread(row.saved)), _share(spread(row.gain))]
    paper = ["–"] * 3
    if row.paper is not None and row.paper_saved is not None:
        a, b = row.paper
        paper = [f"{a:.4f} / {b:.4f}", f"{row.paper_saved:.1%}", f"{b / a - 1:.1%}"]
    return [_name(row), *seconds, *shares, *paper]


def _name(row: Row) -> str:
    return f"{row.environment}, c {row.c}, B {row.batch_size}"


def _share(s: dict[str, float]) -> str:
    """Median and quartiles."""
    return f"{s['median']:.1%} [{s['q1']:.1%}, {s['q3']:.1%}]"


def _judgement(rows: Sequence[Row], best: float) -> str:
    """What the table says, and where the quartiles of the rounds don't carry it."""
    saved = [(row, spread(row.saved)) for row in rows]
    values = [s["median"] for _, s in saved]
    text = [f"The pipeline saves {min(values):.1%} to {max(values):.1%} of the time"]
    beside = [(s, row.paper_saved) for row, s in saved if row.paper_saved is not None]
    if beside:
        published = [p for _, p in beside]
        text[0] += (
            f"; in the same cells the paper saves {min(published):.1%} to {max(published):.1%}."
        )
        more, less = sum(s["q1"] > p for s, p in beside), sum(s["q3"] < p for s, p in beside)
        text.append(
            f"More than the paper's is saved in {more} of {len(beside)} cells, less in {less}; in "
            f"{len(beside) - more - less} the paper's is between the quartiles, within the noise."
        )
    else:
        text[0] += "."
    unclear = [_name(row) for row, s in saved if s["q1"] <= 0 <= s["q3"]]
    if unclear:
        text.append(
            f"The quartiles include 0, so what is saved is within the noise: {'; '.join(unclear)}."
        )
    slower = [_name(row) for row, s in saved if s["q3"] < 0]
    if slower:
        text.append(f"Time is lost in: {'; '.join(slower)}.")
    sizes = sorted({row.batch_size for row in rows})
    if len(sizes) > 1:
        text.append(_by_size(rows, sizes[0], sizes[-1]))
    text.append(f"The best cell reaches {max(values) / best:.0%} of the bound.")
    if max(values) > best:
        text.append("What is above the bound is noise of this machine, not the pipeline.")
    return " ".join(text)


def _by_size(rows: Sequence[Row], small: int, large: int) -> str:
    """Whether larger batches save more: all rounds of the one size beside those of the other."""
    few, many = (
        spread([share for row in rows if row.batch_size == size for share in row.saved])
        for size in (small, large)
    )
    if few["q3"] < many["q1"]:
        found = "more than"
    elif many["q3"] < few["q1"]:
        found = "less than"
    else:
        found = "the same, within the noise, as"
    return (
        f"At {large} samples per UE it saves {found} at {small} ({_share(many)}, {_share(few)}); "
        "the paper's saves more."
    )


def picture(rows: Sequence[Row], best: float) -> Figure:
    """Seconds above, share of the time saved below; quartiles as whiskers."""
    figure = Figure(figsize=(max(6.0, 1.5 + 1.1 * len(rows)), 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    places = range(len(rows))
    looks: list[dict[str, Any]] = [
        {"label": "with pipeline", "color": "0.35"},
        {"label": "without", "color": "0.85", "hatch": "//", "edgecolor": "0.2"},
    ]
    for shift, look, times in zip(
        (-0.2, 0.2),
        looks,
        ([r.with_pipeline for r in rows], [r.without for r in rows]),
        strict=True,
    ):
        middles, whiskers = _whiskers(times)
        top.bar([p + shift for p in places], middles, 0.4, yerr=whiskers, capsize=3, **look)
    top.set_ylabel("time per iteration (s)")
    above: dict[str, Any] = {
        "loc": "lower right",
        "bbox_to_anchor": (1, 1),
        "frameon": False,
        "ncols": 3,
    }
    top.legend(**above)
    middles, whiskers = _whiskers([[100 * v for v in row.saved] for row in rows])
    bottom.errorbar(places, middles, yerr=whiskers, fmt="o", color="black", capsize=3, label="ours")
    known = [
        (p, 100 * row.paper_saved) for p, row in enumerate(rows) if row.paper_saved is not None
    ]
    if known:
        bottom.plot(*zip(*known, strict=True), "s", mfc="white", mec="black", label="paper")
    bottom.axhline(100 * best, color="0.4", linestyle="--", label="bound")
    bottom.axhline(0, color="0.7", linewidth=0.8)
    bottom.set_ylabel("time saved (%)")
    bottom.set_xticks(list(places), [f"{r.environment}\nc {r.c}\nB {r.batch_size}" for r in rows])
    bottom.set_xlabel("environment, codeword dimension c, batch size B per UE")
    bottom.legend(**above)
    figure.supxlabel(
        "Medians over rounds, whiskers to the quartiles; time saved is the median of\n"
        "1 − t_with/t_without of each round, not of the median times above.",
        fontsize="small",
    )
    return figure


def _whiskers(series: Sequence[Sequence[float]]) -> tuple[list[float], list[list[float]]]:
    """Medians, and how far the quartiles are below and above them."""
    found = [spread(values) for values in series]
    below = [s["median"] - s["q1"] for s in found]
    above = [s["q3"] - s["median"] for s in found]
    return [s["median"] for s in found], [below, above]
