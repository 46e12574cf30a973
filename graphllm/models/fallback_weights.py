"""How a module of transformers is filled from a checkpoint whose tensors are called or cut otherwise.

Since its fifth version transformers keeps the experts of a layer in one tensor, and has tables that say which
tensors of a published file are its parts. Owns the use of those tables, and that every tensor is accounted
for by name and shape before memory is taken: what a table does is tried on tensors without memory first.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from graphllm.errors import CheckpointError
from graphllm.models.checkpoint import Checkpoint

_MAX_NAMES_SHOWN = 3
# Frequencies that older versions of transformers stored with the weights; they follow from the configuration.
_STORED_FREQUENCIES = re.compile(r".*rotary_emb\.inv_freq")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class WeightPart:
    """Tensors of a checkpoint that fill one place of a module, or, where one is cut, some.

    target: the (first) place's name. converter: transformers' way from the one to the other, None where the
    tensor is taken as it is. sources: the checkpoint's names by the converter's pattern, in natural order.
    """

    target: str
    converter: Any
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]

    def converted(self, read: Callable[[str], torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor]:
        """The module's tensors by name, of what `read` gives. Raises whatever a conversion trips over."""
        if self.converter is None:
            return {self.target: read(self.names[0])}
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.target, name, pattern, partial(read, name))
        made = converter.convert(self.target, model=module, config=module.config)
        return {name: made[name][0] if isinstance(made[name], list) else made[name] for name in made}


def match_weights(module: nn.Module, checkpoint: Checkpoint) -> list[WeightPart]:
    """What fills each place of `module`, which may be without memory.

    Raises CheckpointError for tensors that are missing, left over, meant twice or of another shape, by name.
    """
    state = module.state_dict(keep_vars=True)
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    parts: dict[str, WeightPart] = {}
    left_over = []
    find = _Finder(module, state)
    for name in sorted(checkpoint.tensor_names(), key=_natural_order):
        if _STORED_FREQUENCIES.fullmatch(name):
            continue
        target, pattern, converter = find(name)
        if target in state:
            part = parts.setdefault(target, WeightPart(target, converter))
            if part.converter is not converter or (converter is None and part.sources):
                raise CheckpointError(f"{checkpoint.path}: {_listed([*part.names, name])} both {target!r}.")
            part.sources.setdefault(pattern, []).append(name)
        elif not any(re.search(known, name) for known in ignored):
            left_over.append(name)
    if left_over:
        raise CheckpointError(f"{checkpoint.path}: {_listed(left_over)} not used by {type(module).__name__}.")
    filled: set[int] = set()  # tied weights need one name only
    for part in parts.values():
        filled |= {id(state[name]) for name in _check_shapes(part, module, state, checkpoint=checkpoint)}
    if missing := [name for name, place in state.items() if id(place) not in filled]:
        raise CheckpointError(f"{checkpoint.path}: {_listed(missing)} missing.")
    return [*parts.values()]


def load_weights(
    module: nn.Module, parts: Sequence[WeightPart], checkpoint: Checkpoint
) -> Iterator[WeightPart]:
    """Fill `module` as `match_weights` found; yields behind each part."""
    state = module.state_dict(keep_vars=True)
    for part in parts:
        read = partial(_read, checkpoint, is_float=state[part.target].is_floating_point())
        with torch.no_grad():
            for name, tensor in part.converted(read, module).items():
                state[name].copy_(tensor)
        yield part


class _Finder:
    """Which place a tensor of the checkpoint belongs to, by transformers' tables."""

    def __init__(self, module: Any, state: dict[str, Any]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key

        table = get_model_conversion_mapping(module)
        self._rename = rename_source_key
        self._converters = [entry for entry in table if isinstance(entry, WeightConverter)]
        self._renamings = [entry for entry in table if not isinstance(entry, WeightConverter)]
        self._by_pattern = {
            pattern: converter for converter in self._converters for pattern in converter.source_patterns
        }
        self._prefix, self._state = module.base_model_prefix, state

    def __call__(self, name: str) -> tuple[str, str, Any]:
        """The place, and the pattern of the converter behind it: the name itself, and None, without one."""
        target, pattern = self._rename(name, self._renamings, self._converters, self._prefix, self._state)
        if target not in self._state and name in self._state:  # a pattern that was meant for others
            target, pattern = name, None
        return (target, name, None) if pattern is None else (target, pattern, self._by_pattern[pattern])


def _check_shapes(
    part: WeightPart, module: nn.Module, state: dict[str, Any], *, checkpoint: Checkpoint
) -> list[str]:
    """The places that `part` fills. Raises CheckpointError where they are of another shape, or where one of
    numbered parts is left out.
    """
    for pattern, names in part.sources.items():
        if part.converter is not None and "*" in pattern and (missing := _gap(names)) is not None:
            raise CheckpointError(f"{checkpoint.path}: tensor {missing!r} is missing.")

    def outline(name: str) -> torch.Tensor:
        return torch.empty(checkpoint.tensor_shape(name), device="meta")

    try:
        made = part.converted(outline, module)
    except Exception as error:  # a table's code may fail in any way with tensors that it is not made for
        raise CheckpointError(
            f"{checkpoint.path}: {_listed(part.names)} no {part.target!r}: {' '.join(str(error).split())}."
        ) from error
    for name, tensor in made.items():
        if name not in state:
            raise CheckpointError(
                f"{checkpoint.path}: {_listed(part.names)} not used by {type(module).__name__}."
            )
        if tensor.shape != state[name].shape:
            found, wanted = [*tensor.shape], [*state[name].shape]
            if part.converter is None:
                what = f"tensor {part.names[0]!r} has shape {found}"
            else:
                what = f"{_listed(part.names)} {name!r} with shape {found}"
            raise CheckpointError(f"{checkpoint.path}: {what}; the configuration asks for {wanted}.")
    return [*made]


def _gap(names: Sequence[str]) -> str | None:
    """The first name that is missing among names which differ in one number, counted from 0."""
    numbers = [[int(number) for number in _NUMBER.findall(name)] for name in names]
    for column in range(len(numbers[0])):
        values = [row[column] for row in numbers]
        if len(set(values)) == 1 < len(values):
            continue
        for expected, value in enumerate(values):
            if value != expected and len(values) > 1:
                places = [*_NUMBER.finditer(names[0])]
                start, end = places[column].span()
                return f"{names[0][:start]}{expected}{names[0][end:]}"
    return None


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read(checkpoint: Checkpoint, name: str, *, is_float: bool) -> torch.Tensor:
    tensor = checkpoint.tensor(name)
    if tensor.is_floating_point() != is_float:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} holds {str(tensor.dtype).removeprefix('torch.')}, which the "
            "module does not take."
        )
    return tensor


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MAX_NAMES_SHOWN])
    more = len(names) - _MAX_NAMES_SHOWN
    return (
        f"tensors {shown}{f' and {more} more' if more > 0 else ''} are"
        if len(names) > 1
        else f"tensor {shown} is"
    )
