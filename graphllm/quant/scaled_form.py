"""Checkpoints whose linear layers are stored in 8 bits with scales, to be multiplied so: FP8 and int8 "w8a8".

For a layer they have `weight` [out, in] in e4m3 or int8, and its scales: one (`tensor`), one for each row
(`channel`), or one for each block of rows and inputs (`block`; DeepSeek-AI, 2024, arXiv:2412.19437), all
factors that the values are multiplied by, whether their name ends in "_inv" or not. Activations are rounded
with a scale for each token, with blocks for each token and block of inputs, or with one that the checkpoint
gives for the layer. A token's scale in int8 is its largest number over 127, as the kernels divide that such
checkpoints are mostly served by; the library that writes them tries them out with 127.5.

Owns the form as a value, the names, shapes and types of its tensors, and how they become rows of values and
scales. A scale of a tensor or a block is repeated for each of its rows, so that parts of any size merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from graphllm.errors import CheckpointError
from graphllm.kernels.linear import LinearProduct
from graphllm.quant.pending_parts import PendingParts
from graphllm.quant.scaled import ScaledScheme
from graphllm.quant.scheme import PLAIN_DTYPES, CheckpointTensor, DeviceNeeds, ExpertScheme

ScaledFormat = Literal["e4m3", "int8"]
_DTYPES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}
# DeepSeek's later checkpoints have scales that are powers of two, in 8 bits.
_SCALE_DTYPES = PLAIN_DTYPES | {torch.float8_e8m0fnu}
_SMALLEST_BLOCK = 32

FP8_NEEDS = DeviceNeeds(capability=(8, 9), why="matrix units for 8-bit floating-point numbers")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledForm:
    """A WeightForm. scales_of: what a scale is of. block: rows and inputs of one where it is a block's.

    given_name: the tensor with the activations' scale, None where they get one of their own. scale_name:
    that of the weight's.
    """

    stored: ScaledFormat
    scales_of: Literal["tensor", "channel", "block"]
    block: tuple[int, int] | None = None
    scale_name: str = "weight_scale"
    given_name: str | None = None

    @property
    def name(self) -> str:
        """For people."""
        what = {"tensor": "tensor", "channel": "row"}.get(self.scales_of) or "x".join(
            str(size) for size in self.block or ()
        )
        activations = "given" if self.given_name else "dynamic"
        return f"{'FP8' if self.stored == 'e4m3' else 'int8'}, a scale a {what}, {activations} activations"

    @property
    def devices(self) -> DeviceNeeds:
        """What multiplies it."""
        return FP8_NEEDS if self.stored == "e4m3" else DeviceNeeds(why="int8 matrix units")

    @property
    def is_online(self) -> bool:
        """It comes from checkpoints."""
        return False

    def make_scheme(self, plain: LinearProduct, *, num_experts: int) -> ExpertScheme:
        """See `WeightForm`."""
        return StoredScaled(self, plain)


class StoredScaled(ScaledScheme):
    """An ExpertScheme for layers of one `ScaledForm`."""

    def __init__(self, form: ScaledForm, plain: LinearProduct) -> None:
        super().__init__(
            plain,
            stored=_DTYPES[form.stored],
            group_size=None if form.block is None else form.block[1],
            has_given_scale=form.given_name is not None,
        )
        self.form = form

    def create_weights(
        self,
        layer: nn.Module,
        *,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        if self.group_size is not None and (
            self.group_size < _SMALLEST_BLOCK or self.group_size & (self.group_size - 1)
        ):
            raise CheckpointError(
                f"blocks of {self.group_size} inputs are not multiplied; powers of two from "
                f"{_SMALLEST_BLOCK} on are"
            )
        super().create_weights(
            layer,
            in_features=in_features,
            out_features=out_features,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        layer.pending_parts = PendingParts()  # type: ignore[assignment]

    def checkpoint_tensors(
        self, in_features: int, out_features: int, *, bias: bool
    ) -> dict[str, CheckpointTensor]:
        form = self.form
        shape: tuple[int, ...] | None = None  # of one number: files write it with a dimension or without
        if form.scales_of == "channel":
            shape = (out_features, 1)
        elif form.block is not None:
            shape = (-(-out_features // form.block[0]), -(-in_features // form.block[1]))
        tensors = {
            "weight": CheckpointTensor((out_features, in_features), frozenset({self.stored})),
            form.scale_name: CheckpointTensor(shape, _SCALE_DTYPES),
        }
        if form.given_name is not None:
            tensors[form.given_name] = CheckpointTensor(None)
        return tensors | ({"bias": CheckpointTensor((out_features,))} if bias else {})

    def load(self, layer: nn.Module, name: str, *, tensor: Tensor, first_row: int) -> None:
        if name == "bias":
            self.store_bias(layer, tensor, first_row=first_row)
        elif name == self.form.given_name:
            self.store_given_scale(layer, _one_scale(tensor, name))
        else:
            pending = cast(PendingParts, layer.pending_parts)
            wanted = ("weight", self.form.scale_name)
            part = pending.add(name, tensor, first_row=first_row, wanted=wanted)
            if part is not None:
                scales = self._scales_of_rows(part[self.form.scale_name], num_rows=len(part["weight"]))
                self.store(layer, part["weight"], scales, first_row=first_row)

    def _scales_of_rows(self, scales: Tensor, *, num_rows: int) -> Tensor:
        """[num_rows, num_groups] float32, from what the checkpoint has."""
        scales = scales.float()
        if not scales.isfinite().all():
            raise CheckpointError(f"'{self.form.scale_name}' holds what is no finite number")
        if (scales < 0).any():
            raise CheckpointError(f"'{self.form.scale_name}' holds negative numbers")
        if self.form.scales_of == "tensor":
            return _one_scale(scales, self.form.scale_name)[:, None].expand(num_rows, 1)
        if self.form.block is not None:
            return scales.repeat_interleave(self.form.block[0], 0)[:num_rows]
        return scales


def _one_scale(scale: Tensor, name: str) -> Tensor:
    """[1] float32."""
    if scale.numel() != 1:
        raise CheckpointError(f"{name!r} holds {scale.numel()} numbers, not one")
    scale = scale.float().reshape(1)
    if not (scale.isfinite() & (scale > 0)).all():
        raise CheckpointError(f"{name!r} is {float(scale)}, not a positive number")
    return scale
