"""What the user asked for: frozen dataclasses whose field metadata is the command line's help.

Owns defaults, flag help and the checks that need no other knowledge than the fields themselves.
What the engine works out from them (how many blocks, which threads) is a `MemoryPlan` or a
resolved value elsewhere, never written back here. Flag names are vLLM's where vLLM has the flag.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from graphllm.errors import ConfigError

DEMO_MODEL = "demo"
_BYTE_UNITS = {
    "": 1,
    "b": 1,
    "k": 1000,
    "kb": 1000,
    "m": 1000**2,
    "mb": 1000**2,
    "g": 1000**3,
    "gb": 1000**3,
    "t": 1000**4,
    "tb": 1000**4,
    "kib": 1024,
    "mib": 1024**2,
    "gib": 1024**3,
    "tib": 1024**4,
}


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that is also a command-line flag.

    metadata: `choices`, `metavar`, `parse` (text to value), `flag` (another name than the field's).
    """
    return field(default=default, metadata={"help": help, **metadata})


def parse_bytes(text: str) -> int:
    """`"512MiB"`, `"2G"` or `"1073741824"` to bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _BYTE_UNITS:
        raise ConfigError(f"{text!r} is not a size; write for example 800MB, 2GiB or 1073741824.")
    return int(float(match[1]) * _BYTE_UNITS[match[2]])


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The model, where it runs, and how much of it at once."""

    model: str = option(
        DEMO_MODEL,
        "A folder in Hugging Face layout, a .gguf file, or 'demo' (SmolLM2-135M-Instruct, fetched once).",
        metavar="PATH",
    )
    device: str = option("auto", "Where the model runs.", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto",
        "Number format of weights and activations; auto is float32 on a CPU.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    max_model_len: int | None = option(
        None, "Longest sequence, prompt and output together; by default the model's own context."
    )
    max_num_seqs: int = option(64, "Most sequences in one step.")
    max_num_batched_tokens: int | None = option(
        None, "Most tokens in one step, prompt chunks and decodes together; by default 256 on a CPU."
    )
    block_size: int = option(16, "Tokens in a KV block.", choices=(8, 16, 32, 64, 128))
    kv_cache_memory_bytes: int | None = option(
        None,
        "Memory for the KV cache, for example 2GiB; by default a quarter of what is free, at most 4 GiB, "
        "and never less than one sequence of full length.",
        parse=parse_bytes,
        metavar="BYTES",
    )
    seed: int = option(0, "Seeds the seeds of requests that bring none.")
    look_ahead: bool = option(True, "Launch the next step before this one's tokens are seen.")
    cpu_threads: int | None = option(None, "Threads for the CPU device; by default the cores at hand.")

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "block_size"):
            _check_positive(name, getattr(self, name))
        for name in ("max_model_len", "max_num_batched_tokens", "kv_cache_memory_bytes", "cpu_threads"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The HTTP side: where it listens and what it accepts."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    served_model_name: str | None = option(None, "The model's id in the API; by default the --model value.")
    api_key: str | None = option(None, "Require this bearer token on /v1 routes.")
    max_body_bytes: int = option(32 * 1024**2, "Largest request body.", parse=parse_bytes, metavar="BYTES")
    drain_timeout: float = option(30.0, "Seconds that running requests may take to end after Ctrl-C.")
    log_level: str = option("info", "How much is logged.", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be between 0 and 65535, not {self.port}.")
        _check_positive("max_body_bytes", self.max_body_bytes)
        if not 0 <= self.drain_timeout < math.inf:
            raise ConfigError(f"--drain-timeout must be a number of seconds, not {self.drain_timeout}.")


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
