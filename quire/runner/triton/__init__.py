"""Triton kernels of the runner, for NVIDIA GPUs. Nothing imports this folder where triton is missing."""
