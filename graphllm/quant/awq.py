"""Weights as AWQ stores them (Lin et al., 2023, arXiv:2306.00978), in the packing of AutoAWQ's "gemm".

    w_{n,k} = scale_{g,n} * (code_{k,n} - zero_{g,n}),   g = k // group_size

For a layer: qweight [in, out / 8] int32; qzeros [groups, out / 8] int32; scales [groups, out]. A word holds
the codes of eight neighbouring outputs, from its lowest bits up those of outputs 0, 2, 4, 6, 1, 3, 5, 7.

Owns that packing. What a scheme does with codes and scales is `stored_packed.py`'s.
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

# Where in a word the code of each of eight outputs is.
_PLACE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqForm(StoredForm):
    """Always of 4 bits, asymmetric, without an order."""

    method: ClassVar[str] = "AWQ"

    def make_scheme(self, plain: LinearProduct, *, num_experts: int) -> ExpertScheme:
        return Awq(self, plain, num_experts=num_experts)


class Awq(StoredPacked):
    """An ExpertScheme for layers of one `AwqForm`."""

    def tensors_of_rows(self, in_features: int, out_features: int) -> dict[str, CheckpointTensor]:
        groups, words = self.num_groups(in_features), fill_words(out_features, 4, what="outputs")
        return {
            "qweight": CheckpointTensor((in_features, words), INT32),
            "qzeros": CheckpointTensor((groups, words), INT32),
            "scales": CheckpointTensor((groups, out_features), SCALE_DTYPES),
        }

    def read_rows(self, tensors: dict[str, Tensor]) -> StoredRows:
        codes, zeros = (_by_output(tensors[name]) for name in ("qweight", "qzeros"))
        return StoredRows(codes, tensors["scales"].t(), zeros)


def _by_output(words: Tensor) -> Tensor:
    """words: [rows, out / 8]; returns [out, rows], the outputs in their order."""
    places = unpack_words(words, 4).view(len(words), -1, len(_PLACE_OF_OUTPUT))
    return places[:, :, list(_PLACE_OF_OUTPUT)].reshape(len(words), -1).t()
