"""compressed-tensors' part of config.json: groups of modules, and how the weights of each are stored.

Owns its keys, and which group a module belongs to. What is not multiplied here is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from graphllm.models.hf_config import HFConfig
from graphllm.quant.compressed_integers import CompressedForm
from graphllm.quant.scaled_form import ScaledForm
from graphllm.quant.scheme import WeightForm

_LINEAR = "Linear"  # the class of every module that is asked for
_PATTERN = "re:"
_NOTES = ("quantization_status", "global_compression_ratio", "version")
_NOTES_OF_ARGUMENTS = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
_PACKED, _UNPACKED, _FLOATS = "pack-quantized", ("int-quantized", "naive-quantized"), "float-quantized"
_ACTORDERS = {"group": True, "dynamic": True, "weight": False, "static": False}


@dataclass(frozen=True, slots=True)
class CompressedRules:
    """`Rules`: targets and their forms, and what is ignored; a name counts more than a class."""

    groups: tuple[tuple[tuple[str, ...], WeightForm], ...]
    ignored: tuple[str, ...]

    @property
    def forms(self) -> tuple[WeightForm, ...]:
        """Every form of a group."""
        return tuple(dict.fromkeys(form for _, form in self.groups))

    def form_of(self, module: str, tensors: Collection[str] | None) -> WeightForm | None:
        """See `Rules`."""
        if any(name == _LINEAR or _matches(name, module) for name in self.ignored):
            return None
        for is_match in (_matches, _is_its_class):
            for targets, form in self.groups:
                if any(is_match(target, module) for target in targets):
                    return form
        return None


def _matches(target: str, module: str) -> bool:
    if target.startswith(_PATTERN):
        return re.match(target.removeprefix(_PATTERN), module) is not None
    return target == module


def _is_its_class(target: str, module: str) -> bool:
    return target == _LINEAR


def read_compressed_tensors(section: HFConfig, config: HFConfig) -> CompressedRules:
    """The section's groups. Raises CheckpointError for a format or arithmetic that is not served."""
    for key in _NOTES:
        section.get(key)
    for key in ("kv_cache_scheme", "transform_config", "moe_sparsity_config"):
        if section.get(key):
            section.refuse(key, "is not empty, which is not supported")
    sparsity = section.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        section.refuse("sparsity_config", "is not empty, which is not supported")
    dtype = torch.float16 if config.dtype() == torch.float16 else torch.float32
    found, groups = section.section("config_groups"), []
    for name in found.sections():
        group = found.section(name)
        form = _read_form(group, str(group.get("format", section.get("format"))), scale_dtype=dtype)
        groups.append((_names(group, "targets"), form))
        group.check_understood()
    section.get("format")
    found.check_understood()
    if not groups:
        section.refuse("config_groups", "names no group of modules")
    return CompressedRules(tuple(groups), _names(section, "ignore"))


def _read_form(group: HFConfig, layout: str, *, scale_dtype: torch.dtype) -> WeightForm:
    if layout not in (_PACKED, *_UNPACKED, _FLOATS):
        understood = ", ".join((_PACKED, *_UNPACKED, _FLOATS))
        group.refuse("format", f"is {layout!r}; {understood} are understood")
    if group.get("output_activations") is not None:
        group.refuse("output_activations", "is there: outputs are not rounded here")
    if group.get("weights") is None:
        group.refuse("weights", "is missing")
    weights = group.section("weights")
    has_activations = group.get("input_activations") is not None
    activations = group.section("input_activations") if has_activations else None
    if weights.get("dynamic", False) is not False:
        weights.refuse("dynamic", "is true, of weights")
    kind, bits = (
        weights.choice("type", {"int": "int", "float": "float"}, default="int"),
        weights.get("num_bits", 8),
    )
    if activations is None:
        form: WeightForm = _read_weight_only(weights, layout, kind=kind, bits=bits, scale_dtype=scale_dtype)
    else:
        form = _read_scaled(weights, activations, kind=kind, bits=bits)
        activations.check_understood()
    weights.check_understood()
    return form


def _read_weight_only(
    weights: HFConfig, layout: str, *, kind: str, bits: Any, scale_dtype: torch.dtype
) -> WeightForm:
    is_packed = layout == _PACKED
    if kind != "int":
        weights.refuse("type", "is float, with activations that are not rounded, which is not supported")
    if bits not in ((4, 8) if is_packed else (8,)):
        weights.refuse("num_bits", f"is {bits!r}; {'4 and 8 are' if is_packed else '8 is'} understood")
    strategy = _strategy(weights, ("group", "channel", "tensor"))
    is_symmetric = weights.flag("symmetric", default=True)
    if not is_symmetric and (not is_packed or strategy == "tensor"):
        weights.refuse("symmetric", "is false, which is understood of packed groups and channels only")
    size = weights.positive_int("group_size") if strategy == "group" else None
    if size is None and weights.get("group_size") not in (None, -1):
        weights.refuse("group_size", f"contradicts the strategy {strategy!r}")
    order = weights.get("actorder")
    has_order = False if order in (None, False) else weights.choice("actorder", _ACTORDERS)
    _skip_notes(weights)
    return CompressedForm(
        bits=bits,
        group_size=size,
        is_symmetric=is_symmetric,
        has_order=has_order and size is not None,
        scale_dtype=scale_dtype,
        is_packed=is_packed,
        has_one_scale=strategy == "tensor",
    )


def _read_scaled(weights: HFConfig, activations: HFConfig, *, kind: str, bits: Any) -> WeightForm:
    """Weights and activations of 8 bits both."""
    for arguments, what in ((weights, bits), (activations, activations.get("num_bits", 8))):
        if what != 8:
            arguments.refuse("num_bits", f"is {what!r}; where activations are rounded, 8 is understood")
        if not arguments.flag("symmetric", default=True):
            arguments.refuse("symmetric", "is false, which is not understood where activations are rounded")
    if activations.get("type", "int") != kind:
        activations.refuse("type", f"is not {kind!r}, as the weights'")
    strategy = _strategy(weights, ("tensor", "channel", "block"))
    if kind == "int" and strategy == "block":
        _refuse_strategy(weights, strategy, ("tensor", "channel"))
    is_dynamic = activations.flag("dynamic", default=False)
    block = None
    if strategy == "block":
        block = _block(weights)
        if not is_dynamic or activations.get("group_size") != block[1]:
            activations.refuse("group_size", f"is not that of the weights' blocks, {block[1]}")
    _strategy(activations, ("group",) if block else ("token", "tensor") if is_dynamic else ("tensor",))
    if weights.get("actorder") or weights.get("group_size") not in (None, -1):
        weights.refuse("group_size", "or 'actorder' is there, which channels don't have")
    for arguments in (weights, activations):
        _skip_notes(arguments)
        for key in ("group_size", "block_structure", "actorder"):
            arguments.get(key)
    return ScaledForm(
        stored="int8" if kind == "int" else "e4m3",
        scales_of=strategy,
        block=block,
        given_name=None if is_dynamic else "input_scale",
    )


def _strategy(arguments: HFConfig, understood: tuple[str, ...]) -> Any:
    strategy = arguments.get("strategy")
    if strategy is None:  # as the library completes it
        strategy = "group" if arguments.get("group_size") not in (None, -1) else "tensor"
    if strategy not in understood:
        _refuse_strategy(arguments, strategy, understood)
    return strategy


def _refuse_strategy(arguments: HFConfig, strategy: object, understood: tuple[str, ...]) -> NoReturn:
    arguments.refuse("strategy", f"is {strategy!r}; here {' and '.join(understood)} are understood")


def _block(weights: HFConfig) -> tuple[int, int]:
    block = weights.get("block_structure")
    if not isinstance(block, list) or [type(size) for size in block] != [int, int] or min(block) < 1:
        weights.refuse("block_structure", f"is {block!r}, not two sizes")
    return block[0], block[1]


def _skip_notes(arguments: HFConfig) -> None:
    for key in _NOTES_OF_ARGUMENTS:
        arguments.get(key)


def _names(section: HFConfig, key: str) -> tuple[str, ...]:
    names = section.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        section.refuse(key, "is not a list of modules")
    for name in names:
        if name.startswith(_PATTERN):
            try:
                re.compile(name.removeprefix(_PATTERN))
            except re.error as error:
                section.refuse(key, f"has {name!r}, which is no regular expression: {error}")
    return tuple(names)
