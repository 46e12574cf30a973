"""The references of the LoRA operations against their formulas."""

from __future__ import annotations

import torch

from graphllm.kernels.lora_expand import TILE_FEATURES, feature_tiles
from graphllm.kernels.lora_tokens import lora_tokens
from tests.kernels.lora_inputs import lora_case, token_by_token, with_adapters


def test_each_token_gets_its_own_adapter_and_parts_that_it_changes() -> None:
    case = lora_case([2, -1, 0, 0, 2, -1], unchanged=((2, 1),))
    torch.testing.assert_close(with_adapters(case).double(), token_by_token(case), rtol=1e-5, atol=1e-5)
    assert torch.equal(with_adapters(case)[[1, 5]], case.base[[1, 5]])
    assert torch.equal(with_adapters(case)[[0, 4], 80:], case.base[[0, 4], 80:])


def test_a_tile_of_features_lies_in_one_part() -> None:
    tiles = feature_tiles((TILE_FEATURES + 1, 3, TILE_FEATURES), device=torch.device("cpu")).tolist()
    end = TILE_FEATURES + 1
    assert tiles == [
        [0, 0, end],
        [0, TILE_FEATURES, end],
        [1, end, end + 3],
        [2, end + 3, 2 * TILE_FEATURES + 4],
    ]


def written_tokens(
    query_lens: list[int], *, num_tokens: int, is_decode: bool, device: torch.device
) -> list[int]:
    """Rows whose slots are 3, 2, 1, 0, of adapters -1, 5, -1, 7 in turn."""
    lens = torch.tensor(query_lens, device=device)
    starts = torch.arange(len(query_lens) + 1, device=device)
    if not is_decode:
        starts[1:] = lens.cumsum(0)
    out = torch.full((num_tokens,), 99, dtype=torch.int32, device=device)
    lora_tokens(
        row_slots=torch.tensor([3, 2, 1, 0, 3, 2][: len(query_lens)], device=device),
        query_lens=lens,
        query_starts=starts,
        slot_adapters=torch.tensor([7, -1, 5, -1], dtype=torch.int32, device=device),
        is_decode=is_decode,
        out=out,
    )
    return out.tolist()


def test_padding_tokens_and_rows_without_tokens_have_no_adapter() -> None:
    device = torch.device("cpu")
    assert written_tokens([1, 1, 1, 0], num_tokens=4, is_decode=True, device=device) == [-1, 5, -1, -1]
    mixed = written_tokens([1, 3, 0, 2], num_tokens=8, is_decode=False, device=device)
    assert mixed == [-1, 5, 5, 5, 7, 7, -1, -1]
