"""What keeps a module out of captured graphs is found without a card, and named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from graphllm.models.fallback_capture import find_obstacle

CPU = torch.device("cpu")
WEIGHT = torch.randn(11, 8, generator=torch.Generator().manual_seed(0))


class Module:
    """A step with state, so that what it keeps can be noticed."""

    def __init__(self, body: Callable[[Module, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.body = body
        self.kept: torch.Tensor | None = None
        self.num_steps = 0

    def __call__(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self.num_steps += 1
        return self.body(self, WEIGHT[token_ids], positions)


def obstacle(body: Callable[[Module, torch.Tensor, torch.Tensor], torch.Tensor]) -> str | None:
    return find_obstacle(Module(body), vocab_size=11, device=CPU)


def built_once(module: Module, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A table that the first step makes and later ones read."""
    if module.kept is None:
        module.kept = torch.arange(64.0).cos()
    return x * module.kept[positions][:, None]


def kept_for_the_next(module: Module, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    last, module.kept = module.kept, x * 2
    return x if last is None else x + last


@pytest.mark.parametrize(
    "body",
    [
        lambda module, x, positions: (x @ WEIGHT.T).softmax(-1),
        lambda module, x, positions: torch.where(positions[:, None] > 2, x, -x),
        lambda module, x, positions: torch.dropout(x, 0.1, train=False),
        lambda module, x, positions: x[torch.arange(3)] if x.shape[0] > 2 else x,
        built_once,
    ],
    ids=["products", "choices on the device", "idle dropout", "branches on sizes", "built once"],
)
def test_what_depends_on_sizes_alone_may_be_captured(
    body: Callable[[Module, torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    assert obstacle(body) is None


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda module, x, positions: x * positions[0].item(), "reads values of the device (aten.item"),
        (lambda module, x, positions: x if positions.sum() > 3 else -x, "reads values of the device"),
        (lambda module, x, positions: x[positions > 2], "reads values of the device (aten.index.Tensor)"),
        (lambda module, x, positions: x[positions.nonzero()], "reads values of the device (aten.nonzero"),
        (
            lambda module, x, positions: x[torch.where(positions > 2)],
            "reads values of the device (aten.where",
        ),
        (lambda module, x, positions: torch.rand_like(x), "draws random numbers"),
        (lambda module, x, positions: torch.dropout(x, 0.1, train=True), "draws random numbers"),
        (lambda module, x, positions: x * module.num_steps, "depends on the values (aten.mul.Tensor"),
        (
            lambda module, x, positions: x if module.num_steps < 3 else x.exp(),
            "what it does depends on the values",
        ),
        (kept_for_the_next, "keeps tensors from one step to the next (aten.add.Tensor)"),
    ],
)
def test_what_a_graph_would_get_wrong_is_named(
    body: Callable[[Module, torch.Tensor, torch.Tensor], torch.Tensor], reason: str
) -> None:
    found = obstacle(body)
    assert found is not None and reason in found
