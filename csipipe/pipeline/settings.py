"""DeepSpeed's settings of the tail: the user's file plus what we derive. No DeepSpeed import."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from csipipe.device import computes_in
from csipipe.files import given_or_shipped, shipped
from csipipe.settings.config import Precision, Settings

KNOWN_VERSIONS = ("0.19.8",)
"""DeepSpeed releases that csipipe was tested with; it relies on their internals."""
ANY_SIZE = "an integer above 0"
"""Instead of the values of a key that sizes something."""
ALLOWED: dict[str, tuple[object, ...] | str] = {
    "gradient_clipping": (0.0,),
    "steps_per_print": ANY_SIZE,
    "wall_clock_breakdown": (False,),
    "bf16.enabled": (False,),
    "bfloat16.enabled": (False,),
    "fp16.enabled": (False,),
    "torch_autocast.enabled": (False, True),
    "torch_autocast.dtype": ("bfloat16",),
    "zero_optimization.stage": (0, 1),
    "zero_optimization.allgather_partitions": (False, True),
    "zero_optimization.contiguous_gradients": (False, True),
    "zero_optimization.overlap_comm": (False, True),
    "zero_optimization.reduce_bucket_size": ANY_SIZE,
    "zero_optimization.reduce_scatter": (False, True),
}
"""Keys that a file may have, with their values; each is known to change nothing that it shouldn't
(`tests/distributed/test_deepspeed_keys.py`). Any other might, in silence."""
_OBJECTS = {key.partition(".")[0] for key in ALLOWED if "." in key}
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def load(path: str | None, precision: Precision) -> dict[str, Any]:
    """Read and check a DeepSpeed file; `None` is ds_configs/<precision>.json.

    Raises:
        ValueError, OSError: a DeepSpeed release that csipipe doesn't know; not a JSON object,
            batch keys of its own, gradient clipping, an optimiser or a precision that csipipe
            decides, a key or a value that isn't in `ALLOWED`.
    """
    if version("deepspeed") not in KNOWN_VERSIONS:
        raise ValueError(
            f"DeepSpeed {version('deepspeed')} is installed; csipipe knows "
            f"{', '.join(KNOWN_VERSIONS)}. Run: pip install deepspeed=={KNOWN_VERSIONS[-1]}"
        )
    file = Path(given_or_shipped(path)) if path else shipped(f"ds_configs/{precision}.json")
    if not file.is_file():
        raise FileNotFoundError(
            f"train.deepspeed: {file} doesn't exist; the shipped files are in "
            f"{shipped('ds_configs')}."
        )
    try:
        keys = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"train.deepspeed: {file} is not JSON: {error}") from error
    if not isinstance(keys, dict):
        raise ValueError(f"train.deepspeed: {file} holds no JSON object.")
    _check(file, keys, precision)
    return keys


def on(keys: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The same for a device: without autocast on a CPU, see `device.computes_in`."""
    if computes_in("bf16", device) == "bf16":
        return keys
    return {name: value for name, value in keys.items() if name != "torch_autocast"}


def of(settings: Settings) -> dict[str, Any] | None:
    """What `load` reads for a run; None: its method runs without DeepSpeed. Raises as `load`."""
    if not settings.spec.pipelined:
        return None
    return load(settings.train.deepspeed, settings.train.precision)


def _check(file: Path, keys: dict[str, Any], precision: Precision) -> None:
    for key in (*BATCH_KEYS, "optimizer", "scheduler"):
        if key in keys:
            raise ValueError(
                f"train.deepspeed: {file} sets {key!r}, which csipipe derives from train.* and "
                "topology.ues; remove it."
            )
    if keys.get("gradient_clipping") != 0.0:
        raise ValueError(
            f"train.deepspeed: {file} has gradient_clipping {keys.get('gradient_clipping')!r}; "
            "it must be 0.0, since DeepSpeed clips per stage (to 1.0 when the key is missing) and "
            "results would depend on the partition."
        )
    for key in ("bf16", "bfloat16", "fp16", "torch_autocast", "zero_optimization"):
        if not isinstance(keys.get(key, {}), dict):
            raise ValueError(f"train.deepspeed: {file} has {key} {keys[key]!r}, not an object.")
    for key in ("bf16", "bfloat16", "fp16"):
        if keys.get(key, {}).get("enabled"):
            raise ValueError(
                f"train.deepspeed: {file} enables {key}; use torch_autocast, as in "
                "ds_configs/bf16.json: the weights stay fp32."
            )
    autocast = keys.get("torch_autocast", {})
    found = "fp32"
    if autocast.get("enabled"):
        found = "bf16" if autocast.get("dtype") == "bfloat16" else str(autocast.get("dtype"))
    if found != precision:
        raise ValueError(
            f"train.deepspeed: {file} computes in {found}, but train.precision is {precision}; "
            f"leave train.deepspeed out, or use a file with that precision."
        )
    zero = keys.get("zero_optimization", {})
    if zero.get("stage", 0) not in (0, 1) or "offload_optimizer" in zero:
        raise ValueError(
            f"train.deepspeed: {file} has zero_optimization {zero}; pipelines work with stages 0 "
            "and 1, without offloading (which compiles an optimiser)."
        )
    for name, value in keys.items():
        if name in _OBJECTS and isinstance(value, dict):
            for key, inner in value.items():
                _check_allowed(file, f"{name}.{key}", inner)
        else:
            _check_allowed(file, name, value)


def _check_allowed(file: Path, key: str, value: Any) -> None:
    """Refuse (ValueError) what could change results, or fail inside DeepSpeed."""
    if key not in ALLOWED:
        raise ValueError(
            f"train.deepspeed: {file} sets {key!r}; csipipe runs DeepSpeed's stages in an order of "
            "its own, and takes only keys that were seen to change no result there: "
            f"{', '.join(ALLOWED)}. Remove it."
        )
    values = ALLOWED[key]
    # 1 is not true, though they are equal
    fits = (
        type(value) in (int, float) and value > 0 and value % 1 == 0  # 5e8 is usual
        if isinstance(values, str)
        else any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)
    )
    if not fits:
        wanted = values if isinstance(values, str) else " or ".join(map(json.dumps, values))
        raise ValueError(
            f"train.deepspeed: {file} has {key} {json.dumps(value)}; csipipe takes {wanted}."
        )


def with_batches(keys: dict[str, Any], rows: int, micro_batches: int) -> dict[str, Any]:
    """The same with the batch keys: `rows` per micro-batch over all UEs; and with our Adam, which
    computes what PyTorch's does, allowed under ZeRO."""
    return {
        **keys,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": rows * micro_batches,
    }
