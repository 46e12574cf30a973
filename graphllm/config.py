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

# GiB that the driver reports as the card's total, rounded down; what is really there decides at start.
_CARD_GIB = {
    "a10g": 22.0,
    "a100-40": 39.3,
    "a100-80": 79.1,
    "b200": 178.3,
    "h100": 79.1,
    "h100-nvl": 93.0,
    "h200": 139.7,
    "l4": 22.0,
    "l40s": 44.3,
    "rtx-3090": 23.5,
    "rtx-4090": 23.5,
    "rtx-5090": 31.3,
}


# Compute capabilities, which say what numbers a card calculates with; of an unknown card, the least with FP8.
_CARD_CAPABILITY = {
    "a10g": (8, 6),
    "a100-40": (8, 0),
    "a100-80": (8, 0),
    "b200": (10, 0),
    "h100": (9, 0),
    "h100-nvl": (9, 0),
    "h200": (9, 0),
    "l4": (8, 9),
    "l40s": (8, 9),
    "rtx-3090": (8, 6),
    "rtx-4090": (8, 9),
    "rtx-5090": (12, 0),
}
_UNKNOWN_CARD_CAPABILITY = (8, 9)

# The names of output_formats, which lies on a higher floor; a test holds both together.
TOOL_CALL_PARSERS = (
    "auto",
    "deepseek",
    "deepseek_v3",
    "deepseek_v31",
    "generic",
    "glm",
    "glm45",
    "glm47",
    "gpt-oss",
    "gpt_oss",
    "granite",
    "hermes",
    "hunyuan_a13b",
    "jamba",
    "kimi",
    "kimi_k2",
    "lfm2",
    "llama3",
    "llama3_json",
    "llama4_json",
    "llama4_pythonic",
    "minimax_m2",
    "mistral",
    "mistral_named",
    "nemotron",
    "nemotron_json",
    "olmo3",
    "openai",
    "phi4_mini",
    "phi4_mini_json",
    "pythonic",
    "qwen",
    "qwen25",
    "qwen3_coder",
    "qwen3_xml",
    "seed_oss",
)
REASONING_PARSERS = (
    "auto",
    "deepseek_r1",
    "deepseek_v3",
    "ernie45",
    "glm",
    "glm45",
    "granite",
    "hunyuan_a13b",
    "kimi",
    "kimi_k2",
    "minimax_m2",
    "mistral",
    "none",
    "olmo3",
    "qwen3",
    "seed_oss",
    "step3",
    "think",
)
# The names of models/quantization.py, which lies on a higher floor; a test holds both together.
QUANTIZATIONS = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gguf", "gptq", "int4", "int8", "mxfp4")
_SMALLEST_CARD_BYTES = 1024**3
_LORA_RANKS = (8, 16, 32, 64, 128, 256)


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that is also a command-line flag.

    metadata: `choices`, `metavar`, `parse` (text to value; of a tuple, each argument to a part of it),
    `flag` (another name than the field's).
    """
    return field(default=default, metadata={"help": help, **metadata})


def parse_bytes(text: str) -> int:
    """`"512MiB"`, `"2G"` or `"1073741824"` to bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _BYTE_UNITS:
        raise ConfigError(f"{text!r} is not a size; write for example 800MB, 2GiB or 1073741824.")
    return int(float(match[1]) * _BYTE_UNITS[match[2]])


def parse_card(text: str) -> int:
    """The name of a card, or a size, to the bytes of its memory. Raises ConfigError."""
    gib = _CARD_GIB.get(_card_name(text))
    if gib is not None:
        return int(gib * 1024**3)
    try:
        num_bytes = parse_bytes(text)
    except ConfigError:
        raise ConfigError(
            f"{text!r} is neither a card that is known ({', '.join(_CARD_GIB)}) nor a size such as 24GiB."
        ) from None
    if num_bytes < _SMALLEST_CARD_BYTES:
        raise ConfigError(f"{text!r} is {num_bytes} bytes, too little for a card; write for example 24GiB.")
    return num_bytes


def card_capability(text: str) -> tuple[int, int]:
    """The compute capability of a card by its name; a card known by its size alone has FP8."""
    return _CARD_CAPABILITY.get(_card_name(text), _UNKNOWN_CARD_CAPABILITY)


def _card_name(text: str) -> str:
    return text.strip().lower().replace(" ", "-")


def parse_gib(text: str) -> float:
    """`"4"` (GiB) or `"512MiB"` to GiB. Raises ConfigError."""
    try:
        return float(text)
    except ValueError:
        return parse_bytes(text) / 1024**3


def parse_sizes(text: str) -> tuple[int, ...]:
    """`"1 2 4"` or `"1,2,4"` to (1, 2, 4), in the order given. Raises ConfigError."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        raise ConfigError(f"{text!r} is not a list of sizes; write for example 1,2,4,8.")
    return tuple(int(word) for word in words)


def parse_lora_module(text: str) -> tuple[str, ...]:
    """`"name=path"` to a tuple of it. Raises ConfigError for anything else."""
    split_lora_module(text)
    return (text,)


def split_lora_module(text: str) -> tuple[str, str]:
    """The two sides of `"name=path"`. Raises ConfigError."""
    name, sign, path = text.partition("=")
    if not (name and sign and path):
        raise ConfigError(f"--lora-modules {text!r} is not of the form name=path.")
    return name, path


def parse_path(text: str) -> tuple[str, ...]:
    """A path to a tuple of one. Raises ConfigError for an empty one."""
    if not text:
        raise ConfigError("An empty path.")
    return (text,)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The model, where it runs, and how much of it at once."""

    model: str = option(
        DEMO_MODEL,
        "A folder in Hugging Face layout, a .gguf file, a repository on the Hugging Face Hub (org/name, "
        "org/name@revision, org/name:file.gguf), or 'demo' (SmolLM2-135M-Instruct, fetched once); "
        "with --load-format dummy also a config.json, by whatever name.",
        metavar="MODEL",
    )
    revision: str | None = option(
        None,
        "Branch, tag or commit of a Hub repository; by default main. All files are of the one commit that "
        "it names at the start.",
    )
    gguf_file: str | None = option(
        None, "Which GGUF file of a Hub repository or folder to serve.", metavar="FILE"
    )
    model_impl: str = option(
        "auto",
        "Who computes the model: graphllm's own decoder, or transformers' module with graphllm's paged "
        "attention, which is slower; auto takes the latter for architectures that the former does not have.",
        choices=("auto", "graphllm", "transformers"),
    )
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the checkpoint: it can do whatever you can."
    )
    load_format: str = option(
        "auto",
        "Where the weights come from: auto reads the checkpoint, dummy draws random ones of the same shapes, "
        "to measure speed without a checkpoint.",
        choices=("auto", "dummy"),
    )
    device: str = option("auto", "Where the model runs.", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto",
        "Number format of weights and activations; auto is float32 on a CPU, and on CUDA the checkpoint's "
        "own where that is bfloat16 or float16, else bfloat16.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str | None = option(
        None,
        "How weights are stored; by default as the checkpoint has them. fp8, int8 and int4 round the weights "
        "of an unquantized checkpoint while it is loaded; the name of a published format only confirms what "
        "the checkpoint has. gguf leaves a GGUF file's matrices packed, which are expanded otherwise.",
        choices=QUANTIZATIONS,
    )
    max_model_len: int | None = option(
        None, "Longest sequence, prompt and output together; by default the model's own context."
    )
    max_num_seqs: int = option(64, "Most sequences in one step.")
    max_num_batched_tokens: int | None = option(
        None,
        "Most tokens in one step, prompt chunks and decodes together; by default 256 on a CPU, 2048 on CUDA.",
    )
    block_size: int = option(16, "Tokens in a KV block.", choices=(8, 16, 32, 64, 128))
    gpu_memory_utilization: float = option(
        0.9,
        "Share of a CUDA device's memory that may be in use, above 0 and at most 1. What other processes "
        "use, weights, activations and graphs come first; the KV cache takes the rest.",
    )
    kv_cache_memory_bytes: int | None = option(
        None,
        "Memory for the KV cache, for example 2GiB. By default, on CUDA, what --gpu-memory-utilization "
        "leaves; on a CPU a quarter of what is free, at most 4 GiB, and never less than one sequence of "
        "full length.",
        parse=parse_bytes,
        metavar="BYTES",
    )
    kv_cache_dtype: str = option(
        "auto",
        "Number format of the KV cache; auto is the model's. fp8 (fp8_e4m3), fp8_e5m2 and int8 take a little "
        "more than half of bfloat16's memory, with a scale for each token and head; int8 is the most exact. "
        "On a card, 16 and 32 bits only as the model has them.",
        choices=("auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2", "int8"),
    )
    enable_prefix_caching: bool = option(
        True,
        "Keep the KV of prompts and answers, so that the next request that begins alike need not compute it.",
    )
    swap_space: float | None = option(
        None,
        "GiB of host memory that preempted sequences are moved to, instead of being computed again; by "
        "default 4 on CUDA, and 0 on a CPU, whose KV cache is host memory already.",
        parse=parse_gib,
        metavar="GIB",
    )
    kv_offloading_size: float = option(
        0.0,
        "GiB of host memory for cached prefixes that no longer fit in the KV cache; 0 drops them.",
        parse=parse_gib,
        metavar="GIB",
    )
    pin_prefix: tuple[str, ...] | None = option(
        None,
        "Files whose text is computed at start and never leaves the KV cache: a system prompt each, or, in a "
        ".json file, a list of chat messages.",
        parse=parse_path,
        metavar="FILE",
    )
    max_pinned_share: float = option(
        0.25, "Largest share of the KV cache that pinned prefixes may take, from 0 to below 1."
    )
    enable_lora: bool = option(
        False,
        "Serve LoRA adapters beside the base model, loaded at run time or by --lora-modules: requests choose "
        "one by its name as their model.",
    )
    lora_modules: tuple[str, ...] | None = option(
        None,
        "Adapters that are served from the start: folders as peft writes them, each with the name that "
        "requests call it. Switches --enable-lora on.",
        parse=parse_lora_module,
        metavar="NAME=PATH",
    )
    max_loras: int = option(4, "Most adapters that the sequences of a step may have.")
    max_lora_rank: int = option(
        16, "Largest rank of an adapter; memory is set aside for it.", choices=_LORA_RANKS
    )
    max_cpu_loras: int | None = option(
        None,
        "Most adapters that are loaded at once, all of which have a copy in host memory; by default as many "
        "as --lora-modules, and at least twice --max-loras.",
    )
    debug_kv: bool = option(
        False, "Check every invariant of KV blocks after each step: slow, and a violation ends the engine."
    )
    cudagraph_capture_sizes: tuple[int, ...] | None = option(
        None,
        "Numbers of sequences that get a decode graph each on CUDA, for example 1,2,4,8; by default 1, 2, 4 "
        "and every eighth up to --max-num-seqs.",
        parse=parse_sizes,
        metavar="N",
    )
    matryoshka_dimensions: tuple[int, ...] | None = option(
        None,
        "Sizes that a model's vectors may be cut to, for example 128,256,512, where its makers say so and "
        "its config.json does not.",
        parse=parse_sizes,
        metavar="N",
    )
    enforce_eager: bool = option(
        False, "Capture no CUDA graphs and launch kernel by kernel: slow, for debugging."
    )
    eager_capture: bool = option(
        False,
        "Capture all CUDA graphs before serving, instead of while serving, when the traffic wants them.",
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
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                "--gpu-memory-utilization must be above 0 and at most 1, "
                f"not {self.gpu_memory_utilization:g}."
            )
        for name in ("swap_space", "kv_offloading_size"):
            gib = getattr(self, name)
            if gib is not None and not 0 <= gib < math.inf:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} must be a number of GiB, 0 or more, not {gib:g}.")
        if self.kv_offloading_size and not self.enable_prefix_caching:
            raise ConfigError("--kv-offloading-size keeps cached prefixes: it needs --enable-prefix-caching.")
        if self.pin_prefix and not self.enable_prefix_caching:
            raise ConfigError("--pin-prefix keeps cached prefixes: it needs --enable-prefix-caching.")
        if not 0 <= self.max_pinned_share < 1:
            raise ConfigError(
                f"--max-pinned-share must be at least 0 and below 1, not {self.max_pinned_share:g}."
            )
        self._check_lora()
        self._check_capture_sizes()

    @property
    def serves_lora(self) -> bool:
        """Whether there is memory for adapters."""
        return self.enable_lora or bool(self.lora_modules)

    @property
    def max_loaded_loras(self) -> int:
        """How many adapters may be loaded at once."""
        return self.max_cpu_loras or max(2 * self.max_loras, len(self.lora_modules or ()))

    def _check_lora(self) -> None:
        _check_positive("max_loras", self.max_loras)
        if self.max_lora_rank not in _LORA_RANKS:
            ranks = ", ".join(map(str, _LORA_RANKS))
            raise ConfigError(f"--max-lora-rank must be one of {ranks}, not {self.max_lora_rank}.")
        modules = [split_lora_module(text) for text in self.lora_modules or ()]
        if len(modules) > len({name for name, _ in modules}):
            raise ConfigError("--lora-modules gives a name twice.")
        most = self.max_cpu_loras
        if most is not None and most < max(self.max_loras, len(modules)):
            raise ConfigError(
                f"--max-cpu-loras {most} is below --max-loras {self.max_loras}, or below the number of "
                f"--lora-modules, {len(modules)}: every adapter has a copy in host memory."
            )

    def _check_capture_sizes(self) -> None:
        if self.enforce_eager:
            for name in ("eager_capture", "cudagraph_capture_sizes"):
                if getattr(self, name):
                    raise ConfigError(
                        f"--enforce-eager captures no graphs; it cannot go with --{name.replace('_', '-')}."
                    )
        sizes = self.cudagraph_capture_sizes
        if sizes is None:
            return
        if not sizes:
            raise ConfigError("--cudagraph-capture-sizes is empty; --enforce-eager captures no graphs.")
        for size in sizes:
            if not 1 <= size <= self.max_num_seqs:
                raise ConfigError(
                    f"--cudagraph-capture-sizes must lie between 1 and --max-num-seqs {self.max_num_seqs}, "
                    f"not {size}."
                )
        if len(set(sizes)) != len(sizes):
            raise ConfigError("--cudagraph-capture-sizes names a size twice.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The HTTP side: where it listens and what it accepts."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    served_model_name: str | None = option(None, "The model's id in the API; by default the --model value.")
    api_key: str | None = option(None, "Require this bearer token on /v1 and /admin routes.")
    max_body_bytes: int = option(32 * 1024**2, "Largest request body.", parse=parse_bytes, metavar="BYTES")
    tool_call_parser: str = option(
        "auto",
        "How the model writes tool calls; auto guesses from its chat template and vocabulary.",
        choices=TOOL_CALL_PARSERS,
        metavar="NAME",
    )
    reasoning_parser: str = option(
        "auto",
        "How the model sets its reasoning apart; auto guesses, none leaves it in the text.",
        choices=REASONING_PARSERS,
        metavar="NAME",
    )
    lenient: bool = option(
        False,
        "Drop request fields that no API knows, with a warning in the answer, instead of refusing them.",
    )
    max_stored_responses: int = option(
        1024, "Most responses of /v1/responses that are kept to be retrieved or continued; 0 keeps none."
    )
    response_store_size: int = option(
        256 * 1024**2,
        "Memory for stored responses; the oldest make room for new ones.",
        parse=parse_bytes,
        metavar="BYTES",
    )
    response_ttl: float = option(30 * 86400.0, "Seconds that a stored response is kept at most.")
    drain_timeout: float = option(30.0, "Seconds that running requests may take to end after Ctrl-C.")
    log_level: str = option("info", "How much is logged.", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be between 0 and 65535, not {self.port}.")
        _check_positive("max_body_bytes", self.max_body_bytes)
        _check_positive("response_store_size", self.response_store_size)
        if self.max_stored_responses < 0:
            raise ConfigError(f"--max-stored-responses must be at least 0, not {self.max_stored_responses}.")
        if not 0 < self.response_ttl < math.inf:
            raise ConfigError(
                f"--response-ttl must be a number of seconds above 0, not {self.response_ttl:g}."
            )
        if not 0 <= self.drain_timeout < math.inf:
            raise ConfigError(f"--drain-timeout must be a number of seconds, not {self.drain_timeout}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """What `graphllm plan` is asked beside the engine's own flags."""

    gpu: str | None = option(
        None,
        f"The card to plan for: {', '.join(_CARD_GIB)}, or its memory, for example 24GiB.",
        metavar="CARD",
    )
    json: bool = option(False, "Print JSON, bytes as integers.")

    def __post_init__(self) -> None:
        if self.gpu is None:
            raise ConfigError("--gpu is missing: name a card, for example h100, or its memory.")
        parse_card(self.gpu)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
