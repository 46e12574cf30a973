"""Adapters' places: who waits, who goes, and that no place is written while a step may read it.

The simulated device has places with contents. A copy spoils its place when it is launched and fills it when
it is completed; each step finds, when it ends, that every row's place holds the row's adapter.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from graphllm.adapter import Adapter, AdapterUpload
from graphllm.batch import ScheduledBatch
from graphllm.cache.host_tier import HostTier
from graphllm.scheduler.adapter_places import AdapterPlaces
from graphllm.sequence import SequenceGroup, SequenceStatus
from tests.scheduler.simulated_device import Simulation

SPOILED = -1


def adapters(count: int) -> list[Adapter]:
    return [Adapter(f"a{i}", load_id=i, path="", rank=8, image=object()) for i in range(1, count + 1)]


class AdapterSimulation(Simulation):
    """Requests with adapters, over `num_places` places."""

    def __init__(self, *, num_places: int, **values: Any) -> None:
        super().__init__(**values)
        self.places = AdapterPlaces(num_places)
        self.slots.adapters = self.places
        self.contents = [0] * num_places
        self.uploads: list[AdapterUpload] = []
        self.num_uploads = 0
        self._place_of_slot: dict[int, int] = {}
        self._reads: dict[int, list[tuple[int, int]]] = {}  # by step: places and loads

    def add_for(self, adapter: Adapter | None, prompt: list[int], **values: Any) -> SequenceGroup:
        group = self.add(prompt, **values)
        group.adapter = adapter
        if adapter is not None:
            adapter.retain()
        return group

    def launch(self) -> ScheduledBatch | None:
        batch = super().launch()
        if batch is not None:
            self._place_of_slot |= {install.slot: install.adapter_place for install in batch.installs}
            rows = [(self._place_of_slot[row.slot], row.sequence.group.adapter_load) for row in batch.rows]
            assert all((place >= 0) == (load > 0) for place, load in rows)
            assert batch.uses_adapters == any(load for _, load in rows)
            self._reads[batch.step_id] = [(place, load) for place, load in rows if load]
        return batch

    def launch_transfers(self) -> None:
        super().launch_transfers()
        for upload in self.scheduler.take_uploads():
            self.contents[upload.place] = SPOILED
            self.uploads.append(upload)
            self.num_uploads += 1

    def complete(self) -> None:
        step_id = self.device.queue[0].batch.step_id
        assert all(self.contents[place] == load for place, load in self._reads.pop(step_id))
        super().complete()

    def complete_transfers(self, *, fail: bool = False) -> int:
        uploads, self.uploads = self.uploads, []
        for upload in uploads:
            self.contents[upload.place] = upload.adapter.load_id
            self.scheduler.upload_completed(upload)
        return super().complete_transfers(fail=fail) + len(uploads)

    def status(self, group: SequenceGroup) -> SequenceStatus:
        return group.sequences[0].status


@pytest.mark.parametrize("seed", range(12))
def test_any_mixture_of_adapters_comes_to_its_end(seed: int) -> None:
    rng = random.Random(seed)
    simulation = AdapterSimulation(
        num_places=rng.choice([1, 2, 3]),
        num_blocks=rng.choice([15, 33]),
        host_tier=HostTier(num_swap_blocks=rng.choice([0, 40]), num_cache_blocks=0),
        enable_prefix_caching=rng.random() < 0.5,
        windows=rng.choice([(None,), (None, 6)]),
    )
    known = [None, *adapters(4)]
    for _ in range(30):
        prompt = [rng.randrange(90) for _ in range(rng.choice([1, 5, 14]))]
        n = rng.choice([1, 1, 1, 3])
        simulation.add_for(
            rng.choice(known), prompt, n=n, max_tokens=rng.choice([1, 9, 20]), priority=rng.choice([0, 0, 1])
        )
    simulation.run(rng=rng)
    simulation.assert_all_as_expected()
    simulation.assert_nothing_held()
    assert simulation.places.num_holders == 0


def test_a_place_is_not_written_before_the_last_step_that_reads_it_has_ended() -> None:
    simulation = AdapterSimulation(num_places=1)
    first, second = adapters(2)
    one = simulation.add_for(first, [1, 2], max_tokens=20)
    assert simulation.launch() is None, "its adapter is on its way"
    simulation.complete_transfers()
    simulation.launch()
    simulation.launch()
    simulation.scheduler.abort(one)
    simulation.add_for(second, [3])
    assert simulation.launch() is None and simulation.num_uploads == 1
    simulation.complete()
    assert simulation.launch() is None and simulation.num_uploads == 1, "one step may still read it"
    simulation.complete()
    assert simulation.launch() is None and simulation.num_uploads == 2
    simulation.run()


def test_the_base_model_and_other_adapters_overtake_one_that_waits() -> None:
    simulation = AdapterSimulation(num_places=1, depth=1)
    first, second = adapters(2)
    simulation.add_for(first, [1], max_tokens=40)
    simulation.launch()
    simulation.complete_transfers()
    simulation.launch()
    waiting = simulation.add_for(second, [2])
    base = simulation.add_for(None, [3])
    simulation.complete()
    simulation.launch()
    assert simulation.status(base) is SequenceStatus.RUNNING
    assert simulation.status(waiting) is SequenceStatus.WAITING


def test_an_adapter_in_constant_demand_gives_way_to_one_that_waits() -> None:
    """A new request for the first adapter at every step, and none of them overtakes the second's."""
    simulation = AdapterSimulation(num_places=1, depth=1, max_num_seqs=4)
    first, second = adapters(2)
    simulation.add_for(first, [1], max_tokens=10)
    simulation.launch()
    simulation.complete_transfers()
    waiting = None
    for step in range(40):
        if step == 3:
            waiting = simulation.add_for(second, [2], max_tokens=3)
        simulation.add_for(first, [1], max_tokens=10)
        if simulation.launch() is not None:
            simulation.complete()
        simulation.complete_transfers()
        if waiting is not None and waiting.is_finished:
            assert step <= 3 + 10 + 10, "what ran before it, and its own steps"
            simulation.run()
            return
    raise AssertionError("it never ran")


def test_a_swapped_sequence_does_not_start_when_its_adapter_has_gone_meanwhile() -> None:
    """Its blocks are being copied up, nobody holds the place, and somebody of better priority wants it."""
    tier = HostTier(num_swap_blocks=40, num_cache_blocks=0)
    simulation = AdapterSimulation(num_places=1, num_blocks=10, host_tier=tier)
    first, second = adapters(2)
    one, two = (simulation.add_for(first, [number], max_tokens=25) for number in (1, 2))
    while not one.is_finished:
        simulation.complete_transfers()
        if simulation.launch() is None and simulation.device.queue:
            simulation.complete()
    while simulation.device.queue:
        simulation.complete()
    assert simulation.launch() is None and simulation.device.transfers, "the second is being copied up"
    urgent = simulation.add_for(second, [3], max_tokens=3, priority=-1)
    assert simulation.launch() is None and simulation.uploads
    simulation.complete_transfers()
    batch = simulation.launch()
    assert batch is not None and [row.sequence.group for row in batch.rows] == [urgent]
    simulation.run()
    simulation.assert_all_as_expected()
    assert two.is_finished and simulation.num_uploads == 3


def test_the_adapter_used_longest_ago_makes_room() -> None:
    places = AdapterPlaces(2)
    first, second, third, fourth = adapters(4)

    def bring(adapter: Adapter) -> None:
        places.begin_round()
        assert not places.admit(adapter)
        for upload in places.take_uploads():
            places.upload_completed(upload)
        places.begin_round()
        assert places.admit(adapter)

    for adapter in (first, second):
        bring(adapter)
        places.release(places.take(adapter))
    places.release(places.take(first))
    bring(third)
    assert places.is_ready(first) and not places.is_ready(second)
    first.retire()  # nobody can ask for it any more
    places.release(places.take(third))
    bring(fourth)
    assert places.is_ready(third) and not places.is_ready(first)
    places.check(0)


def test_a_place_that_an_earlier_sequence_wants_is_not_taken_by_a_later_one() -> None:
    places = AdapterPlaces(1)
    first, second = adapters(2)
    places.begin_round()
    places.admit(first)
    for upload in places.take_uploads():
        places.upload_completed(upload)
    # The first waits for memory, say; the second comes after it, at every step.
    for _ in range(3):
        places.begin_round()
        assert places.admit(first) and not places.admit(second)
        assert not places.take_uploads()


def test_two_that_wait_claim_two_places_and_keep_their_claims() -> None:
    places = AdapterPlaces(2)
    first, second, third, fourth = adapters(4)
    for adapter in (first, second):
        places.begin_round()
        places.admit(adapter)
        for upload in places.take_uploads():
            places.upload_completed(upload)
        places.take(adapter)
    places.take(second)
    places.step_launched(1)
    for _ in range(2):
        places.begin_round()
        assert not places.admit(third)  # claims the first's, which has fewer holders
        assert places.admit(second) and not places.admit(first)
        assert not places.admit(fourth), "the other place is wanted"
    places.release(0)
    places.begin_round()
    assert not places.admit(third) and not places.take_uploads()
    places.step_completed(1)
    places.begin_round()
    assert not places.admit(third)
    assert [upload.place for upload in places.take_uploads()] == [0]
