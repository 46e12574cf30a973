"""graphllm serves open-weight language models over the OpenAI API.

This is the package's public face: `LLM` and `SamplingParams` are imported when they are first used,
so that `import graphllm` costs nothing. It owns the version and nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphllm.llm import LLM
    from graphllm.sampling_params import SamplingParams

__version__ = "0.1.0"

__all__ = ["LLM", "SamplingParams", "__version__"]

_PUBLIC_MODULES = {"LLM": "graphllm.llm", "SamplingParams": "graphllm.sampling_params"}


def __getattr__(name: str) -> Any:
    module = _PUBLIC_MODULES.get(name)
    if module is None:
        raise AttributeError(f"module 'graphllm' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
