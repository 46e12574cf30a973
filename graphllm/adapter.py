"""A LoRA adapter as requests, the scheduler and the device's copies know it.

Owns the handle and the count of requests that use it. What lies in its memory is `models/lora.py`'s, which
place of the device it has the scheduler's, and who may name it the engine's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Adapter:
    """One load of one adapter. Two loads are two adapters, whatever their names and contents are.

    created: when, in seconds since 1970. name: what requests call it. load_id: positive, of no other load in
    this process. path: where it was read. rank: its largest. image: its memory as the device gets it, on the
    host; None once it is retired and no request is left: `on_unused` is then given it.
    """

    __slots__ = (
        "_is_retired",
        "_on_unused",
        "created",
        "image",
        "load_id",
        "name",
        "num_requests",
        "path",
        "rank",
    )

    def __init__(
        self,
        name: str,
        *,
        load_id: int,
        path: str,
        rank: int,
        image: Any,
        on_unused: Callable[[Any], None] = lambda image: None,
    ) -> None:
        assert load_id > 0, "0 is the base model's"
        self.name = name
        self.load_id = load_id
        self.path = path
        self.rank = rank
        self.created = int(time.time())
        self.image = image
        self.num_requests = 0
        self._is_retired = False
        self._on_unused = on_unused

    @property
    def is_retired(self) -> bool:
        """Whether no further request may name it."""
        return self._is_retired

    def retain(self) -> None:
        """One request more uses it."""
        assert not self._is_retired, "nobody can name it any more"
        self.num_requests += 1

    def release(self) -> None:
        """A request that uses it has ended."""
        self.num_requests -= 1
        self._let_go()

    def retire(self) -> None:
        """No further request names it; its memory goes with the last one that does."""
        self._is_retired = True
        self._let_go()

    def _let_go(self) -> None:
        if self._is_retired and self.num_requests == 0:
            image, self.image = self.image, None
            self._on_unused(image)

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, load {self.load_id}, {self.num_requests} requests)"


@dataclass(frozen=True, slots=True)
class AdapterUpload:
    """Copy an adapter's memory to one of the device's places, beside the steps.

    No step waits for it: the scheduler uses the place when it is told that the copy has ended.
    """

    adapter: Adapter
    place: int
