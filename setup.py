"""Builds the CPU kernels, where there is a C++ compiler; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

KERNELS = Path("quire/kernels/cpu")

setup(
    ext_modules=[
        Extension(
            "quire.kernels.cpu.quire_cpu",
            sources=sorted(str(path) for path in KERNELS.glob("*.cpp")),
            depends=sorted(str(path) for path in (*KERNELS.glob("*.h"), *KERNELS.glob("*.inl"))),
            language="c++",
            extra_compile_args=["-std=c++17", "-O3", "-fopenmp", "-g0", "-Wno-psabi"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
