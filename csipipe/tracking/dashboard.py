"""How TensorBoard presents a run: its settings, its place in a sweep, which charts come first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import summary

from csipipe.measure.figures import Figures
from csipipe.measure.metrics import to_db
from csipipe.settings import commandline
from csipipe.settings.config import Settings

KILOBYTES, KILOSCALARS = "against_kilobytes", "against_kiloscalars"
"""Groups of curves whose step isn't the iteration but the amount exchanged by then. TensorBoard's
narrow cards cut longer names."""
CURVES = ("loss", "nmse_db", "sgcs")
"""Figures of an evaluation, as JSON calls them; SGCS where images' columns are compared."""
_OTHERS = ("exchanged/scalars", "exchanged/bytes", "speed/samples_per_second")
"""Curves beside those whose last points are shown beside the settings in HPARAMS."""
_SWEPT = ("data.environment", "method", "model.c1", "train.lr", "train.seed")
"""Settings that sweeps vary: HPARAMS first shows five, these."""
_CHARTS = {
    "test NMSE in dB: mean and band over UEs": [
        "Margin",
        ["test/nmse_db", "test/nmse_db_min", "test/nmse_db_max"],
    ],
    "loss: training, held-out rows, test set": [
        "Multiline",
        ["train/loss$", "holdout/loss$", "test/loss$"],
    ],
    "test loss against exchanged kilobytes": ["Multiline", [f"{KILOBYTES}/test_loss"]],
    "seconds per iteration: compute": ["Multiline", ["time/compute"]],  # a curve per rank
    "seconds per iteration: wait": ["Multiline", ["time/wait"]],
}
_SGCS = {
    "test SGCS: mean and band over UEs": ["Margin", ["test/sgcs", "test/sgcs_min", "test/sgcs_max"]]
}


def layout(settings: Settings) -> Any:
    """The figures that matter first, for CUSTOM SCALARS."""
    charts = (_SGCS if settings.similarity else {}) | _CHARTS
    return summary.custom_scalars({"What matters": charts})  # type: ignore[no-untyped-call]


def settings_text(settings: Settings) -> Any:
    """All settings, as a YAML file has them, for TEXT."""
    lines = commandline.to_yaml(settings).splitlines()
    indented = "\n".join(f"    {line}" for line in lines)
    return summary.text("settings", indented)  # type: ignore[no-untyped-call]


def hparams(settings: Settings) -> tuple[Any, Any, Any]:
    """For HPARAMS: the columns, a run's settings, and the mark of a finished run.

    Settings under `run` make no difference to the result and are left out.
    """
    flat = commandline.dotted(commandline.plain(settings))
    chosen = {
        key: str(value) if isinstance(value, list) else value
        for key, value in flat.items()
        if not key.startswith("run.")
    }
    curves = CURVES if settings.similarity else CURVES[:2]
    values = dict.fromkeys([*(f"test/{name}" for name in curves), *_OTHERS], 0.0)
    columns, mine, end = summary.hparams(chosen, values)  # type: ignore[no-untyped-call]
    plugin = columns.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin.content)
    for column in content.experiment.hparam_infos:
        column.differs = column.name in _SWEPT  # what TensorBoard sorts by
    plugin.content = content.SerializeToString()
    return columns, mine, end


def band(part: str, figures: Figures, similarity: bool) -> dict[str, float]:
    """Loss, NMSE in dB and SGCS, if any: mean over UEs, and the lowest and highest UE's."""
    taking_part = (figures.sums[:, 0] > 0).tolist()

    def of(values: Iterable[float]) -> list[float]:
        return [v for v, there in zip(values, taking_part, strict=True) if there] or [float("nan")]

    losses, nmses = of(figures.loss_per_ue), of(figures.nmse_per_ue)
    sgcs = {}
    if similarity:
        each = of(figures.sgcs_per_ue)
        sgcs = {
            f"{part}/sgcs": figures.sgcs,
            f"{part}/sgcs_min": min(each),
            f"{part}/sgcs_max": max(each),
        }
    return sgcs | {
        f"{part}/loss": figures.loss,
        f"{part}/loss_min": min(losses),
        f"{part}/loss_max": max(losses),
        f"{part}/nmse_db": figures.nmse_db,
        f"{part}/nmse_db_min": to_db(min(nmses)),
        f"{part}/nmse_db_max": to_db(max(nmses)),
    }
