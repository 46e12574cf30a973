from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from graphllm.kernels.kv_quantization import LARGEST_STORED, dequantize_kv_ref, quantize_kv_ref
from graphllm.kernels.rotary import QueryGrowth, rotary_tables_ref
from graphllm.kernels.rotary_cache_write import rotary_cache_write, rotary_cache_write_ref
from tests.kernels.device import DEVICE

pytestmark = pytest.mark.triton

HAS_E4M3 = DEVICE.type == "cpu" or torch.cuda.get_device_capability() >= (8, 9)
FORMATS = [torch.float8_e5m2, torch.int8] + ([torch.float8_e4m3fn] if HAS_E4M3 else [])
# How far from x what is meant may be: a part of |x|, or of the scale among the subnormals.
HALF_STEPS = {
    torch.float8_e4m3fn: (2**-4, 2**-10),
    torch.float8_e5m2: (2**-3, 2**-17),
    torch.int8: (0.0, 0.5),
}


@dataclass
class Step:
    """One layer's inputs, and caches whose slots all hold NaN (or, as numbers, 99)."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    is_turned: bool = True
    norm: str = ""  # "weight", "1 + weight" or none
    num_padding: int = 0
    rotary_dim: int = 0  # 0 for the whole head
    is_interleaved: bool = False
    query_growth: QueryGrowth | None = None
    qkv: torch.Tensor = field(init=False, repr=False)
    tables: torch.Tensor | None = field(init=False, repr=False, default=None)
    options: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.num_tokens + self.head_dim)
        self.cache_dtype = self.cache_dtype or self.dtype
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        # Heads of very different sizes, so that a scale of a wrong head shows.
        sizes = torch.logspace(-2, 2, width // self.head_dim).repeat_interleave(self.head_dim)
        self.qkv = (torch.randn(self.num_tokens, width) * sizes).to(DEVICE, self.dtype)
        if self.is_turned:
            self.tables = rotary_tables_ref(
                torch.randint(5000, (self.num_tokens,)),
                torch.rand((self.rotary_dim or self.head_dim) // 2),
                scale=1.25,
                query_growth=self.query_growth,
                out=torch.empty(
                    2 if self.query_growth is None else 4,
                    self.num_tokens,
                    self.rotary_dim or self.head_dim,
                    dtype=self.dtype,
                ),
            ).to(DEVICE)
        num_blocks = self.num_tokens // self.block_size + 3
        slots = self.block_size + torch.randperm((num_blocks - 1) * self.block_size)[: self.num_tokens]
        slots[self.num_tokens - self.num_padding :] = -1
        self.qkv[self.num_tokens - self.num_padding :] = torch.nan
        size = (num_blocks, self.block_size, self.num_kv_heads, self.head_dim)
        empty = 99 if self.cache_dtype == torch.int8 else torch.nan
        self.options = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "is_interleaved": self.is_interleaved,
            "slot_mapping": slots.to(DEVICE),
            "key_cache": torch.full(size, empty, device=DEVICE).to(self.cache_dtype),
            "value_cache": torch.full(size, empty, device=DEVICE).to(self.cache_dtype),
        }
        if self.cache_dtype in FORMATS:
            for name in ("key_scale", "value_scale"):
                self.options[name] = torch.full(size[:3], torch.nan, device=DEVICE)
        if self.norm:
            for name in ("query_norm", "key_norm"):
                self.options[name] = torch.rand(self.head_dim).to(DEVICE, self.dtype)
            self.options |= {"norm_eps": 1e-3, "norm_unit_offset": self.norm == "1 + weight"}

    def run(self, function: Any) -> dict[str, torch.Tensor]:
        """The queries [num_tokens, num_heads, head_dim] and whole caches that `function` leaves."""
        qkv = self.qkv.clone()
        options = {
            name: option.clone() if isinstance(option, torch.Tensor) else option
            for name, option in self.options.items()
        }
        function(qkv, self.tables, **options)
        query = qkv.view(self.num_tokens, -1, self.head_dim)[:, : self.num_heads]
        left = {name: options[name] for name in options if name.endswith(("_cache", "_scale"))}
        return {"query": query[: self.num_tokens - self.num_padding]} | left

    def close(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Equal within roundings of each head's largest element, and NaN in the same places."""
        found, expected = found.float(), expected.float()
        assert torch.equal(found.isnan(), expected.isnan())
        found, expected = found.nan_to_num(), expected.nan_to_num()
        coarsest = max(torch.finfo(self.dtype).eps, torch.finfo(self.cache_dtype).eps)
        # Each of the norm's two roundings and the turn's may be a truncation under the interpreter.
        num_roundings = 4 if self.norm else 2
        allowed = max(num_roundings * coarsest, 4e-6) * expected.abs().amax(dim=-1, keepdim=True)
        assert ((found - expected).abs() <= allowed).all()


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# A pairwise cover: head_dim, ratio of heads, block size, dtype, norm, with and without turn, program sizes.
STEPS = [
    Step(1, 8, 2, 64, dtype=BF16),
    Step(5, 4, 4, 128, dtype=BF16, norm="weight", block_size=64),
    Step(4, 9, 3, 64, dtype=F32, norm="1 + weight", num_padding=1),
    Step(3, 2, 1, 80, dtype=F32, num_padding=2),
    Step(3, 6, 3, 96, dtype=F16, norm="weight", is_turned=False),
    Step(2, 4, 1, 256, dtype=BF16, norm="1 + weight", block_size=64),
    Step(3, 12, 12, 80, dtype=BF16),
    Step(2, 3, 3, 96, dtype=F32, is_turned=False),
    Step(3, 4, 2, 64, dtype=F32, cache_dtype=BF16, norm="weight"),
    Step(3, 4, 2, 80, dtype=F32, rotary_dim=32, num_padding=1),
    Step(3, 2, 2, 64, dtype=BF16, rotary_dim=48, norm="weight"),
    Step(2, 4, 1, 12, dtype=F32, rotary_dim=2, norm="1 + weight"),
    Step(3, 4, 2, 64, dtype=F32, is_interleaved=True),
    Step(3, 4, 2, 96, dtype=F16, is_interleaved=True, rotary_dim=48, norm="weight", num_padding=1),
    Step(3, 4, 2, 80, dtype=F32, query_growth=QueryGrowth(growth=0.5, interval=100), num_padding=1),
    Step(261, 8, 2, 64, dtype=BF16, query_growth=QueryGrowth(growth=0.5, interval=100), norm="weight"),
    Step(260, 4, 2, 64, dtype=BF16, is_interleaved=True, rotary_dim=32),
    Step(261, 3, 1, 64, dtype=BF16, num_padding=3),
    Step(259, 10, 10, 128, dtype=F32, norm="weight", block_size=64, num_padding=1),
]


def name_of(step: Step) -> str:
    dtypes = f"{step.dtype}-{step.cache_dtype}".replace("torch.", "")
    heads = f"{step.num_heads}-{step.num_kv_heads}-{step.head_dim}"
    turn = f"{step.rotary_dim}-{'neighbours' if step.is_interleaved else 'halves'}"
    growth = "" if step.query_growth is None else "-growing queries"
    return f"{step.num_tokens}-{heads}-{dtypes}-{step.norm or 'no norm'}-{turn}{growth}"


@pytest.mark.parametrize("step", STEPS, ids=name_of)
def test_queries_and_caches_are_the_references(step: Step) -> None:
    found, expected = step.run(rotary_cache_write), step.run(rotary_cache_write_ref)
    for name in expected:
        step.close(found[name], expected[name])
    if step.dtype == step.cache_dtype:
        # What is only moved keeps its bits, and slots of no token keep theirs.
        assert torch.equal(found["value_cache"].nan_to_num(), expected["value_cache"].nan_to_num())


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum of a padding token's head
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", [(5, 3, 3, 64), (260, 1, 2, 80)])
def test_unturned_heads_are_quantized_bit_by_bit_like_the_reference(
    dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    step = Step(*shape, cache_dtype=dtype, is_turned=False, num_padding=2)
    found, expected = step.run(rotary_cache_write), step.run(rotary_cache_write_ref)
    for name in ("key_cache", "value_cache"):
        assert torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8))
    for name in ("key_scale", "value_scale"):
        assert torch.equal(found[name].nan_to_num(nan=-1.0), expected[name].nan_to_num(nan=-1.0))


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_rounding_to_8_bits_is_to_nearest_even(dtype: torch.dtype) -> None:
    limit = LARGEST_STORED[dtype]
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = torch.unique(values[values.abs() <= limit])
    middles = (numbers[1:] + numbers[:-1]) / 2
    above, below = (torch.nextafter(middles, torch.tensor(side)) for side in (torch.inf, -torch.inf))
    x = torch.cat((numbers, middles, above, below))
    num_heads = -(-len(x) // 255)
    heads = torch.zeros(num_heads * 255)
    heads[: len(x)] = x
    # One element of each head is the largest number, so that its scale is 1.
    heads = torch.cat((heads.view(num_heads, 255), torch.full((num_heads, 1), limit)), dim=1)

    step = Step(1, 1, num_heads, 256, cache_dtype=dtype, is_turned=False)
    step.qkv[:, 256:] = torch.cat((heads, -heads)).flatten()
    found = step.run(rotary_cache_write)
    slot = int(step.options["slot_mapping"])
    for name, sign in (("key", 1), ("value", -1)):
        stored, scale = quantize_kv_ref(sign * heads, dtype)
        assert (scale == 1).all()
        assert torch.equal(found[f"{name}_scale"].flatten(0, 1)[slot].cpu(), scale)
        written = found[f"{name}_cache"].flatten(0, 1)[slot].cpu()
        assert torch.equal(written.view(torch.uint8), stored.view(torch.uint8))


@pytest.mark.parametrize("dtype", FORMATS)
def test_zero_and_almost_zero_heads_are_stored_like_the_reference(dtype: torch.dtype) -> None:
    step = Step(2, 1, 2, 64, cache_dtype=dtype)
    heads = step.qkv.view(2, 5, 64)
    heads[:, 1] = 0.0  # a zero key turns into a zero key
    heads[:, 3] = 0.0
    heads[:, 4] *= 1e-36
    found, expected = step.run(rotary_cache_write), step.run(rotary_cache_write_ref)
    slots = step.options["slot_mapping"]
    for name in ("key", "value"):
        stored = found[f"{name}_cache"].flatten(0, 1)[slots].float()
        scale = found[f"{name}_scale"].flatten(0, 1)[slots]
        assert (stored[:, 0] == 0).all() and (scale[:, 0] == 0).all()
    for name in ("value_cache", "value_scale"):
        assert torch.equal(
            found[name].flatten(0, 1)[slots].float(), expected[name].flatten(0, 1)[slots].float()
        )


@pytest.mark.parametrize("dtype", FORMATS)
def test_keys_are_quantized_after_norm_and_turn(dtype: torch.dtype) -> None:
    relative, absolute = HALF_STEPS[dtype]
    step = Step(3, 4, 2, 128, dtype=BF16, cache_dtype=dtype, norm="weight")
    found = step.run(rotary_cache_write)
    step.cache_dtype = BF16
    for name in ("key", "value"):
        del step.options[f"{name}_scale"]
        step.options[f"{name}_cache"] = torch.full_like(step.options[f"{name}_cache"], torch.nan, dtype=F32)
    exact = step.run(rotary_cache_write_ref)
    slots = step.options["slot_mapping"]
    for name in ("key", "value"):
        scale = found[f"{name}_scale"].flatten(0, 1)[slots]
        meant = dequantize_kv_ref(found[f"{name}_cache"].flatten(0, 1)[slots], scale)
        expected = exact[f"{name}_cache"].flatten(0, 1)[slots]
        largest = expected.abs().amax(dim=-1)
        torch.testing.assert_close(scale * LARGEST_STORED[dtype], largest, rtol=4 * 2**-7, atol=0.0)
        allowed = expected.abs() * relative + scale[..., None] * absolute
        assert ((meant - expected).abs() <= allowed + 4 * 2**-7 * largest[..., None]).all()


def test_padding_in_the_middle_stores_nothing_either() -> None:
    step = Step(4, 2, 2, 64, cache_dtype=torch.int8)
    step.options["slot_mapping"][1] = -1
    found = step.run(rotary_cache_write)
    for name in ("key_scale", "value_scale"):
        assert found[name].isfinite().sum() == 3 * 2
        is_unused = found[name].isnan()
        assert (found[name.replace("scale", "cache")][is_unused] == 99).all()
