"""An estimate of what compiling will cost, and what is compiled may grow to, made before it is done.

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
# Never a reason to refuse, because the library's own limits hold, but a reason to compile beside the loop.
LITERAL_BYTES = 16  # so many bytes of constants a unit
GRAMMAR_DEFINITION = 10
SET_OPERATION = 50
MANY_STATES = 300
START_MARKER = 100

LARGE_COUNT = 64
"""A repetition, or a length, from which on the library may find any number of states while it is used."""

_BASE_BYTES = 262_144
_BYTES_OF_UNIT = 4_096
_BYTES_OF_MANY_STATES = 16_777_216
WALKED_SCHEMAS = 16  # so many schemas looked at, where several may apply to one value, a unit


class WorkBudget:
    """What one request's compilation may still cost.

    spent: what counts towards the limit. expected: that, and work which the library bounds itself. Both in
    units of 10 microseconds.
    """

    __slots__ = ("_has_many_states", "_limit", "expected", "spent")

    def __init__(self, limits: GrammarLimits) -> None:
        self._limit = limits.max_compile_cost
        self._has_many_states = False
        self.spent = 0
        self.expected = 0

    def spend(self, cost: int) -> None:
        """cost: in units of 10 microseconds. Raises InvalidRequestError once there is no more."""
        self.spent += cost
        self.expected += cost
        if self.spent > self._limit:
            raise grammar_error(
                "the schema or grammar is too large to be compiled while other requests are served "
                f"(estimated at more than {self._limit / 100:g} ms); use fewer properties, branches, "
                "values or patterns, or split the request."
            )

    def expect(self, cost: int) -> None:
        """Work that takes its time and cannot get out of hand."""
        self.expected += cost

    def expect_many_states(self) -> None:
        """A part from which the library may make any number of states, up to its limit, while it is used."""
        if not self._has_many_states:
            self._has_many_states = True
            self.expected += MANY_STATES

    @property
    def expected_bytes(self) -> int:
        """What the compiled grammar may come to occupy, states found in use included.

        Measured: 0.2 MB on average and 2 MB at most for ordinary schemas, 16 MB for the worst pattern.
        """
        most = _BYTES_OF_MANY_STATES
        if self._has_many_states:
            return most
        return min(_BASE_BYTES + _BYTES_OF_UNIT * self.expected, most)
