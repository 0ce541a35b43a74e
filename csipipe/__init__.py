"""csipipe: split, pipelined training of CSI-feedback autoencoders (CSILocal)."""

__version__ = "0.1.0"
