"""Weights as GPTQ stores them (Frantar et al., 2022, arXiv:2210.17323), in 4 or 8 bits.

    w_{n,k} = scale_{g(k),n} * (code_{k,n} - zero_{g(k),n})

What AutoGPTQ and GPTQModel write for a layer: qweight [in * bits / 32, out] int32, a word's codes along the
inputs, the first in its lowest bits; scales [groups, out]; qzeros [groups, out * bits / 32] int32, a word's
zeros along the outputs; g_idx [in] int32, the group g of each input. The first version of the format stores
a zero less one, and so a zero of 0 as the largest code; the second stores it as it is.

Owns that packing. What a scheme does with codes, scales and groups is `stored_packed.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

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


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqForm(StoredForm):
    """zero_offset: what stored zeros lack, 1 in the format's first version and 0 in its second."""

    method: ClassVar[str] = "GPTQ"

    zero_offset: int

    def make_scheme(self, plain: LinearProduct, *, num_experts: int) -> ExpertScheme:
        return Gptq(self, plain, num_experts=num_experts)


class Gptq(StoredPacked):
    """An ExpertScheme for layers of one `GptqForm`."""

    def __init__(self, form: GptqForm, plain: LinearProduct, *, num_experts: int) -> None:
        super().__init__(form, plain, num_experts=num_experts)
        self.form = form

    def tensors_of_rows(self, in_features: int, out_features: int) -> dict[str, CheckpointTensor]:
        groups, bits = self.num_groups(in_features), self.form.bits
        code_words = fill_words(in_features, bits, what="inputs")
        zero_words = fill_words(out_features, bits, what="outputs")
        return {
            "qweight": CheckpointTensor((code_words, out_features), INT32),
            "qzeros": CheckpointTensor((groups, zero_words), INT32),
            "scales": CheckpointTensor((groups, out_features), SCALE_DTYPES),
            "g_idx": CheckpointTensor((in_features,), INT32),
        }

    def read_rows(self, tensors: dict[str, Tensor]) -> StoredRows:
        bits = self.form.bits
        zeros = unpack_words(tensors["qzeros"], bits).t()
        return StoredRows(
            unpack_words(tensors["qweight"].t(), bits),
            tensors["scales"].t(),
            (zeros + self.form.zero_offset) & (2**bits - 1),
            tensors["g_idx"],
        )
