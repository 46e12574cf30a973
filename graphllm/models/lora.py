"""A LoRA adapter's folder, as peft writes it, and its way into an adapter's memory.

Everything that can be wrong is found and refused before memory is filled, but for numbers that are none.
Owns the accounting of tensors; what the configuration means is `adapter_config.py`'s, what layers are called
`adapter_names.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NoReturn

import torch

from graphllm.errors import CheckpointError
from graphllm.layers.lora import AdapterLayout
from graphllm.models.adapter_config import read_lora_config
from graphllm.models.adapter_file import AdapterFile
from graphllm.models.adapter_names import AdapterNames, AdapterTarget

WEIGHTS_FILE = "adapter_model.safetensors"
_OTHER_WEIGHTS_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True, slots=True)
class _Pair:
    """A layer's two tensors, by name, and what they are worth."""

    target: AdapterTarget
    down: str
    up: str
    rank: int
    scale: float


class AdapterFolder:
    """An opened adapter; its tensors are still to be checked against the model, and read.

    Raises CheckpointError, naming the file, and the tensor or key at fault.
    """

    def __init__(self, path: Path, names: AdapterNames, *, max_rank: int) -> None:
        try:
            if not path.is_dir():
                raise CheckpointError(f"{path}: {'is not a folder' if path.exists() else 'no such folder'}.")
            self._config = read_lora_config(path)
            self._file = _open_weights(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error}.") from error
        self._names = names
        self._max_rank = max_rank
        self.rank = 0
        """The largest, once `read_in_slices` has looked."""

    def read_in_slices(self, image: torch.Tensor, layout: AdapterLayout) -> Iterator[None]:
        """Check all layers, then fill an adapter's memory, image: [layout.num_bytes] uint8, layer by layer.

        Raises CheckpointError for what does not fit the model, for numbers that are none, or too large for
        the model's number format, and for a file that was written to since it was opened.
        """
        pairs_of: dict[str, list[_Pair]] = {}
        for pair in (yield from self._find_pairs()):
            pairs_of.setdefault(pair.target.path, []).append(pair)
        try:
            yield from self._fill(image, layout, pairs_of)
        except OSError as error:
            self._refuse(f"it cannot be read: {error}")

    def _fill(
        self, image: torch.Tensor, layout: AdapterLayout, pairs_of: Mapping[str, list[_Pair]]
    ) -> Iterator[None]:
        with self._file.opened() as file:
            for path in layout.places:
                views = layout.views(image[None], path)
                for whole in (views.down, views.up, views.scales):
                    whole.zero_()
                for pair in pairs_of.get(path, ()):
                    target, rank = pair.target, pair.rank
                    down, up = (self._read(file, name, dtype=layout.dtype) for name in (pair.down, pair.up))
                    views.up[0, target.start : target.end, :rank] = up
                    for part in target.parts:
                        views.down[0, part, :rank] = down
                        views.scales[0, part] = pair.scale
                yield

    def _find_pairs(self) -> Generator[None, None, list[_Pair]]:
        tensors: dict[str, dict[str, str]] = {}
        for name in self._file.shapes:
            match = _TENSOR.fullmatch(name.removeprefix(_PREFIX))
            if match is None:
                self._refuse(f"tensor {name!r} is not of a plain LoRA layer (lora_A.weight, lora_B.weight)")
            sides = tensors.setdefault(match["layer"], {})
            if match["side"] in sides:
                self._refuse(f"tensor {name!r} is there twice")
            sides[match["side"]] = name
        pairs = []
        for layer, sides in tensors.items():
            pairs.append(self._pair(layer, sides))
            yield
        self._check_targets(pairs)
        self.rank = max(pair.rank for pair in pairs)
        if self.rank > self._max_rank:
            raise CheckpointError(
                f"{self._config.path}: the adapter's rank, {self.rank}, is above "
                f"--max-lora-rank {self._max_rank}."
            )
        return pairs

    def _pair(self, layer: str, sides: dict[str, str]) -> _Pair:
        if missing := {"A", "B"} - sides.keys():
            self._refuse(f"layer {layer!r} has no lora_{missing.pop()}")
        target = self._names.targets.get(layer)
        if target is None:
            self._refuse(f"it changes {layer!r}, {self._names.refusal(layer)}")
        if not self._config.is_target(layer):
            self._refuse(f"it has tensors of {layer!r}, which its 'target_modules' does not name")
        rank = self._config.rank_of(layer)
        for name, shape in (
            (sides["A"], (rank, target.in_features)),
            (sides["B"], (target.end - target.start, rank)),
        ):
            if (found := self._file.shapes[name]) != shape:
                self._refuse(f"tensor {name!r} has shape {list(found)}; model and rank ask for {list(shape)}")
        return _Pair(target, sides["A"], sides["B"], rank, self._config.scale_of(layer))

    def _check_targets(self, pairs: list[_Pair]) -> None:
        """Refuse layers that are there twice under two names, or not at all."""
        rows = [(pair.target.path, part) for pair in pairs for part in pair.target.parts]
        if len(rows) > len(set(rows)):
            self._refuse("it changes a layer twice, under two names")
        if self._config.targets is None or self._config.is_partial:
            return
        found = {pair.target.name for pair in pairs}
        wanted = {target.name for name, target in self._names.targets.items() if self._config.is_target(name)}
        if missing := sorted(wanted - found):
            self._refuse(f"it has no tensors of {missing[0]!r}, though 'target_modules' means that layer too")

    def _read(self, file: BufferedReader, name: str, *, dtype: torch.dtype) -> torch.Tensor:
        tensor = self._file.read(file, name).to(dtype)
        if not bool(torch.isfinite(tensor).all()):
            self._refuse(
                f"tensor {name!r} has values that are no numbers in {str(dtype).removeprefix('torch.')}"
            )
        return tensor

    def _refuse(self, reason: str) -> NoReturn:
        self._file.refuse(reason)


def _open_weights(path: Path) -> AdapterFile:
    file = path / WEIGHTS_FILE
    others = [name for name in _OTHER_WEIGHTS_FILES if (path / name).exists()]
    if others and not file.exists():
        raise CheckpointError(
            f"{path}: it has weights only as {others[0]}; convert them to safetensors ({WEIGHTS_FILE})."
        )
    return AdapterFile(file)
