"""Triton kernels of the sampler, for NVIDIA GPUs. Nothing imports this folder where triton is missing."""
