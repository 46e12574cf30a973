"""`skinny_linear` and `gated_linear` against their references: interpreted, or compiled on a card."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.tune_linear import Bench, Product, is_right
from graphllm.kernels import skinny_linear as skinny_linear_module
from graphllm.kernels.gated_activation import Activation
from graphllm.kernels.gated_linear import gated_linear, gated_linear_ref
from graphllm.kernels.linear import LinearWorkspace, gpu_product, linear, linear_ref
from graphllm.kernels.linear_choice import (
    Choice,
    ChoiceKey,
    Form,
    LinearTable,
    Operation,
    SkinnyConfig,
    capability_of,
    dtype_name,
    row_bucket,
)
from graphllm.kernels.skinny_linear import (
    skinny_linear,
    skinny_linear_ref,
    skinny_num_counters,
    skinny_scratch_bytes,
)
from tests.kernels.device import DEVICE

pytestmark = pytest.mark.triton

# Two units in the last place of the 16-bit formats: the interpreter truncates.
RELATIVE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
FORMS: tuple[Form, ...] = ("gemv", "dot")


def config_of(form: Form, *, splits: int = 1, block_k: int = 128, num_stages: int = 3) -> SkinnyConfig:
    return SkinnyConfig(form, 16, block_k, splits, num_warps=4, num_stages=num_stages)


def amid_nan(*size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Random numbers in memory that has NaN before and behind them."""
    num_elements = math.prod(size)
    memory = torch.full((num_elements + 256,), math.nan, dtype=dtype, device=DEVICE)
    values = memory[128 : 128 + num_elements]
    values.copy_(torch.randn(num_elements).mul_(scale))
    return values.view(size)


def workspace_of(num_rows: int, out_features: int, config: SkinnyConfig) -> LinearWorkspace:
    num_partials = skinny_scratch_bytes(num_rows, out_features, config) // 4
    return LinearWorkspace(
        torch.full((num_partials,), math.nan, device=DEVICE),
        torch.zeros(skinny_num_counters(out_features, config), dtype=torch.int32, device=DEVICE),
    )


def multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    config: SkinnyConfig,
    *,
    workspace: LinearWorkspace | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`skinny_linear` into memory whose surroundings it must leave alone."""
    num_rows, out_features = len(x), len(weight)
    workspace = workspace or workspace_of(num_rows, out_features, config)
    memory = torch.full((num_rows + 2, out_features), math.nan, dtype=out_dtype or x.dtype, device=DEVICE)
    out = memory[1:-1]
    partials, counters = workspace.partials, workspace.counters
    assert skinny_linear(x, weight, bias, out, config=config, partials=partials, counters=counters) is out
    assert memory[0].isnan().all() and memory[-1].isnan().all()
    assert not counters.any()
    return out


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(x), len(weight), dtype=dtype, device=DEVICE)
    return skinny_linear_ref(x, weight, bias, out)


def assert_close(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(ours, reference, rtol=RELATIVE[ours.dtype], atol=1e-4)


@pytest.mark.parametrize(
    ("num_rows", "form"),
    [(rows, form) for form in FORMS for rows in range(1, 17) if form == "dot" or rows <= 4],
)
def test_every_number_of_rows_on_odd_sizes(num_rows: int, form: Form) -> None:
    torch.manual_seed(num_rows)
    dtype = (torch.bfloat16, torch.float32, torch.float16)[num_rows % 3]
    x, weight = amid_nan(num_rows, 301, dtype=dtype), amid_nan(37, 301, dtype=dtype)
    bias = amid_nan(37, dtype=dtype) if num_rows % 2 else None
    assert_close(multiply(x, weight, bias, config_of(form)), expected(x, weight, bias, dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(1, 1), (5, 7), (16, 128), (48, 384), (33, 130), (20, 64)]
)
def test_sizes_that_are_and_are_not_whole_tiles(out_features: int, in_features: int, form: Form) -> None:
    torch.manual_seed(0)
    x, weight = (amid_nan(rows, in_features, dtype=torch.float32) for rows in (3, out_features))
    assert_close(multiply(x, weight, None, config_of(form)), expected(x, weight, None, torch.float32))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("splits", range(1, 9))
def test_split_sums_are_whole(splits: int, form: Form) -> None:
    torch.manual_seed(splits)
    x, weight = amid_nan(3, 700, dtype=torch.bfloat16), amid_nan(17, 700, dtype=torch.bfloat16)
    bias = amid_nan(17, dtype=torch.bfloat16)
    # With 6 tiles, some of 8 programs have none.
    config = config_of(form, splits=splits)
    ours = multiply(x, weight, bias, config, out_dtype=torch.float32)
    torch.testing.assert_close(ours, expected(x, weight, bias, torch.float32), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_float32_output_was_not_rounded_on_its_way(form: Form) -> None:
    torch.manual_seed(0)
    x, weight = amid_nan(2, 256, dtype=torch.bfloat16), amid_nan(16, 256, dtype=torch.bfloat16)
    ours = multiply(x, weight, None, config_of(form), out_dtype=torch.float32)
    exact = x.double() @ weight.double().t()
    assert (ours.double() - exact).abs().max() < 1e-4
    assert (ours.to(torch.bfloat16).double() - exact).abs().max() > 1e-2


@pytest.mark.parametrize("num_stages", [1, 2, 5])
@pytest.mark.parametrize("form", FORMS)
def test_depth_of_the_pipeline_changes_nothing(form: Form, num_stages: int) -> None:
    torch.manual_seed(0)
    x, weight = amid_nan(4, 640, dtype=torch.float16), amid_nan(16, 640, dtype=torch.float16)
    reference = multiply(x, weight, None, config_of(form))
    assert_close(multiply(x, weight, None, config_of(form, num_stages=num_stages)), reference)


@pytest.mark.parametrize("form", FORMS)
def test_parts_are_added_in_their_order_whoever_comes_last(form: Form) -> None:
    torch.manual_seed(0)
    config = config_of(form, splits=3)
    x, weight = amid_nan(2, 700, dtype=torch.float32), amid_nan(40, 700, dtype=torch.float32)
    workspace = workspace_of(2, 40, config)
    ours = multiply(x, weight, None, config, workspace=workspace)
    parts = workspace.partials.view(3, config.rows_held(2), 40)[:, :2]
    assert not parts.isnan().any()
    assert torch.equal(ours, parts[0] + parts[1] + parts[2])
    # Counters that stand at two make the first to arrive believe that it is the last; the others' parts
    # are there from before. Each launch then leaves its counters as it found them.
    workspace.counters.fill_(2)
    again = torch.empty_like(ours)
    partials, counters = workspace.partials, workspace.counters
    skinny_linear(x, weight, None, again, config=config, partials=partials, counters=counters)
    assert torch.equal(again, ours) and (counters == 2).all()


@pytest.mark.parametrize("form", FORMS)
def test_workspace_serves_launch_after_launch_of_any_size(form: Form) -> None:
    torch.manual_seed(0)
    config = config_of(form, splits=3)
    workspace = workspace_of(4, 50, config)
    for num_rows, out_features in [(4, 50), (1, 18), (4, 50)]:
        x, weight = (amid_nan(rows, 390, dtype=torch.float32) for rows in (num_rows, out_features))
        ours = multiply(x, weight, None, config, workspace=workspace)
        assert_close(ours, expected(x, weight, None, torch.float32))
        assert torch.equal(multiply(x, weight, None, config, workspace=workspace), ours)


def test_more_rows_than_a_form_takes_and_too_small_a_workspace_are_refused() -> None:
    x, weight = torch.ones(5, 32, device=DEVICE), torch.ones(16, 32, device=DEVICE)
    nothing = LinearWorkspace(torch.empty(0, device=DEVICE), torch.zeros(0, dtype=torch.int32, device=DEVICE))
    with pytest.raises(AssertionError):
        multiply(x, weight, None, config_of("gemv"), workspace=nothing)
    with pytest.raises(AssertionError):
        multiply(x, weight, None, config_of("dot", splits=2), workspace=nothing)
    assert_close(
        multiply(x, weight, None, config_of("dot"), workspace=nothing), torch.full((5, 16), 32.0).to(DEVICE)
    )


def test_no_rows_store_nothing() -> None:
    x, weight = torch.ones(0, 32, device=DEVICE), torch.ones(16, 32, device=DEVICE)
    assert multiply(x, weight, None, config_of("dot", splits=2)).shape == (0, 16)


def table_with(
    config: SkinnyConfig, *, num_rows: int, out_features: int, in_features: int, dtype: torch.dtype
) -> LinearTable:
    rows, name = row_bucket(num_rows), dtype_name(dtype)
    key = ChoiceKey(capability_of(DEVICE), "linear", name, out_features, in_features, rows)
    return LinearTable({key: Choice(config, 1.0, 2.0, "run")}, {"run": {}})


def test_linear_takes_the_kernel_of_the_table_where_its_workspace_suffices() -> None:
    torch.manual_seed(0)
    config = config_of("dot", splits=2)
    x, weight = amid_nan(7, 300, dtype=torch.float32), amid_nan(20, 300, dtype=torch.float32)
    table = table_with(config, num_rows=7, out_features=20, in_features=300, dtype=x.dtype)
    workspace = workspace_of(7, 20, config)
    out = torch.empty(7, 20, device=DEVICE)
    assert_close(
        linear(x, weight, None, out, workspace=workspace, table=table), expected(x, weight, None, x.dtype)
    )
    # That it ran is seen from what it left: the parts.
    parts = workspace.partials.view(2, 16, 20)[:, :7]
    assert torch.equal(parts[0] + parts[1], out)

    nothing = LinearWorkspace(workspace.partials[:0], workspace.counters[:0])
    by_torch = linear_ref(x, weight, None, torch.empty_like(out))
    assert torch.equal(linear(x, weight, None, out, workspace=nothing, table=table), by_torch)


def test_product_for_a_card_brings_the_workspace_that_its_table_asks_for() -> None:
    torch.manual_seed(0)
    config = config_of("gemv", splits=4)
    x, weight = amid_nan(3, 300, dtype=torch.float32), amid_nan(20, 300, dtype=torch.float32)
    table = table_with(config, num_rows=3, out_features=20, in_features=300, dtype=x.dtype)
    product = gpu_product([(64, 64), (20, 300)], dtype=x.dtype, device=DEVICE, table=table)
    ours = product(x, weight, None, torch.empty(3, 20, device=DEVICE))
    assert torch.equal(ours, multiply(x, weight, None, config))
    # Another shape is not in the table.
    other = product(x, weight[:9], None, torch.empty(3, 9, device=DEVICE))
    assert torch.equal(other, linear_ref(x, weight[:9], None, torch.empty_like(other)))


GATED: list[tuple[int, Form, torch.dtype, Activation, bool]] = [
    (1, "gemv", torch.float32, "silu", False),
    (2, "gemv", torch.float32, "gelu", True),
    (3, "gemv", torch.bfloat16, "silu", True),
    (4, "gemv", torch.float16, "gelu_tanh", False),
    (1, "dot", torch.float16, "silu", False),
    (5, "dot", torch.float32, "gelu_tanh", True),
    (8, "dot", torch.float32, "silu", False),
    (13, "dot", torch.bfloat16, "gelu", True),
    (16, "dot", torch.bfloat16, "silu", False),
]


@pytest.mark.parametrize(("num_rows", "form", "dtype", "activation", "has_bias"), GATED)
@pytest.mark.parametrize(("intermediate", "in_features"), [(37, 301), (32, 256)])
def test_gated_product_is_a_product_and_an_activation(
    num_rows: int,
    form: Form,
    dtype: torch.dtype,
    activation: Activation,
    has_bias: bool,
    intermediate: int,
    in_features: int,
) -> None:
    torch.manual_seed(num_rows)
    x = amid_nan(num_rows, in_features, dtype=dtype)
    weight = amid_nan(2 * intermediate, in_features, dtype=dtype, scale=in_features**-0.5)
    bias = amid_nan(2 * intermediate, dtype=dtype) if has_bias else None
    memory = torch.full((num_rows + 2, intermediate), math.nan, dtype=dtype, device=DEVICE)
    out = memory[1:-1]
    assert gated_linear(x, weight, bias, activation, out=out, config=config_of(form)) is out
    assert memory[0].isnan().all() and memory[-1].isnan().all()
    reference = gated_linear_ref(x, weight, bias, activation, out=torch.empty_like(out))
    # Rounding differs in three places: gates, their activation, and the product.
    torch.testing.assert_close(out, reference, rtol=4 * RELATIVE[dtype], atol=4 * RELATIVE[dtype] / 10)


def test_tuning_compares_products_that_agree() -> None:
    table = table_with(config_of("gemv"), num_rows=2, out_features=32, in_features=128, dtype=torch.bfloat16)
    for operation, config in itertools.product(get_args(Operation), (config_of("gemv"), config_of("dot"))):
        product = Product("layer", operation, 16, 128, writes_float32=operation == "linear")
        bench = Bench(product, 2, copies=2, device=DEVICE)
        # The gated layer's other side has its wide product, 32 x 128, from the table.
        expected = bench.result(bench.other(table))
        ours = bench.result(bench.ours(config))
        assert is_right(ours, expected)
        assert not is_right(ours.roll(1, 0), expected) and not is_right(ours * math.nan, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("prefetches", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_captured_chain_of_dependent_products_equals_one_at_a_time(
    form: Form, prefetches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each product reads what the one before it wrote, with dependent launch where the card has it."""
    monkeypatch.setattr(skinny_linear_module, "prefetches_weights", lambda: prefetches)
    torch.manual_seed(0)
    config = config_of(form, splits=4, block_k=256)
    size, num_layers = 2048, 40
    weights = [(torch.randn(size, size, device=DEVICE) * size**-0.5).bfloat16() for _ in range(num_layers)]
    workspace = workspace_of(4, size, config)
    steps = torch.randn(num_layers + 1, 4, size, device=DEVICE).bfloat16()

    def run(*, waits: bool) -> None:
        for weight, x, out in zip(weights, steps[:-1], steps[1:], strict=True):
            partials, counters = workspace.partials, workspace.counters
            skinny_linear(x, weight, None, out, config=config, partials=partials, counters=counters)
            if waits:
                torch.cuda.synchronize()

    run(waits=True)
    one_at_a_time = steps.clone()
    assert_close(steps[1], expected(steps[0], weights[0], None, steps.dtype))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(waits=False)
    for _ in range(20):
        steps[1:].fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(steps, one_at_a_time)
