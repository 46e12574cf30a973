"""Progress bars on standard error, for what takes seconds before the server is ready."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

tqdm.monitor_interval = 0  # its monitor is a thread


@contextmanager
def progress_bar(title: str, unit: str, *, show: bool) -> Iterator[Callable[[int, int], None]]:
    """A callback (done, total) that draws; it draws nothing unless `show`."""
    with tqdm(desc=title, unit=unit, disable=not show, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance
