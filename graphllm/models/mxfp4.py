"""Experts stored in MXFP4, as the plain numbers that they stand for.

    w_j = 2^(s - 127) * v_j,   32 neighbouring weights with one scale s (8 bits) and v_j of 4 bits (E2M1)

(OCP Microscaling Formats specification 1.0, 2023.) Two weights share a byte, the first in its lower half.
Every such number is exact in bfloat16 and in float32. Owns the unpacking; that they are multiplied in this
form, as they could be, is not done here.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphllm.errors import CheckpointError

if TYPE_CHECKING:
    from graphllm.models.checkpoint import Checkpoint
    from graphllm.tokenizer.tokenizer import Tokenizer

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BYTES_PER_SCALE = 16
_EXPONENT_BIAS = 127
_BLOCKS, _SCALES = "_blocks", "_scales"


class MXFP4Checkpoint:
    """A Checkpoint in which `X_blocks` and `X_scales` of another are one tensor X of bfloat16.

    X_blocks: [num_experts, rows, in_features / 32, 16] bytes; X_scales: [num_experts, rows, in_features /
    32] bytes; X: [num_experts, in_features, rows], as the unpacked checkpoints have it. A checkpoint with
    none of these is handed through.
    """

    path: Path
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]

    def __init__(self, packed: Checkpoint) -> None:
        self.path = packed.path
        self.hf_config = packed.hf_config
        self.generation_config = packed.generation_config
        self._checkpoint = packed
        names = packed.tensor_names()
        self._packed = {
            name.removesuffix(_BLOCKS)
            for name in names
            if name.endswith(_BLOCKS) and name.removesuffix(_BLOCKS) + _SCALES in names
        }

    def tensor_names(self) -> Collection[str]:
        names: dict[str, None] = {}
        for name in self._checkpoint.tensor_names():
            whole = name.removesuffix(_BLOCKS).removesuffix(_SCALES)
            names[whole if whole in self._packed else name] = None
        return names

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        if name not in self._packed:
            return self._checkpoint.tensor_shape(name)
        blocks = self._checkpoint.tensor_shape(name + _BLOCKS)
        if len(blocks) != 4 or blocks[3] != _BYTES_PER_SCALE:
            self._refuse(name + _BLOCKS, blocks, f"[experts, rows, blocks, {_BYTES_PER_SCALE}]")
        scales = self._checkpoint.tensor_shape(name + _SCALES)
        if scales != blocks[:3]:
            self._refuse(name + _SCALES, scales, f"{list(blocks[:3])}, one for each block")
        num_experts, rows, num_blocks, _ = blocks
        return num_experts, num_blocks * 2 * _BYTES_PER_SCALE, rows

    def _refuse(self, name: str, shape: tuple[int, ...], wanted: str) -> None:
        raise CheckpointError(f"{self.path}: tensor {name!r} has shape {list(shape)}, not {wanted}.")

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._packed:
            return self._checkpoint.tensor(name)
        num_experts, in_features, rows = self.tensor_shape(name)
        blocks, scales = (self._read_bytes(name + suffix) for suffix in (_BLOCKS, _SCALES))
        numbers = torch.empty(num_experts, rows, in_features, dtype=torch.bfloat16)
        for expert in range(num_experts):  # one by one, for what is needed on the way
            numbers[expert] = unpack_mxfp4(blocks[expert], scales[expert])
        return numbers.mT

    def _read_bytes(self, name: str) -> torch.Tensor:
        tensor = self._checkpoint.tensor(name)
        if tensor.dtype != torch.uint8:
            found = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{self.path}: tensor {name!r} holds {found}, not packed bytes.")
        return tensor

    def load_tokenizer(self) -> Tokenizer:
        return self._checkpoint.load_tokenizer()


def unpack_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks: [rows, num_blocks, 16] uint8, scales: [rows, num_blocks] uint8; returns [rows, num_blocks * 32]
    bfloat16."""
    values = torch.tensor([*_VALUES, *(-value for value in _VALUES)])
    halves = torch.stack((blocks & 0xF, blocks >> 4), dim=-1)  # [rows, num_blocks, 16, 2]
    numbers = values[halves.int()].flatten(2)
    exponents = scales.int()[..., None] - _EXPONENT_BIAS
    return torch.ldexp(numbers, exponents).flatten(1).to(torch.bfloat16)
