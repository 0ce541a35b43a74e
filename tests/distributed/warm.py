"""What every rank does before it trains, done once: the fork server that ranks are forked from
imports this module first."""

import importlib

MODULES = (
    "attr",
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
    "encodings.idna",
    "scipy.linalg",
    "torch._dynamo",
    "torch._inductor.config",
)
for name in MODULES:
    importlib.import_module(name)

from csipipe.settings import commandline  # noqa: E402  # DeepSpeed wants to be imported first

commandline.settings(commandline.reader(), [])
