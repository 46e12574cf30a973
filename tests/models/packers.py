"""Packed checkpoints, made of plain ones to the letter of the published formats.

Each packer turns one plain matrix into the tensors of its format and the plain numbers that they stand for,
which are computed here from codes, scales and zeros, in the formats' own words and not in ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.models.memory_checkpoint import MemoryCheckpoint

# (module's name in the checkpoint, weight [out, in]) -> (tensors by name within the module, plain weight)
Packer = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]

LINEARS = ("_proj", ".w1", ".w2", ".w3", "query_key_value", "_mqa", "dense", "4h", "to_h")


def packed(
    plain: MemoryCheckpoint,
    packer: Packer,
    *,
    config: dict[str, Any],
    is_packed: Callable[[str], bool] = lambda module: True,
    dtype: str = "float16",
) -> tuple[MemoryCheckpoint, MemoryCheckpoint]:
    """(the packed checkpoint, the plain one of the same numbers).

    config: its quantization_config. is_packed: which linear modules are, by name. dtype: config.json's.
    """
    stored, dequantized = dict(plain.tensors), dict(plain.tensors)
    for name, weight in plain.tensors.items():
        module = name.removesuffix(".weight")
        if weight.ndim != 2 or not module.endswith(LINEARS) or not is_packed(module):
            continue
        del stored[name]
        tensors, dequantized[name] = packer(module, weight)
        stored |= {f"{module}.{tensor}": value for tensor, value in tensors.items()}
    hf_config = {key: value for key, value in plain.hf_config.items() if key not in ("dtype", "torch_dtype")}
    hf_config["torch_dtype"] = dtype
    whole = hf_config | {"quantization_config": config}
    return MemoryCheckpoint(whole, stored), MemoryCheckpoint(hf_config, dequantized)


def quantize(
    weight: Tensor, group_of_input: Tensor, *, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round-to-nearest: codes [out, in] from 0, scales [out, groups] float16, zeros [out, groups] from 0, and
    the plain numbers."""
    largest = 2**bits - 1
    num_groups = int(group_of_input.max()) + 1
    codes, plain = torch.empty_like(weight, dtype=torch.int32), torch.empty_like(weight)
    scales = torch.empty(len(weight), num_groups, dtype=torch.float16)
    zeros = torch.empty(len(weight), num_groups, dtype=torch.int32)
    for group in range(num_groups):
        columns = weight[:, group_of_input == group]
        if symmetric:
            scale = 2 * columns.abs().amax(1) / largest
            zero = torch.full_like(scale, 2 ** (bits - 1))
        else:
            low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
            scale = (high - low) / largest
            zero = (-low / scale).round()
        scales[:, group], zeros[:, group] = scale.half(), zero.int()
        exact = scales[:, group].float()[:, None]
        of_group = ((columns / exact).round() + zero[:, None]).clamp(0, largest)
        codes[:, group_of_input == group] = of_group.int()
        plain[:, group_of_input == group] = (of_group - zero[:, None]) * exact
    return codes, scales, zeros, plain


def words(codes: Tensor, bits: int) -> Tensor:
    """[rows, columns] to [rows, columns * bits / 32] int32; a word's first code in its lowest bits."""
    per_word = 32 // bits
    parts = codes.to(torch.int64).view(len(codes), -1, per_word)
    total = sum(parts[:, :, place] << (bits * place) for place in range(per_word))
    assert isinstance(total, Tensor)
    return (total - ((total >> 31) << 32)).to(torch.int32)  # as a signed number of the same bits


def in_place(in_features: int, group_size: int | None) -> Tensor:
    """The group of each input where groups are neighbours."""
    return torch.arange(in_features) // (group_size or in_features)


def shuffled(module: str, in_features: int, group_size: int | None) -> Tensor:
    """The group of each input under act-order: the same for modules that see the same input."""
    parent, _, name = module.rpartition(".")
    is_inner = name in ("down_proj", "w2", "o_proj")
    seed = int.from_bytes(hashlib.sha256(f"{parent} {is_inner}".encode()).digest()[:4], "little")
    order = torch.randperm(in_features, generator=torch.Generator().manual_seed(seed))
    return in_place(in_features, group_size)[order]


def gptq(
    *, bits: int, group_size: int | None, symmetric: bool, act_order: bool = False, version: int = 1
) -> Packer:
    """AutoGPTQ's format and, as version 2, GPTQModel's."""

    def pack(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        in_features = weight.shape[1]
        groups = in_place(in_features, group_size)
        if act_order:
            groups = shuffled(module, in_features, group_size)
        codes, scales, zeros, plain = quantize(weight, groups, bits=bits, symmetric=symmetric)
        stored_zeros = (zeros - 1) % 2**bits if version == 1 else zeros
        tensors = {
            "qweight": words(codes, bits).t().contiguous(),
            "qzeros": words(stored_zeros.t().contiguous(), bits),
            "scales": scales.t().contiguous(),
            "g_idx": groups.to(torch.int32),
        }
        return tensors, plain

    return pack


def awq(*, group_size: int | None) -> Packer:
    """AutoAWQ's packing for matrix-matrix kernels."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def interleaved(codes: Tensor) -> Tensor:
        eights = codes.reshape(len(codes), -1, 8)
        return words(eights[:, :, list(order)].reshape(len(codes), -1), 4)

    def pack(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        groups = in_place(weight.shape[1], group_size)
        codes, scales, zeros, plain = quantize(weight, groups, bits=4, symmetric=False)
        tensors = {
            "qweight": interleaved(codes.t()),
            "qzeros": interleaved(zeros.t()),
            "scales": scales.t().contiguous(),
        }
        return tensors, plain

    return pack


def pack_quantized(*, bits: int, group_size: int | None, symmetric: bool, act_order: bool = False) -> Packer:
    """compressed-tensors' "pack-quantized"."""

    def pack(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        groups = in_place(weight.shape[1], group_size)
        if act_order:
            groups = shuffled(module, weight.shape[1], group_size)
        codes, scales, zeros, plain = quantize(weight, groups, bits=bits, symmetric=symmetric)
        tensors = {
            "weight_packed": words(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = words(zeros.t(), bits).t().contiguous()
        if act_order:
            tensors["weight_g_idx"] = groups.to(torch.int32)
        return tensors, plain

    return pack


def unpacked_int8(*, one_scale: bool = False) -> Packer:
    """compressed-tensors' int8 codes as they are, with a scale for each row or one for all."""

    def pack(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        largest = weight.abs().max().expand(len(weight)) if one_scale else weight.abs().amax(1)
        scales = (largest / 127).half()[:, None]
        codes = (weight / scales.float()).round().clamp(-128, 127)
        tensors = {"weight": codes.to(torch.int8), "weight_scale": scales[0] if one_scale else scales}
        return tensors, codes * scales.float()

    return pack
