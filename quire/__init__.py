"""Quire serves large language models. Names are loaded when first used, so that importing is cheap."""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# OpenMP threads that wait spin for long by default; where another process wants the core, every parallel operation
# then waits a time slice (17 times slower). libgomp reads this when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_HOME = {
    "LLM": "quire.llm",
    "AsyncEngine": "quire.engine.client",
    "AsyncEngineArgs": "quire.engine.client",
    "AsyncLLMEngine": "quire.engine.client",
    "Config": "quire.config",
    "SamplingParams": "quire.types",
    "BeamSearchParams": "quire.types",
    "OutputKind": "quire.types",
    "RequestOutput": "quire.types",
    "CompletionOutput": "quire.types",
    "QuireError": "quire.errors",
    "serve_app": "quire.server.ray_serve",
}
__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from quire.config import Config as Config
    from quire.engine.client import AsyncEngine as AsyncEngine
    from quire.engine.client import AsyncEngineArgs as AsyncEngineArgs
    from quire.engine.client import AsyncLLMEngine as AsyncLLMEngine
    from quire.errors import QuireError as QuireError
    from quire.llm import LLM as LLM
    from quire.server.ray_serve import serve_app as serve_app
    from quire.types import BeamSearchParams as BeamSearchParams
    from quire.types import CompletionOutput as CompletionOutput
    from quire.types import OutputKind as OutputKind
    from quire.types import RequestOutput as RequestOutput
    from quire.types import SamplingParams as SamplingParams


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'quire' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
