"""Which scheme each linear layer of a model has.

Owns the way from a module to its path in the model ("layers.3.attention.qkv"), not the choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from graphllm.quant.scheme import ExpertScheme


@dataclass(frozen=True, slots=True)
class SchemeSource:
    """The schemes of a model, seen from one of its modules.

    plain: of what must not be rounded, routers and tied heads. choose: a layer's path in the model to its
    scheme. path: the module's, with a dot at the end.
    """

    plain: ExpertScheme
    choose: Callable[[str], ExpertScheme]
    path: str = ""

    def within(self, name: str) -> SchemeSource:
        """The same, seen from a module inside this one."""
        return replace(self, path=f"{self.path}{name}.")

    def at(self, name: str) -> ExpertScheme:
        """The scheme of this module's layer `name`."""
        return self.choose(self.path + name)


def one_scheme(scheme: ExpertScheme) -> SchemeSource:
    """The same for every layer."""
    return SchemeSource(scheme, lambda path: scheme)
