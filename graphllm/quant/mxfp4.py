"""Stacks of experts in MXFP4, which stay packed: 4-bit floats (E2M1), and for 32 neighbours a power of two.

    w_j = 2^(s - 127) * v_j        (OCP Microscaling Formats specification 1.0, 2023)

For a stack a checkpoint has `X_blocks` [num_experts, rows, in_features / 32, 16] bytes, two codes each, the
first in its lower half, and `X_scales` [num_experts, rows, in_features / 32] bytes. Unpacking them is
`models/mxfp4.py`'s.

Owns the form as a value, its tensors, and how they become codes and scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphllm.errors import CheckpointError
from graphllm.kernels.linear import LinearProduct
from graphllm.kernels.packed_tiles import E2M1
from graphllm.kernels.packed_weight import PackedFormat
from graphllm.quant.packed import PackedScheme
from graphllm.quant.scheme import CheckpointTensor, DeviceNeeds, ExpertScheme

_BLOCK, _BYTES_PER_BLOCK = 32, 16
_NOT_A_NUMBER = 255
_BYTES = frozenset({torch.uint8})


@dataclass(frozen=True, slots=True)
class Mxfp4Form:
    """A WeightForm."""

    name: str = "MXFP4"
    is_online: bool = False

    @property
    def devices(self) -> DeviceNeeds:
        """What multiplies it."""
        return DeviceNeeds(instead="int4")

    def make_scheme(self, plain: LinearProduct, *, num_experts: int) -> ExpertScheme:
        """See `WeightForm`."""
        return Mxfp4(plain)


class Mxfp4(PackedScheme):
    """An ExpertScheme of MXFP4 weights. Its tensors are told apart by what stands behind a stack's name."""

    _FORMAT = PackedFormat(bits=4, group_size=_BLOCK, codebook=E2M1, scale_dtype=torch.uint8)

    def format_of(self, in_features: int, out_features: int) -> PackedFormat:
        return self._FORMAT

    def checkpoint_tensors(
        self, in_features: int, out_features: int, *, bias: bool
    ) -> dict[str, CheckpointTensor]:
        if in_features % _BLOCK:
            raise CheckpointError(f"rows of {in_features} are no whole blocks of {_BLOCK}")
        num_blocks = in_features // _BLOCK
        tensors = {
            "blocks": CheckpointTensor((out_features, num_blocks, _BYTES_PER_BLOCK), _BYTES),
            "scales": CheckpointTensor((out_features, num_blocks), _BYTES),
        }
        return tensors | ({"bias": CheckpointTensor((out_features,))} if bias else {})

    def load(self, layer: nn.Module, name: str, *, tensor: Tensor, first_row: int) -> None:
        if name == "bias":
            self.store_bias(layer, tensor, first_row=first_row)
        elif name == "blocks":
            codes = torch.stack((tensor & 0xF, tensor >> 4), dim=-1)  # [rows, num_blocks, 16, 2]
            self.store(layer, first_row=first_row, codes=codes.flatten(1))
        else:
            if (tensor == _NOT_A_NUMBER).any():
                raise CheckpointError("a scale is 255, which is no number")
            self.store(layer, first_row=first_row, scales=tensor)
