"""Linear layers in FP8 beside bfloat16: a decoder layer's products for 1, 8 and 32 rows, and for a prompt.

    python -m benchmarks.gpu.fp8_linear

For each number of rows a CUDA graph holds the four products of a layer, each over so many copies of its
weights that the cache never has them; in FP8 the rounding of the activations is part of it. Three forms are
measured: bfloat16 as the engine multiplies it, e4m3 with a scale a row, and e4m3 with a scale a 128x128
block. Each FP8 product is compared with its reference on the card first, and what is off is no time but a
failure. Owns no kernel.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.command import failing, run_benchmark
from benchmarks.gpu.floors import SHAPES_FOLDER
from benchmarks.gpu.results import ResultLog
from benchmarks.gpu.timing import captured, time_on_device

if TYPE_CHECKING:
    import torch

    from graphllm.layers.linear import Linear

SHAPES = ("llama-3.1-8b", "llama-3.2-1b")
ROWS = (1, 8, 32)
PROMPT_ROWS = 2048
BLOCK = 128
# Bytes that go through the cache between two visits of a weight.
_BYTES_BETWEEN = 256 << 20
# Of values around one: rounding to bfloat16, and the order of sums.
_TOLERANCE = 2e-2


def layer_products(name: str) -> list[tuple[int, int]]:
    """(out_features, in_features) of a decoder layer's products: qkv, output, gate and up, down."""
    config = json.loads((SHAPES_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    qkv = (heads + 2 * config["num_key_value_heads"]) * head_dim
    return [(qkv, hidden), (hidden, heads * head_dim), (2 * inner, hidden), (hidden, inner)]


def make_layers(
    shapes: Sequence[tuple[int, int]], form: str, *, device: torch.device, copies: int | None = None
) -> list[list[Linear]]:
    """For each shape its layer, several times over, with random weights. form: "bfloat16", "rows", "blocks".

    copies: None for as many as the cache cannot hold.
    """
    import torch

    from graphllm.kernels.linear import gpu_product, linear_ref
    from graphllm.layers.linear import Linear
    from graphllm.quant.fp8 import Fp8
    from graphllm.quant.scaled_form import ScaledForm
    from graphllm.quant.scheme import ExpertScheme
    from graphllm.quant.unquantized import Unquantized

    is_cuda = device.type == "cuda"
    plain = gpu_product(shapes, dtype=torch.bfloat16, device=device) if is_cuda else linear_ref
    blocks = ScaledForm(stored="e4m3", scales_of="block", block=(BLOCK, BLOCK))
    schemes: dict[str, Callable[[], ExpertScheme]] = {
        "bfloat16": lambda: Unquantized(plain),
        "rows": lambda: Fp8(plain),
        "blocks": lambda: blocks.make_scheme(plain, num_experts=0),
    }
    scheme = schemes[form]()
    generator = torch.Generator(device).manual_seed(0)
    layers = []
    for out_features, in_features in shapes:
        num_bytes = out_features * in_features * (2 if form == "bfloat16" else 1)
        layers.append(
            [
                Linear(
                    in_features,
                    {"": out_features},
                    bias=False,
                    scheme=scheme,
                    device=device,
                    dtype=torch.bfloat16,
                )
                for _ in range(copies or 1 + math.ceil(_BYTES_BETWEEN / num_bytes))
            ]
        )
        for layer in layers[-1]:
            scheme.fill_random(layer, generator=generator, deviation=in_features**-0.5)
    return layers


def largest_error(layer: Linear, num_rows: int) -> float:
    """Largest difference of a product from that of the numbers that are multiplied, rounded as they are."""
    import torch

    from graphllm.kernels.quantize_rows import dequantize_rows_ref, num_groups_of, quantize_rows_ref
    from graphllm.quant.scaled import ScaledScheme

    scheme = layer.scheme
    assert isinstance(scheme, ScaledScheme)
    device = next(layer.parameters()).device
    x = torch.randn(num_rows, layer.in_features, device=device).to(torch.bfloat16)
    out = torch.empty(num_rows, layer.out_features, dtype=torch.bfloat16, device=device)
    layer.project(x, out=out)
    values = torch.empty(x.shape, dtype=scheme.stored, device=device)
    scales = torch.empty(num_rows, num_groups_of(layer.in_features, scheme.group_size), device=device)
    quantize_rows_ref(x, scheme.group_size, given=None, out=values, scales=scales)
    numbers = dequantize_rows_ref(values, scales, scheme.group_size)
    weight = scheme.dequantized_rows(layer, 0, layer.out_features, dtype=torch.float32)
    expected = numbers.double() @ weight.double().t()
    return float(((out - expected).abs() / (1 + expected.abs())).max().nan_to_num(math.inf))


def time_layer(layers: Sequence[Sequence[Linear]], num_rows: int) -> float:
    """Milliseconds of all products of one decoder layer."""
    import torch

    device = torch.device("cuda")
    inputs = [torch.randn(num_rows, copies[0].in_features, device=device).bfloat16() for copies in layers]
    outs = [
        torch.empty(num_rows, copies[0].out_features, dtype=torch.bfloat16, device=device)
        for copies in layers
    ]
    turns = [itertools.cycle(copies) for copies in layers]
    num_rounds = max(map(len, layers))

    def run() -> None:
        for _ in range(num_rounds):
            for turn, x, out in zip(turns, inputs, outs, strict=True):
                next(turn).project(x, out=out)

    graph: Any = captured(run)
    return time_on_device(graph.replay, repeats=2, groups=10).least / num_rounds


def measure(options: argparse.Namespace, log: ResultLog) -> None:
    import torch

    device = torch.device("cuda")
    with torch.inference_mode():
        for name in SHAPES:
            plain: dict[int, float] = {}
            shapes = layer_products(name)
            for form in ("bfloat16", "rows", "blocks"):
                with failing(log, f"{name} {form}: a layer's products", unit="us"):
                    layers = make_layers(shapes, form, device=device)
                    for num_rows in (PROMPT_ROWS, *ROWS):  # the largest first: it fixes addresses
                        metric = f"{name} {form}, {num_rows} rows: a layer's products"
                        if form != "bfloat16":
                            error = max(largest_error(copies[0], num_rows) for copies in layers)
                            if error > _TOLERANCE:
                                log.failed(metric, f"a product is off by {error:.3g}", unit="us")
                                continue
                        milliseconds = time_layer(layers, num_rows)
                        log.measured(metric, 1e3 * milliseconds, unit="us")
                        if form == "bfloat16":
                            plain[num_rows] = milliseconds
                        elif num_rows in plain:
                            ratio = plain[num_rows] / milliseconds
                            log.measured(f"{metric}, speed beside bfloat16", ratio, unit="times")
                    del layers


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark("fp8_linear", measure, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
