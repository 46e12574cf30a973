"""Where no kernels run, the device's sampler is the specification, writing to the same places."""

import pytest
import torch

from graphllm.arena import Arena
from graphllm.kernels.triton_support import INTERPRETED
from graphllm.runner.device_sampler import SampleResults, sample_on_device
from graphllm.runner.sampler import SamplerKind, SamplerVariant, SamplingTables, pack_sampling_row, sample
from graphllm.sampling_params import SamplingParams

_CPU = torch.device("cpu")
_VOCAB = 300


@pytest.mark.skipif(INTERPRETED, reason="this process interprets kernels on the CPU")
@pytest.mark.parametrize("kind", list(SamplerKind))
@pytest.mark.parametrize("lines", [None, [4, 0]])
def test_without_kernels_the_specification_fills_the_same_places(
    kind: SamplerKind, lines: list[int] | None
) -> None:
    general = SamplingParams(top_p=0.7, presence_penalty=1.0)
    params = [SamplingParams(temperature=0.0) if kind is SamplerKind.GREEDY else general] * 2
    tables = SamplingTables.allocate(3, device=_CPU)
    for slot, row_params in enumerate(params):
        row = pack_sampling_row(row_params, seed=slot, sibling=0, num_prompt_tokens=2, eos_token_ids=())
        tables.write_row(slot + 1, row)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, _VOCAB, generator=generator)
    token_table = torch.randint(0, _VOCAB, (3, 9), generator=generator).int()
    lengths = torch.tensor([0, 7, 3])
    slots = torch.tensor([2, 1])
    read = torch.tensor(lines or [0, 1])
    expected = sample(
        logits[read],
        slots=slots,
        tables=tables,
        variant=SamplerVariant.of([*params, SamplingParams(logprobs=20)]),
        token_table=token_table,
        lengths=lengths,
    )
    assert expected.logprobs is not None and expected.top_ids is not None

    results = SampleResults.allocate(5, device=_CPU)
    arena = Arena(_CPU)
    sample_on_device(
        logits,
        slots=slots,
        tables=tables,
        kind=kind,
        token_table=token_table,
        lengths=lengths,
        results=results,
        arena=arena,
        lines=None if lines is None else read,
    )
    assert torch.equal(results.token_ids[read], expected.token_ids)
    assert torch.equal(token_table[slots, lengths[slots]].long(), expected.token_ids)
    if kind is SamplerKind.LOGPROBS:
        assert torch.equal(results.logprobs[read], expected.logprobs)
        assert torch.equal(results.top_ids[read], expected.top_ids)
    else:
        assert not results.logprobs.any() and not results.top_ids.any()
    assert arena.num_bytes == 0


def test_the_greedy_sampler_refuses_masks() -> None:
    with pytest.raises(AssertionError, match="knows no masks"):
        sample_on_device(
            torch.zeros(1, 32),
            slots=torch.tensor([0]),
            tables=SamplingTables.allocate(1, device=_CPU),
            kind=SamplerKind.GREEDY,
            token_table=torch.zeros(1, 4, dtype=torch.int32),
            lengths=torch.tensor([1]),
            results=SampleResults.allocate(1, device=_CPU),
            arena=Arena(_CPU),
            masks=torch.zeros(1, 1, dtype=torch.int32),
        )
