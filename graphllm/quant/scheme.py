"""The contract between a linear layer and the way its weights are stored.

A layer may be several layers of the checkpoint in one (query, key and value): its rows are then loaded
part by part. A layer knows nothing of its scheme but this. Which layer has which scheme is decided above,
by `WeightForm`s: values that say how weights are stored, and can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from graphllm.errors import ConfigError
from graphllm.kernels.expert_activation import ExpertActivation
from graphllm.kernels.gated_activation import Activation
from graphllm.kernels.linear import LinearProduct
from graphllm.kernels.moe_sum import SharedPart
from graphllm.kernels.moe_tiles import RoutedTokens

PLAIN_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
"""What plain numbers may be stored as. Those of 8 bits mean nothing without scales."""


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """What a checkpoint's tensor has to be: its shape (None for any), what it may be stored as, and whether
    checkpoints may leave it out."""

    shape: tuple[int, ...] | None
    dtypes: frozenset[torch.dtype] = PLAIN_DTYPES
    is_optional: bool = False


def plain_tensors(in_features: int, out_features: int, *, bias: bool) -> dict[str, CheckpointTensor]:
    """Those of a layer that the checkpoint stores as it is multiplied."""
    tensors = {"weight": CheckpointTensor((out_features, in_features))}
    return tensors | ({"bias": CheckpointTensor((out_features,))} if bias else {})


class LinearScheme(Protocol):
    """y = x W^T + b, W stored in some form."""

    def create_weights(
        self,
        layer: nn.Module,
        *,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Register the layer's parameters, uninitialized and without gradients."""
        ...

    def checkpoint_tensors(
        self, in_features: int, out_features: int, *, bias: bool
    ) -> dict[str, CheckpointTensor]:
        """The checkpoint tensors that `out_features` rows are made of, by name ("weight").

        Raises CheckpointError for sizes that cannot be stored so.
        """
        ...

    def load(self, layer: nn.Module, name: str, *, tensor: torch.Tensor, first_row: int) -> None:
        """Store one checkpoint tensor, on the CPU, as the layer's rows from `first_row` onwards.

        Raises CheckpointError for contents that cannot be.
        """
        ...

    def finish(self, layer: nn.Module) -> None:
        """Do what is left to do after the last tensor."""
        ...

    def fill_random(self, layer: nn.Module, *, generator: torch.Generator, deviation: float) -> None:
        """Instead of loading: draw weights around 0 with about this standard deviation, where they lie."""
        ...

    def dequantized_rows(
        self, layer: nn.Module, first_row: int, num_rows: int, *, dtype: torch.dtype
    ) -> torch.Tensor:
        """Rows of the plain weight, [num_rows, in_features], for who cannot multiply them as they are."""
        ...

    def apply(self, layer: nn.Module, x: torch.Tensor, *, out: torch.Tensor) -> None:
        """Multiply into `out`.

        x: [num_tokens, in_features]; out: [num_tokens, out_features], contiguous, of x's dtype or float32.
        """
        ...

    def apply_gated(
        self, layer: nn.Module, x: torch.Tensor, activation: Activation, *, out: torch.Tensor
    ) -> bool:
        """For a layer of gates and then as many factors: the product and its activation in one kernel.

        out: [num_tokens, out_features / 2]. False, with nothing done, where two kernels are the better way.
        """
        ...


class ExpertScheme(LinearScheme, Protocol):
    """A LinearScheme that also multiplies stacks: the rows of all experts of a layer, expert after expert.

    A stack is created and loaded like a linear layer of as many rows as all its experts have together, so a
    scheme stores experts in whatever form it stores rows. `layer.num_experts` says how many they are.
    """

    def apply_experts_gated(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        routed: RoutedTokens,
        activation: ExpertActivation,
        *,
        out: torch.Tensor,
    ) -> None:
        """Each pair of a token and its expert through the expert's gates and factors.

        x: [num_tokens, in_features]. An expert's rows are its gates, then as many factors. out: [num_tokens *
        top_k, half of an expert's rows]; the rows of padding are left as they are.
        """
        ...

    def apply_experts(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        routed: RoutedTokens,
        shared: SharedPart | None,
        *,
        results: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """Each pair's row through its expert, and the weighted sum of a token's pairs and the shared part.

        x: [num_tokens * top_k, in_features]; out: [num_tokens, an expert's rows], which may be the shared
        output. results: memory for [num_tokens * top_k, an expert's rows] of x's dtype; needed with tiles.
        """
        ...


LEAST_CAPABILITY = (8, 0)
"""Of the cards that multiply any weights but plain ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceNeeds:
    """What multiplies weights of a form.

    capability: the least compute capability of a card, and why. instead: the nearest `--quantization` that
    runs where this one does not.
    """

    on_cpu: bool = True
    capability: tuple[int, int] = LEAST_CAPABILITY
    why: str = "bfloat16 matrix units"
    instead: str = "int8"

    def check(self, form: str, *, device_type: str, capability: tuple[int, int] | None) -> None:
        """Raises ConfigError, naming the form, where a device cannot run it.

        capability: the card's; None on a CPU.
        """
        nearest = f"The nearest that runs here is --quantization {self.instead}, of an unquantized version."
        if device_type == "cpu":
            if not self.on_cpu:
                raise ConfigError(f"Weights in {form} do not run on a CPU. {nearest}")
        elif capability is not None and capability < self.capability:
            if capability < LEAST_CAPABILITY:
                nearest = "The nearest that runs here is an unquantized version, as it is."
            least, found = (f"{major}.{minor}" for major, minor in (self.capability, capability))
            raise ConfigError(
                f"Weights in {form} need {self.why}, which cards have from compute capability {least}; "
                f"this one's is {found}. {nearest}"
            )


class WeightForm(Protocol):
    """How weights are stored: a value, equal to another where both are stored alike."""

    @property
    def name(self) -> str:
        """For people: "GPTQ, 4 bits in groups of 128"."""
        ...

    @property
    def devices(self) -> DeviceNeeds: ...

    @property
    def is_online(self) -> bool:
        """Whether plain numbers are loaded, and brought into the form on the way."""
        ...

    def make_scheme(self, plain: LinearProduct, *, num_experts: int) -> ExpertScheme:
        """What stores and multiplies such weights, for any number of layers of this form.

        plain: the product of what has to be made plain first. num_experts: of a stack; 0 for linear layers.
        """
        ...
