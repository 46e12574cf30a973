"""What happened to KV memory, counted from the start: plain numbers for the metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class KVCounters:
    """Tokens and blocks; nothing here ever decreases.

    num_prefix_queries_tokens, num_prefix_hit_tokens: prompt tokens looked up in the prefix cache, and
    found there. num_preemptions counts swaps and recomputations; num_recomputed the latter, and swaps whose
    KV was lost.
    num_offloaded_blocks: cached contents copied down to the host tier; num_fetched_blocks: copied up
    again for a prompt. num_voided_sequences: those that had read what a failed step should have written.
    """

    num_preemptions: int = 0
    num_recomputed: int = 0
    num_prefix_queries_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_swapped_out_blocks: int = 0
    num_swapped_in_blocks: int = 0
    num_offloaded_blocks: int = 0
    num_fetched_blocks: int = 0
    num_voided_sequences: int = 0
