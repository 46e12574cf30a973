"""The ahead-of-time harness itself, on kernels that break each rule: what it must notice, it notices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.aot.child import build_rows
from tests.aot.compiling import Row, matrix_formats, product_formats
from tests.aot.rules import complaints
from tests.aot.table import differences, from_markdown, to_markdown

GOOD = Row(
    kernel="_some_kernel",
    configuration="2x*bf16 i32; SIZE=64; warps=4 stages=3",
    capability=80,
    registers=40,
    stack_bytes=0,
    spill_bytes=0,
    shared_bytes=1024,
    products=("bf16",),
    matrix=("bf16",),
    is_serialized=False,
)


@pytest.fixture(scope="module")
def small_rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("aot")
    return build_rows("tests.aot.small_cases", cache=folder / "cache", output=folder / "rows")[0]


def rows_of(rows: list[Row], kernel: str, part: str = "") -> list[Row]:
    found = [row for row in rows if row.kernel == kernel and part in row.configuration]
    assert {row.capability for row in found} >= {90, 100}
    return found


def test_equal_launches_are_compiled_once_and_a_pointer_of_unknown_alignment_is_another_kernel(
    small_rows: list[Row],
) -> None:
    found = rows_of(small_rows, "_good_kernel")
    assert len(found) == 2 * 3
    assert len([row for row in found if row.configuration.startswith("*bf16' *bf16 i32;")]) == 3
    assert [complaint for row in found for complaint in complaints(row)] == []


def test_dependent_launch_is_compiled_where_the_card_has_it(small_rows: list[Row]) -> None:
    # The wait costs a register or two, or an instruction; what is compiled differs, so do the figures.
    by_card = {row.capability: row.registers for row in rows_of(small_rows, "_good_kernel", "2x*bf16")}
    assert by_card[80] < by_card[90]


@pytest.mark.parametrize(
    ("kernel", "part", "complaint"),
    [
        ("_spilling_kernel", "", "spills"),
        ("_specializing_kernel", "i32!", "do_not_specialize"),
        ("_specializing_kernel", "count=1!", "do_not_specialize"),
        ("_greedy_kernel", "", "bytes of shared memory"),
        ("_product_kernel", "tf32", "widened operands"),
        ("_product_kernel", "ieee", "widened operands"),
    ],
)
def test_a_broken_rule_is_noticed_on_every_card(
    small_rows: list[Row], kernel: str, part: str, complaint: str
) -> None:
    for row in rows_of(small_rows, kernel, part):
        (found,) = complaints(row)
        assert complaint in found


def test_products_of_16_and_8_bits_reach_matrix_units_in_their_own_format(small_rows: list[Row]) -> None:
    for row in rows_of(small_rows, "_product_kernel", "PRECISION=dot"):
        assert row.matrix == (("e4m3",) if "fp8e4nv" in row.configuration else ("bf16",))
        assert complaints(row) == []


def test_what_no_small_kernel_shows_is_noticed_too() -> None:
    assert complaints(GOOD) == []
    wrong = {
        "local memory": replace(GOOD, stack_bytes=8),
        "wait for one another": replace(GOOD, is_serialized=True),
        "matrix instructions in ()": replace(GOOD, matrix=()),
        "multiplies in ('f16',)": replace(GOOD, products=("f16",), matrix=("f16",)),
        "has none": replace(GOOD, configuration="*fp8e4nv; ; warps=4 stages=3"),
    }
    for words, row in wrong.items():
        (found,) = complaints(row)
        assert words in found


PTX = {
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 };": "bf16",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 { %r1 };": "tf32",
    "mma.sync.aligned.kind::f8f6f4.m16n8k32.row.col.f32.e5m2.e5m2.f32 { %r1 };": "e5m2",
    "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 { %r1 };": "s8",
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 { %f1 };": "f16",
    "@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 ], %rd1, %rd2, %r2, %p2;": "bf16",
    "@%p1 tcgen05.mma.cta_group::1.kind::tf32 [ %r1 ], %rd1, %rd2, %r2, %p2;": "tf32",
    "fma.rn.f32 %f1, %f2, %f3, %f4;": "",
}


@pytest.mark.parametrize(("ptx", "formats"), PTX.items())
def test_matrix_formats_are_read_from_the_instructions(ptx: str, formats: str) -> None:
    assert " ".join(matrix_formats(ptx, ("bf16",))) == formats


def test_product_formats_are_read_from_the_intermediate_form() -> None:
    line = "%4 = tt.dot %1, %2, %3, inputPrecision = tf32 : tensor<16x64x{0}> * tensor<64x8x{0}> -> %5"
    text = "\n".join(line.format(name) for name in ("bf16", "f8E4M3FN", "f32"))
    assert product_formats(text) == ("bf16", "e4m3", "f32")


def test_a_second_run_compiles_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, _ = build_rows("tests.aot.one_small_case", cache=cache, output=tmp_path / "first")
    files = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    second, _ = build_rows("tests.aot.one_small_case", cache=cache, output=tmp_path / "second")
    assert second == first
    assert len(first) == len(files) == 6
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == files


def test_a_table_is_read_as_it_was_written(small_rows: list[Row]) -> None:
    assert from_markdown(to_markdown(small_rows, "3.9.0")) == (
        "3.9.0",
        sorted(small_rows, key=lambda r: r.key),
    )


def test_the_table_is_compared_figure_by_figure_under_its_own_compiler_only() -> None:
    other = replace(GOOD, capability=90)
    tracked = to_markdown([GOOD, other], "3.9.0")
    slower = replace(other, registers=80)
    assert differences(tracked, [GOOD, other], "3.9.0") == []
    (found,) = differences(tracked, [GOOD, slower], "3.9.0")
    assert "registers=80" in found
    assert differences(tracked, [GOOD, slower], "3.10.0") == []


@pytest.mark.parametrize("version", ["3.9.0", "3.10.0"])
def test_a_row_too_many_or_too_few_is_noticed_under_every_compiler(version: str) -> None:
    other = replace(GOOD, configuration="2x*bf16 i32; SIZE=128; warps=4 stages=3")
    assert "not in the table" in differences(to_markdown([GOOD], "3.9.0"), [GOOD, other], version)[0]
    assert "no longer compiled" in differences(to_markdown([GOOD, other], "3.9.0"), [GOOD], version)[0]
