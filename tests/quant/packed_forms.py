"""Packed matrices of every form, with random codes, scales and zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from graphllm.kernels.packed_weight import PackedFormat, PackedWeight, pack_codes

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
NORMAL_FLOAT = tuple(torch.linspace(-1, 1, 16).pow(3).tolist())

FORMS = {
    "4 bits, symmetric": PackedFormat(bits=4, group_size=32),
    "4 bits, integer zeros": PackedFormat(bits=4, group_size=64, zeros="integer"),
    "4 bits, offsets": PackedFormat(bits=4, group_size=32, zeros="offset", scale_dtype=torch.bfloat16),
    "4 bits, whole rows": PackedFormat(bits=4, group_size=None, scale_dtype=torch.float32),
    "4 bits, a codebook": PackedFormat(
        bits=4, group_size=64, codebook=NORMAL_FLOAT, scale_dtype=torch.float32
    ),
    "4 bits, e2m1 and powers of two": PackedFormat(
        bits=4, group_size=32, codebook=E2M1, scale_dtype=torch.uint8
    ),
    "4 bits, in another order": PackedFormat(bits=4, group_size=32, zeros="integer", num_orders=1),
    "8 bits, whole rows": PackedFormat(bits=8, group_size=None, scale_dtype=torch.float32),
    "8 bits, groups of 16": PackedFormat(bits=8, group_size=16),
    "8 bits, integer zeros": PackedFormat(bits=8, group_size=32, zeros="integer"),
    "8 bits, in another order": PackedFormat(bits=8, group_size=128, num_orders=1),
}
"""Every kind of codes, scales, zeros and order, each at least once."""


def random_codes(form: PackedFormat, out_features: int, in_features: int) -> Tensor:
    low, high = (0, 16) if form.bits == 4 else (-128, 128)
    return torch.randint(low, high, (out_features, in_features))


def random_weight(form: PackedFormat, out_features: int, in_features: int) -> PackedWeight:
    """On the CPU; values are about as large as in_features ** -0.5."""
    groups = (out_features, form.num_groups(in_features))
    size = in_features**-0.5 / (1 if form.codebook is not None else 4 if form.bits == 4 else 64)
    if form.scale_dtype == torch.uint8:
        scales = torch.randint(120, 127, groups, dtype=torch.uint8)
    else:
        scales = (torch.rand(groups) + 0.5).mul_(size).to(form.scale_dtype)
    zeros = None
    if form.zeros == "integer":
        zeros = random_codes(form, *groups).to(form.zero_dtype)
    elif form.zeros == "offset":
        zeros = torch.randn(groups).mul_(4 * size).to(form.zero_dtype)
    orders = [torch.randperm(in_features) for _ in range(form.num_orders)]
    return PackedWeight(
        form,
        in_features,
        pack_codes(random_codes(form, out_features, in_features), form.bits),
        scales,
        zeros,
        torch.stack(orders).int() if orders else None,
        None if form.codebook is None else torch.tensor(form.codebook),
    )
