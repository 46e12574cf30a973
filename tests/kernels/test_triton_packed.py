"""Products of packed weights against their references: interpreted, or compiled on a card."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from graphllm.kernels.expert_activation import ClampedSwiGLU, ExpertActivation
from graphllm.kernels.linear import LinearWorkspace, linear_ref
from graphllm.kernels.moe_sum import SharedPart
from graphllm.kernels.packed_dense import packed_dense, packed_dense_linear
from graphllm.kernels.packed_grouped import (
    packed_grouped_gated,
    packed_grouped_gated_ref,
    packed_grouped_linear,
    packed_grouped_linear_ref,
)
from graphllm.kernels.packed_grouped_sum import packed_grouped_sum, packed_grouped_sum_ref
from graphllm.kernels.packed_linear import (
    PackedConfig,
    packed_config,
    packed_gated_linear,
    packed_gated_linear_ref,
    packed_linear,
    packed_linear_ref,
    packed_workspace_size,
)
from graphllm.kernels.packed_product import CardPackedProduct
from graphllm.kernels.packed_weight import PackedFormat, PackedWeight, dequantize
from tests.kernels.device import DEVICE
from tests.kernels.moe_inputs import amid_nan, nan_like, tiles_of
from tests.quant.packed_forms import FORMS, random_weight

pytestmark = pytest.mark.triton

# Weights are rounded to the format once more than in float32, and the interpreter truncates.
RELATIVE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DTYPES = tuple(RELATIVE)


def weight_on_device(form: PackedFormat, out_features: int, in_features: int) -> PackedWeight:
    weight = random_weight(form, out_features, in_features)
    optional = (weight.zeros, weight.order, weight.codebook)
    moved = (None if tensor is None else tensor.to(DEVICE) for tensor in optional)
    return PackedWeight(form, in_features, weight.codes.to(DEVICE), weight.scales.to(DEVICE), *moved)


def workspace_for(weight: PackedWeight) -> LinearWorkspace:
    partials, counters = packed_workspace_size(
        weight.out_features, weight.in_features, weight.format, torch.device(DEVICE)
    )
    return LinearWorkspace(
        torch.full((partials,), math.nan, device=DEVICE),
        torch.zeros(counters, dtype=torch.int32, device=DEVICE),
    )


def multiply(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    *,
    config: PackedConfig | None = None,
    workspace: LinearWorkspace | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`packed_linear` into memory whose surroundings it must leave alone."""
    memory = nan_like(len(x) + 2, weight.out_features, dtype=out_dtype or x.dtype)
    workspace = workspace or workspace_for(weight)
    out = memory[1:-1]
    assert packed_linear(x, weight, bias, out, workspace=workspace, config=config) is out
    assert memory[0].isnan().all() and memory[-1].isnan().all()
    assert not workspace.counters.any()
    return out


def assert_close(found: Tensor, expected: Tensor) -> None:
    relative = RELATIVE[found.dtype]
    scale = expected.float().nan_to_num().abs().max().item()
    torch.testing.assert_close(found, expected, rtol=relative, atol=relative * scale, equal_nan=True)


def expected(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    return packed_linear_ref(x, weight, bias, nan_like(len(x), weight.out_features, dtype=x.dtype))


WHOLE_TILES = ("4 bits, offsets", "4 bits, a codebook", "8 bits, whole rows")


@pytest.mark.parametrize(
    ("name", "num_rows", "in_features"),
    [
        *((name, num_rows, 300) for name in FORMS for num_rows in (1, 5)),
        *((name, *sizes) for name in WHOLE_TILES for sizes in ((1, 1024), (33, 256))),
    ],
)
def test_product_of_every_form_is_that_of_its_plain_weight(
    name: str, num_rows: int, in_features: int
) -> None:
    torch.manual_seed(num_rows)
    dtype = DTYPES[(num_rows + list(FORMS).index(name)) % 3]
    weight = weight_on_device(FORMS[name], 37, in_features)
    x = amid_nan(num_rows, in_features, dtype=dtype)
    bias = amid_nan(37, dtype=dtype) if num_rows != 5 else None
    assert_close(multiply(x, weight, bias), expected(x, weight, bias))


@pytest.mark.parametrize("in_features", [301, 20])
@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_that_end_anywhere(bits: int, num_rows: int, in_features: int) -> None:
    """Rows of 8-bit codes that are not aligned, and of 4-bit codes that are padded."""
    torch.manual_seed(0)
    weight = weight_on_device(PackedFormat(bits=bits, group_size=32), 11, in_features)  # type: ignore[arg-type]
    x = amid_nan(num_rows, in_features, dtype=torch.float32)
    assert_close(multiply(x, weight, None), expected(x, weight, None))


@pytest.mark.parametrize("name", ["4 bits, offsets", "8 bits, whole rows"])
def test_tiles_of_many_rows(name: str) -> None:
    torch.manual_seed(0)
    weight, x = weight_on_device(FORMS[name], 140, 256), amid_nan(130, 256, dtype=torch.float16)
    assert_close(multiply(x, weight, None), expected(x, weight, None))


@pytest.mark.parametrize("form", ["gemv", "dot"])
@pytest.mark.parametrize("splits", [1, 2, 3])
def test_split_sums_are_whole_and_in_their_order(splits: int, form: str) -> None:
    torch.manual_seed(splits)
    weight, x = weight_on_device(FORMS["4 bits, offsets"], 21, 700), amid_nan(1, 700, dtype=torch.float32)
    config = PackedConfig(form, 1 if form == "gemv" else 16, 16, 128, splits, 4, 2)  # type: ignore[arg-type]
    workspace = LinearWorkspace(
        torch.full((splits * config.rows * 21,), math.nan, device=DEVICE),
        torch.zeros(2, dtype=torch.int32, device=DEVICE),
    )
    ours = multiply(x, weight, None, config=config, workspace=workspace)
    assert_close(ours, expected(x, weight, None))
    if splits > 1:
        parts = workspace.partials.view(splits, config.rows, 21)[:, :1]
        assert torch.equal(sum(parts[1:], parts[0]), ours)
        # The second launch finds the counters as the first did.
        assert torch.equal(multiply(x, weight, None, config=config, workspace=workspace), ours)


def test_float32_output_was_not_rounded_on_its_way() -> None:
    torch.manual_seed(0)
    weight, x = weight_on_device(FORMS["8 bits, whole rows"], 16, 256), amid_nan(2, 256, dtype=torch.bfloat16)
    ours = multiply(x, weight, None, out_dtype=torch.float32)
    exact = x.double() @ dequantize(weight).double().t()
    # The codes are exact in bfloat16, and the scale comes last.
    assert (ours.double() - exact).abs().max() < 1e-4
    assert (ours.bfloat16().double() - exact).abs().max() > 1e-3


def test_a_larger_card_splits_more_and_no_size_leaves_a_program_without_work() -> None:
    form = FORMS["4 bits, offsets"]
    for num_rows in (1, 16, 64, 65, 512):
        for out_features in (64, 4096, 28672):
            few, many = (
                packed_config(num_rows, out_features, 4096, form, num_multiprocessors=count)
                for count in (8, 132)
            )
            assert few.splits <= many.splits
            assert many.splits * many.block_k <= 4096
    assert packed_config(65, 64, 4096, form, num_multiprocessors=132).splits == 1


@pytest.mark.parametrize("num_rows", [1, 9])
@pytest.mark.parametrize("name", ["4 bits, offsets", "8 bits, whole rows", "4 bits, in another order"])
def test_gated_product_is_a_product_and_an_activation(name: str, num_rows: int) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if num_rows == 1 else torch.float16
    weight, x = weight_on_device(FORMS[name], 2 * 37, 300), amid_nan(num_rows, 300, dtype=dtype)
    bias = amid_nan(2 * 37, dtype=dtype) if num_rows == 1 else None
    memory = nan_like(num_rows + 2, 37, dtype=dtype)
    packed_gated_linear(x, weight, bias, "silu", out=memory[1:-1])
    reference = packed_gated_linear_ref(x, weight, bias, "silu", out=nan_like(num_rows, 37, dtype=dtype))
    assert_close(memory[1:-1], reference)
    assert memory[0].isnan().all() and memory[-1].isnan().all()


@pytest.mark.parametrize(
    ("name", "in_features"), [*((name, 300) for name in FORMS), *((name, 512) for name in WHOLE_TILES)]
)
def test_weight_made_plain_is_the_specification(name: str, in_features: int) -> None:
    torch.manual_seed(0)
    weight = weight_on_device(FORMS[name], 37, in_features)
    memory = nan_like(39, in_features, dtype=torch.float32)
    packed_dense(weight, out=memory[1:-1])
    torch.testing.assert_close(memory[1:-1], dequantize(weight), rtol=1e-6, atol=1e-7)
    assert memory[0].isnan().all() and memory[-1].isnan().all()


def test_many_rows_multiply_the_weight_slice_by_slice() -> None:
    torch.manual_seed(0)
    weight, x = (
        weight_on_device(FORMS["4 bits, integer zeros"], 37, 256),
        amid_nan(40, 256, dtype=torch.float32),
    )
    bias, out = amid_nan(37, dtype=torch.float32), nan_like(40, 37, dtype=torch.float32)
    scratch = nan_like(10 * 256 + 7, dtype=torch.float32)
    packed_dense_linear(x, weight, bias, out, scratch=scratch, product=linear_ref)
    assert_close(out, expected(x, weight, bias))


def test_product_on_a_card_has_memory_for_all_layers_and_any_number_of_rows() -> None:
    torch.manual_seed(0)
    product = CardPackedProduct(linear_ref)
    weights = [weight_on_device(FORMS["4 bits, offsets"], rows, 1024) for rows in (24, 80)]
    for weight in weights:
        product.reserve(weight.out_features, 1024, form=weight.format, device=torch.device(DEVICE))
    for num_rows in (520, 1, 20):
        for weight in weights:
            x = amid_nan(num_rows, 1024, dtype=torch.float32)
            out = nan_like(num_rows, weight.out_features, dtype=torch.float32)
            assert_close(product(x, weight, None, out), expected(x, weight, None))


# -- experts ---------------------------------------------------------------------------------------

NUM_EXPERTS = 3
CLAMPED = ClampedSwiGLU(alpha=1.702, limit=0.7)
EXPERT_CASES: list[tuple[str, torch.dtype, ExpertActivation, bool]] = [
    ("4 bits, e2m1 and powers of two", torch.float16, CLAMPED, True),
    ("4 bits, integer zeros", torch.float32, "silu", False),
    ("4 bits, in another order", torch.float32, "silu", True),
    ("8 bits, whole rows", torch.bfloat16, "gelu_tanh", False),
]


def stack(name: str, rows_per_expert: int, in_features: int) -> PackedWeight:
    form = FORMS[name]
    if form.num_orders:
        form = replace(form, num_orders=NUM_EXPERTS)
    return weight_on_device(form, NUM_EXPERTS * rows_per_expert, in_features)


def chosen(num_tokens: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Experts and weights of some tokens, the last of which is padding."""
    choices = torch.stack([torch.randperm(NUM_EXPERTS)[:top_k] for _ in range(num_tokens)])
    experts = choices.to(dtype=torch.int32, device=DEVICE)
    experts[-1] = -1
    return experts, torch.rand(num_tokens, top_k, device=DEVICE)


@pytest.mark.parametrize(("name", "dtype", "activation", "has_bias"), EXPERT_CASES)
@pytest.mark.parametrize("num_tokens", [3, 20])
def test_experts_are_those_of_the_reference(
    name: str, dtype: torch.dtype, activation: ExpertActivation, has_bias: bool, num_tokens: int
) -> None:
    torch.manual_seed(0)
    (hidden, inner), top_k = (150, 70) if num_tokens > 3 else (45, 34), 2
    experts, weights = chosen(num_tokens, top_k)
    tiles = tiles_of(experts, num_experts=NUM_EXPERTS, rows_per_tile=16) if num_tokens > 3 else None
    num_pairs = num_tokens * top_k
    x = amid_nan(num_tokens, hidden, dtype=dtype)
    x[-1] = math.nan
    gate_up, down = stack(name, 2 * inner, hidden), stack(name, hidden, inner)
    gate_up_bias = amid_nan(NUM_EXPERTS, 2 * inner, dtype=dtype) if has_bias else None
    down_bias = amid_nan(NUM_EXPERTS, hidden, dtype=dtype) if has_bias else None
    found, reference = (nan_like(num_pairs, inner, dtype=dtype) for _ in range(2))
    arguments = (x, gate_up, gate_up_bias, experts, activation)
    packed_grouped_gated(*arguments, num_experts=NUM_EXPERTS, tiles=tiles, out=found)
    packed_grouped_gated_ref(*arguments, num_experts=NUM_EXPERTS, out=reference)
    assert_close(found, reference)
    assert found[-top_k:].isnan().all(), "nothing is stored for padding"

    second = (reference, down, down_bias, experts, weights)
    if tiles is not None:
        results, expected_results = (nan_like(num_pairs, hidden, dtype=dtype) for _ in range(2))
        packed_grouped_linear(*second, num_experts=NUM_EXPERTS, tiles=tiles, out=results)
        packed_grouped_linear_ref(*second, num_experts=NUM_EXPERTS, out=expected_results)
        assert_close(results, expected_results)
        assert results[-top_k:].isnan().all(), "nothing is stored for padding"
        return
    logits = torch.randn(num_tokens, NUM_EXPERTS + 1, device=DEVICE)
    shared = SharedPart(amid_nan(num_tokens, hidden, dtype=dtype), logits) if has_bias else None
    out, expected_out = (nan_like(num_tokens, hidden, dtype=dtype) for _ in range(2))
    packed_grouped_sum(*second, shared, num_experts=NUM_EXPERTS, out=out)
    packed_grouped_sum_ref(*second, shared, num_experts=NUM_EXPERTS, out=expected_out)
    assert_close(out, expected_out)
    assert out.isfinite().all(), "what padding has left is not added"


@pytest.mark.gpu
def test_captured_products_equal_those_one_at_a_time() -> None:
    """Each product reads what the one before it wrote, with dependent launch where the card has it; one kind
    of product is split, one streams a row, and one makes slices of the weight plain."""
    torch.manual_seed(0)
    size, num_layers = 2048, 12
    product = CardPackedProduct(linear_ref)
    weights = [weight_on_device(FORMS["4 bits, offsets"], size, size) for _ in range(num_layers)]
    product.reserve(size, size, form=weights[0].format, device=torch.device(DEVICE))
    for num_rows in (600, 1, 20):
        steps = torch.randn(num_layers + 1, num_rows, size, device=DEVICE).bfloat16()

        def run(steps: Tensor, *, waits: bool) -> None:
            for weight, x, out in zip(weights, steps[:-1], steps[1:], strict=True):
                product(x, weight, None, out)
                if waits:
                    torch.cuda.synchronize()

        run(steps, waits=True)
        one_at_a_time = steps.clone()
        assert_close(steps[1], expected(steps[0], weights[0], None))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(steps, waits=False)
        for _ in range(5):
            steps[1:].fill_(math.nan)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(steps, one_at_a_time)
