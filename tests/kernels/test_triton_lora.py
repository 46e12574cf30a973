"""The LoRA kernels against their formulas, one token at a time and in tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from graphllm.kernels import lora_tokens as tokens_module
from graphllm.kernels.lora_shrink import MAX_SINGLE_TOKENS
from tests.kernels.device import DEVICE
from tests.kernels.lora_inputs import lora_case, token_by_token, with_adapters
from tests.kernels.test_lora import written_tokens

pytestmark = pytest.mark.triton

# A decode step of a few, a tile of decodes, a prompt's tokens beside another's and padding.
STEPS = {
    "single tokens": [2, -1, 0],
    "a tile of rows": [0, 2, 0, -1, 2, 2, -1, 0, 0],
    "runs of tokens": [0] * 7 + [-1] * 4 + [1] * 20 + [2] * 2 + [-1] * 7,
}
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.25}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_kernels_add_what_the_formula_says(step: list[int], dtype: torch.dtype) -> None:
    case = lora_case(step, dtype=dtype, unchanged=((2, 1), (0, 0)), in_features=520)
    found = with_adapters(case.to(DEVICE)).cpu().double()
    expected = token_by_token(case)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
    is_base = case.token_adapters < 0
    assert torch.equal(found[is_base], case.base[is_base].double())


@pytest.mark.parametrize("num_tokens", [2, MAX_SINGLE_TOKENS + 1])
@pytest.mark.parametrize("max_rank", [16, 128])
def test_every_rank_counts(max_rank: int, num_tokens: int) -> None:
    case = lora_case([1] * num_tokens, max_rank=max_rank, part_sizes=(40,))
    found = with_adapters(case.to(DEVICE)).cpu().double()
    torch.testing.assert_close(found, token_by_token(case), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("num_tokens", [3, MAX_SINGLE_TOKENS + 3])
def test_an_adapter_of_no_numbers_harms_no_other_tokens(num_tokens: int) -> None:
    case = lora_case([0, 1, -1] + [1] * (num_tokens - 3))
    case.down[0, 0, 0] = torch.nan
    found = with_adapters(case.to(DEVICE)).cpu().double()
    assert not found[0].isfinite().all()
    torch.testing.assert_close(found[1:], token_by_token(case)[1:], rtol=1e-4, atol=1e-3)


def test_output_of_another_format_is_added_to() -> None:
    case = lora_case([1, 0, -1], dtype=torch.bfloat16)
    case = replace(case, base=case.base.float())
    found = with_adapters(case.to(DEVICE)).cpu().double()
    torch.testing.assert_close(found, token_by_token(case), rtol=0.05, atol=0.5)


@pytest.mark.parametrize("max_row_programs", [1, 2048])
def test_tokens_of_a_step_know_their_adapters(max_row_programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "_TOKEN_TILE", 4)
    monkeypatch.setattr(tokens_module, "_DECODE_TILE", 4)
    monkeypatch.setattr(tokens_module, "_MAX_ROW_PROGRAMS", max_row_programs)
    decode = written_tokens([1, 1, 0, 1, 1, 0], num_tokens=6, is_decode=True, device=DEVICE)
    assert decode == [-1, 5, -1, 7, -1, -1]
    mixed = written_tokens([1, 11, 0, 9], num_tokens=30, is_decode=False, device=DEVICE)
    assert mixed == [-1] + [5] * 11 + [7] * 9 + [-1] * 9
