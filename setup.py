"""Metadata, dependencies and extras; tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "csipipe/__init__.py").read_text())
assert VERSION
SHIPPED = {"ds_configs": ["*.json"], "launch/configs": ["*.yaml", "reports/*.yaml"], "slurm": ["*"]}
"""Folders of files that a wheel brings along; `csipipe.files.shipped` finds them."""
PACKAGES = {f"csipipe.shipped.{folder.replace('/', '.')}": folder for folder in SHIPPED}

setup(
    name="csipipe",
    version=VERSION.group(1),
    description="Split, pipelined training of CSI-feedback autoencoders on clusters (CSILocal)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[*find_packages(include=["csipipe", "csipipe.*"]), *PACKAGES],
    package_dir=PACKAGES,
    package_data={
        "csipipe": ["py.typed"],
        **{package: SHIPPED[folder] for package, folder in PACKAGES.items()},
    },
    install_requires=[
        "torch>=2.13",
        "deepspeed==0.19.8",  # csipipe/pipeline/subworld.py knows this release
        "docstring-parser>=0.16",
        "h5py>=3.11",
        "jsonargparse[signatures]>=4.49",
        "llvmlite>=0.50",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "pillow>=10.1",
        "psutil>=5.9",
        "pyyaml>=6.0",
        "safetensors>=0.8",  # its writer lets other threads run
        "scipy>=1.13",
        "tensorboard>=2.18",
        "tqdm>=4.66",
    ],
    extras_require={
        "browser": ["selenium>=4.30"],
        "docs": ["mkdocs-material>=9.6"],
        "export": ["onnx>=1.19", "onnxruntime>=1.23", "onnxscript>=0.5"],
        "profile": ["torch-tb-profiler==0.4.3"],  # TensorBoard's PROFILE tab
        "sionna": ["sionna-no-rt>=2.2"],  # channels generate --model umi, uma, cdl-a … cdl-e
        "test": ["hypothesis>=6", "pytest>=8", "pytest-xdist>=3.6", "ruff", "mypy", "types-PyYAML"],
    },
)
