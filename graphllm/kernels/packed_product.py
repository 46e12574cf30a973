"""The product of packed weights on a card: which kernel computes it, and the memory that products share.

Owns the partial sums, counters and plain slices that products need beside their operands. They are allocated
at the first product, once and for the largest layer, so that their addresses may be captured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphllm.kernels.linear import LinearProduct, LinearWorkspace
from graphllm.kernels.packed_dense import SLICE_BYTES, packed_dense_linear
from graphllm.kernels.packed_linear import MAX_TILED_ROWS, packed_linear, packed_workspace_size
from graphllm.kernels.packed_weight import PackedFormat, PackedWeight


class CardPackedProduct:
    """A PackedProduct for layers that run one after the other; `plain` multiplies what was made plain."""

    def __init__(self, plain: LinearProduct) -> None:
        self._plain = plain
        self._num_partials = 0
        self._num_counters = 0
        self._num_plain = 0
        self._workspace: LinearWorkspace | None = None
        self._slice: Tensor | None = None

    def reserve(
        self, out_features: int, in_features: int, *, form: PackedFormat, device: torch.device
    ) -> None:
        """Announce a layer, before the first product."""
        assert self._workspace is None, "a layer was made after products had begun"
        partials, counters = packed_workspace_size(out_features, in_features, form, device)
        self._num_partials = max(self._num_partials, partials)
        self._num_counters = max(self._num_counters, counters)
        self._num_plain = max(self._num_plain, out_features * in_features)

    def __call__(self, x: Tensor, weight: PackedWeight, bias: Tensor | None, out: Tensor) -> Tensor:
        workspace = self._workspace or self._allocate(x)
        if len(x) <= MAX_TILED_ROWS:
            return packed_linear(x, weight, bias, out, workspace=workspace)
        assert self._slice is not None
        return packed_dense_linear(x, weight, bias, out, scratch=self._slice, product=self._plain)

    def _allocate(self, x: Tensor) -> LinearWorkspace:
        device = x.device
        self._workspace = LinearWorkspace(
            torch.empty(self._num_partials, dtype=torch.float32, device=device),
            torch.zeros(self._num_counters, dtype=torch.int32, device=device),
        )
        num_plain = min(self._num_plain, SLICE_BYTES // x.element_size())
        self._slice = torch.empty(num_plain, dtype=x.dtype, device=device)
        return self._workspace
