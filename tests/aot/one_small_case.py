"""The one case of the small ones that keeps all rules."""

from tests.aot.small_cases import good

CASES = (good,)
