"""What `csipipe export` does: cut a UE's model where the feedback crosses, write, check, report."""

from __future__ import annotations

import hashlib
import json
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from csipipe import __version__, channels
from csipipe.device import set_threads
from csipipe.entry import refusing
from csipipe.export import bits as curve
from csipipe.export import check, folder, formats
from csipipe.export.learning import learn
from csipipe.export.pack import pack
from csipipe.export.parts import Pair, nmse_db, operations, run, trained_for, unrounded
from csipipe.export.quantiser import BITS, Quantiser
from csipipe.models import count_parameters, widths
from csipipe.run import ceiling, trained
from csipipe.run.trained import Autoencoder, Trained
from csipipe.settings import commandline

ABOUT = """Writes the encoder of a UE, and the decoder tail with the UE's head for the BTS, with
torch.export (.pt2) and as ONNX, checks both against the original on the run's test set, and adds
scripts that do feedback with them. With --bits the codeword is quantised."""
SAMPLES = 16
"""Test rows that are included as `samples.f32`."""
_NAMES = {"encoder": ("H", "codeword"), "decoder": ("codeword", "H_hat")}
_SCRIPTS = {
    formats.PT2: ("feedback_torch.py", "feedback.py"),
    formats.ONNX: ("feedback_onnx.py", "feedback_onnx.py"),
}


@refusing(OSError, RuntimeError, ValueError)
def main(arguments: list[str]) -> int:
    """Write one export; returns the exit code."""
    parser = commandline.RunParser("python -m csipipe export", ABOUT)
    add_arguments(parser)
    options, settings = parser.parse(arguments)
    export(options, settings)
    return 0


def add_arguments(parser: ArgumentParser) -> None:
    """The command's own options; settings are what is left."""
    parser.add_argument(
        "--ue", type=int, metavar="N", help="the UE whose encoder and head to export; see --pack"
    )
    parser.add_argument(
        "--pack",
        metavar="DIR",
        help="instead write the weights with a card into DIR, of all UEs or of --ue: evaluate, "
        "export and train.init take it as a run",
    )
    parser.add_argument(
        "--half",
        action="store_true",
        help="with --pack: weights in float16, half the bytes; biases and norms stay float32, and "
        "the card's figures are of the rounded weights",
    )
    parser.add_argument("--licence", default="not stated", help="what --pack writes into the card")
    parser.add_argument(
        "--bits",
        type=int,
        metavar="B",
        help=f"quantise the codeword: bits per entry, {BITS[0]} … {BITS[-1]}; default: those that "
        "it was trained for (--comm.scale range), or none",
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=formats.FORMATS,
        default=list(formats.FORMATS),
        help="pt2 (torch.export), onnx; default: both",
    )
    parser.add_argument("--out", metavar="DIR", help="default: RUN/export/ue-N[-Bbit]")


def export(options: Namespace, changes: Sequence[str]) -> None:
    """Write the export, or the weights to hand on, and print its content.

    Raises:
        ValueError, OSError: a run, UE, data or packages that can't be used.
        RuntimeError: the exported files don't do what the original does.
    """
    source = trained.read(Path(options.run), changes, options.weights)
    ues = source.settings.topology.ues
    _check(options, ues)
    set_threads(source.settings.train.threads, ranks_on_node=1)
    if options.pack is None:
        _export(options, source)
        return
    some = range(ues) if options.ue is None else [options.ue]
    h_BAD, out = _test_rows(source), Path(options.pack)
    print(pack(source, some, h_BAD, options.licence, out, options.half))


def _check(options: Namespace, ues: int) -> None:
    """Refuse (ValueError) options that can't be used with a run of so many UEs."""
    if options.ue is None and options.pack is None:
        raise ValueError(f"--ue is missing; the run has UEs 0 … {ues - 1}.")
    if options.ue is not None and not 0 <= options.ue < ues:
        raise ValueError(f"--ue is {options.ue}; the run has UEs 0 … {ues - 1}.")
    if options.half and options.pack is None:
        raise ValueError("--half is for the weights that --pack writes: add --pack DIR.")
    if options.pack is None:
        formats.require(tuple(options.formats))


def _export(options: Namespace, source: Trained) -> None:
    """Write and check both ends of a UE; raises as `export`."""
    [model] = source.models([options.ue])
    h_BAD = _test_rows(source)
    quantise: Callable[[int], Quantiser] | None = None
    if options.bits is None:
        options.bits = source.settings.feedback_bits
    if options.bits is not None:
        quantise = _quantise(source, options.ue, model)
    pair = Pair.of(model, quantise(options.bits) if quantise else None)
    name = f"ue-{options.ue}" + (f"-{options.bits}bit" if options.bits is not None else "")
    out = Path(options.out) if options.out else source.folder / "export" / name
    with folder.whole(out, folder.MANIFEST) as place:
        content = _describe(source, options, pair, h_BAD)
        content["original"] = {"nmse_db": nmse_db(run(model, h_BAD), h_BAD)}
        content["checked"] = {
            kind: _write(pair, kind, place, content, h_BAD) for kind in options.formats
        }
        h_BAD[:SAMPLES].numpy().astype("<f4").tofile(place / "samples.f32")
        text = _table(content)
        if quantise is not None:
            points, whole = curve.measure(model, quantise, h_BAD)
            title = f"UE {options.ue} of {source.folder.resolve().name}"
            curve.write(points, whole, title, place)
            text += "\n\n" + curve.table(points, whole)
        (place / folder.MANIFEST).write_text(json.dumps(content, indent=1) + "\n")
    print(text)
    scripts = [shlex.join(["python", str(out / _SCRIPTS[kind][1])]) for kind in options.formats]
    print(f"\nwritten:      {out}\ntry it:       {' or '.join(scripts)}", flush=True)


def _test_rows(source: Trained) -> Tensor:
    rows = channels.rows_of(*channels.tested(source.settings))
    return torch.from_numpy(np.ascontiguousarray(rows))


def _quantise(source: Trained, ue: int, model: Autoencoder) -> Callable[[int], Quantiser]:
    """Makes a quantiser with that many bits from the codewords of the UE's training rows.

    Of those, `ceiling.MOST` at most. For the bits that the model was trained for, the quantiser is
    the one that it was trained with.
    """
    stream, ues = source.dealt()
    rows = channels.rows_of(stream, tuple(ceiling.fitted(ues[ue])))
    z_BC = run(unrounded(model), torch.from_numpy(np.ascontiguousarray(rows)))
    own = trained_for(model)
    return lambda bits: own if own is not None and own.bits == bits else learn(z_BC, bits)


def _describe(source: Trained, options: Namespace, pair: Pair, h_BAD: Tensor) -> dict[str, Any]:
    """What `export.json` says before anything is written."""
    model = source.settings.model
    codeword, (entries, _) = run(pair.encoder, h_BAD[:2]), widths(model)
    inputs = {"encoder": h_BAD, "decoder": codeword}
    return {
        "csipipe": __version__,
        "run": str(source.folder),
        "method": source.settings.method,
        "state": source.state,
        "finished": source.finished,
        "ue": options.ue,
        "row": [2, model.angles, model.delays],
        "entries": entries,
        "trained_in": source.settings.train.precision,
        "bits_per_entry": options.bits,
        "bits_per_channel": entries * (options.bits or 32),
        "parts": {
            end: {
                "parameters": count_parameters([module]),
                "multiply_accumulates": operations(module, inputs[end]),
                "files": {},
            }
            for end, module in pair.ends.items()
        },
    }


def _write(
    pair: Pair, kind: str, place: Path, content: dict[str, Any], h_BAD: Tensor
) -> dict[str, Any]:
    """Write and check both ends in one format, with its script; returns the largest differences."""
    # the example is stored inside a .pt2, so it must be nobody's channels
    empty = torch.zeros(2, *content["row"])
    examples = {"encoder": empty, "decoder": torch.zeros_like(run(pair.encoder, empty))}
    functions = {}
    for end, module in pair.ends.items():
        file = place / f"{end}.{kind}"
        functions[end] = formats.save(module, examples[end], _NAMES[end], file)
        data = file.read_bytes()
        content["parts"][end]["files"][file.name] = {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    found = check.compare(pair, functions["encoder"], functions["decoder"], h_BAD)
    found.check(kind)
    _script(kind, place, content)
    return {
        "encoder": found.encoder,
        "decoder": found.decoder,
        "bits_that_differ": list(found.bits),
        "nmse_db": found.nmse_db,
    }


def _script(kind: str, place: Path, content: dict[str, Any]) -> None:
    """Write the script that does feedback with the files, with this export's numbers filled in."""
    template, name = _SCRIPTS[kind]
    text = (Path(__file__).parent / template).read_text(encoding="utf-8")
    digests = {
        file: entry["sha256"]
        for part in content["parts"].values()
        for file, entry in part["files"].items()
    }
    for before, after in (
        ("ROW = (2, 32, 32)", f"ROW = {tuple(content['row'])}"),
        ("ENTRIES = 256", f"ENTRIES = {content['entries']}"),
        ("BITS = 0", f"BITS = {content['bits_per_entry'] or 0}"),
        ("SHA256: dict[str, str] = {}", f"SHA256 = {json.dumps(digests, indent=4)}"),
    ):
        text = text.replace(f"\n{before}\n", f"\n{after}\n")
    (place / name).write_text(text, encoding="utf-8")


def _table(content: dict[str, Any]) -> str:
    lines = [
        f"UE {content['ue']} of {content['run']}: {content['state']}",
        "",
        f"{'part':>10}  {'parameters':>12}  {'MACs / channel':>15}  files (bytes)",
    ]
    if not content["finished"]:
        lines[0] += "; training isn't finished"
    if content["trained_in"] != "fp32":
        lines[0] += f"; trained in {content['trained_in']}, exported and compared in fp32"
    for end, part in content["parts"].items():
        files = ", ".join(f"{name} {entry['bytes']:,}" for name, entry in part["files"].items())
        lines.append(
            f"{end:>10}  {part['parameters']:>12,}  {part['multiply_accumulates']:>15,}  {files}"
        )
    lines += [
        "",
        f"{'checked':>10}  {'encoder':>12}  {'decoder':>15}  NMSE (dB)   largest difference, "
        f"at most {check.BOUND:.0e}",
        f"{'original':>10}  {'':>12}  {'':>15}  {content['original']['nmse_db']:9.2f}   codeword "
        "as it is",
    ]
    for kind, found in content["checked"].items():
        differ, of = found["bits_that_differ"]
        note = f"   {differ} of {of:,} bits differ" if of else ""
        lines.append(
            f"{kind:>10}  {found['encoder']:>12.1e}  {found['decoder']:>15.1e}  "
            f"{found['nmse_db']:9.2f}{note}"
        )
    what = f"{content['bits_per_entry'] or 32} bits for each of {content['entries']} entries"
    lines += ["", f"feedback per channel: {content['bits_per_channel']:,} bits, {what}"]
    return "\n".join(lines)
