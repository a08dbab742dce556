"""Kernels for CPUs: C++ behind a plain C ABI, and oneDNN through torch."""
