"""One thread beside the event loop, for compilations that would hold every stream up.

Owns the thread, which begins with the first long compilation and ends with `close`. The library lets go of
the interpreter lock while it compiles. What is compiled, and whether that takes long, is `compiler.py`'s to
know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class CompilationWorker:
    """Does one piece of work after the other, in the order in which they came."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None

    def run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """What `work` returns or raises, as a future of the running loop. `work` must not need the loop."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")
        return asyncio.wrap_future(self._executor.submit(work))

    def close(self) -> None:
        """Cancel what has not begun; what has begun ends by itself. Closing again does nothing."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None
