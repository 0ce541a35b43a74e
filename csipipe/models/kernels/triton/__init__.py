"""Fused kernels for GPUs, written in Triton."""
