"""Weights as bitsandbytes stores them: NF4 and FP4 (Dettmers et al., 2023, arXiv:2305.14314), and the int8 of
LLM.int8 (Dettmers et al., 2022, arXiv:2208.07339).

    w_{n,k} = codebook(code_{n,k}) * absmax_b,       b the block of 64 neighbours, counted through all rows
    absmax_b = nested_map(byte_b) * nested_absmax_{b / 256} + nested_offset        where it is quantized again
    w_{n,k} = code_{n,k} * SCB_n / 127                                              int8

Two codes of 4 bits share a byte, the first in its upper half, in a tensor `weight` [bytes, 1]; what else is
known of it stands in `weight.quant_state...`, JSON in bytes. Only the weights' form is taken over: LLM.int8
also splits activations, and multiplies most of them in int8 and outliers in 16 bits. Here activations stay
as they are, which is more exact.

Owns both forms as values, their tensors, and how they become codes and scales.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from graphllm.errors import CheckpointError
from graphllm.kernels.linear import LinearProduct
from graphllm.kernels.packed_weight import PackedFormat
from graphllm.quant.packed import PackedScheme
from graphllm.quant.pending_parts import PendingParts
from graphllm.quant.scheme import CheckpointTensor, DeviceNeeds, ExpertScheme

FourBitKind = Literal["nf4", "fp4"]

_NORMAL_FLOAT = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FLOAT_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


def _float_codebook() -> tuple[float, ...]:
    """Magnitudes over the largest, in float32, then the same below zero; there are two zeros."""
    positive = (torch.tensor(_FLOAT_MAGNITUDES) / 12).tolist()
    return (*positive, 0.0, *(-value for value in positive[1:]))


CODEBOOKS: dict[FourBitKind, tuple[float, ...]] = {"nf4": _NORMAL_FLOAT, "fp4": _float_codebook()}
"""The values of the 16 codes."""
BLOCK_SIZE = 64
"""Numbers of a block: what the library takes unless it is told otherwise, which no configuration says."""
_NESTED_BLOCK_SIZE = 256
_BYTES, _FLOATS = frozenset({torch.uint8}), frozenset({torch.float32})


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBitForm:
    """A WeightForm. is_nested: the blocks' absmax are quantized themselves."""

    kind: FourBitKind
    is_nested: bool

    @property
    def name(self) -> str:
        """For people."""
        return f"bitsandbytes {self.kind}{', double quantization' if self.is_nested else ''}"

    @property
    def devices(self) -> DeviceNeeds:
        """What multiplies it."""
        return DeviceNeeds(instead="int4")

    @property
    def is_online(self) -> bool:
        """It comes from checkpoints."""
        return False

    def make_scheme(self, plain: LinearProduct, *, num_experts: int) -> ExpertScheme:
        """See `WeightForm`."""
        return FourBit(self, plain)


@dataclass(frozen=True, slots=True)
class EightBitForm:
    """A WeightForm: LLM.int8's weights."""

    name: str = "bitsandbytes int8"
    is_online: bool = False

    @property
    def devices(self) -> DeviceNeeds:
        """What multiplies it."""
        return DeviceNeeds()

    def make_scheme(self, plain: LinearProduct, *, num_experts: int) -> ExpertScheme:
        """See `WeightForm`."""
        return EightBit(plain)


class FourBit(PackedScheme):
    """An ExpertScheme for layers of one `FourBitForm`."""

    def __init__(self, form: FourBitForm, plain: LinearProduct) -> None:
        super().__init__(plain)
        self.form = form
        self._state = f"weight.quant_state.bitsandbytes__{form.kind}"
        self._format_of_all = PackedFormat(
            bits=4,
            group_size=BLOCK_SIZE,
            scale_dtype=torch.float32,
            codebook=CODEBOOKS[form.kind],
        )

    def format_of(self, in_features: int, out_features: int) -> PackedFormat:
        if in_features % BLOCK_SIZE:
            raise CheckpointError(
                f"rows of {in_features} are no whole blocks of {BLOCK_SIZE}, which the codes' scales are of"
            )
        return self._format_of_all

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
        self.format_of(in_features, out_features)
        num_blocks = out_features * in_features // BLOCK_SIZE
        tensors = {
            "weight": CheckpointTensor((out_features * in_features // 2, 1), _BYTES),
            "weight.quant_map": CheckpointTensor((16,), _FLOATS),
            self._state: CheckpointTensor(None, _BYTES),
            "weight.absmax": CheckpointTensor((num_blocks,), _BYTES if self.form.is_nested else _FLOATS),
        }
        if self.form.is_nested:
            num_nested = -(-num_blocks // _NESTED_BLOCK_SIZE)
            tensors["weight.nested_absmax"] = CheckpointTensor((num_nested,), _FLOATS)
            tensors["weight.nested_quant_map"] = CheckpointTensor((256,), _FLOATS)
        return tensors | ({"bias": CheckpointTensor((out_features,))} if bias else {})

    def load(self, layer: nn.Module, name: str, *, tensor: Tensor, first_row: int) -> None:
        if name == "bias":
            self.store_bias(layer, tensor, first_row=first_row)
            return
        in_features = cast(int, layer.in_features)
        wanted = self.checkpoint_tensors(in_features, 1, bias=False)
        pending = cast(PendingParts, layer.pending_parts)
        part = pending.add(name, tensor, first_row=first_row, wanted=wanted)
        if part is None:
            return
        if part["weight.quant_map"].tolist() != list(CODEBOOKS[self.form.kind]):
            raise CheckpointError(f"'weight.quant_map' is not the codebook of {self.form.kind}")
        codes = torch.stack((part["weight"] >> 4, part["weight"] & 0xF), dim=-1).view(-1, in_features)
        state = _read_state(part[self._state])
        expected = {"quant_type": self.form.kind, "blocksize": BLOCK_SIZE, "shape": list(codes.shape)}
        if self.form.is_nested:
            expected["nested_blocksize"] = _NESTED_BLOCK_SIZE
        for key, value in expected.items():
            if (found := state.get(key)) != value:
                raise CheckpointError(f"{self._state!r} says {key!r} is {found!r}, not {value!r}")
        absmax = part["weight.absmax"]
        if self.form.is_nested:
            absmax = _nested_absmax(part, state.get("nested_offset"))
        self.store(layer, first_row=first_row, codes=codes, scales=_finite(absmax).view(len(codes), -1))


class EightBit(PackedScheme):
    """An ExpertScheme for layers in LLM.int8's weight format, row-major."""

    _FORMAT = PackedFormat(bits=8, group_size=None, scale_dtype=torch.float32)

    def format_of(self, in_features: int, out_features: int) -> PackedFormat:
        return self._FORMAT

    def checkpoint_tensors(
        self, in_features: int, out_features: int, *, bias: bool
    ) -> dict[str, CheckpointTensor]:
        tensors = {
            "weight": CheckpointTensor((out_features, in_features), frozenset({torch.int8})),
            "SCB": CheckpointTensor((out_features,)),
            "weight_format": CheckpointTensor((), _BYTES, is_optional=True),
        }
        return tensors | ({"bias": CheckpointTensor((out_features,))} if bias else {})

    def load(self, layer: nn.Module, name: str, *, tensor: Tensor, first_row: int) -> None:
        if name == "bias":
            self.store_bias(layer, tensor, first_row=first_row)
        elif name == "SCB":
            self.store(layer, first_row=first_row, scales=_finite(tensor.float())[:, None] / 127)
        elif name == "weight":
            self.store(layer, first_row=first_row, codes=tensor)
        elif int(tensor):
            raise CheckpointError(f"'weight_format' is {int(tensor)}; only 0, row by row, is understood")


def _read_state(state: Tensor) -> dict[str, Any]:
    """The JSON object that a tensor of bytes holds."""
    try:
        value = json.loads(bytes(state.flatten().tolist()))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the state of its quantization is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError("the state of its quantization is no JSON object")
    return value


def _nested_absmax(part: dict[str, Tensor], offset: object) -> Tensor:
    """[num_blocks] float32, from its bytes."""
    if not isinstance(offset, float):  # an integer may lie beyond every float, and the library writes none
        raise CheckpointError(f"'nested_offset' is {offset!r}, not a number")
    values = part["weight.nested_quant_map"][part["weight.absmax"].int()]
    factors = part["weight.nested_absmax"].repeat_interleave(_NESTED_BLOCK_SIZE)[: len(values)]
    return values * factors + offset


def _finite(scales: Tensor) -> Tensor:
    """The same. Raises CheckpointError where one is not finite."""
    if not scales.isfinite().all():
        raise CheckpointError("its scales are not all finite")
    return scales
