"""What config.json says of packed weights: one reader for each `quant_method`.

Owns the keys of its `quantization_config`, and which of a checkpoint's modules are packed, and how. A key
that nobody understands is refused, as in the rest of the file. Reads no tensors; where their names are at
hand, they decide which modules are packed, because most methods' configurations don't list them all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from graphllm.models.hf_compressed_tensors import read_compressed_tensors
from graphllm.models.hf_config import HFConfig
from graphllm.models.hf_scaled_quantization import read_bitsandbytes, read_fp8, read_mxfp4
from graphllm.quant.awq import AwqForm
from graphllm.quant.gptq import GptqForm
from graphllm.quant.scheme import WeightForm

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.")

# Notes on how a checkpoint was made, and how other programs shall run it.
_GPTQ_NOTES = (
    "act_group_aware",
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "disable_exllama",
    "exllama_config",
    "hyb_act",
    "max_input_length",
    "meta",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize",
    "mse",
    "offload_to_disk",
    "offload_to_disk_path",
    "pad_token_id",
    "static_groups",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
    "use_mse",
)
_AWQ_NOTES = ("backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse", "use_exllama_v2")


class Rules(Protocol):
    """What one checkpoint's configuration says of how its modules are stored."""

    @property
    def forms(self) -> tuple[WeightForm, ...]:
        """Every form that it names."""
        ...

    def form_of(self, module: str, tensors: Collection[str] | None) -> WeightForm | None:
        """How a module ("model.layers.0.self_attn.q_proj") is stored; None for plain numbers.

        tensors: the names of all that the checkpoint has, None where it is a configuration alone.
        """
        ...


@dataclass(frozen=True, slots=True)
class ByTensor:
    """A module is packed where the checkpoint has `marker` of it.

    Without tensors, all linear layers are, but for those that `skipped` names, and the head only with
    `has_head`. overrides: patterns of modules to their own forms, None for plain numbers; the first that
    matches holds.
    """

    form: WeightForm
    marker: str
    skipped: tuple[str, ...] = ()
    has_head: bool = False
    overrides: tuple[tuple[str, WeightForm | None], ...] = ()

    @property
    def forms(self) -> tuple[WeightForm, ...]:
        """See `Rules`."""
        others = (form for _, form in self.overrides if form is not None)
        return tuple(dict.fromkeys((self.form, *others)))

    def form_of(self, module: str, tensors: Collection[str] | None) -> WeightForm | None:
        """See `Rules`."""
        form: WeightForm | None = self.form
        for pattern, other in self.overrides:
            if re.match(pattern, module):
                form = other
                break
        if tensors is not None:
            return form if f"{module}.{self.marker}" in tensors else None
        if any(f".{name}." in f".{module}." for name in self.skipped):
            return None
        return form if self.has_head or _LAYER.search(module) else None


def read_gptq(section: HFConfig, config: HFConfig) -> Rules:
    """GPTQ as AutoGPTQ and GPTQModel write it."""
    _skip(section, _GPTQ_NOTES)
    section.expect("pack_dtype", "int32")
    for key in ("is_marlin_format", "awq_gemm_checkpoint"):  # other packings, in older files
        section.expect(key, False)
    formats = {"gptq": 1, "gptq_v2": 0}
    offset = section.choice("checkpoint_format", formats, default=section.get("format", "gptq"))
    form = GptqForm(
        bits=_bits(section, (4, 8)),
        group_size=_group_size(section),
        is_symmetric=section.flag("sym", default=True),
        has_order=section.flag("desc_act", default=False),
        zero_offset=offset,
        scale_dtype=_scale_dtype(config),
    )
    return ByTensor(
        form,
        "qweight",
        has_head=section.flag("lm_head", default=False),
        overrides=_gptq_overrides(section, form),
    )


def _gptq_overrides(section: HFConfig, form: GptqForm) -> tuple[tuple[str, WeightForm | None], ...]:
    """GPTQModel's `dynamic`: "-:pattern" stays plain, "+:pattern" or "pattern" has other parameters."""
    overrides: list[tuple[str, WeightForm | None]] = []
    dynamic = section.section("dynamic")
    for pattern in dynamic.sections():
        expression = pattern.removeprefix("+:").removeprefix("-:")
        try:
            re.compile(expression)
        except re.error as error:
            dynamic.refuse(pattern, f"is no regular expression: {error}")
        if pattern.startswith("-:"):
            dynamic.get(pattern)
            overrides.append((expression, None))
            continue
        other = dynamic.section(pattern)
        _skip(other, _GPTQ_NOTES)
        overrides.append(
            (
                expression,
                replace(
                    form,
                    bits=_bits(other, (4, 8), form.bits),
                    group_size=_group_size(other, form.group_size),
                    is_symmetric=other.flag("sym", default=form.is_symmetric),
                    has_order=other.flag("desc_act", default=form.has_order),
                ),
            )
        )
        other.check_understood()
    dynamic.check_understood()
    return tuple(overrides)


def read_awq(section: HFConfig, config: HFConfig) -> Rules:
    """AWQ as AutoAWQ writes it; of its packings that of its matrix-matrix kernels."""
    _skip(section, _AWQ_NOTES)
    version = section.get("version", "gemm")
    if str(version).lower() != "gemm":
        section.refuse("version", f"is {version!r}; only the packing 'gemm' is understood")
    section.expect("zero_point", True)
    form = AwqForm(
        bits=_bits(section, (4,), key="w_bit" if section.get("bits") is None else "bits"),
        group_size=_group_size(section, key="q_group_size" if section.get("group_size") is None else ""),
        is_symmetric=False,
        scale_dtype=_scale_dtype(config),
    )
    return ByTensor(form, "qweight", skipped=_module_names(section, "modules_to_not_convert"))


READERS: Mapping[str, Callable[[HFConfig, HFConfig], Rules]] = {
    "awq": read_awq,
    "bitsandbytes": read_bitsandbytes,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
    "gptq": read_gptq,
    "mxfp4": read_mxfp4,
}
"""By `quant_method`; each is given the section of config.json, and the whole."""


def _skip(section: HFConfig, keys: Sequence[str]) -> None:
    for key in keys:
        section.get(key)


def _bits(
    section: HFConfig, choices: tuple[int, ...], default: int | None = None, *, key: str = "bits"
) -> Any:
    bits = section.positive_int(key, default)
    if bits not in choices:
        understood = " and ".join(str(choice) for choice in choices)
        section.refuse(key, f"is {bits}; only {understood} are understood")
    return bits


def _group_size(section: HFConfig, default: int | None = None, *, key: str = "") -> int | None:
    """None for a whole row, which files call -1."""
    key = key or "group_size"
    size = section.get(key, -1 if default is None else default)
    if size == -1:
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 16 or size % 16:
        section.refuse(key, f"is {size!r}, not -1 or a multiple of 16")
    return size


def _scale_dtype(config: HFConfig) -> torch.dtype:
    """What holds the scales: files in float16 have such scales, others may have any."""
    return torch.float16 if config.dtype() == torch.float16 else torch.float32


def _module_names(section: HFConfig, key: str) -> tuple[str, ...]:
    names = section.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        section.refuse(key, "is not a list of modules")
    return tuple(names)
