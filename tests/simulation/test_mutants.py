"""The simulation finds what it is there for: each defect put into the real code breaks a world soon.

A mutant is one function with one line changed, compiled in its own module. Without a configuration of its
own its worlds are drawn at random.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass, replace
from typing import Any

import pytest

from graphllm.cache import prefix_hash
from graphllm.cache.block_layout import BlockLayout
from graphllm.cache.block_manager import BlockManager
from graphllm.cache.host_tier import HostTier
from graphllm.cache.prefix_hash import PrefixHasher
from graphllm.scheduler import prefix_sharing, queues, scheduler, step_builder, tiers, windows
from graphllm.scheduler.prefix_sharing import PrefixSharing
from graphllm.scheduler.scheduler import Scheduler
from graphllm.scheduler.slots import SlotAllocator
from graphllm.scheduler.step_builder import StepBuilder
from graphllm.scheduler.tiers import Tiers
from tests.simulation.episodes import STEPS_OF_A_WORLD, SimulationFailure, simulate
from tests.simulation.world import CROWD, STORM, WINDOWED_CROWD, WINDOWED_STORM, Configuration, World

MAX_WORLDS = 12
PRIORITIES = replace(CROWD, num_priorities=4)
CONSTRAINED = replace(CROWD, constrained_share=0.5)


@dataclass(frozen=True, slots=True)
class Mutant:
    """In `owner`'s function `name`, `old` becomes `new`. `without_checks`: the device alone finds it too."""

    owner: Any
    name: str
    old: str
    new: str
    configuration: Configuration | None = None
    without_checks: bool = False

    def function(self) -> Any:
        original = self.owner.__dict__[self.name]
        source = textwrap.dedent(inspect.getsource(original))
        assert source.count(self.old) == 1, (
            f"the line that the mutant changes occurs {source.count(self.old)} times"
        )
        namespace = dict(original.__globals__)
        exec("from __future__ import annotations\n" + source.replace(self.old, self.new), namespace)
        return namespace[self.name]


MUTANTS = {
    "blocks are free before the step that reads them has ended": Mutant(
        BlockManager, "release", "if self._fence > self._completed_step:", "if False:", without_checks=True
    ),
    "a shared block is written": Mutant(
        StepBuilder,
        "_grow",
        "copies = num_groups if num_written > 0 and manager.reference_count(table[first]) > 1 else 0",
        "copies = 0",
        without_checks=True,
    ),
    "a failed step's blocks stay published": Mutant(
        PrefixSharing,
        "_withdraw",
        "self._manager.withdraw(publication.block, publication.key)",
        "pass",
        configuration=STORM,
        without_checks=True,
    ),
    "readers of a failed step's blocks go on": Mutant(
        PrefixSharing,
        "withdraw",
        "return list(tainted)[num_failed:]",
        "return []",
        configuration=STORM,
        without_checks=True,
    ),
    "siblings of a reader go on": Mutant(
        PrefixSharing, "join", "if leader in readers:", "if False:", configuration=STORM, without_checks=True
    ),
    "device blocks are free before they are copied out": Mutant(
        Tiers, "swap_out", "manager.release(reversed(kept))", "manager.release(reversed(kept + sources))"
    ),
    "device blocks are used before they are filled": Mutant(
        queues, "has_arrived", "return sequence.transfer_id is None and", "return", without_checks=True
    ),
    "a failed copy out counts as one that succeeded": Mutant(
        Tiers,
        "completed",
        "if failed:\n        sequence.skips",
        "if False:\n        sequence.skips",
        without_checks=True,
        configuration=CROWD,
    ),
    "a failed offload is found": Mutant(
        Tiers, "completed", "if not failed:", "if True:", configuration=CROWD, without_checks=True
    ),
    "a finished sequence forgets its host blocks": Mutant(
        Scheduler, "_take_out", "self.tiers.drop_host_blocks(sequence)", "pass"
    ),
    "a hash forgets what came before": Mutant(
        PrefixHasher,
        "extend",
        "hashlib.sha256(parent + content",
        "hashlib.sha256(content",
        without_checks=True,
    ),
    "a generated block is published before its last token has KV": Mutant(
        PrefixSharing,
        "publish_confirmed",
        "(len(sequence.token_ids) - 1) //",
        "len(sequence.token_ids) //",
        configuration=CROWD,
        without_checks=True,
    ),
    "a dropped host block is still found": Mutant(
        HostTier, "_drop", "del self._block_of[content_hash]", "pass", without_checks=True
    ),
    "an evicted block is still found": Mutant(
        BlockManager, "allocate", "self._forget(block)", "pass", without_checks=True
    ),
    "slots are given out again too early": Mutant(
        SlotAllocator,
        "take",
        "self._generation += 1",
        "self._generation = 1",
        configuration=STORM,
        without_checks=True,
    ),
    "a recomputed prompt is scored from its row's beginning": Mutant(
        StepBuilder, "_add_span", "first - 1 - start", "0", configuration=CROWD, without_checks=True
    ),
    "scores follow the rows' old order": Mutant(
        StepBuilder, "finish", "replace(span, row=new_row[span.row])", "span", without_checks=True
    ),
    "only the first chunk of a prompt is scored": Mutant(
        StepBuilder,
        "_add_span",
        "sequence.num_unscored_tokens -= end - first",
        "sequence.num_unscored_tokens = 0",
        without_checks=True,
    ),
    "a new request queues behind those of lower priority": Mutant(
        queues,
        "_insert",
        "place(ordered[-1]) < place(sequence)",
        "True",
        configuration=PRIORITIES,
        without_checks=True,
    ),
    "constrained rows are sampled with their forward": Mutant(
        StepBuilder,
        "_add_pair",
        "held = sequence.constraint is not None",
        "held = False",
        configuration=CONSTRAINED,
        without_checks=True,
    ),
    "a preempted sequence forgets a token in flight": Mutant(
        Scheduler,
        "apply",
        "pair.generation != sequence.slot_generation",
        "pair.slot != sequence.slot",
        configuration=CONSTRAINED,
        without_checks=True,
    ),
    "a block is released that the next token sees": Mutant(
        BlockLayout,
        "first_column",
        "num_tokens - window + 1)",
        "num_tokens - window + 2)",
        configuration=WINDOWED_CROWD,
        without_checks=True,
    ),
    "what falls behind a window is kept": Mutant(
        windows,
        "release_behind_windows",
        "while entry >= 0 and",
        "while False and",
        configuration=WINDOWED_STORM,
    ),
    "blocks behind a window are free before the step that reads them has ended": Mutant(
        BlockManager,
        "release",
        "if self._fence > self._completed_step:",
        "if self._fence > self._completed_step and not passed:",
        configuration=WINDOWED_STORM,
        without_checks=True,
    ),
    "a prefix is found without its windows": Mutant(
        BlockLayout,
        "longest_prefix",
        "if missing is None:",
        "if True:",
        configuration=WINDOWED_STORM,
        without_checks=True,
    ),
    "a prefix is found by the first group alone": Mutant(
        PrefixSharing,
        "look_up",
        "min(map(len, runs))",
        "len(runs[0])",
        configuration=replace(WINDOWED_STORM, windows=(None, None)),
        without_checks=True,
    ),
    "groups find each other's blocks": Mutant(
        prefix_hash,
        "content_key",
        "bytes((group,)) if group else content_hash",
        "b''",
        configuration=WINDOWED_STORM,
        without_checks=True,
    ),
    "a swapped sequence leaves the blocks of one group behind": Mutant(
        Tiers,
        "swap_out",
        "if block != NULL_BLOCK:",
        "if block != NULL_BLOCK and index % 3:",
        configuration=WINDOWED_CROWD,
    ),
    "a swapped sequence finds another group's block": Mutant(
        Tiers,
        "swap_in",
        "content_key(sequence.block_hashes[column], group)",
        "content_key(sequence.block_hashes[column], 0)",
        configuration=WINDOWED_CROWD,
        without_checks=True,
    ),
    "only one group's part of a shared column is copied": Mutant(
        StepBuilder,
        "_grow",
        "copies = num_groups if",
        "copies = 1 if",
        configuration=WINDOWED_CROWD,
        without_checks=True,
    ),
    "newer requests overtake swapped ones": Mutant(
        Scheduler, "_admit", "swapped.group.place <= waiting.group.place", "False", configuration=CROWD
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_simulation_finds_the_mutant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _plant(MUTANTS[name], monkeypatch)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        _run_worlds(MUTANTS[name])


@pytest.mark.parametrize("name", [name for name, mutant in MUTANTS.items() if mutant.without_checks])
def test_device_finds_the_mutant_without_the_checker(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _plant(MUTANTS[name], monkeypatch)
    monkeypatch.setattr(Scheduler, "check", lambda self, full=True: None)
    with pytest.raises((AssertionError, KeyError, IndexError)):
        _run_worlds(MUTANTS[name])


def test_failing_seed_is_named_and_fails_again(monkeypatch: pytest.MonkeyPatch) -> None:
    _plant(MUTANTS["an evicted block is still found"], monkeypatch)
    with pytest.raises(SimulationFailure) as first:
        simulate(0, 20_000)
    command = re.search(r"python -m tests.simulation --seed (\d+) --steps (\d+)", str(first.value))
    assert command is not None
    with pytest.raises(SimulationFailure) as second:
        simulate(int(command[1]), int(command[2]))
    assert str(second.value) == str(first.value)


def _plant(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    function = mutant.function()
    monkeypatch.setattr(mutant.owner, mutant.name, function)
    # And where a function was imported by its name.
    for user in (scheduler, tiers, step_builder, prefix_sharing):
        if not inspect.isclass(mutant.owner) and hasattr(user, mutant.name):
            monkeypatch.setattr(user, mutant.name, function)


def _run_worlds(mutant: Mutant) -> None:
    for seed in range(MAX_WORLDS):
        world = World(seed, configuration=mutant.configuration)
        world.run(STEPS_OF_A_WORLD)
