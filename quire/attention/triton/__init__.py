"""Attention on NVIDIA GPUs, in Triton: kernels that read the cache's pages where they lie."""
