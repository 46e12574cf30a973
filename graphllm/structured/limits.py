"""How large a schema, pattern or grammar may be, and how much work one token of it may cost.

Owns the numbers and nothing else. What they protect is the event loop: short compilations and all masks run
on it, and the thread for longer ones is one; `docs/decisions/016` has the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarLimits:
    """Sizes are checked before anything is compiled; the last group is the library's own fuel.

    max_text_bytes: UTF-8 bytes of a schema, a grammar, or all choices together. max_depth: containers
    within containers in a schema, and parentheses within parentheses in patterns and grammars.
    max_compile_cost: an estimate in units of 10 microseconds of one core, summed over a request's parts
    (`work_budget.py`). max_enum_values: of all `enum` lists of a schema together, and of `choice`.
    max_literal_bytes: one constant or choice. max_regex_length: characters of one pattern. max_repeats: the
    bounds of `{n,m}` in a pattern or grammar, and their product where repetitions stand inside each other.
    max_loop_cost: the estimate up to which a grammar is compiled on the loop. max_waiting: long compilations
    that may be under way or waiting. min_marker_length: characters of a text of `starts_after`; shorter ones
    are part of too many tokens.
    max_cache_entries, max_cache_bytes: compiled grammars that are kept, and the memory that they may come to
    occupy as `work_budget.py` estimates it, since the library does not say: most are counted with about 1 MB
    and have 0.2, and the worst with 16 MB, which they have when all `max_lexer_states` states were found. So
    the cache has 128 MB at most, and grammars that requests in flight hold come on top.
    """

    max_text_bytes: int = 65_536
    max_depth: int = 48
    max_compile_cost: int = 2_000
    max_loop_cost: int = 200
    max_waiting: int = 64
    min_marker_length: int = 3
    max_enum_values: int = 1_000
    max_literal_bytes: int = 4_096
    max_regex_length: int = 2_048
    max_repeats: int = 10_000
    max_cache_entries: int = 64
    max_cache_bytes: int = 134_217_728

    max_items_in_row: int = 2_000
    max_ambiguous_items: int = 250
    max_ambiguous_step_items: int = 2_500
    initial_lexer_fuel: int = 60_000
    step_lexer_fuel: int = 40_000
    step_max_items: int = 100_000
    max_lexer_states: int = 16_000
    max_grammar_size: int = 50_000
