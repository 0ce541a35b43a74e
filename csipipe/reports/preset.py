"""A report preset: what all runs of the paper's figures share, and which points they take.

`launch/configs/reports/*.yaml` holds the presets. Codeword sizes follow from the compression
ratios, c1 = c2 = 2·A·D / ratio, so that another input size keeps the paper's ratios.
"""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from csipipe import channels
from csipipe.files import shipped
from csipipe.plotting import name_of
from csipipe.settings import commandline, tables
from csipipe.settings.config import DataSettings, Environment, Settings, suited

PRESETS = shipped("launch/configs/reports")

METHODS: tuple[str, ...] = (
    "csilocal",
    "fedavg",
    "fedavgper",
    "fedprox",
    "fedproxper",
    "fedgrad",
    "fedgradper",
)
OURS = METHODS[0]
REFERENCE = "centralised"

PANELS: dict[str, tuple[Environment, int]] = {
    "a": ("indoor", 8),
    "b": ("indoor", 4),
    "c": ("noniid", 8),
    "d": ("noniid", 4),
    "e": ("outdoor", 8),
    "f": ("outdoor", 4),
}
"""Fig. 6: distribution and compression ratio (8 is c = 256 of 2048 reals, 4 is c = 512)."""

NO_DATA = ("--data.source", DataSettings().source, "--data.path", "null")
"""Where no data is looked at, none is asked for."""
DECIDED = ("model.c1", "model.c2", "data.environment", "train.lr", "train.seed", "run.dir")
"""What a report itself sets for each run, besides the method; some set more."""


def panel_name(panel: str) -> str:
    """Distribution and compression ratio of a panel."""
    environment, ratio = PANELS[panel]
    return f"{name_of(environment)}, compression 1/{ratio}"


@dataclass(frozen=True, kw_only=True)
class Search:
    """The learning-rate search: on one panel, judged on held-out training rows."""

    panel: str
    """Panel of Fig. 6 whose data and codeword are used."""
    grid: tuple[float, ...]
    """Rates tried, the same for every method."""
    seeds: tuple[int, ...]
    """Seeds of the weights and draws; the median over them is used."""
    iterations: int
    """Iterations of each run."""
    holdout: float
    """Share of the training rows that is held out to judge by."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings and points of the reports; see the files for their sizes."""

    name: str
    arguments: tuple[str, ...]
    """Settings of all runs, as the command line takes them."""
    processes: int
    """Ranks of a run; fewer where a method can't use as many."""
    compression: tuple[int, ...]
    """Fig. 5's points: reals of a sample per real of its codeword, ascending in c."""
    seeds: tuple[int, ...]
    """Seeds of the weights and draws: the headline takes all, the figures the first."""
    rates: dict[str, float]
    """Learning rate by method; empty: train.lr of the settings."""
    rates_file: Path | None
    """Where `search` writes the rates; None: the preset has its rates from the paper."""
    search: Search | None = None
    panels: tuple[str, ...] = tuple(PANELS)
    """Panels of Fig. 6."""
    headline: tuple[str, ...] = METHODS
    """Methods of the headline."""
    loss: float | None = None
    """The headline's given test loss; None: by its rule."""
    iterations: dict[str, int] = field(default_factory=dict)
    """Iterations by method, where they aren't train.iterations of the settings."""

    def __post_init__(self) -> None:
        if not (self.compression and self.panels and self.seeds):
            raise ValueError(
                f"preset {self.name}: compression, panels and seeds must not be empty."
            )
        if list(self.compression) != sorted(self.compression, reverse=True):
            raise ValueError(
                f"preset {self.name}: compression is {self.compression}; order it from the "
                "smallest codeword to the largest, such as 64, 32, 16, 8, 4."
            )
        for method in (*self.headline, *self.iterations):
            tables.check("method", method)
        for panel in self.panels:
            if panel not in PANELS:
                raise ValueError(
                    f"preset {self.name}: unknown panel {panel!r}; expected {', '.join(PANELS)}."
                )

    def common(self) -> Settings:
        """Settings that all runs of the preset share, as CSILocal's runs have them.

        Raises:
            ValueError: a setting that doesn't exist, can't be used, or that reports set themselves.
        """
        return _parse(self.arguments, OURS)

    def settings(self, method: str, environment: Environment, ratio: int, seed: int) -> Settings:
        """Settings of one run, without `run.dir`; raises as `common`."""
        common = _parse(self.arguments, method)
        if None in (common.model.angles, common.model.delays):
            common = channels.sized(common)
        model, train, topology = common.model, common.train, common.topology
        reals = model.reals
        if reals % ratio:
            raise ValueError(
                f"model.angles {model.angles} × model.delays {model.delays} are {reals} reals, "
                f"which the compression ratio 1/{ratio} of preset {self.name} doesn't divide; "
                f"choose sizes whose product is a multiple of {max(self.compression) // 2}."
            )
        return Settings(
            method=method,
            model=replace(model, c1=reals // ratio, c2=reals // ratio),
            topology=topology,
            data=replace(common.data, environment=environment),
            train=replace(
                train,
                iterations=self.iterations.get(method, train.iterations),
                lr=self.rates.get(method, train.lr),
                seed=seed,
            ),
            comm=common.comm,
            run=common.run,
        )


@cache
def _sections(arguments: tuple[str, ...]) -> dict[str, Any]:
    return commandline.sections(arguments)


def _parse(arguments: tuple[str, ...], method: str) -> Settings:
    """What a method's run has of settings that several methods' runs share."""
    return Settings(**suited(method, _sections(arguments)))


def load(
    name: str, quick: bool = False, user: Sequence[str] = (), decided: Sequence[str] = ()
) -> Preset:
    """Read a preset.

    Args:
        name: of a file in `launch/configs/reports`, or a path of such a file.
        quick: with what the file has as `quick`: fewer panels and points.
        user: settings as the command line takes them; they win over the preset's.
        decided: what the report sets itself, beside `DECIDED`; a section ends with a dot.

    Raises:
        ValueError: an unknown preset or key, or a user's setting that reports set themselves.
    """
    file = PRESETS / f"{name}.yaml" if not name.endswith(".yaml") else Path(name)
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
        raise ValueError(f"--preset {name}: there is no {file}; known presets: {known}.")
    try:
        read: dict[str, Any] = yaml.safe_load(file.read_text())
        fewer = read.pop("quick", {})
        preset = _preset(file, read | fewer if quick else read)
    except (ArgumentError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is not a preset of reports: {error}.") from error
    own = ("train.iterations",) if preset.iterations else ()
    _refuse_decided(preset.arguments, tuple(user), (*DECIDED, *decided, *own))
    return replace(preset, arguments=(*preset.arguments, *user), rates=_rates(preset.rates_file))


def _preset(file: Path, read: dict[str, Any]) -> Preset:
    """A preset's file without the user's settings and the rates."""
    arguments = _flat(read.pop("settings", None) or {})
    if (config := read.pop("config", None)) is not None:
        arguments = ["--config", str((file.parent / config).resolve()), *arguments]
    rates_file = read.pop("rates", None)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Preset, skip={"name", "arguments", "rates", "rates_file"})
    return Preset(
        name=file.stem,
        arguments=tuple(arguments),
        rates_file=None if rates_file is None else file.parent / rates_file,
        rates={},
        **vars(parser.instantiate(parser.parse_object(read))),
    )


def _rates(file: Path | None) -> dict[str, float]:
    """Learning rate by method, as `search` wrote it."""
    if file is None or not file.is_file():
        return {}
    read = yaml.safe_load(file.read_text())
    known = {*METHODS, REFERENCE}
    if not isinstance(read, dict) or not set(read) <= known:
        raise ValueError(
            f"{file} isn't a table of learning rates by method; write it again with "
            "csipipe reproduce search."
        )
    return {method: float(rate) for method, rate in read.items()}


def _refuse_decided(preset: tuple[str, ...], user: tuple[str, ...], own: tuple[str, ...]) -> None:
    """Refuse (ValueError) a user's value for a setting that a report sets for each run."""
    if not user:
        return
    before, after = (
        commandline.dotted(commandline.plainly(_sections(words)))
        for words in ((*preset, *NO_DATA), (*preset, *user, *NO_DATA))
    )
    parts = tuple(key for key in own if key.endswith("."))
    decided = [
        key
        for key, _, _ in commandline.differences(before, after)
        if key in own or key.startswith(parts)
    ]
    decided += ["method" for word in user if word.split("=")[0] == "--method"]
    if decided:
        raise ValueError(
            f"{decided[0]} is among the settings to pass on, but a report sets it for each run; "
            "leave it out."
        )


def plain(settings: Settings) -> dict[str, Any]:
    """Settings by dotted key, as YAML has them."""
    return commandline.dotted(commandline.plain(settings))


def _flat(settings: dict[str, Any]) -> list[str]:
    """Nested settings as arguments of `csipipe train`."""
    return [
        word
        for key, value in commandline.dotted(settings).items()
        for word in (f"--{key}", commandline.argument(value))
    ]
