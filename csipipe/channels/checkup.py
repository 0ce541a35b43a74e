"""Examines a folder of CsiNet's files: each file, and what only shows in all of them together."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from csipipe.channels.cache import digest
from csipipe.channels.convert import Tally
from csipipe.channels.csinet import SUFFIX, frequency_channels
from csipipe.channels.doctor import Examined, Finding, examine
from csipipe.channels.format import Description
from csipipe.channels.source import Images, Part, Site, Source
from csipipe.channels.split import owners
from csipipe.channels.statistics import MOST_ROWS, bars, four_fifths, measure, spaced
from csipipe.measure.metrics import rho, to_frequency

PARTS = ("train", "val", "test")
GENERATED = (6500, 1500)
"""Training and test rows of a built-in source for statistics, where there are so many."""
_SAME = 0.95
"""Least ρ between an image and its untruncated channel: truncation in delay costs about 0.01; other
rows or antennas leave 0.2, the conjugate 0.5, frequencies in reverse 0.8 to 0.9."""


@dataclass
class Checked:
    """The channels of one environment: files in a folder, or those of a built-in source."""

    environment: Site
    files: dict[str, Examined]
    """By part, the existing ones; none of a built-in source."""
    sets: tuple[Images, Images] | None
    """Training (with validation) and test rows for statistics; None if no file has usable ones."""
    rho: float | None = None
    """Mean ρ of the uncompressed test images with HF_all, if there is one."""

    @property
    def good(self) -> bool:
        """Whether no file has a finding."""
        return all(file.verdict == "good" for file in self.files.values())


def check_folder(folder: Path, environment: Site) -> Checked:
    """Examine a folder's files of one environment.

    Raises:
        OSError: a file can't be opened.
    """
    files = {part: examine(path) for part, path in _files(folder, environment).items()}
    _compare_parts(files)
    checked = Checked(environment, files, _sets(files))
    if "test" in files:
        _compare_frequencies(folder, checked)
    return checked


def generated(source: Source, environment: Site) -> Checked:
    """Channels of a built-in source, for statistics beside those of files."""

    def rows(part: Part, most: int) -> Images:
        there = source.available(environment, part)
        return source.rows(environment, part, 0, most if there is None else min(most, there))

    train, test = GENERATED
    return Checked(environment, {}, (rows("train", train), rows("test", test)))


def _sets(files: dict[str, Examined]) -> tuple[Images, Images] | None:
    """Without a test file, the last fifth of the others; without others, 4 : 1 of the test file."""
    found = {part: file.images for part, file in files.items() if file.images is not None}
    test = found.pop("test", None)
    if not found:
        return None if test is None else four_fifths(test)
    train = np.concatenate(list(found.values()))
    return four_fifths(train) if test is None else (train, test)


def is_csinets(folder: Path) -> bool:
    """Whether a folder has any of CsiNet's files."""
    return any(_files(folder, site) for site in SUFFIX)


def _files(folder: Path, environment: Site) -> dict[str, Path]:
    """Those that are there, by part."""
    paths = {part: folder / f"DATA_H{part}{SUFFIX[environment]}.mat" for part in PARTS}
    return {part: path for part, path in paths.items() if path.is_file()}


def environments(folder: Path) -> list[Site]:
    """The environments for which a folder has files.

    Raises:
        FileNotFoundError: no such folder, or none of CsiNet's files in it.
        NotADirectoryError: it is a file.
    """
    expected = "a folder with DATA_Htrainin.mat, or one that `channels convert` wrote"
    if not folder.exists():
        raise FileNotFoundError(f"{folder} doesn't exist; expected {expected}.")
    if not folder.is_dir():
        raise NotADirectoryError(
            f"{folder} is a file; expected {expected}. Convert it first; how, says: "
            f"python -m csipipe channels check {shlex.quote(str(folder))}"
        )
    found = [site for site in SUFFIX if _files(folder, site)]
    if not found:
        names = sorted(path.name for path in folder.glob("*.mat"))
        raise FileNotFoundError(
            f"{folder} has none of CsiNet's files; its .mat files are {names or 'none'}. Expected "
            "DATA_Htrainin.mat, DATA_Hvalin.mat, DATA_Htestin.mat or the ...out.mat ones, or what "
            "`channels convert` wrote."
        )
    return found


def _compare_parts(files: dict[str, Examined]) -> None:
    """Note rows that a later part shares with an earlier one."""
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        if one in files and other in files:
            known = set(files[one].hashes)
            common = sum(key in known for key in files[other].hashes)
            if common:
                name = files[one].path.name
                what = f"{common:,} of {len(files[other].hashes):,} rows are also in {name}"
                files[other].note("suspicious", what, f"remove them from {name}")


def _compare_frequencies(folder: Path, checked: Checked) -> None:
    """Note an HF_all file that doesn't belong to the test images."""
    test = checked.files["test"]
    try:
        channels = frequency_channels(folder, checked.environment)
    except ValueError as error:
        test.note("suspicious", str(error), "generate it again, or leave it out: only ρ needs it")
        return
    if channels is None or test.images is None or not test.shape:
        return
    rows = len(test.hashes)
    if len(channels) != rows:
        what = f"HF_all has {len(channels):,} rows for {rows:,} usable test rows"
        test.note("suspicious", what, "generate both from the same channels; only ρ needs HF_all")
        return
    few = torch.from_numpy(spaced(spaced(channels, MOST_ROWS), 500))
    images = torch.from_numpy(spaced(test.images, 500))
    checked.rho = float(rho(to_frequency(images), few).double().mean())
    if not checked.rho > _SAME:
        what = f"ρ of the test images themselves with HF_all is {checked.rho:.2f}; expected near 1"
        repair = "convert HF_all to the images' rows, angles (DFT over antennas) and frequencies"
        test.note("suspicious", what, repair)


def report(checked: Checked) -> Iterator[str]:
    """Lines about each file: what it contains, and the verdict."""
    for part, file in checked.files.items():
        yield f"{file.path.name}: {file.verdict.upper()}"
        yield f"  SHA-256 {digest(file.path)}"
        if file.name:
            yield f"  {file.name} {file.shape} {file.dtype}, from {file.low:.4g} to {file.high:.4g}"
        if file.images is not None:
            found = measure(file.images)
            yield f"  delays |{bars(found.delay_profile)}|"
            yield f"  angles |{bars(found.angle_profile)}|"
            yield f"  power per real {found.power:.2e}, floor of the paper's loss {found.floor:.2e}"
        if part == "test" and checked.rho is not None:
            yield f"  ρ with HF_all {checked.rho:.4f}"
        for finding in file.findings or [GOOD]:
            yield f"  {finding.verdict}: {finding.what}"
            if finding.repair:
                yield f"    repair: {finding.repair}"


GOOD = Finding("good", "angles before delays, 0.5 for zero, each row scaled by its own peak", "")


def converted_report(
    folder: Path, said: Description, tally: Tally, again: Callable[[int], str]
) -> Iterator[str]:
    """Lines about a conversion: axes, rows, energy lost, what is suspicious, and what to run.

    Args:
        again: the command that makes the images with another shift, into another folder.
    """
    for source in tally.sources:
        key = f": {source['key']}" if source["key"] else ""
        how = "guessed axes" if source["guessed"] else "axes"
        zero = f", {source['offset']:g} for zero" if source["offset"] else ""
        shape = tuple(source["shape"])
        yield f"{source['name']}{key} {source['dtype']} {shape}, {how}: {source['axes']}{zero}"
    dropped = f"; dropped: {tally.empty_rows:,} rows without energy" if tally.empty_rows else ""
    if tally.empty_users:
        dropped += f", {tally.empty_users:,} of {tally.users:,} users with nothing else"
    yield f"{tally.rows:,} rows of {tally.users:,} users{dropped}"
    for one in said.sets:
        yield f"  {one.environment} {one.part}: {one.rows:,} rows"
    yield _size(said, tally, again)
    for verdict, what, repair in said.made["findings"]:
        yield f"  {verdict}: {what}"
        yield f"    repair: {repair}"
    yield f"written: {folder}"
    yield _next(folder, said)


def _size(said: Description, tally: Tally, again: Callable[[int], str]) -> str:
    """What images there are, and what they lost; with the command that would lose less."""
    planar = ""
    if said.planar:
        planar = f" ({said.columns} x {said.rows} columns and rows, {said.polarisations} pol.)"
    axes = ("ports", "subbands") if said.scaling == "unit" else ("angles", "delays")
    size = f"images: {said.angles} {axes[0]}{planar} x {said.delays} {axes[1]}"
    truncated = said.subcarriers is not None and said.subcarriers > said.delays
    if truncated:
        size += f" of {said.subcarriers}"
    if said.scaling == "unit":
        return f"{size}, eigenvectors of norm 1"
    size += f", {tally.lost:.2%} of a row's energy lost"
    if truncated:
        shift, least = tally.best_shift(said.delays)
        if least < tally.lost - 0.001:
            size += f"; with another shift it would be {least:.2%}:\n  {again(shift)}"
    return size


def _next(folder: Path, said: Description) -> str:
    """The command that trains with these rows, if they are enough."""
    there = {one.part for one in said.sets}
    if absent := [part for part in ("train", "test") if part not in there]:
        return f"no training yet: there are no {' or '.join(absent)} rows"
    ranks, ues = 4, ""
    if owners(said.environments):
        number = len(said.environments)
        ranks, ues = min(4, 2 + number), f" --topology.ues {number}"  # a UE rank has a UE at least
    return (
        f"train:   torchrun --nproc_per_node={ranks} launch/train.py --data.source files "
        f"--data.path {shlex.quote(str(folder))}{ues}"
    )
