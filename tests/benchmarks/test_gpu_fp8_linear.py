"""What `benchmarks.gpu.fp8_linear` takes for right, on a CPU; its times need a card."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.fp8_linear import _TOLERANCE, largest_error, layer_products, make_layers
from graphllm.quant.scheme import ExpertScheme

CPU = torch.device("cpu")


def test_a_decoder_layer_has_four_products() -> None:
    assert layer_products("llama-3.1-8b") == [
        (6144, 4096),
        (4096, 4096),
        (28672, 4096),
        (4096, 14336),
    ]


@pytest.mark.parametrize("form", ["rows", "blocks"])
def test_a_right_product_passes_and_one_without_rounding_or_with_other_weights_does_not(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((layer,),) = make_layers([(48, 160)], form, device=CPU, copies=1)
    assert largest_error(layer, 5) < _TOLERANCE
    scheme: ExpertScheme = layer.scheme  # type: ignore[assignment]
    own = scheme.apply
    monkeypatch.setattr(
        scheme, "apply", lambda layer, x, *, out: own(layer, x.roll(1, 0), out=out), raising=True
    )
    assert largest_error(layer, 5) > _TOLERANCE
