"""What `benchmarks.gpu.packed_linear` takes for right, on a CPU; its times need a card."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.engines import QUANTIZED
from benchmarks.gpu.packed_linear import _TOLERANCE, largest_error, layer_bytes, make_layers
from benchmarks.gpu.quantized_decode import LAYER_BITS
from benchmarks.gpu.targets import TARGETS, quantized_metric
from graphllm.quant.packed import PackedScheme

CPU = torch.device("cpu")


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_a_right_product_passes_and_one_of_other_rows_does_not(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((layer,),) = make_layers([(48, 160)], form, device=CPU, copies=1)
    assert largest_error(layer, 5) < _TOLERANCE
    scheme = layer.scheme
    assert isinstance(scheme, PackedScheme)
    own = scheme.apply
    monkeypatch.setattr(scheme, "apply", lambda layer, x, *, out: own(layer, x.roll(1, 0), out=out))
    assert largest_error(layer, 5) > _TOLERANCE


def test_packed_layers_are_as_small_as_they_say() -> None:
    sizes = [(64, 320), (96, 64)]
    numbers = sum(rows * columns for rows, columns in sizes)
    bits = {
        form: 8 * layer_bytes(make_layers(sizes, form, device=CPU, copies=1)) / numbers
        for form in ("bfloat16", "int4", "int8")
    }
    assert bits["bfloat16"] == LAYER_BITS["bfloat16"] == 16 and bits["int4"] == LAYER_BITS["int4"] == 5
    assert 8 < bits["int8"] < 8.3  # a float32 a row


def test_whole_steps_are_measured_in_every_form_that_has_a_target_and_in_bfloat16_first() -> None:
    metrics = {quantized_metric(form, rows) for form in ("int4", "fp8") for rows in (1, 8, 32)}
    assert metrics == {target.metric for target in TARGETS if target.benchmark == "quantized_decode"}
    assert list(QUANTIZED) == list(LAYER_BITS) and next(iter(QUANTIZED)) == "bfloat16"
    asked = {form: limits.options().get("quantization") for form, limits in QUANTIZED.items()}
    assert asked == {"bfloat16": None, "int4": "int4", "fp8": "fp8"}
