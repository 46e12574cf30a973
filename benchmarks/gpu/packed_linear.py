"""Linear layers in our int4 and int8 beside bfloat16: a decoder layer's products, for few rows and a prompt.

    python -m benchmarks.gpu.packed_linear

For each number of rows a CUDA graph holds the four products of a layer, each over so many copies of its
weights that the cache never has them, as `benchmarks.gpu.fp8_linear` does. The floor of a time is that of
reading the packed weights at the card's copy bandwidth. Each product is compared with the plain weight's in
float64 first, and what is off is no time but a failure. Owns no kernel.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.gpu.ceilings import measure_ceilings
from benchmarks.gpu.command import failing, run_benchmark
from benchmarks.gpu.fp8_linear import PROMPT_ROWS, ROWS, SHAPES, layer_products, time_layer
from benchmarks.gpu.results import ResultLog

if TYPE_CHECKING:
    import torch

    from graphllm.layers.linear import Linear

FORMS = ("bfloat16", "int4", "int8")
# Those of a prompt are made plain first, 256 are not. The largest come first: they fix addresses.
ALL_ROWS = (PROMPT_ROWS, 256, *ROWS)
# Bytes that go through the cache between two visits of a weight.
_BYTES_BETWEEN = 256 << 20
# Of values around one: weights and results are rounded to bfloat16.
_TOLERANCE = 3e-2


def make_layers(
    shapes: Sequence[tuple[int, int]], form: str, *, device: torch.device, copies: int | None = None
) -> list[list[Linear]]:
    """For each shape its layer, several times over, with random weights.

    copies: None for as many as the cache cannot hold.
    """
    import torch

    from graphllm.kernels.linear import gpu_product, linear_ref
    from graphllm.layers.linear import Linear
    from graphllm.quant.online import ONLINE_FORMS
    from graphllm.quant.unquantized import Unquantized

    is_cuda = device.type == "cuda"
    plain = gpu_product(shapes, dtype=torch.bfloat16, device=device) if is_cuda else linear_ref
    bits = 16 if form == "bfloat16" else int(form.removeprefix("int"))
    scheme = Unquantized(plain) if bits == 16 else ONLINE_FORMS[form].make_scheme(plain, num_experts=0)
    generator = torch.Generator(device).manual_seed(0)
    layers = []
    for out_features, in_features in shapes:
        num_copies = copies or 1 + math.ceil(8 * _BYTES_BETWEEN / (bits * out_features * in_features))
        parts = {"": out_features}
        layers.append(
            [
                Linear(in_features, parts, bias=False, scheme=scheme, device=device, dtype=torch.bfloat16)
                for _ in range(num_copies)
            ]
        )
        for layer in layers[-1]:
            scheme.fill_random(layer, generator=generator, deviation=in_features**-0.5)
            scheme.finish(layer)
    return layers


def largest_error(layer: Linear, num_rows: int) -> float:
    """Largest difference of a product from the plain weight's, beside one and the product's size."""
    import torch

    device = next(layer.parameters()).device
    x = torch.randn(num_rows, layer.in_features, device=device).to(torch.bfloat16)
    out = torch.empty(num_rows, layer.out_features, dtype=torch.bfloat16, device=device)
    layer.project(x, out=out)
    weight = layer.scheme.dequantized_rows(layer, 0, layer.out_features, dtype=torch.float32)
    expected = x.double() @ weight.double().t()
    return float(((out - expected).abs() / (1 + expected.abs())).max().nan_to_num(math.inf))


def layer_bytes(layers: Sequence[Sequence[Linear]]) -> int:
    """What one pass over a decoder layer's weights reads."""
    return sum(values.nbytes for copies in layers for values in copies[0].parameters())


def measure(options: argparse.Namespace, log: ResultLog) -> None:
    import torch

    device = torch.device("cuda")
    bytes_per_second = measure_ceilings().bytes_per_second
    with torch.inference_mode():
        for name in SHAPES:
            plain: dict[int, float] = {}
            shapes = layer_products(name)
            for form in FORMS:
                with failing(log, f"{name} {form}: a layer's products", unit="us"):
                    layers = make_layers(shapes, form, device=device)
                    floor = 1e6 * layer_bytes(layers) / bytes_per_second
                    for num_rows in ALL_ROWS:
                        metric = f"{name} {form}, {num_rows} rows: a layer's products"
                        error = max(largest_error(copies[0], num_rows) for copies in layers)
                        if error > _TOLERANCE:
                            log.failed(metric, f"a product is off by {error:.3g}", unit="us")
                            continue
                        milliseconds = time_layer(layers, num_rows)
                        log.measured(metric, 1e3 * milliseconds, unit="us", floor=floor)
                        if form == "bfloat16":
                            plain[num_rows] = milliseconds
                        elif num_rows in plain:
                            ratio = plain[num_rows] / milliseconds
                            log.measured(f"{metric}, speed beside bfloat16", ratio, unit="times")
                    del layers


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark("packed_linear", measure, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
