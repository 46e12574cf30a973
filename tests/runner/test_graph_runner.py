"""The bookkeeping of captured steps: sizes, misses, order, limits, and what a capture may not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from graphllm.attention.backend import AttentionBucket
from graphllm.batch import SamplePair, ScheduledBatch, ScheduledRow
from graphllm.runner.graph_runner import GraphKey, GraphRunner
from graphllm.runner.sampler import SamplerKind
from graphllm.runner.step_program import StepShape
from graphllm.sampling_params import SamplingParams
from graphllm.sequence import SequenceGroup
from graphllm.step_buckets import StepBuckets
from tests.runner.recording_device import GRAPH_BYTES, CaptureError, RecordingDevice

BUCKETS = StepBuckets.choose(max_num_seqs=16, max_num_batched_tokens=128)


class CountingProgram:
    """A program whose device work is additions to one tensor, so that a capture has something to record."""

    adapter_kinds: tuple[bool, ...] = (False,)

    def __init__(self) -> None:
        self.memory = torch.zeros(3)
        self.num_layers = 3
        self.fails_in: StepShape | None = None
        self.work: list[Any] = []

    def forward_in_slices(self, shape: StepShape, *, with_adapters: bool = False) -> Iterator[None]:
        for layer in range(self.num_layers):
            if shape == self.fails_in and layer == 1:
                raise RuntimeError("a kernel that cannot be captured")
            self.memory.add_(1.0)
            self.work.append(("adapted layer" if with_adapters else "layer", shape.bucket.num_tokens))
            yield

    def sample(self, num_pairs: int, kind: SamplerKind) -> None:
        self.memory.add_(100.0)
        self.work.append(("sample", num_pairs, kind))

    def sample_subset(self, num_pairs: int, kind: SamplerKind, *, masked: bool) -> None:
        self.memory.add_(10_000.0)
        self.work.append(("subset", num_pairs, kind, masked))


def make(**options: Any) -> tuple[GraphRunner, CountingProgram, RecordingDevice]:
    program, device = CountingProgram(), RecordingDevice()
    device.persistent = lambda: [program.memory]
    graphs = GraphRunner(
        program,  # type: ignore[arg-type]  # stands in for a StepProgram
        BUCKETS,
        max_num_seqs=16,
        **{"device": device, **options},
    )
    return graphs, program, device


def batch(*query_lens: int, num_pairs: int | None = None) -> ScheduledBatch:
    params = SamplingParams(temperature=0.0)
    sequence = SequenceGroup("r", [1], params=params, seed=0, max_total_tokens=9).sequences[0]
    rows = [ScheduledRow(sequence, slot, length) for slot, length in enumerate(query_lens)]
    count = len(rows) if num_pairs is None else num_pairs
    pairs = [SamplePair(0, sequence, slot, 1) for slot in range(count)]
    num_decode_rows = sum(length == 1 for length in query_lens)
    return ScheduledBatch(1, rows=rows, pairs=pairs, num_decode_rows=num_decode_rows)


def decode_key(graphs: GraphRunner, size: int, kind: SamplerKind = SamplerKind.GREEDY) -> GraphKey:
    return graphs.step_key(graphs.decode_shape(size), kind)


def capture_pending(graphs: GraphRunner) -> None:
    while graphs.has_captures_due:
        graphs.capture_slice()


@pytest.mark.parametrize(("num_rows", "size"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (16, 16)])
def test_decode_step_runs_at_the_next_size(num_rows: int, size: int) -> None:
    graphs, _, _ = make()
    shape = graphs.shape_of(batch(*[1] * num_rows))
    assert shape == StepShape(AttentionBucket(size, size, size), size)
    assert shape.bucket.is_decode


@pytest.mark.parametrize(("query_lens", "size"), [((2,), 8), ((1, 8), 16), ((60,), 64), ((1, 1, 70), 72)])
def test_step_with_a_prompt_runs_at_the_next_token_size(query_lens: tuple[int, ...], size: int) -> None:
    graphs, _, _ = make()
    shape = graphs.shape_of(batch(*query_lens))
    assert shape == StepShape(AttentionBucket(size, 16, 0), 16), "rows and pairs are those of any step"
    assert not shape.bucket.is_decode


def test_steps_with_prompts_of_a_foreign_module_run_at_their_own_sizes_and_are_never_captured() -> None:
    graphs, _, _ = make(is_foreign=True)
    assert graphs.shape_of(batch(1, 1, 5)) == StepShape(AttentionBucket(7, 3, 2), 3)
    graphs.run(graphs.step_key(graphs.mixed_shape(8), SamplerKind.GENERAL))
    assert graphs.num_misses == 1 and not graphs.has_captures_due
    assert graphs.shape_of(batch(1, 1, 1)).bucket.is_decode
    graphs.run(decode_key(graphs, 4))
    capture_pending(graphs)
    graphs.run(decode_key(graphs, 4))
    assert graphs.num_replays == 1
    graphs.capture_all()
    shapes = [key.shape for key in graphs.default_keys()]
    assert graphs.num_captured == len(shapes) and all(shape.bucket.is_decode for shape in shapes if shape)


def test_memory_that_a_capture_takes_between_its_slices_is_counted() -> None:
    graphs, _, device = make(is_foreign=True)
    graphs.run(decode_key(graphs, 4))
    graphs.capture_slice()
    device.total_bytes -= 2 * 700  # half of what is there is free
    capture_pending(graphs)
    assert graphs.num_bytes == GRAPH_BYTES + 700


def test_more_pairs_than_rows_take_the_size_of_the_pairs() -> None:
    graphs, _, _ = make()
    assert graphs.shape_of(batch(1, num_pairs=3)).num_pairs == 4


def test_without_graphs_a_step_runs_at_its_own_size() -> None:
    graphs, _, _ = make(device=None)
    assert graphs.shape_of(batch(1, 1, 5)) == StepShape(AttentionBucket(7, 3, 2), 3)
    graphs.run(graphs.step_key(graphs.shape_of(batch(1, 1, 5)), SamplerKind.GREEDY))
    assert graphs.num_misses == 0 and not graphs.has_captures_due


def test_step_above_every_size_runs_at_its_own_and_is_a_miss_that_nobody_captures() -> None:
    buckets = StepBuckets.choose(max_num_seqs=16, max_num_batched_tokens=128, decode_sizes=[1, 2])
    program, device = CountingProgram(), RecordingDevice()
    graphs = GraphRunner(program, buckets, max_num_seqs=16, device=device)  # type: ignore[arg-type]
    shape = graphs.shape_of(batch(1, 1, 1))
    assert shape.bucket.num_tokens == 8, "a token size still holds it"
    big = StepShape(AttentionBucket(500, 3, 0), 3)
    graphs.run(GraphKey(big, SamplerKind.GREEDY))
    assert graphs.num_misses == 1 and not graphs.has_captures_due


def test_first_step_of_a_size_is_a_miss_and_the_next_a_replay() -> None:
    graphs, program, _ = make()
    key = decode_key(graphs, 4)
    graphs.run(key)
    assert (graphs.num_misses, graphs.num_replays, graphs.num_wanted) == (1, 0, 1)
    assert program.memory[0] == 103.0
    capture_pending(graphs)
    assert program.memory[0] == 103.0, "a capture does nothing"
    assert graphs.num_captured == 1 and not graphs.has_captures_due
    num_calls = len(program.work)
    graphs.run(key)
    assert (graphs.num_misses, graphs.num_replays) == (1, 1)
    assert program.memory[0] == 206.0, "one replay is the whole step, its sample included"
    assert len(program.work) == num_calls, "no Python of the step runs in a replay"


def test_capture_is_done_in_slices_between_which_other_steps_run() -> None:
    graphs, program, device = make()
    graphs.run(decode_key(graphs, 2))
    graphs.capture_slice()
    assert graphs.has_captures_due and not device.is_capturing
    before = float(program.memory[0])
    graphs.run(decode_key(graphs, 8))  # a step between two slices is done, not recorded
    assert float(program.memory[0]) == before + 103.0
    capture_pending(graphs)
    assert graphs.num_captured == 2
    assert [len(graph.operations) for graph in device.graphs_made] == [4, 4]


def test_what_traffic_wants_most_is_captured_first() -> None:
    graphs, _, _ = make()
    for size, times in ((1, 1), (8, 3), (4, 2)):
        for _ in range(times):
            graphs.run(decode_key(graphs, size))
    order = []
    while graphs.has_captures_due:
        before = set(graphs._graphs)
        graphs.capture_slice()
        order += [key.shape.num_pairs for key in set(graphs._graphs) - before if key.shape]
    assert order == [8, 4, 1]


def test_size_that_cannot_be_captured_stays_eager_and_harms_no_other() -> None:
    graphs, program, _ = make()
    bad, good = decode_key(graphs, 4), decode_key(graphs, 2)
    graphs.run(bad)
    graphs.run(good)
    program.fails_in = bad.shape
    capture_pending(graphs)
    assert graphs.num_captured == 1
    program.fails_in = None
    graphs.run(bad)
    assert not graphs.has_captures_due, "it is not tried again and again"
    graphs.run(good)
    assert graphs.num_replays == 1


def test_captures_end_when_the_memory_set_aside_is_used_up() -> None:
    graphs, _, _ = make(max_bytes=2 * GRAPH_BYTES)
    for size in (1, 2, 4, 8):
        graphs.run(decode_key(graphs, size))
    capture_pending(graphs)
    assert graphs.num_captured == 2
    assert graphs.num_bytes == 2 * GRAPH_BYTES
    graphs.run(decode_key(graphs, 16))
    capture_pending(graphs)
    assert graphs.num_captured == 2


def test_mixed_steps_share_one_graph_a_size_whatever_they_sample() -> None:
    graphs, _, _ = make()
    shape = graphs.mixed_shape(32)
    assert graphs.step_key(shape, SamplerKind.GREEDY) == graphs.step_key(shape, SamplerKind.GENERAL)
    decode = graphs.decode_shape(4)
    assert graphs.step_key(decode, SamplerKind.GREEDY) != graphs.step_key(decode, SamplerKind.GENERAL)


def test_sampler_that_stands_alone_has_graphs_of_its_own() -> None:
    graphs, program, _ = make()
    assert graphs.num_subset_pairs(3) == 4
    key = GraphKey(None, SamplerKind.GENERAL, num_subset_pairs=4, is_masked=True)
    graphs.run(key)
    capture_pending(graphs)
    graphs.run(key)
    assert program.memory[0] == 20_000.0
    assert program.work == [("subset", 4, SamplerKind.GENERAL, True)] * 2, "once eager, once captured"


def test_capture_all_takes_every_size_largest_first() -> None:
    graphs, _, device = make()
    graphs.capture_all()
    keys = list(graphs._graphs)
    assert len(keys) == 2 * len(BUCKETS.decode_sizes) + len(BUCKETS.token_sizes) == len(device.graphs_made)
    sizes = [key.shape.bucket.num_tokens for key in keys if key.shape and key.shape.bucket.is_decode]
    assert sizes == sorted(sizes, reverse=True)
    for query_lens in ((1,), (1, 1, 1), (5, 1), (128,)):
        graphs.run(graphs.step_key(graphs.shape_of(batch(*query_lens)), SamplerKind.GENERAL))
    assert graphs.num_misses == 0


def test_price_of_all_graphs_comes_from_the_largest() -> None:
    graphs, _, _ = make()
    assert graphs.measure_bytes() == GRAPH_BYTES * len(graphs.default_keys())
    assert graphs.num_captured == 2


def test_forced_eager_runs_the_same_padded_step_without_its_graph() -> None:
    graphs, program, _ = make()
    key = decode_key(graphs, 4)
    graphs.run(key)
    capture_pending(graphs)
    graphs.force_eager = True
    num_calls = len(program.work)
    graphs.run(key)
    assert len(program.work) == num_calls + 4 and graphs.num_replays == 0


@pytest.mark.parametrize(
    "work", [lambda memory: memory + 1.0, lambda memory: memory[0].item()], ids=["allocation", "host read"]
)
def test_recording_device_refuses_what_a_card_would(work: Callable[[torch.Tensor], Any]) -> None:
    memory = torch.ones(3)
    capture = RecordingDevice().begin_capture()
    with pytest.raises(CaptureError), capture.slice():
        work(memory)


def test_recording_device_sees_a_stale_address() -> None:
    device, memory = RecordingDevice(), torch.ones(3)
    capture = device.begin_capture()
    with capture.slice():
        memory.add_(1.0)
    graph = capture.end()
    device.persistent = lambda: [memory]
    graph.replay()
    assert memory[0] == 2.0
    device.persistent = lambda: [torch.ones(3)]
    with pytest.raises(AssertionError, match="nobody's any more"):
        graph.replay()


def test_only_captures_that_may_allocate_do_and_replays_fill_their_memory_again() -> None:
    device, memory = RecordingDevice(), torch.ones(3)
    device.persistent = lambda: [memory]
    capture = device.begin_capture(may_allocate=True)
    with capture.slice():
        memory.copy_(memory * 2)
    graph = capture.end()
    assert memory.tolist() == [1, 1, 1]
    for expected in (2.0, 4.0):
        with device.on_stream():
            graph.replay()
        assert memory.tolist() == [expected] * 3
    with pytest.raises(CaptureError, match="allocates"), device.begin_capture().slice():
        memory.copy_(memory * 2)
