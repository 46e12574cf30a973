"""Weights as GGUF's blocks have them, to be multiplied so: codes with scales, and offsets in some types.

Owns the form as a value, and its tensors: codes, scales and zeros, as `models/packed_gguf.py` hands them out.
What blocks look like is `models/gguf_packed.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphllm.errors import CheckpointError
from graphllm.kernels.linear import LinearProduct
from graphllm.kernels.packed_weight import PackedFormat
from graphllm.quant.packed import PackedScheme
from graphllm.quant.scheme import CheckpointTensor, DeviceNeeds, ExpertScheme


@dataclass(frozen=True, slots=True)
class GgufForm:
    """A WeightForm. kind: GGUF's name of the type, "Q4_K"."""

    kind: str
    format: PackedFormat

    @property
    def name(self) -> str:
        """For people."""
        return f"GGUF {self.kind}"

    @property
    def devices(self) -> DeviceNeeds:
        """What multiplies it."""
        return DeviceNeeds()

    @property
    def is_online(self) -> bool:
        """It comes from checkpoints."""
        return False

    def make_scheme(self, plain: LinearProduct, *, num_experts: int) -> ExpertScheme:
        """See `WeightForm`."""
        return GgufRows(self.format, plain)


class GgufRows(PackedScheme):
    """An ExpertScheme for layers of one `GgufForm`."""

    def __init__(self, form: PackedFormat, plain: LinearProduct) -> None:
        super().__init__(plain)
        self._format_of_all = form

    def format_of(self, in_features: int, out_features: int) -> PackedFormat:
        return self._format_of_all

    def checkpoint_tensors(
        self, in_features: int, out_features: int, *, bias: bool
    ) -> dict[str, CheckpointTensor]:
        form = self._format_of_all
        groups = (out_features, form.num_groups(in_features))
        scales = CheckpointTensor(groups, frozenset({form.scale_dtype}))
        codes = CheckpointTensor((out_features, in_features), frozenset({torch.int8}))
        tensors = {"codes": codes, "scales": scales}
        if form.zeros != "none":
            tensors["zeros"] = scales
        return tensors | ({"bias": CheckpointTensor((out_features,))} if bias else {})

    def load(self, layer: nn.Module, name: str, *, tensor: Tensor, first_row: int) -> None:
        if name == "bias":
            self.store_bias(layer, tensor, first_row=first_row)
            return
        if name != "codes" and not tensor.isfinite().all():
            raise CheckpointError("its numbers are not all finite")
        self.store(layer, first_row=first_row, **{name: tensor})
