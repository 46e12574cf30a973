"""Captured steps are, bit for bit, what they are kernel by kernel; they allocate and wait for nothing."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from benchmarks.gpu.decode_rig import Rows, fill_kv, limited_config, open_engine
from benchmarks.gpu.engines import GRAPH_TESTS
from graphllm.sampling_params import SamplingParams
from graphllm.sequence import SequenceGroup

pytestmark = pytest.mark.gpu

NUM_KV_TOKENS = 16384


@pytest.fixture(scope="module", params=sorted(GRAPH_TESTS))
def engine(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """A model at its real shape, with its device; nothing is captured yet for traffic."""
    with open_engine(limited_config(GRAPH_TESTS[request.param], num_kv_tokens=NUM_KV_TOKENS)) as opened:
        loaded, device = opened
        with device.on_stream():
            fill_kv(loaded.runner)
        yield opened
        del loaded, device, opened
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def captured_engine(engine: tuple[Any, Any]) -> Any:
    """The model with all graphs captured."""
    loaded, device = engine
    with device.on_stream():
        loaded.runner.graphs.capture_all()
    return loaded


def test_captures_allocate_nothing_and_need_no_larger_arena(engine: tuple[Any, Any]) -> None:
    loaded, device = engine
    graphs = loaded.runner.graphs
    torch.cuda.synchronize()
    allocated, arena = torch.cuda.memory_allocated(), loaded.runner.arena.num_bytes
    with device.on_stream():
        graphs.capture_all()
    torch.cuda.synchronize()
    assert graphs.num_captured == len(graphs.default_keys())
    assert graphs.num_capture_allocations == 0
    assert torch.cuda.memory_allocated() == allocated
    assert loaded.runner.arena.num_bytes == arena


def run_both_ways(
    loaded: Any, contexts: Sequence[int], computed: Sequence[int]
) -> tuple[tuple[torch.Tensor, list[int]], tuple[torch.Tensor, list[int]]]:
    """(logits, tokens) of the same step as a graph and kernel by kernel, at the same padded bucket."""
    rows, runner = Rows(loaded, contexts), loaded.runner
    found = []
    for force_eager in (False, True):
        runner.graphs.force_eager = force_eager
        replays = runner.graphs.num_replays
        try:
            tokens = rows.install(computed)
        finally:
            runner.graphs.force_eager = False
        assert runner.graphs.num_replays == replays + (not force_eager)
        torch.cuda.synchronize()
        found.append((runner.buffers.logits[: len(contexts)].clone(), tokens))
    return found[0], found[1]


def assert_bit_equal(loaded: Any, contexts: Sequence[int], computed: Sequence[int]) -> None:
    (replayed, replayed_tokens), (eager, eager_tokens) = run_both_ways(loaded, contexts, computed)
    assert torch.isfinite(replayed).all()
    assert torch.equal(replayed, eager)
    assert replayed_tokens == eager_tokens == eager.argmax(dim=-1).tolist()


# Every case of a bucket goes through the same graph, whose lengths are read on the device.
@pytest.mark.parametrize(
    "contexts",
    [
        [1],
        [4000],
        [16, 17],
        [1, 15, 3000],
        [1000] * 4,
        [5, 100, 16, 31, 2000],
        [1, 2, 3, 4, 5, 6, 7, 4000],
    ],
    ids=str,
)
def test_a_replayed_decode_step_is_bit_equal_to_an_eager_one(
    captured_engine: Any, contexts: list[int]
) -> None:
    assert_bit_equal(captured_engine, contexts, [context - 1 for context in contexts])


@pytest.mark.parametrize(
    ("contexts", "computed"),
    [
        ([200], [0]),
        ([2, 1], [0, 0]),
        ([1000, 77], [999, 0]),
        ([33, 500, 300], [32, 499, 250]),
        ([20] * 8, [0] * 8),
        ([3000, 100, 3100], [2999, 83, 3000]),
    ],
    ids=str,
)
def test_a_replayed_mixed_step_is_bit_equal_to_an_eager_one(
    captured_engine: Any, contexts: list[int], computed: list[int]
) -> None:
    order = sorted(range(len(contexts)), key=lambda row: contexts[row] - computed[row] > 1)
    assert_bit_equal(captured_engine, [contexts[row] for row in order], [computed[row] for row in order])


def test_what_traffic_wants_is_captured_without_an_allocation(captured_engine: Any) -> None:
    """A step with logprobs, which nobody captures ahead: slice by slice, as between other steps."""
    runner = captured_engine.runner
    params = SamplingParams(temperature=0.7, logprobs=5, max_tokens=4, ignore_eos=True)
    rows = Rows(captured_engine, [100, 200, 300], params=params)
    num_captured = runner.graphs.num_captured
    rows.install_decode()
    assert runner.graphs.has_captures_due
    while runner.graphs.has_captures_due:
        runner.graphs.capture_slice()
    assert runner.graphs.num_captured > num_captured
    assert runner.graphs.num_capture_allocations == 0


def test_padding_never_writes_the_null_block(captured_engine: Any) -> None:
    Rows(captured_engine, [50, 60, 70]).install_decode()
    Rows(captured_engine, [50, 60, 70]).install([0, 0, 40])
    torch.cuda.synchronize()
    for layer in captured_engine.runner.kv_cache.layers:
        assert not layer.key[0].any() and not layer.value[0].any()


def test_steps_launched_ahead_give_the_tokens_of_steps_one_by_one(captured_engine: Any) -> None:
    rows = Rows(captured_engine, [100, 200, 300])
    one_by_one = [rows.install_decode(), *(rows.decode() for _ in range(6))]
    rows.install_decode()
    in_flight: deque[Any] = deque()
    ahead = []
    for _ in range(6):
        in_flight.append(rows.launch([1, 1, 1], []))
        if len(in_flight) == 2:
            ahead.append(rows.finish(in_flight.popleft()))
    ahead.append(rows.finish(in_flight.popleft()))
    assert ahead == one_by_one[1:]


def test_no_step_waits_for_the_device(captured_engine: Any) -> None:
    """schedule, launch, ready, result and apply under torch's own check for synchronizing calls."""
    loaded = captured_engine
    scheduler, runner = loaded.scheduler, loaded.runner
    requests = {
        "greedy": SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
        "sampled": SamplingParams(temperature=0.8, top_p=0.9, top_k=50, max_tokens=20, ignore_eos=True),
        "penalized": SamplingParams(
            presence_penalty=0.5, logit_bias={7: 2.0}, max_tokens=12, ignore_eos=True
        ),
        "logprobs": SamplingParams(temperature=0.0, logprobs=5, max_tokens=8, ignore_eos=True),
    }
    prompt = list(range(300, 400))
    groups = [
        SequenceGroup(
            name, prompt, params=params, seed=1, max_total_tokens=len(prompt) + (params.max_tokens or 0)
        )
        for name, params in requests.items()
    ]
    for group in groups:
        scheduler.add(group)
    in_flight: deque[Any] = deque()
    deadline = time.monotonic() + 60
    torch.cuda.set_sync_debug_mode("error")
    try:
        while scheduler.has_unfinished or in_flight:
            assert time.monotonic() < deadline, "the requests do not end"
            batch = scheduler.schedule() if len(in_flight) < 2 and scheduler.has_unfinished else None
            if batch is not None:
                in_flight.append(runner.launch(batch))
            if in_flight and in_flight[0].ready():
                handle = in_flight.popleft()
                scheduler.step_completed(handle.batch.step_id)
                scheduler.apply(handle.batch, handle.result())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {group.request_id: group.sequences[0].num_output_tokens for group in groups} == {
        name: params.max_tokens for name, params in requests.items()
    }


def test_the_check_for_synchronizing_calls_does_see_one() -> None:
    number = torch.ones(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            number.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
