"""Checkpoints in 8 bits with scales, written as their formats say, and the model that they mean.

The model is transformers' own: its linear layers hold the numbers that the stored ones stand for, and round
what they are given. Nothing here comes from the code under test.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.models.memory_checkpoint import MemoryCheckpoint, as_checkpoint

E4M3, INT8 = torch.float8_e4m3fn, torch.int8
LARGEST = {E4M3: 448.0, INT8: 127.0}
LINEAR = re.compile(r"layers\.\d+\..*_proj\.weight$|experts\.\d+\..*\.weight$")

Quantizer = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
"""A plain weight to its checkpoint tensors, by what stands behind the layer's name, and what they mean."""


def rounded(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """numbers: within the format's range."""
    return (numbers.round() if dtype == INT8 else numbers).to(dtype)


def by_row(weight: Tensor, dtype: torch.dtype, *, name: str = "weight_scale") -> tuple[Any, Tensor]:
    """A scale a row."""
    scale = weight.abs().amax(1, keepdim=True) / LARGEST[dtype]
    stored = rounded(weight / scale, dtype)
    return {"weight": stored, name: scale}, stored.float() * scale


def by_tensor(weight: Tensor, dtype: torch.dtype, *, name: str = "weight_scale") -> tuple[Any, Tensor]:
    """One scale, of no dimension."""
    scale = weight.abs().amax() / LARGEST[dtype]
    stored = rounded(weight / scale, dtype)
    return {"weight": stored, name: scale}, stored.float() * scale


def by_block(weight: Tensor, block: tuple[int, int]) -> tuple[Any, Tensor]:
    """A scale a block, e4m3; the last blocks of rows and of inputs may be smaller."""
    rows, inputs = block
    stored, meant = torch.empty_like(weight, dtype=E4M3), torch.empty_like(weight)
    scales = torch.empty(-(-len(weight) // rows), -(-weight.shape[1] // inputs))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * rows, (i + 1) * rows), slice(j * inputs, (j + 1) * inputs)
            scales[i, j] = weight[place].abs().amax() / 448
            stored[place] = (weight[place] / scales[i, j]).to(E4M3)
            meant[place] = stored[place].float() * scales[i, j]
    return {"weight": stored, "weight_scale_inv": scales}, meant


def round_activations(x: Tensor, dtype: torch.dtype, *, group: int | None, given: float | None) -> Tensor:
    """What is left of activations: a scale a row, a group of a row, or a given one."""
    limit = LARGEST[dtype]
    if given is not None:
        least = -128.0 if dtype == INT8 else -limit
        return rounded((x / given).clamp(least, limit), dtype).float() * given
    pieces = x.split(group or x.shape[-1], dim=-1)
    scales = [piece.abs().amax(-1, keepdim=True) / limit for piece in pieces]
    return torch.cat(
        [
            rounded((piece / scale).nan_to_num(), dtype).float() * scale
            for piece, scale in zip(pieces, scales, strict=True)
        ],
        -1,
    )


def quantized(
    model: PreTrainedModel,
    quantizer: Quantizer,
    config: dict[str, Any],
    *,
    dtype: torch.dtype,
    group: int | None = None,
    given: float | None = None,
    given_name: str = "",
) -> tuple[MemoryCheckpoint, PreTrainedModel]:
    """The checkpoint, and the model that it means. config: the section `quantization_config`."""
    checkpoint = as_checkpoint(model)
    checkpoint.hf_config["quantization_config"] = config
    meant = deepcopy(model)
    for name in [name for name in checkpoint.tensors if LINEAR.search(name)]:
        tensors, numbers = quantizer(checkpoint.tensors.pop(name))
        if given is not None:
            tensors[given_name] = torch.tensor(given)
        beginning = name.removesuffix("weight")
        checkpoint.tensors |= {beginning + last: tensor for last, tensor in tensors.items()}
        module = meant.get_submodule(name.removesuffix(".weight"))
        assert isinstance(module, nn.Linear)
        module.weight.data.copy_(numbers)
        module.register_forward_pre_hook(
            lambda module, inputs: (round_activations(inputs[0], dtype, group=group, given=given),)
        )
    return checkpoint, meant
