"""Drives launchers as if a card were there, and writes down what they would have launched.

Owns the pretended card: tensors that say they are on a CUDA device and hold no memory, the answers that
torch gives about the device, and Triton's driver. Compiles nothing. For a process of its own: what it
replaces in Triton stays replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# Compute capability -> multiprocessors, of an A100, an H100 and a B200.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
CAPABILITIES = tuple(MULTIPROCESSORS)
FIRST_CAPABILITY_WITH_E4M3 = 89
FIRST_CAPABILITY_WITH_DEPENDENT_LAUNCH = 90


class CardTensor(torch.Tensor):
    """A tensor on torch's "meta" device that says it is on a card, at an address as aligned as there.

    Operations of torch on it give views or fail: a launcher that allocates does not get through.
    """

    is_cuda = True
    device = torch.device("cuda", 0)

    def data_ptr(self) -> int:
        # torch's allocations on a card begin at multiples of 512 bytes.
        return self.storage_offset() * self.element_size()


class _MemoryOfCard(TorchFunctionMode):
    """Allocations on "cuda" become card tensors; cuBLAS's products are no launches of ours."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.mm, torch.addmm) and isinstance(kwargs.get("out"), CardTensor):
            return kwargs["out"]
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "meta"
            return func(*args, **kwargs).as_subclass(CardTensor)
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Launch:
    """What Triton would compile for one launch; equal launches need one compilation."""

    kernel: JITFunction = field(compare=False)
    capability: int
    name: str
    configuration: str
    signature: dict[str, str] = field(compare=False)
    constexprs: dict[tuple[int, ...], Any] = field(compare=False)
    attributes: dict[tuple[int, ...], Any] = field(compare=False)
    options: dict[str, Any] = field(compare=False)


@dataclass(frozen=True)
class Card:
    """What a case may know of the card that it is run for."""

    capability: int

    @property
    def has_e4m3(self) -> bool:
        return self.capability >= FIRST_CAPABILITY_WITH_E4M3

    @property
    def num_multiprocessors(self) -> int:
        return MULTIPROCESSORS[self.capability]

    @property
    def device(self) -> torch.device:
        return CardTensor.device

    def tensor(self, *size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.tensor(*tensor.shape, dtype=tensor.dtype)


Case = Callable[[Card], None]


def record(cases: Iterable[Case], capabilities: Sequence[int] = CAPABILITIES) -> list[Launch]:
    """The distinct launches of all cases on all cards, in the order of their first appearance."""
    launches: dict[Launch, None] = {}
    all_cases = list(cases)
    for capability in capabilities:
        with _pretended_card(capability, launches):
            for case in all_cases:
                case(Card(capability))
    return list(launches)


@contextmanager
def _pretended_card(capability: int, launches: dict[Launch, None]) -> Iterator[None]:
    properties = SimpleNamespace(
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=MULTIPROCESSORS[capability],
        name=f"a card of compute capability {capability / 10}",
    )

    def write_down(
        kernel: JITFunction,
        key: object,
        signature: dict[str, str],
        device: int,
        constexprs: dict[tuple[int, ...], Any],
        options: Any,
        attrs: dict[tuple[int, ...], Any],
        warmup: bool,
    ) -> None:
        """Stands where Triton compiles; without a compiled kernel it then launches nothing."""
        launch = Launch(
            kernel=kernel,
            capability=capability,
            name=kernel.__name__,
            configuration=describe(
                kernel, signature, constexprs=constexprs, attributes=attrs, options=options
            ),
            signature=signature,
            constexprs=constexprs,
            attributes=attrs,
            options=dict(vars(options)),
        )
        launches.setdefault(launch)

    # Triton keeps what it knows of a kernel by device, so each card is a device of its own to it.
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: capability,
            get_current_stream=lambda device=None: 0,
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
        )
    )
    _forget_what_was_asked_of_the_device()
    with (
        mock.patch.object(JITFunction, "_do_compile", write_down),
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=divmod(capability, 10)),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        _MemoryOfCard(),
    ):
        yield
    _forget_what_was_asked_of_the_device()


def _forget_what_was_asked_of_the_device() -> None:
    """Empties the caches of all functions of the package: some hold a capability."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "graphllm":
            for value in list(vars(module).values()):
                if callable(clear := getattr(value, "cache_clear", None)):
                    clear()


def describe(
    kernel: JITFunction,
    signature: dict[str, str],
    *,
    constexprs: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], Any],
    options: Any,
) -> str:
    """A compilation in a line: the types of its arguments, its constants, its warps and stages.

    A pointer that is not known to be a multiple of 16 bytes has an apostrophe, for it costs vector loads.
    An integer that is specialized has an exclamation mark, for it costs a compilation a value. Dependent
    launch is left out: it follows from the card.
    """
    types: list[tuple[str, int]] = []
    constants: list[str] = []
    for index, parameter in enumerate(kernel.params):
        kind = signature[parameter.name]
        if (index,) in constexprs:
            if parameter.name != "PDL":
                mark = "" if parameter.is_constexpr or constexprs[index,] is None else "!"
                constants.append(f"{parameter.name}={_constant(constexprs[index,])}{mark}")
            continue
        is_divisible = bool(attributes.get((index,)))
        if kind.startswith("*"):
            kind += "" if is_divisible else "'"
        elif is_divisible:
            kind += "!"
        if types and types[-1][0] == kind:
            types[-1] = (kind, types[-1][1] + 1)
        else:
            types.append((kind, 1))
    arguments = " ".join(kind if count == 1 else f"{count}x{kind}" for kind, count in types)
    launch = [f"warps={options.num_warps}", f"stages={options.num_stages}"]
    if not options.enable_fp_fusion:
        launch.append("unfused")
    if options.maxnreg is not None:
        launch.append(f"maxnreg={options.maxnreg}")
    return "; ".join(part for part in (arguments, " ".join(constants), " ".join(launch)) if part)


def _constant(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
