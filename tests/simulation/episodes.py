"""Runs worlds one after another until enough steps have been simulated, and says which seed failed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields

from graphllm.scheduler.kv_counters import KVCounters
from tests.simulation.world import World

STEPS_OF_A_WORLD = 2_000


class SimulationFailure(AssertionError):
    """A world broke; the message has the command that shows it again."""


@dataclass(slots=True)
class Outcome:
    """What was simulated: steps, requests, CPU seconds, the longest wait (steps), what happened to KV.

    num_constrained_tokens were sampled apart from their forward; num_overtakers counts requests that started
    before older ones of a lower priority.
    """

    num_steps: int = 0
    num_requests: int = 0
    seconds: float = 0.0
    longest_wait: int = 0
    num_evicted_blocks: int = 0
    num_passed_blocks: int = 0  # released behind windows
    num_constrained_tokens: int = 0
    num_overtakers: int = 0
    counters: KVCounters = field(default_factory=KVCounters)

    def add(self, world: World) -> None:
        self.num_steps += world.num_steps
        self.num_requests += world.num_requests
        self.longest_wait = max(self.longest_wait, world.longest_wait)
        self.num_evicted_blocks += world.manager.num_evicted_blocks
        self.num_passed_blocks += world.manager.num_passed_blocks
        self.num_constrained_tokens += world.num_constrained_tokens
        self.num_overtakers += world.num_overtakers
        for name in (each.name for each in fields(KVCounters)):
            total = getattr(self.counters, name) + getattr(world.scheduler.counters, name)
            setattr(self.counters, name, total)


def simulate(seed: int, num_steps: int, *, steps_of_a_world: int = STEPS_OF_A_WORLD) -> Outcome:
    """Worlds of the seeds `seed`, `seed` + 1, ... until `num_steps` steps. Raises SimulationFailure."""
    outcome = Outcome()
    started = time.process_time()
    while outcome.num_steps < num_steps:
        world = World(seed)
        planned = min(steps_of_a_world, num_steps - outcome.num_steps)
        try:
            world.run(planned)
        except Exception as error:
            raise SimulationFailure(
                f"seed {seed} failed at step {world.num_steps}: {error!r}\n"
                f"{world.configuration}\n"
                f"python -m tests.simulation --seed {seed} --steps {planned}"
            ) from error
        outcome.add(world)
        seed += 1
    outcome.seconds = time.process_time() - started
    return outcome
