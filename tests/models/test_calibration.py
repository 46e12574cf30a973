"""How large a model's activations are: measured a layer at a time, and heeded where weights are rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphllm.attention.paged import PagedAttention
from graphllm.layers.linear import Linear
from graphllm.layers.moe import ExpertStack, MoE
from graphllm.models import calibration
from graphllm.models.calibration import MeasuredLinear, input_mean_squares
from graphllm.models.decoder import Decoder
from graphllm.models.quantization import read_quantization
from graphllm.models.registry import find_family, read_model_config
from graphllm.models.weights import load_model
from tests.models.memory_checkpoint import MemoryCheckpoint, as_checkpoint, tiny_llama
from tests.models.moe_families import MOE_FAMILIES
from tests.models.paged_model import BLOCK_SIZE, PagedModel

CPU = torch.device("cpu")
MAX_TOKENS = 24


def load(checkpoint: MemoryCheckpoint, *, quantization: str | None = None) -> tuple[Decoder, PagedModel]:
    backend = PagedAttention(block_size=BLOCK_SIZE)
    model = load_model(
        checkpoint, backend=backend, device=CPU, dtype=torch.float32, quantization=quantization
    )
    return model, PagedModel(model, backend)


def measured(checkpoint: MemoryCheckpoint) -> dict[str, Tensor]:
    config = read_model_config(checkpoint, find_family(checkpoint))
    quantization = read_quantization(checkpoint, asked="int4")
    return input_mean_squares(checkpoint, config, quantization=quantization)


def token_ids(vocab_size: int) -> list[int]:
    return ((torch.arange(MAX_TOKENS) * 2654435761) % vocab_size).tolist()


@pytest.fixture(autouse=True)
def _short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MAX_TOKENS", MAX_TOKENS)


def seen_by(model: Decoder, kind: type[nn.Module]) -> dict[str, list[Tensor]]:
    """The first input of every module of a kind, from when it is called next."""
    seen: dict[str, list[Tensor]] = {}
    for path, module in model.named_modules():
        if isinstance(module, kind):
            module.register_forward_pre_hook(
                lambda _, inputs, path=path: seen.setdefault(path, []).append(inputs[0].clone())
            )
    return seen


def test_mean_squares_are_those_of_the_whole_model() -> None:
    model = tiny_llama()
    checkpoint = as_checkpoint(model)
    plain, paged = load(checkpoint)
    seen = seen_by(plain, Linear)
    paged.step([(0, token_ids(97))])
    found = measured(checkpoint)
    assert found.keys() == {path for path in seen if path.startswith("layers.")}
    assert len(found) == 2 * 4
    for path, values in found.items():
        torch.testing.assert_close(values, torch.cat(seen[path]).square().mean(0), rtol=1e-4, atol=1e-6)


def test_experts_are_measured_and_their_router_is_not() -> None:
    cases = next(family for family in MOE_FAMILIES if family.architecture == "MixtralForCausalLM")
    checkpoint = as_checkpoint(cases.tiny(next(iter(cases.variants))))
    plain, paged = load(checkpoint)
    seen = seen_by(plain, MoE)
    paged.step([(0, token_ids(plain.config.vocab_size))])
    found = measured(checkpoint)
    assert not any("router" in path for path in found)
    for path, inputs in seen.items():
        mean = torch.cat(inputs).square().mean(0)
        torch.testing.assert_close(found[f"{path}.gate_up"], mean, rtol=1e-4, atol=1e-6)
        down = plain.get_submodule(f"{path}.down")
        assert isinstance(down, ExpertStack) and len(found[f"{path}.down"]) == down.in_features


def test_only_one_layer_has_weights_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Decoder] = []
    present: list[set[str]] = []

    class Watched(Decoder):
        def __init__(self, *arguments: Any, **keys: Any) -> None:
            super().__init__(*arguments, **keys)
            made.append(self)

    def apply(self: MeasuredLinear, layer: nn.Module, x: Tensor, *, out: Tensor) -> None:
        layers = [
            (path, module)
            for path, module in made[0].named_modules()
            if isinstance(module, Linear | ExpertStack)
        ]
        present.append({path for path, module in layers if not module.get_parameter("weight").is_meta})
        original(self, layer, x, out=out)

    original = MeasuredLinear.apply
    monkeypatch.setattr(calibration, "Decoder", Watched)
    monkeypatch.setattr(MeasuredLinear, "apply", apply)
    measured(as_checkpoint(tiny_llama()))
    assert len(present) == 8
    for number, paths in enumerate(present):
        assert {path.split(".")[1] for path in paths} == {str(number // 4)} and len(paths) == 4


def test_int4_heeds_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = as_checkpoint(tiny_llama(hidden_size=64, intermediate_size=96))
    mean_squares = measured(checkpoint)
    plain = load(checkpoint)[0]

    def cost(model: Decoder) -> float:
        """The mean square that rounding adds to a layer's outputs, by what its inputs were."""
        total = 0.0
        for path, squares in mean_squares.items():
            layer, exact = model.get_submodule(path), plain.get_submodule(path)
            assert isinstance(layer, Linear) and isinstance(exact, Linear)
            rows = layer.scheme.dequantized_rows(layer, 0, layer.out_features, dtype=torch.float32)
            total += float(((rows - exact.get_parameter("weight")).square() @ squares).sum())
        return total

    with_importance = load(checkpoint, quantization="int4")[0]
    assert not any(hasattr(module, "importance") for module in with_importance.modules())
    monkeypatch.setattr("graphllm.models.weights.input_mean_squares", lambda *_, **__: {})
    assert cost(with_importance) < 0.97 * cost(load(checkpoint, quantization="int4")[0])
