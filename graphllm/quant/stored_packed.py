"""Checkpoints whose linear layers are stored as integer codes with scales, to be multiplied so.

Owns what their formats have in common: a part's tensors come one by one and mean something only together;
codes count from 0; inputs may be grouped by how much they matter and not by their place (act-order). The
groups then become neighbours by an input order, which a product of several layers has once: layers over the
same input are ordered alike, because the order depends on the input alone, and it is checked. How a format
packs its codes is the format's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from graphllm.errors import CheckpointError
from graphllm.kernels.linear import LinearProduct
from graphllm.kernels.packed_weight import SMALLEST_GROUP, PackedFormat
from graphllm.quant.packed import PackedScheme
from graphllm.quant.pending_parts import PendingParts
from graphllm.quant.scheme import CheckpointTensor, DeviceNeeds, ExpertScheme

SCALE_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
INT32 = frozenset({torch.int32})


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredForm(ABC):
    """A WeightForm of integers with scales.

    group_size: None for whole rows. has_order: whether inputs are grouped by something else than their
    place. scale_dtype: what holds the scales exactly.
    """

    method: ClassVar[str]

    bits: Literal[4, 8]
    group_size: int | None
    is_symmetric: bool
    has_order: bool = False
    scale_dtype: torch.dtype

    @property
    def name(self) -> str:
        """For people."""
        groups = "whole rows" if self.group_size is None else f"groups of {self.group_size}"
        kind = "" if self.is_symmetric else ", asymmetric"
        return f"{self.method}, {self.bits} bits in {groups}{kind}{', act-order' if self.has_order else ''}"

    @property
    def devices(self) -> DeviceNeeds:
        """What multiplies it."""
        return DeviceNeeds()

    @property
    def is_online(self) -> bool:
        """It comes from checkpoints."""
        return False

    @abstractmethod
    def make_scheme(self, plain: LinearProduct, *, num_experts: int) -> ExpertScheme:
        """See `WeightForm`."""


@dataclass(frozen=True, slots=True)
class StoredRows:
    """What a part's tensors say: codes [rows, in_features] uint8, from 0; scales and zeros [rows, groups],
    zeros as codes are; group_of_input [in_features], None where inputs are grouped by their place."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_of_input: Tensor | None = None


class StoredPacked(PackedScheme):
    """An ExpertScheme for layers of one `StoredForm`. num_experts: 0 for linear layers."""

    def __init__(self, form: StoredForm, plain: LinearProduct, *, num_experts: int) -> None:
        super().__init__(plain)
        self.stored = form
        is_ordered = form.has_order and form.group_size is not None
        self._num_orders = max(1, num_experts) if is_ordered else 0

    @abstractmethod
    def tensors_of_rows(self, in_features: int, out_features: int) -> dict[str, CheckpointTensor]:
        """The tensors that `out_features` rows are stored in, without the bias.

        Raises CheckpointError for sizes that cannot be stored so.
        """

    @abstractmethod
    def read_rows(self, tensors: dict[str, Tensor]) -> StoredRows:
        """What the tensors of `tensors_of_rows` say. Raises CheckpointError for what they cannot."""

    def format_of(self, in_features: int, out_features: int) -> PackedFormat:
        form = self.stored
        self.num_groups(in_features)
        group_size = form.group_size
        smallest = SMALLEST_GROUP[form.bits]
        if group_size is not None and group_size % smallest:
            raise CheckpointError(
                f"groups of {group_size} are not multiplied; {form.bits} bits have groups of a multiple of "
                f"{smallest}"
            )
        return PackedFormat(
            bits=form.bits,
            group_size=group_size,
            zeros="none" if form.is_symmetric else "integer",
            scale_dtype=form.scale_dtype,
            num_orders=self._num_orders,
        )

    def num_groups(self, in_features: int) -> int:
        """Groups of a row. Raises CheckpointError where they do not fill it."""
        size = self.stored.group_size or in_features
        if in_features % size:
            raise CheckpointError(f"groups of {size} do not divide {in_features} inputs")
        return in_features // size

    def checkpoint_tensors(
        self, in_features: int, out_features: int, *, bias: bool
    ) -> dict[str, CheckpointTensor]:
        # Some versions write a bias of zeros where there is none.
        has_bias = CheckpointTensor((out_features,), is_optional=not bias)
        return self.tensors_of_rows(in_features, out_features) | {"bias": has_bias}

    def load(self, layer: nn.Module, name: str, *, tensor: Tensor, first_row: int) -> None:
        if name == "bias":
            if layer.bias is not None:
                self.store_bias(layer, tensor, first_row=first_row)
            elif tensor.any():
                raise CheckpointError("it is not zero, though the model has no such bias")
            return
        pending = layer.__dict__.setdefault("pending_parts", PendingParts())
        # Of the names alone, which are those of parts of any size.
        wanted = self.tensors_of_rows(cast(int, layer.in_features), len(cast(Tensor, layer.codes)))
        part = pending.add(name, tensor, first_row=first_row, wanted=wanted)
        if part is not None:
            self._store_part(layer, self.read_rows(part), first_row)

    def _store_part(self, layer: nn.Module, rows: StoredRows, first_row: int) -> None:
        form, codes, zeros = self.stored, rows.codes, rows.zeros
        middle = 2 ** (form.bits - 1)
        if form.is_symmetric and zeros is not None:
            if bool((zeros != middle).any()):
                raise CheckpointError(
                    f"its zeros are not all {middle}, though the configuration says that it is symmetric"
                )
            zeros = None
        order = self._order(rows.group_of_input, codes.shape[1])
        if order is not None:
            self._store_shared_order(layer, order, first_row)
            codes = codes[:, order]
        if form.bits == 8:
            codes, zeros = _signed(codes), None if zeros is None else _signed(zeros)
        scales = _exact(rows.scales, form.scale_dtype)
        self.store(layer, first_row=first_row, codes=codes, scales=scales, zeros=zeros)

    def _order(self, group_of_input: Tensor | None, in_features: int) -> Tensor | None:
        """The input feature of each stored column, [in_features]; None where they are in place.

        Raises CheckpointError where not every group has its share of inputs.
        """
        if group_of_input is None:
            assert not self._num_orders
            return None
        size = self.stored.group_size or in_features
        in_place = torch.arange(in_features) // size
        order = torch.argsort(group_of_input, stable=True)
        if not torch.equal(group_of_input[order].long(), in_place):
            lowest, highest, last = int(group_of_input.min()), int(group_of_input.max()), int(in_place[-1])
            if lowest < 0 or highest > last:
                raise CheckpointError(
                    f"its groups of inputs are {lowest} to {highest}, but there are only 0 to {last}"
                )
            raise CheckpointError(f"its groups of inputs are not of {size} inputs each")
        if self._num_orders:
            return order
        if not torch.equal(group_of_input.long(), in_place):
            raise CheckpointError("its inputs have an order, of which the configuration says nothing")
        return None

    def _store_shared_order(self, layer: nn.Module, order: Tensor, first_row: int) -> None:
        index = first_row // (len(cast(Tensor, layer.codes)) // self._num_orders)
        known: dict[int, Tensor] = layer.__dict__.setdefault("known_orders", {})
        if not torch.equal(known.setdefault(index, order), order):
            raise CheckpointError(
                "its order of inputs differs from that of another layer over the same input, and one product "
                "does both"
            )
        self.store_order(layer, order.to(torch.int32), index=index)

    def finish(self, layer: nn.Module) -> None:
        for name in ("pending_parts", "known_orders"):
            layer.__dict__.pop(name, None)
        super().finish(layer)


def _signed(codes: Tensor) -> Tensor:
    """Codes from 0 to 255, uint8, less 128, int8."""
    return (codes ^ 128).view(torch.int8)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """words: [rows, columns] int32; returns [rows, columns * 32 / bits] uint8, codes from 0.

    bits: 4 or 8. The first of a word's codes is in its lowest bits.
    """
    packed = words.contiguous().view(torch.uint8)  # a word's lowest bits first
    return packed if bits == 8 else torch.stack((packed & 15, packed >> 4), 2).view(len(words), -1)


def fill_words(features: int, bits: int, *, what: str) -> int:
    """How many words hold so many codes. Raises CheckpointError where they do not fill them."""
    codes_per_word = 32 // bits
    if features % codes_per_word:
        raise CheckpointError(f"{features} {what} do not fill words of {codes_per_word} codes")
    return features // codes_per_word


def _exact(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales in `dtype`. Raises CheckpointError where it does not hold them, or nothing does."""
    converted = scales.to(dtype)
    if not converted.isfinite().all():
        raise CheckpointError("its scales are not all finite")
    if not torch.equal(converted.to(scales.dtype), scales):
        raise CheckpointError(f"its scales are finer than {str(dtype).removeprefix('torch.')}")
    return converted
