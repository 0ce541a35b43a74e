"""What every rank does before it trains, done once: the fork server that ranks are forked from
imports this module first."""

import importlib

MODULES = (
    "bits",
    "csipipe.__main__",
    "csipipe.bench.rank",
    "csipipe.methods.csilocal_bts",
    "csipipe.methods.csilocal_ue",
    "csipipe.methods.fedavg",
    "csipipe.methods.fedgrad",
    "csipipe.models.csilocal",
    "csipipe.models.kernels",
    "csipipe.pipeline.engine",
    "csipipe.run.command",
    "csipipe.run.training",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.original_muon",
    "encodings.idna",
    "harness",
    "pytest",
    "runs",
    "scipy.linalg",
    "torch._dynamo",
    "torch._inductor.config",
)
for name in MODULES:
    try:
        importlib.import_module(name)
    except ImportError as error:  # the server would go on without any of this, and say nothing
        raise RuntimeError(f"{name}, which ranks need, can't be imported") from error

commandline = importlib.import_module("csipipe.settings.commandline")
commandline.read([])
