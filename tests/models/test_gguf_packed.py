"""GGUF blocks that stay packed mean the numbers that the `gguf` package expands them to."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from graphllm.kernels.packed_weight import PackedWeight, dequantize, pack_codes
from graphllm.models.gguf_packed import packed_format, unpack_rows

PACKED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")


def random_rows(type: GGMLQuantizationType, *, rows: int, columns: int) -> np.ndarray:
    """Blocks of random bytes whose float16 fields are finite: every code, scale and minimum occurs."""
    random = np.random.default_rng(0)
    elements, num_bytes = gguf.GGML_QUANT_SIZES[type]
    blocks = random.integers(0, 256, (rows * columns // elements, num_bytes), dtype=np.uint8)
    halves = {"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q6_K": (208,)}[type.name]
    for first in halves:
        values = random.normal(size=(len(blocks), 1)).astype(np.float16)
        blocks[:, first : first + 2] = values.view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_are_the_numbers_that_the_package_expands(name: str) -> None:
    kind = GGMLQuantizationType[name]
    data = random_rows(kind, rows=24, columns=512)
    expected = torch.from_numpy(gguf.dequantize(data, kind))
    rows, form = unpack_rows(data, kind), packed_format(kind)
    assert form is not None
    weight = PackedWeight(
        form,
        512,
        codes=pack_codes(torch.from_numpy(rows.codes), form.bits),
        scales=torch.from_numpy(rows.scales.copy()),
        zeros=None if rows.offsets is None else torch.from_numpy(rows.offsets.copy()),
    )
    for tensor_name, (shape, dtype) in form.shapes(24, 512).items():
        tensor = getattr(weight, tensor_name)
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    assert torch.equal(dequantize(weight), expected)


def test_types_of_other_forms_are_to_be_expanded() -> None:
    assert packed_format(GGMLQuantizationType.IQ2_XS) is None
    assert packed_format(GGMLQuantizationType.F16) is None
