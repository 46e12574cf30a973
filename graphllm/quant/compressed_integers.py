"""Integer weights as compressed-tensors stores them, to be multiplied with plain activations.

    w_{n,k} = scale_{n,g(k)} * (code_{n,k} - zero_{n,g(k)})

"pack-quantized": weight_packed [out, in * bits / 32] int32, a word's codes along the inputs, the first in its
lowest bits, from 0; weight_scale [out, groups]; asymmetric ones also weight_zero_point [out * bits / 32,
groups] int32, a word's zeros along the outputs; weight_g_idx [in] int32 where inputs are grouped by how much
they matter; weight_shape [2], the sizes once more. "naive-quantized" and "int-quantized": weight [out, in]
int8, the codes themselves, and weight_scale.

Owns those packings. What a scheme does with codes, scales and groups is `stored_packed.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graphllm.errors import CheckpointError
from graphllm.kernels.linear import LinearProduct
from graphllm.quant.scheme import CheckpointTensor, ExpertScheme
from graphllm.quant.stored_packed import (
    INT32,
    SCALE_DTYPES,
    StoredForm,
    StoredPacked,
    StoredRows,
    fill_words,
    unpack_words,
)

_INT8 = frozenset({torch.int8})


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedForm(StoredForm):
    """is_packed: whether several codes share a word; else they are int8. has_one_scale: one for a layer."""

    method: ClassVar[str] = "compressed-tensors"

    is_packed: bool
    has_one_scale: bool = False

    def make_scheme(self, plain: LinearProduct, *, num_experts: int) -> ExpertScheme:
        return CompressedIntegers(self, plain, num_experts=num_experts)


class CompressedIntegers(StoredPacked):
    """An ExpertScheme for layers of one `CompressedForm`."""

    def __init__(self, form: CompressedForm, plain: LinearProduct, *, num_experts: int) -> None:
        super().__init__(form, plain, num_experts=num_experts)
        self.form = form

    def tensors_of_rows(self, in_features: int, out_features: int) -> dict[str, CheckpointTensor]:
        form, groups = self.form, self.num_groups(in_features)
        scales = (1,) if form.has_one_scale else (out_features, groups)
        tensors = {"weight_scale": CheckpointTensor(scales, SCALE_DTYPES)}
        if not form.is_packed:
            return tensors | {"weight": CheckpointTensor((out_features, in_features), _INT8)}
        words = fill_words(in_features, form.bits, what="inputs")
        tensors["weight_packed"] = CheckpointTensor((out_features, words), INT32)
        tensors["weight_shape"] = CheckpointTensor((2,), frozenset({torch.int64, torch.int32}))
        if not form.is_symmetric:
            words = fill_words(out_features, form.bits, what="outputs")
            tensors["weight_zero_point"] = CheckpointTensor((words, groups), INT32)
        if form.has_order:
            tensors["weight_g_idx"] = CheckpointTensor((in_features,), INT32)
        return tensors

    def read_rows(self, tensors: dict[str, Tensor]) -> StoredRows:
        form = self.form
        if form.is_packed:
            codes = unpack_words(tensors["weight_packed"], form.bits)
            if tensors["weight_shape"].tolist() != [*codes.shape]:
                said = tensors["weight_shape"].tolist()
                raise CheckpointError(f"its 'weight_shape' is {said}, not {[*codes.shape]}")
        else:
            codes = tensors["weight"].view(torch.uint8) ^ 128  # from 0, as the packed ones
        zeros = tensors.get("weight_zero_point")
        scales = tensors["weight_scale"]
        return StoredRows(
            codes,
            scales.expand(len(codes), 1) if form.has_one_scale else scales,
            None if zeros is None else unpack_words(zeros.t(), form.bits).t(),
            tensors.get("weight_g_idx"),
        )
