"""What `csipipe evaluate` does: read runs, measure them on one test set, show and write results."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor, nn

from csipipe.comm import collectives
from csipipe.comm.world import World
from csipipe.device import pick_device, set_threads
from csipipe.evaluation import distribution, feedback, samples, table, testset
from csipipe.evaluation.summary import Evaluated
from csipipe.files import in_words, write_file
from csipipe.run import ceiling, trained
from csipipe.run.ceiling import Ceiling
from csipipe.run.trained import Trained
from csipipe.settings import commandline, launcher
from csipipe.settings.config import Precision

ABOUT = """Evaluates the weights of the run in directory RUN: the paper's loss, centred NMSE, ρ and
SGCS, per UE, mean and over samples. A run in progress, or an interrupted one, is evaluated from its
newest checkpoint. One process is enough; under torchrun the ranks share the rows."""
MANY = 8
"""Most runs that a picture and a table can show well."""


def main(arguments: list[str]) -> int:
    """Evaluate, as the only process or as a rank of a torchrun; returns the exit code."""
    launch = launcher.launched(arguments)
    arguments = launch.arguments
    if {"-h", "--help"} & set(arguments) and not launch.speaks:
        return 0
    if launch.leftover:
        print(
            f"csipipe: {launch.leftover} is ignored: neither torchrun nor DeepSpeed's launcher "
            "started this process, so it works alone.",
            file=sys.stderr,
        )
    parser = commandline.RunParser("python -m csipipe evaluate", ABOUT)
    add_arguments(parser)
    world = None
    try:
        world = World.launched(launch.by) if launch.by else None
        options, settings = parser.parse(arguments)
        run(options, settings, world)
        if world is not None:
            world.part()
    except Exception as error:
        if world is not None:
            world.fail(error, "--debug" in arguments)
        if not launch.speaks_here:
            return 1
        if "--debug" in arguments or not isinstance(error, ValueError | OSError):
            raise
        print(f"csipipe: error: {in_words(error)}", file=sys.stderr)
        return 1
    return 0


def add_arguments(parser: ArgumentParser) -> None:
    """The command's own options; settings are what is left."""
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="RUN", help="more runs, side by side"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where to write; RUN/evaluation, with --compare RUN/comparison",
    )
    parser.add_argument(
        "--bits",
        action="store_true",
        help="NMSE and SGCS against feedback bits too, beside PCA, the strongest bins and, for "
        "eigenvectors of two polarisations, 3GPP's enhanced Type II codebook",
    )


def run(options: Namespace, changes: Sequence[str], world: World | None) -> None:
    """Evaluate; collective where there is a world. Rank 0 shows and writes.

    Args:
        changes: settings that replace the runs' (`--data.source csinet …`).

    Raises:
        ValueError, OSError: runs, data or settings that can't be used; named before the ranks meet.
    """
    runs = _read(options, changes)
    train = runs[0].settings.train
    rank, ranks = (world.rank, world.size) if world else (0, 1)
    set_threads(train.threads, world.local_size if world else 1)
    device = pick_device(train.device, world.local_rank if world else 0)
    _check_same(runs)
    models = [run.models() for run in runs]
    rows = testset.load(runs[0].settings)
    if world:
        world.ready("data")
        world.connect(runs[0].settings.run.timeout)
    total = collectives.total if world else (lambda values: values)

    def measure(modules: Sequence[nn.Module], precision: Precision = "fp32") -> Tensor:
        return samples.measure(modules, rows, precision, device, rank, ranks, total)

    found = []
    for one, mine in zip(runs, models, strict=True):
        found.append(Evaluated(one, measure(mine, one.settings.train.precision)))
        for model in mine:
            model.cpu()
    points = None
    if options.bits:
        points = feedback.curves(list(zip(_names(runs), runs, models, strict=True)), rows, measure)
    if world:
        world.leave()  # before the report: nobody has to wait while it is drawn
    if rank == 0:
        found = [replace(one, pca=_pca(one, rows)) for one in found]
        _report(list(zip(_names(runs), found, strict=True)), rows, options, points)


def _pca(one: Evaluated, rows: testset.Rows) -> Ceiling | None:
    """The PCA of the rows that a run was trained on, no bound on a test set of other data; None:
    they can't be read here, too."""
    if one.run.settings.data == one.run.own.data and (noted := ceiling.noted(one.run.folder)):
        return noted
    try:
        found = ceiling.find(one.run.own, rows.h_BAD.numpy())
    except (ValueError, OSError):
        return None
    return replace(found, bound=False) if found and one.run.elsewhere else found


def _read(options: Namespace, changes: Sequence[str]) -> list[Trained]:
    folders = [Path(folder) for folder in (options.run, *options.compare)]
    if len(folders) > MANY:
        raise ValueError(f"{len(folders)} runs were given; at most {MANY} can be compared.")
    return [trained.read(folder, changes, options.weights) for folder in folders]


def _check_same(runs: Sequence[Trained]) -> None:
    """Figures can be compared on the same rows only."""
    first, *others = runs
    for run in others:
        if difference := testset.difference(first.settings, run.settings):
            raise ValueError(
                f"{first.folder} and {run.folder} have different test sets: {difference}. Give the "
                "same --data.… for all of them (images of another size can't be compared)."
            )


def _names(runs: Sequence[Trained]) -> list[str]:
    """The folders' names, or their whole paths where two have the same one."""
    names = [run.folder.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _report(
    runs: Sequence[tuple[str, Evaluated]],
    rows: testset.Rows,
    options: Namespace,
    points: Sequence[feedback.Point] | None,
) -> None:
    """Print the tables and write `figures.json`, `table.txt` and the pictures."""
    best = samples.ceiling(rows)
    text = _text(runs, rows, best, points)
    print(text, flush=True)
    default = Path(options.run) / ("comparison" if options.compare else "evaluation")
    out = Path(options.out) if options.out else default
    content = {
        "test": {
            "name": rows.name,
            **testset.identity(runs[0][1].run.settings),
            "rows_without_energy": runs[0][1].empty,
            "no_rho_because": rows.missing or None,
            "ceiling": None if best is None else {"rho": best[0], "sgcs": best[1]},
        },
        "runs": [evaluated.to_json() for _, evaluated in runs],
    }
    written = ["figures.json", "table.txt", "samples.png"]
    if points:
        content["bits"] = [asdict(point) for point in points]
        written += ["bits.csv", "bits.png"]
    try:
        write_file(out / "table.txt", text + "\n")
        distribution.draw(runs, rows.name, out / "samples.png")
        if points:
            feedback.write(points, rows.name, out)
        write_file(out / "figures.json", json.dumps(content, indent=1) + "\n")
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"{out} can't be written: {reason}. Make room there if it is full, or choose another "
            "--out."
        ) from error
    print(f"\nwritten:      {out}/{', '.join(written)}", flush=True)


def _text(
    runs: Sequence[tuple[str, Evaluated]],
    rows: testset.Rows,
    best: tuple[float, float] | None,
    points: Sequence[feedback.Point] | None,
) -> str:
    parts = [f"test set: {rows.name}"]
    if rows.missing:
        parts[0] += f"; no ρ and SGCS: {rows.missing}"
    if empty := runs[0][1].empty:
        parts[0] += f"; {empty} row(s) without energy: not in NMSE, ρ, SGCS"
    for name, evaluated in runs:
        parts.append(f"{name}: {evaluated.run.state}\n\n{table.of_run(evaluated, best)}")
    if len(runs) > 1:
        parts.append(table.side_by_side(runs))
    if points:
        parts.append(feedback.table(points))
    return "\n\n".join(parts)
