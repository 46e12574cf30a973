"""An estimate of what compiling will cost, made before it is done.

Owns the budget that the checks of schemas, patterns and grammars draw on, and what one part of each costs.
The numbers were fitted to measurements (`benchmarks/structured.py` prints both); they err on the dear side.
"""

from __future__ import annotations

from graphllm.structured.compiled import grammar_error
from graphllm.structured.limits import GrammarLimits

# In units of 10 microseconds of one core.
SUBSCHEMA = 6
NUMBER_RANGE = 8
LENGTH_RANGE = 2
FORMAT = 20
ENUM_VALUE = 1
ENUM_OBJECT = 16
BRANCH_PAIR = 4
COMBINATION = 8
MULTIPLE_OF_STATES = 3  # so many states of a divisor's automaton a unit
PATTERN = 4
PATTERN_CHARACTERS = 32  # so many characters of a pattern a unit
UNICODE_CLASS = 40
GRAMMAR_ELEMENT = 1


class WorkBudget:
    """What one request's compilation may still cost."""

    __slots__ = ("_limit", "spent")

    def __init__(self, limits: GrammarLimits) -> None:
        self._limit = limits.max_compile_cost
        self.spent = 0

    def spend(self, cost: int) -> None:
        """cost: in units of 10 microseconds. Raises InvalidRequestError once there is no more."""
        self.spent += cost
        if self.spent > self._limit:
            raise grammar_error(
                "the schema or grammar is too large to be compiled while other requests are served "
                f"(estimated at more than {self._limit / 100:g} ms); use fewer properties, branches, "
                "values or patterns, or split the request."
            )
