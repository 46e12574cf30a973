"""Every kernel, as launchers choose to compile it, compiled for cc 8.0, 9.0 and 10.0 without a card.

Refresh the tracked table with `python -m tests.aot.build --write`.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.aot.child import build_rows
from tests.aot.compiling import Row
from tests.aot.recording import CAPABILITIES
from tests.aot.rules import complaints
from tests.aot.table import TABLE, differences
from tests.architecture.source_tree import PACKAGE, read_package

# Kernels whose products belong on matrix units; `_skinny_linear_kernel` and its like in one form of two.
ATTENTION = {
    "_paged_decode_attention_kernel",
    "_paged_prefill_attention_kernel",
    "_paged_latent_decode_kernel",
    "_paged_latent_prefill_kernel",
}
PRODUCTS = {"_skinny_linear_kernel", "_gated_linear_kernel", "_packed_linear_kernel", "_packed_gated_kernel"}
GROUPED_PRODUCTS = {"_grouped_gated_kernel", "_grouped_linear_kernel", "_packed_down_kernel"}
# In 8 bits, and in float16 where their rows are few.
SCALED_PRODUCTS = {"_scaled_linear_kernel", "_scaled_grouped_gated_kernel", "_scaled_grouped_linear_kernel"}
# They cost half a second each on average: a table that grew past this would cost every change minutes.
MAX_COMPILATIONS = 500

# A cold cache, on two busy cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> list[Row]:
    folder = tmp_path_factory.mktemp("aot")
    kept = getattr(pytestconfig, "cache", None)
    cache = folder if kept is None else kept.mkdir("kernels-aot")
    return build_rows("tests.aot.cases", cache=Path(cache), output=folder / "rows")[0]


def kernels_of_the_package() -> set[str]:
    """The names of all launched Triton functions: `@triton.jit` and a name that ends in "_kernel"."""
    return {
        node.name
        for source in read_package(PACKAGE)
        for node in ast.walk(source.tree())
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and _is_jitted(node)
    }


def _is_jitted(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def test_every_kernel_is_compiled_for_every_card(rows: list[Row]) -> None:
    compiled = {(row.kernel, row.capability) for row in rows}
    assert compiled == {(name, card) for name in kernels_of_the_package() for card in CAPABILITIES}


def test_no_kernel_breaks_a_rule(rows: list[Row]) -> None:
    found = [complaint for row in rows for complaint in complaints(row)]
    assert not found, "\n".join(found)


def test_attention_multiplies_on_matrix_units_in_every_configuration(rows: list[Row]) -> None:
    found = {(row.kernel, row.matrix) for row in rows if row.kernel in ATTENTION}
    assert found == {(kernel, ("bf16",)) for kernel in ATTENTION}


def test_experts_products_multiply_on_matrix_units_in_every_configuration(rows: list[Row]) -> None:
    found = {(row.kernel, row.matrix) for row in rows if row.kernel in GROUPED_PRODUCTS}
    assert found == {(kernel, ("bf16",)) for kernel in GROUPED_PRODUCTS}


def test_products_multiply_on_matrix_units_on_every_card(rows: list[Row]) -> None:
    on_matrix_units = {(row.kernel, row.capability) for row in rows if row.matrix == ("bf16",)}
    assert on_matrix_units >= {(kernel, card) for kernel in PRODUCTS for card in CAPABILITIES}


def test_products_in_8_bits_multiply_8_bits_where_rows_are_many(rows: list[Row]) -> None:
    """In float16, exactly, only where rows are few; nothing is widened to tf32."""
    found = {(row.kernel, row.matrix) for row in rows if row.kernel in SCALED_PRODUCTS}
    assert found == {(kernel, (name,)) for kernel in SCALED_PRODUCTS for name in ("e4m3", "f16", "s8")}
    few = {row.configuration for row in rows if row.kernel in SCALED_PRODUCTS and row.matrix == ("f16",)}
    assert all(" ROWS=16 " in configuration for configuration in few)


def test_an_8_bit_cache_is_compiled_in_a_format_that_the_card_has(rows: list[Row]) -> None:
    for card, stored in {80: "*i8", 90: "*fp8e4nv", 100: "*fp8e4nv"}.items():
        found = {row.kernel for row in rows if row.capability == card and stored in row.configuration}
        assert found >= {*ATTENTION, "_rotary_cache_write_kernel"}


def test_there_are_not_too_many_compilations(rows: list[Row]) -> None:
    assert len(rows) <= MAX_COMPILATIONS


def test_the_tracked_table_is_current(rows: list[Row]) -> None:
    found = differences(TABLE.read_text(encoding="utf-8"), rows)
    assert not found, "\n".join([*found, "After a look at the figures: python -m tests.aot.build --write"])
