"""What `csipipe channels` does: generate DIR, convert FILES DIR, check DIR, look DIR."""

from __future__ import annotations

import shlex
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal, cast

from jsonargparse import ArgumentParser

from csipipe.channels import checkup, export, places, profileplot, rawcheck, statistics, words
from csipipe.channels import convert as converting
from csipipe.channels import generate as generating
from csipipe.channels.checkup import converted_report
from csipipe.channels.eigenvectors import SUBBANDS
from csipipe.channels.format import SetPart
from csipipe.channels.inputs import Input, Plan
from csipipe.channels.scene import Scene
from csipipe.channels.source import Site
from csipipe.channels.split import own_environment
from csipipe.channels.transform import Geometry
from csipipe.entry import refusing

Place = Literal["indoor", "outdoor"]
ABOUT = "Generates, converts, examines and draws CSI data, in one process."


def generate(
    folder: str,
    environment: Place = "indoor",
    train: int = 8000,
    val: int = 1000,
    test: int = 1000,
    seed: int = 0,
    model: str | None = None,
    array: str = "32x1x1",
    receive: int = 1,
    carrier: float = Scene.carrier_ghz,
    bandwidth: float = Scene.bandwidth_mhz,
    subcarriers: int = Scene.subcarriers,
    spread: float = Scene.delay_spread_ns,
    speed: float = Scene.speed_kmh,
    snapshots: int = 1,
    interval: float = Scene.interval_ms,
    delays: int | None = None,
    shift: int = 4,
    eigenvectors: bool = False,
    subbands: int = SUBBANDS,
) -> bool:
    """Write generated channels: CsiNet's files, or with --model a folder for --data.source files.

    Nothing is overwritten.

    Args:
        folder: where to write; created if it doesn't exist.
        environment: of CsiNet's files: indoor or outdoor.
        train: training rows; with --model: UEs. CsiNet has 100,000.
        val: validation rows; CsiNet has 30,000.
        test: test rows, with their untruncated channels (for ρ); CsiNet has 20,000.
        seed: of the channels; the same seed makes the same rows, however many are asked for.
        model: umi, uma, cdl-a … cdl-e (3GPP TR 38.901, by Sionna), or the package's own clusters,
            indoor or outdoor, on any array. null: CsiNet's files. The rest is for these.
        array: columns x rows x polarisations of the BTS's array.
        receive: receive antennas of a UE; each is a row.
        carrier: GHz.
        bandwidth: MHz.
        subcarriers: over the bandwidth.
        spread: RMS delay spread of cdl-a … cdl-e, ns.
        speed: km/h, the highest.
        snapshots: of each UE; each is a row.
        interval: ms between snapshots.
        delays: delay bins to keep; null: 32, or all if there are fewer.
        shift: by how much delays are rolled before truncation.
        eigenvectors: images of principal eigenvectors per subband, of all receive antennas.
        subbands: of eigenvectors.
    """
    given = dict(locals())
    if model is not None:
        scene = Scene(
            **words.sizes(array),
            receive=receive,
            carrier_ghz=carrier,
            bandwidth_mhz=bandwidth,
            subcarriers=subcarriers,
            delay_spread_ns=spread,
            speed_kmh=speed,
            snapshots=snapshots,
            interval_ms=interval,
        )
        plan = Plan(
            axes=generating.AXES,
            geometry=scene.geometry,
            delays=delays or 0,
            shift=shift,
            seed=seed,
            subbands=subbands if eigenvectors else None,
        )
        users: dict[SetPart, int] = {"train": train, "val": val, "test": test}
        described, tally = generating.generate(Path(folder), model, scene, users, plan)

        def again(shift: int) -> str:
            return _line(generate, given | {"folder": _beside(folder, shift), "shift": shift})

        print("\n".join(converted_report(Path(folder), described, tally, again)))
        return True
    for file in export.write_files(
        Path(folder), environment, train=train, val=val, test=test, seed=seed
    ):
        rate = file.rows / max(file.seconds, 1e-9)
        size = file.path.stat().st_size / 2**20
        print(f"{file.path}: {file.rows:,} rows, {size:.1f} MiB, {rate:,.0f} rows/s of CPU time")
    return True


def check(
    source: str,
    environment: str | None = None,
    beside: str | None = None,
    seed: int = 0,
) -> bool:
    """Examine channels: layout, range, scaling, domain, duplicates; with a verdict.

    Of arrays that must be converted first, it says how. Exits with status 1 unless all is good.

    Args:
        source: folder with DATA_Htrainin.mat and its siblings, or a converted one; an array's file,
            or a folder of them; or synthetic, or a source of your own, as NAME or NAME:DIR.
        environment: indoor or outdoor, or one of a converted folder; by default all of them.
        beside: another folder of either kind, or such a source, whose statistics go beside: of the
            same environment, or of all that it has.
        seed: seed of synthetic channels.
    """
    place = Path(source)
    if places.is_converted(source):
        return _check_converted(source, places.sites(source, environment), beside, seed)
    if place.is_file() or (not places.built_in(source) and not checkup.is_csinets(place)):
        files = rawcheck.raw_files(place)
        if files:
            print("\n".join(rawcheck.raw_report(files)))
            return False
    good = True
    for site in places.sites(source, environment):
        checked = places.checked(source, site, seed)
        good = good and checked.good
        print("\n".join(checkup.report(checked)))
        sets = {places.title(source): checked.sets} if checked.sets else {}
        if beside is not None:
            sets |= places.beside(beside, source, [site], seed)
        vectors = places.kind(source) == "eigenvectors"
        print(f"\n{site}\n{statistics.table(sets, vectors)}\n", flush=True)
    return good


def convert(
    files: list[str],
    axes: str | None = None,
    key: str | None = None,
    sets: str | None = None,
    environments: str | None = None,
    ues: bool = False,
    split: str = "0.8/0.1/0.1",
    seed: int = 0,
    delays: int | None = None,
    array: str | None = None,
    ports: str = "polarisation column row",
    shift: int = 0,
    scaling: Literal["sample", "set"] = "sample",
    receive: Literal["rows", "strongest"] = "rows",
    time: Literal["samples", "first"] = "samples",
    offset: float | None = None,
    eigenvectors: bool = False,
    subbands: int = SUBBANDS,
) -> bool:
    """Convert arrays (.npy .npz .mat .h5 .csv .pt) to a folder for --data.source files.

    Args:
        files: the files, and last the folder to write, which must not exist.
        axes: a word per axis, of user sample time bts rx tx angle subcarrier delay part, such as
            'sample rx tx subcarrier'; several in one axis with sizes, 'sample (part angle=32
            delay=32)'. null: guessed, or refused.
        key: the variable of a file that holds several, in a group of HDF5 group/name; for several
            files a word per file, or one for all. A file may be given once for each of its
            variables.
        sets: a word per file, of train val test: files that are sets already.
        environments: a word per file, its environment; null: all.
        ues: each file holds the channels of one UE, in the order given.
        split: shares of training, validation and test rows, or of training and test rows; a user's
            rows stay together.
        seed: of the split.
        delays: delay bins to keep; null: 32, or all if there are fewer.
        array: columns x rows x polarisations of a planar array, such as 8x4x2.
        ports: how the ports of a planar array are numbered, the slowest first; as it is: 3GPP's.
        shift: by how much delays are rolled before truncation.
        scaling: each sample by its own peak, or all by the set's.
        receive: several receive antennas become rows each, or the strongest one does.
        time: time samples become rows each, or the first one does.
        offset: the value that stands for zero; null: 0, or 0.5 for pairs of reals in [0, 1].
        eigenvectors: principal eigenvectors per subband instead of angles and delays: of all
            receive antennas together, over ports, of norm 1, stored as 0.5 + v/2.
        subbands: of eigenvectors; 3GPP's studies commonly have 13.
    """
    given = dict(locals())
    if len(files) < 2:
        raise ValueError(f"convert {files[0]}: expected files, and last the folder to write.")
    *names, folder = files
    paths = [Path(name) for name in names]
    parts = words.labels("sets", sets, paths, ("train", "val", "test"))
    places = words.labels("environments", environments, paths) or ["all"] * len(paths)
    if ues:
        if environments is not None:
            raise ValueError("--ues and --environments exclude each other.")
        places = [own_environment(ue) for ue in range(len(paths))]
    keys: Sequence[str | None] = [key] * len(paths)  # one file's may hold spaces
    if key is not None and len(paths) > 1 and len(key.split()) > 1:
        keys = words.labels("key", key, paths) or keys
    inputs = [
        Input(path, place, cast(SetPart, parts[n]) if parts else None, keys[n])
        for n, (path, place) in enumerate(zip(paths, places, strict=True))
    ]
    plan = Plan(
        axes=axes,
        geometry=Geometry(**words.sizes(array), order=tuple(ports.split())),
        delays=delays or 0,
        shift=shift,
        scaling=scaling,
        receive=receive,
        time=time,
        offset=offset,
        split=words.shares(split),
        seed=seed,
        subbands=subbands if eigenvectors else None,
    )
    described, tally = converting.convert(inputs, Path(folder), plan)

    def again(shift: int) -> str:
        return _line(convert, given | {"files": [*names, _beside(folder, shift)], "shift": shift})

    print("\n".join(converted_report(Path(folder), described, tally, again)))
    return True


def _check_converted(source: str, sites: Sequence[Site], beside: str | None, seed: int) -> bool:
    good = True
    folder = Path(source)
    sets = rawcheck.sets_of(folder, sites)
    for name, rows in sets.items():
        found = rawcheck.converted_findings(folder, rows)
        print(f"{name}: {'SUSPICIOUS' if found else 'GOOD'}")
        for finding in found:
            print(f"  {finding.verdict}: {finding.what}\n    repair: {finding.repair}")
        good = good and not found
    if beside is not None:
        sets |= places.beside(beside, source, sites, seed)
    print(f"\n{statistics.table(sets, places.kind(source) == 'eigenvectors')}\n", flush=True)
    return good


def look(
    source: str, output: str = "channels.png", environment: str | None = None, seed: int = 0
) -> bool:
    """Draw channels: three samples, and the mean profiles over delay and angle.

    Of eigenvectors, they are over subband and port.

    Args:
        source: folder with DATA_Htrainin.mat and its siblings, or a converted one; or synthetic, or
            a source of your own, as NAME or NAME:DIR.
        output: the PNG file to write; an existing one is replaced.
        environment: indoor or outdoor, or one of a converted folder; by default all of them.
        seed: seed of synthetic channels.
    """
    tests = {}
    for site in places.sites(source, environment):
        if (rows := places.sets(source, site, seed)) is not None:
            tests[site] = rows[1]
    if not tests:
        raise ValueError(f"no file in {source} has rows that can be drawn; run check on it.")
    title = places.title(source)
    sets = {f"{site} ({title}, {len(rows):,} test rows)": rows for site, rows in tests.items()}
    profileplot.draw(sets, Path(output), places.axes(source))
    print(f"{output}: {', '.join(sets)}")
    return True


def _beside(folder: str, shift: int) -> str:
    """Another folder, for the same channels with another shift."""
    return f"{Path(folder)}-shift{shift}"


def _line(command: Callable[..., bool], given: Mapping[str, Any]) -> str:
    """The line that calls a command with these arguments, without those that are its defaults."""
    line = ["python", "-m", "csipipe", "channels", command.__name__]
    for name, parameter in signature(command).parameters.items():
        value = given[name]
        if parameter.default is parameter.empty:
            line += value if isinstance(value, list) else [value]
        elif value != parameter.default:
            line += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return shlex.join(line)


COMMANDS: dict[str, Callable[..., bool]] = {
    "generate": generate,
    "convert": convert,
    "check": check,
    "look": look,
}


def parser() -> ArgumentParser:
    """A parser of all commands, from their signatures and docstrings."""
    prog = "python -m csipipe channels"
    parser = ArgumentParser(prog=prog, description=ABOUT, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    commands = parser.add_subcommands()
    for name, function in COMMANDS.items():
        about = (function.__doc__ or "").split("Args:")[0].strip()
        command = ArgumentParser(description=about, allow_abbrev=False, exit_on_error=False)
        several = "files" in signature(function).parameters
        if several:
            command.add_argument("files", nargs="+", help="the files, and last the folder to write")
        command.add_function_arguments(
            function, as_positional=True, skip={"files"} if several else None
        )
        commands.add_subcommand(name, command, help=about.splitlines()[0])
    return parser


@refusing(ArgumentError, OSError, TypeError, ValueError)
def main(arguments: list[str]) -> int:
    """Run one command; returns its exit code."""
    values = parser().parse_args([word for word in arguments if word != "--debug"])
    name = values.subcommand
    return 0 if COMMANDS[name](**values[name].as_dict()) else 1
