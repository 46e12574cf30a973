"""Whether a module that is not ours may run inside a captured graph, found out without capturing it.

A graph does again what was recorded, with what lies in the same places. So a module's steps must be the same
operations with the same Python numbers whatever the values are, must not read a value on the host, must not
copy between host and device, and must not keep tensors of a step for the next. All that shows in the
operations that torch dispatches, on any device. Memory that a module allocates is no obstacle: within a
capture it comes from the graphs' own pool.

Owns what is looked for. Knows no module, and captures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[torch.Tensor, torch.Tensor], object]
"""One step of a module, from token ids and positions, [num_tokens] int64 each."""

_NUM_TOKENS = 4
_READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_UNTAGGED_READS = {"aten.is_nonzero.default", "aten.where.default"}  # the latter of a condition alone
_INDEXING = ("aten.index.", "aten.index_put", "aten._index_put")


class _Obstacle(Exception):
    """Why a step cannot be captured."""


@dataclass(slots=True)
class _Trace:
    """A step's operations, and the memory it allocated, held so that no address is given out again."""

    operations: list[str] = field(default_factory=list)
    allocated: dict[int, torch.UntypedStorage] = field(default_factory=dict)


class _Tracing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes a step's operations down. Raises _Obstacle at one that no graph can hold.

    before: the trace of the step before, whose memory must not be met again.
    """

    def __init__(self, trace: _Trace, *, before: _Trace | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace = trace
        self._before = {} if before is None else before.allocated

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        given = list(_tensors_in((args, kwargs)))
        if _reads_values(func, name, args):
            raise _Obstacle(f"it reads values of the device ({name})")
        if torch.Tag.nondeterministic_seeded in func.tags and not _is_idle_dropout(func, args):
            raise _Obstacle(f"it draws random numbers ({name})")
        if any(tensor.untyped_storage()._cdata in self._before for tensor in given):
            raise _Obstacle(f"it keeps tensors from one step to the next ({name})")
        self._trace.operations.append(f"{name}({', '.join(_described((args, kwargs)))})")
        made = func(*args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in given}
        for tensor in _tensors_in(made):
            if "copy" in name and any(tensor.device != other.device for other in given):
                raise _Obstacle(f"it copies between host and device ({name})")
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self._trace.allocated[storage._cdata] = storage
        return made


def find_obstacle(step: Step, *, vocab_size: int, device: torch.device) -> str | None:
    """What keeps `step` out of graphs, None where nothing was found.

    Runs the step three times, with attention that reads no step (see `transformers_attention.py`). The first
    may build what later ones only read: every capture has a step of its size before it, too.
    """
    tokens = torch.arange(_NUM_TOKENS, device=device)
    values = [(tokens % vocab_size, tokens), ((3 * tokens + 1) % vocab_size, tokens.flip(0) + 5)]
    traces: list[_Trace] = []
    try:
        with torch.inference_mode():
            step(*values[0])
            for token_ids, positions in values:
                trace = _Trace()
                with _Tracing(trace, before=traces[-1] if traces else None):
                    step(token_ids, positions)
                traces.append(trace)
    except _Obstacle as obstacle:
        return str(obstacle)
    first, second = (trace.operations for trace in traces)
    for one, other in zip(first, second, strict=False):
        if one != other:
            return f"what it does depends on the values ({one}, then {other})"
    return None if len(first) == len(second) else "what it does depends on the values"


def _reads_values(func: Any, name: str, args: tuple[Any, ...]) -> bool:
    """Whether an operation's host part looks at a tensor: to return a number, or to know a size."""
    if name.startswith(_INDEXING):  # by a mask, whose trues have to be counted first
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors_in(args[1]))
    return name in _UNTAGGED_READS or any(tag in func.tags for tag in _READS)


def _is_idle_dropout(func: Any, args: tuple[Any, ...]) -> bool:
    return func is torch.ops.aten.dropout.default and not args[2]


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))


def _described(value: Any) -> Iterator[str]:
    """Arguments without addresses: of a tensor its form, of everything else what it is."""
    if isinstance(value, torch.Tensor):
        yield f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _described(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (f"{key}={text}" for text in _described(item))
    else:
        yield repr(value)
