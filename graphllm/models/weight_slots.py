"""Every place for a tensor in a decoder, under the tensor's name in a checkpoint.

Owns what lies between a module's slots and a checkpoint's tensors: names, layouts, and the way of packed
tensors into layers that need plain numbers. Reads nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
from torch import nn

from graphllm.kernels.linear import linear_ref
from graphllm.layers.embedding import LearnedPositions, TokenEmbedding
from graphllm.layers.loadable import LoadableModule, WeightSlot
from graphllm.layers.norm import Norm
from graphllm.models.decoder import Decoder
from graphllm.models.quantization import ModelQuantization
from graphllm.models.stored_names import StoredNames, without_numbers
from graphllm.quant.scheme import ExpertScheme, WeightForm
from graphllm.quant.unquantized import Unquantized


def slots_by_stored_name(
    model: Decoder, stored: StoredNames, *, quantization: ModelQuantization, within: str = ""
) -> dict[str, WeightSlot]:
    """Places of all parameters, by the names of their tensors in the checkpoint.

    within: only of modules whose path in the model begins so.

    Raises CheckpointError for sizes that cannot be stored as the checkpoint says.
    """
    slots: dict[str, WeightSlot] = {}
    for path, module in model.named_modules():
        if not isinstance(module, LoadableModule) or not path.startswith(within):
            continue
        is_plain = isinstance(getattr(module, "scheme", None), Unquantized | None)
        is_product = not isinstance(module, Norm | TokenEmbedding | LearnedPositions)
        own = module.whole_slots() if stored.is_whole(path) else module.weight_slots()
        for name, slot in own.items():
            part, tensor = _split(f"{path}.{name}", slot)
            layout = stored.family.layouts.get(without_numbers(part))
            place = slot if layout is None else layout(slot, model.config)
            full_name = stored.tensor(part, tensor)
            stored_module = full_name.removesuffix(".weight")
            form = None
            if is_plain and is_product and tensor == "weight" and len(slot.shape or ()) == 2:
                form = quantization.stored_form(stored_module, stored.tensors)
            if form is None:
                slots[full_name] = place
            else:
                slots |= _dequantizing(place, form, stored_module, names=stored.tensors or ())
    return slots


def _split(name: str, slot: WeightSlot) -> tuple[str, str]:
    """A slot's full name to its part of the model and the tensor within."""
    tensor = slot.tensor or name.rpartition(".")[2]
    return name.removesuffix(f".{tensor}"), tensor


def _dequantizing(
    slot: WeightSlot, form: WeightForm, module: str, *, names: Collection[str]
) -> dict[str, WeightSlot]:
    """Places for the tensors of a packed module that fill a plain slot once all of them are there.

    module: its name in the checkpoint, of which names are the tensors.
    """
    assert slot.shape is not None
    out_features, in_features = slot.shape
    scheme = form.make_scheme(linear_ref, num_experts=0)
    tensors = scheme.checkpoint_tensors(in_features, out_features, bias=False)
    tensors.pop("bias", None)  # the plain layer has a place for it, or none
    wanted = {
        name for name, tensor in tensors.items() if not tensor.is_optional or f"{module}.{name}" in names
    }
    part = _PackedPart(scheme, slot, missing=wanted)
    return {
        f"{module}.{name}": WeightSlot.of(tensor, partial(part.load, name), tensor=name)
        for name, tensor in tensors.items()
    }


class _PackedPart:
    """A packed layer of its own, on the CPU, from its first tensor until `slot` has its plain numbers."""

    def __init__(self, scheme: ExpertScheme, slot: WeightSlot, *, missing: set[str]) -> None:
        self._scheme, self._slot, self._missing = scheme, slot, missing
        self._layer: nn.Module | None = None

    def load(self, name: str, tensor: torch.Tensor) -> None:
        assert self._slot.shape is not None
        out_features, in_features = self._slot.shape
        if self._layer is None:
            self._layer = nn.Module()
            self._layer.in_features = in_features  # type: ignore[assignment]
            self._scheme.create_weights(
                self._layer,
                in_features=in_features,
                out_features=out_features,
                bias=False,
                device=torch.device("cpu"),
                dtype=torch.float32,
            )
        self._scheme.load(self._layer, name, tensor=tensor, first_row=0)
        self._missing.discard(name)
        if not self._missing:
            rows = self._scheme.dequantized_rows(self._layer, 0, out_features, dtype=torch.float32)
            self._layer = None
            self._slot.load(rows)
