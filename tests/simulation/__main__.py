"""`python -m tests.simulation --seed N --steps M` runs worlds from a seed on and reports what happened."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from tests.simulation.episodes import simulate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first world; the next ones count up")
    parser.add_argument("--steps", type=int, default=100_000)
    arguments = parser.parse_args()
    outcome = simulate(arguments.seed, arguments.steps)
    print(f"{outcome.num_steps} steps, {outcome.num_steps / outcome.seconds:.0f} a CPU second")
    print(f"{outcome.num_requests} requests, the first waited {outcome.longest_wait} steps at most")
    print(f"{outcome.num_constrained_tokens} constrained tokens, {outcome.num_overtakers} overtakers")
    print({**asdict(outcome.counters), "num_evicted_blocks": outcome.num_evicted_blocks})


if __name__ == "__main__":
    main()
