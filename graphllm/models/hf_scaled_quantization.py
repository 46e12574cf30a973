"""What config.json says of weights in FP8, of bitsandbytes' and of MXFP4: readers for `hf_quantization.py`.

Owns the keys of these methods' sections, and which modules of a checkpoint have which form. Reads no tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from graphllm.models.hf_config import HFConfig
from graphllm.quant.bitsandbytes import EightBitForm, FourBitForm
from graphllm.quant.mxfp4 import Mxfp4Form
from graphllm.quant.scaled_form import ScaledForm
from graphllm.quant.scheme import WeightForm

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.")
_STACK = re.compile(r"\.experts\.(?:gate_up_proj|down_proj)$")

# How other programs shall run it, and what rounds nothing that is stored.
_BITSANDBYTES_NOTES = (
    "_load_in_4bit",
    "_load_in_8bit",
    "bnb_4bit_compute_dtype",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_threshold",
)
# DeepSeek's and transformers' names for the scales of weights, and the older ones of everybody else; those
# of activations beside them.
_SCALE_NAMES = {"weight_scale_inv": "activation_scale", "weight_scale": "input_scale"}


@dataclass(frozen=True, slots=True)
class ByScaleName:
    """FP8: a module has the form that the scales beside it are of, and is plain where there are none.

    Without tensors, all linear layers of layers have the first form, but for those that `skipped` names.
    """

    forms: tuple[WeightForm, ...]
    scale_names: tuple[str, ...]
    skipped: tuple[str, ...]

    def form_of(self, module: str, tensors: Collection[str] | None) -> WeightForm | None:
        """See `Rules`."""
        if tensors is None:
            is_skipped = any(name in module for name in self.skipped)
            return self.forms[0] if _LAYER.search(module) and not is_skipped else None
        for form, name in zip(self.forms, self.scale_names, strict=True):
            if f"{module}.{name}" in tensors:
                return form
        return None


@dataclass(frozen=True, slots=True)
class ByStack:
    """MXFP4: stacks of experts have it."""

    forms: tuple[WeightForm, ...] = (Mxfp4Form(),)

    def form_of(self, module: str, tensors: Collection[str] | None) -> WeightForm | None:
        """See `Rules`."""
        if tensors is None:
            return self.forms[0] if _STACK.search(module) else None
        is_packed = f"{module}_blocks" in tensors or f"{module}_scales" in tensors
        return self.forms[0] if is_packed else None


def read_fp8(section: HFConfig, config: HFConfig) -> ByScaleName:
    """FP8 as DeepSeek, Qwen and transformers write it, in blocks or not, and AutoFP8's older files."""
    section.expect("fmt", "e4m3")
    section.expect("expert_dtype", "fp8")
    section.expect("dequantize", False)
    section.get("scale_fmt")  # the scales' own type says it
    section.get("kv_cache_scheme")  # scales of the cache are tensors, and refused as such
    is_static = section.choice("activation_scheme", {"dynamic": False, "static": True}, default="dynamic")
    block = _block(section)
    if is_static and block is not None:
        section.refuse("activation_scheme", "is static, which is not understood with blocks")
    skipped = (
        *_names(section, "modules_to_not_convert"),
        *_names(section, "ignored_layers"),
    )
    if _names(section, "modules_to_convert"):
        section.refuse("modules_to_convert", "is there; only linear layers are understood in FP8")
    scales_of: Literal["tensor", "block"] = "tensor" if block is None else "block"
    forms = tuple(
        ScaledForm(
            stored="e4m3",
            scales_of=scales_of,
            block=block,
            scale_name=name,
            given_name=given if is_static else None,
        )
        for name, given in _SCALE_NAMES.items()
    )
    return ByScaleName(forms, tuple(_SCALE_NAMES), skipped)


def read_bitsandbytes(section: HFConfig, config: HFConfig) -> ByScaleName:
    """bitsandbytes, as transformers saves it: 4 bits, or LLM.int8."""
    for key in _BITSANDBYTES_NOTES:
        section.get(key)
    section.expect("llm_int8_has_fp16_weight", False)
    section.expect("bnb_4bit_quant_storage", "uint8")
    is_4bit = section.flag("load_in_4bit", default=False)
    if is_4bit == section.flag("load_in_8bit", default=False):
        section.refuse("load_in_4bit", "and 'load_in_8bit' are alike; one of both is true")
    kind: Literal["nf4", "fp4"] = section.choice(
        "bnb_4bit_quant_type", {"nf4": "nf4", "fp4": "fp4"}, default="fp4"
    )
    is_nested = section.flag("bnb_4bit_use_double_quant", default=False)
    skipped = _names(section, "llm_int8_skip_modules")
    if is_4bit:
        return ByScaleName((FourBitForm(kind=kind, is_nested=is_nested),), ("weight.absmax",), skipped)
    return ByScaleName((EightBitForm(),), ("SCB",), skipped)


def read_mxfp4(section: HFConfig, config: HFConfig) -> ByStack:
    """MXFP4, of which the tensors say themselves where it is."""
    section.get("dequantize")  # whether transformers shall unpack it
    _names(section, "modules_to_not_convert")
    return ByStack()


def _block(section: HFConfig) -> tuple[int, int] | None:
    sizes = section.get("weight_block_size")
    if sizes is None:
        return None
    if (
        not isinstance(sizes, list)
        or len(sizes) != 2
        or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes)
    ):
        section.refuse("weight_block_size", f"is {sizes!r}, not two sizes")
    return sizes[0], sizes[1]


def _names(section: HFConfig, key: str) -> tuple[str, ...]:
    names = section.get(key)
    if names is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        section.refuse(key, "is not a list of modules")
    return tuple(names)
